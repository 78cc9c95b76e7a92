"The sweeps of the preconditioning chapter: EDM, wrong sigma_data, Heun, the ladder of skips, held-out pairs."

import time
from functools import cache, lru_cache, partial

import torch

from t2i_course.core.counting import parameters
from t2i_course.core.data import Painted
from t2i_course.core.sources import load
from t2i_course.core.ema import train_arm
from t2i_course.core.experiments import best_precision, fit
from t2i_course.core.metrics import evaluate, judge_for, reference
from t2i_course.core.training import pick_device
from t2i_course.diffusion.ddpm import VP, drawer, eps, linear_betas, recipe_for, sample
from t2i_course.diffusion.preconditioning import CaptionGaussian, ScalarSkip, fit_skip, make_arm, word_groups
from t2i_course.diffusion.samplers import heun
from t2i_course.diffusion.schedules import EDM, edm_times, log_normal

SWEEP = dict(  # training pictures of three comparisons, drawings, pictures to fit on, steps, calls, rank
    smoke=dict(images=192, ladder=128, painted=64, n=16, fit=512, steps=3, nfe=(3,), rank=24),
    demo=dict(
        images=20_000,
        ladder=16_000,
        painted=10_000,
        n=400,
        fit=8192,
        steps=18,
        nfe=(5, 9, 19, 35),
        rank=144,
    ),
    full=dict(
        images=2_000_000,
        ladder=500_000,
        painted=1_000_000,
        n=10_000,
        fit=65_536,
        steps=18,
        nfe=(5, 9, 19, 35, 79),
        rank=256,
    ),
)
FACTORS = dict(right=1.0, quarter=0.25, double=2.0, four=4.0)  # on sigma_data; double is 1 in place of 0.5
SHIFT = 0.5  # mean of ln sigma in training, in place of EDM's -1.2
RUNGS = ("none", "scalar", "one", "mean", "caption")


class OneForAll(CaptionGaussian):
    "The same Gaussian whatever the caption says"

    def words(self, ids):
        return super().words(ids[:, :0])


def ladder(
    process,  # gives coefs(t)
    tok,  # captions -> Cond
    data,  # captioned pictures
    rank: int = 144,  # spatial directions with a variance of their own
) -> dict:  # name -> skip, not fitted
    "From knowing nothing to a Gaussian for every caption"
    groups = [[tok.index[w] for w in g] for g in word_groups(data)]
    return dict(
        none=None,
        scalar=ScalarSkip(process),
        one=OneForAll(process, len(tok), rank=rank),
        mean=CaptionGaussian(process, len(tok), rank=rank),
        caption=CaptionGaussian(process, len(tok), groups, rank=rank),
    )


def held_out_pairs(
    scale: str,  # smoke, demo or full
    seeds,  # of weights, data and start noise
    vp,  # the process
    steps: int,  # of the sampler
    precision: str,  # fp32 or bf16
):  # yields (key, make)
    "Painted digits, with all pairs of words in the closed form and with those of the strokes alone"
    s, data, device = SWEEP[scale], Painted(), pick_device()
    safer = dict(all_pairs=False, stroke_pairs=True)
    config, judge = recipe_for(data, scale) | dict(max_len=12), judge_for(data)

    @cache
    def fitted(name):
        tok, den = make_arm(config, vp)
        groups = ladder(vp, tok, data)["caption"].groups
        den.skip = CaptionGaussian(vp, len(tok), groups, rank=s["rank"], pairs_in_groups=safer[name])
        return fit_skip(den, data, tok, s["fit"]).skip

    def row(name, images, seed):
        tok, den = make_arm(config, vp, fitted(name), seed=seed)
        start = time.perf_counter()
        if images:
            train_arm(den, tok, data, config, images, seed, precision)
        made = dict(recipe=f"DDPM, {name}", images=images, train_seconds=time.perf_counter() - start)
        den.net.to(device)
        den.to(device)
        w = config.guidance if images else 1.0
        draw = drawer(den, tok, data.shape, torch.linspace(1, 0, steps + 1), w, hold=True, eta=0.0)
        made |= dict(params=parameters(den.net), nfe=steps * (2 if images else 1))
        return evaluate(draw, data, judge, s["n"], seed, s["n"]) | made

    for name in safer:
        for seed in seeds:
            yield f"alone.{name}.seed{seed}", partial(row, name, 0, seed)
            yield f"pairs.{name}.seed{seed}", partial(row, name, s["painted"], seed)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "EDM against DDPM, Heun against Euler, wrong sigma_data, the ladder of skips; held-out pairs"
    s, data = SWEEP[scale], load("digits")
    config, judge = recipe_for(data, scale) | dict(max_len=12), judge_for(data)
    device = pick_device()
    precision = best_precision()
    vp, edm, w, n = VP(linear_betas()), EDM(), config.guidance, s["n"]
    tok, _ = make_arm(config, vp)
    evaluations, n_ladder = 2 * s["steps"] - 1, 25 if scale != "smoke" else 3

    def line(n):
        return torch.linspace(1, 0, n + 1)

    @cache  # fitted once; every arm starts from them
    def rungs():
        _, den = make_arm(config, vp)
        found = ladder(vp, tok, data, s["rank"])
        for skip in found.values():
            den.skip = skip
            fit_skip(den, data, tok, s["fit"])
        return found

    def sigma():
        return rungs()["scalar"].tables["sigma_data"].item()

    def setting():
        return dict(
            images=s["images"],
            ladder_images=s["ladder"],
            painted_images=s["painted"],
            fit_images=s["fit"],
            n=n,
            evaluations=evaluations,
            ladder_steps=n_ladder,
            guidance=w,
            sigma_data=sigma(),
            shift=SHIFT,
            precision=precision,
            seeds=list(seeds),
            fd_floor=reference(data, judge, n)["floor"]["fd_floor"],
        )

    def measured(den, seed, ts, w=w, sampler=None):
        den.net.to(device)
        den.to(device)
        row = evaluate(drawer(den, tok, data.shape, ts, w, eta=0.0, sampler=sampler), data, judge, n, seed)
        calls = 2 * len(ts) - 3 if sampler is heun else len(ts) - 1
        return row | dict(nfe=calls * (1 if w == 1 else 2), guidance=w)

    def trained(name, images, seed, *args, **more):
        def build(config):
            return make_arm(config, *args, **more, seed=seed)

        made = fit(build, config, data, images, seed, precision)
        return made.model, made.about | dict(recipe=name)

    def ddpm_row(name, seed):
        skip = ScalarSkip(vp, sigma()) if name == "scalar" else None
        den, made = trained(f"DDPM, {name}", s["images"], seed, vp, skip, eps)
        return measured(den, seed, line(evaluations)) | made

    @lru_cache(1)  # the arm with the right sigma_data is drawn from in several ways
    def edm_arm(seed, factor, **density):
        skip, times = ScalarSkip(edm, factor * sigma()), log_normal(edm, **density)
        name = f"EDM, sigma_data {factor * sigma():.3f}"
        den, made = trained(name, s["images"], seed, edm, skip, times=times)
        return den, measured(den, seed, edm_times(s["steps"], edm), sampler=heun) | made

    def edm_row(*arm, **density):
        return edm_arm(*arm, **density)[1]

    def by_calls(seed, steps, sampler):
        den = edm_arm(seed, FACTORS["right"], mean=SHIFT)[0]
        return measured(den, seed, edm_times(steps, edm), 1.0, sampler)

    def before(name, seed):  # a fresh network says 0: what the Gaussian draws by itself
        return measured(make_arm(config, vp, rungs()[name])[1], seed, line(n_ladder))

    def rung(name, seed):
        den, made = trained(f"ladder, {name}", s["ladder"], seed, vp, rungs()[name])
        return measured(den, seed, line(n_ladder)) | made

    yield "setting", setting
    for seed in seeds:
        for name in ("ddpm", "scalar"):
            yield f"edm.{name}.seed{seed}", partial(ddpm_row, name, seed)
        yield f"edm.edm.seed{seed}", partial(edm_row, seed, 1.0)
        for name, factor in FACTORS.items():
            yield f"sigma_data.{name}.seed{seed}", partial(edm_row, seed, factor, mean=SHIFT)
            if name != "right":
                continue
            # the same arm in two comparisons
            yield f"edm.shifted.seed{seed}", partial(edm_row, seed, factor, mean=SHIFT)
            for nfe in s["nfe"]:
                for way, steps, sampler in (("euler", nfe, sample), ("heun", (nfe + 1) // 2, heun)):
                    yield f"nfe.{way}.{nfe}.seed{seed}", partial(by_calls, seed, steps, sampler)
        for name in RUNGS:
            if name not in ("none", "scalar"):
                yield f"before.{name}.seed{seed}", partial(before, name, seed)
            yield f"ladder.{name}.seed{seed}", partial(rung, name, seed)
    yield from held_out_pairs(scale, seeds, vp, n_ladder, precision)
