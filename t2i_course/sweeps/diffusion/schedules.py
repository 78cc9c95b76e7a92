"The sweeps of the schedules chapter: each schedule, without its first steps, and drawn on another's steps."

from functools import lru_cache, partial

import torch
from torch import Tensor

from t2i_course.core.data import Painted
from t2i_course.core.sources import load
from t2i_course.core.experiments import best_precision, fit
from t2i_course.core.metrics import evaluate, load_judge, reference
from t2i_course.diffusion.ddpm import drawer, recipe_for
from t2i_course.diffusion.schedules import make_arm, schedules, walk

SWEEP = dict(  # training pictures, drawings, steps of the sampler; where a drawing begins; few and many steps
    smoke=dict(digits=320, painted=160, n=24, steps=6, starts=(1.0, 0.8), few=(3,)),
    demo=dict(digits=20_000, painted=30_000, n=400, steps=50, starts=(1.0, 0.9, 0.8, 0.7, 0.6), few=(10, 50)),
    full=dict(
        digits=1_000_000, painted=4_000_000, n=1_000, steps=50, starts=(1.0, 0.9, 0.8, 0.7, 0.6), few=(10, 50)
    ),
)
ARMS = dict(digits=("linear", "cosine", "sigmoid", "sigmoid beta"), painted=("linear", "cosine"))


class RedOnBlack(Painted):
    "Painted digits of 32 pixels in one colour: what is left to learn in a short training is their shape"

    name, source = "painted, red on black", Painted.source + "; red on black alone"

    def attrs(self, split, draws):
        g, a = super().attrs(split, draws)
        return g, a | {k: torch.zeros_like(a[k]) for k in ("ink", "paper")}


def measured(
    den,  # a trained Denoiser
    tok,  # captions -> Cond
    data,  # captioned pictures
    judge,  # reads the pictures
    ts: Tensor,  # times of the steps
    n: int,  # drawings
    seed: int,  # of the noise
    w: float = 1.0,  # guidance scale
    eta: float = 1.0,  # share of fresh noise
) -> dict:  # a row of the protocol
    "Draw along these times and measure"
    row = evaluate(drawer(den, tok, data.shape, ts, w, eta=eta), data, judge, n, seed, 0)
    return row | dict(nfe=(len(ts) - 1) * (1 if w == 1 else 2), w=w, eta=eta)


def short(
    row: dict,  # as from `measured`
) -> dict:
    "The main numbers of a row"
    return dict(obedience=row["obedience"]["all"], **{k: row[k] for k in ("fd", "recall", "precision")})


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "The same network on each schedule; linear and cosine without first steps, and on each other's"
    s, processes = SWEEP[scale], schedules()
    precision = best_precision()
    worlds = dict(
        digits=(load("digits"), load_judge("digits")),
        painted=(RedOnBlack(), load_judge("painted")),
    )

    def setting():
        def floor(data, judge):
            return reference(data, judge, s["n"])["floor"]["fd_floor"]

        return dict(
            images={k: s[k] for k in worlds},
            n=s["n"],
            steps=s["steps"],
            w=1.0,
            target="v",
            eta=1.0,
            precision=precision,
            seeds=list(seeds),
            fd_floor={world: floor(*pair) for world, pair in worlds.items()},
        )

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(world, name, seed):
        data, judge = worlds[world]
        config = recipe_for(data, scale) | dict(max_len=12)
        made = fit(partial(make_arm, process=processes[name]), config, data, s[world], seed, precision)
        draw = partial(measured, made.model, made.tok, data, judge, n=s["n"], seed=seed)
        return made.model.process, draw, made.about

    @lru_cache(1)
    def whole(*arm):  # all steps
        process, draw, _ = trained(*arm)
        return draw(walk(process, process, s["steps"]))

    def row(world, name, seed):
        arm = (world, name, seed)
        return whole(*arm) | dict(recipe=f"ddpm, v, {name}") | trained(*arm)[2]

    def skipped(start, n, *arm):  # the steps before `start` left out
        process, draw, _ = trained(*arm)
        row = whole(*arm) if start == 1 else draw(walk(process, process, n, start))
        return short(row) | dict(start=start, steps=n)

    def crossed(other, n, *arm):
        process, draw, _ = trained(*arm)
        steps = walk(process, process if other == arm[1] else processes[other], n)
        return short(draw(steps, eta=0.0)) | dict(steps=n)

    def more(key, seed, *arm):  # of one model on digits
        yield f"skip.{key}.100.seed{seed}", partial(skipped, 1.0, s["steps"], *arm)
        for start in s["starts"][1:]:  # in place of the steps left out, none or as many new ones
            for kind, n in dict(skip=round(s["steps"] * start), same=s["steps"]).items():
                yield f"{kind}.{key}.{round(100 * start)}.seed{seed}", partial(skipped, start, n, *arm)
        for other in ("linear", "cosine", "EDM"):
            for n in s["few"]:
                yield f"cross.{key}.{other}.{n}.seed{seed}", partial(crossed, other, n, *arm)

    yield "setting", setting
    for seed in seeds:
        for world in worlds:
            for name in ARMS[world]:
                key, arm = name.replace(" ", "_"), (world, name, seed)
                yield f"arms.{world}.{key}.seed{seed}", partial(row, *arm)
                if world == "digits" and name in ("linear", "cosine"):
                    yield from more(key, seed, *arm)
