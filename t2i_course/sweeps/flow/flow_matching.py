"The sweeps of the flow matching chapter: paths, times, skip, frame, guidance, and plain flow matching."

from functools import cache, lru_cache, partial

import torch

from t2i_course.core.data import Painted
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.core.experiments import best_precision, fit
from t2i_course.core.metrics import evaluate, load_judge, reference
from t2i_course.diffusion.ddpm import VP, drawer, linear_betas, uniform_times
from t2i_course.diffusion.preconditioning import fit_skip
from t2i_course.flow.flow_matching import ETA, build, logit_normal, mode_times, recipe_for

ROWS = ("painted",)  # measured with the recipe as it stands
GUIDANCE = ((1.0, 0.0), (2.0, 0.0), (2.0, 0.2), (4.0, 0.0), (4.0, 0.2))
SWEEP = dict(  # training pictures, drawings, drawings of digits, calls, guidance scales and where they begin
    smoke=dict(images=256, n=12, digits=12, nfe=(2, 4), guidance=GUIDANCE[:3]),
    demo=dict(images=14_000, n=400, digits=5_000, nfe=(2, 4, 8, 16, 32), guidance=GUIDANCE),
    full=dict(images=4_000_000, n=5_000, digits=5_000, nfe=(1, 2, 4, 8, 16, 32, 64), guidance=GUIDANCE),
)
WAYS = dict(  # of drawing with one and the same model
    plain=dict(),
    guided=dict(w=2.0),
    interval=dict(w=2.0, below=0.8),
    boosted=dict(w=2.0, boost=1.5),
    noisy=dict(w=2.0, eta=0.5),
    all=dict(w=2.0, below=0.8, boost=1.5, eta=0.5),
)


class Unframed:
    "A skip that shows the network red, green and blue instead of the caption's own colour directions"

    def __init__(self, skip):
        self.skip = skip

    def to(self, device):
        self.skip.to(device)

    def __call__(self, x_t, t, cond):
        g = self.skip(x_t, t, cond)
        seen = torch.einsum("bij,bkjhw->bkihw", g.frame, g.inputs.unflatten(1, (3, -1))).flatten(1, 2)
        frame = torch.eye(x_t.shape[1], device=x_t.device).expand_as(g.frame)
        return g._replace(frame=frame, inputs=seen)


def arms(
    curve,  # process of the arm 'vp'
) -> dict:  # name -> the one thing that differs from the start
    "Every comparison of the chapter"
    return dict(
        base=dict(),
        uniform=dict(times=uniform_times),
        lognormal0=dict(times=logit_normal(0.0)),
        mode=dict(times=mode_times()),
        vp=dict(times=uniform_times, process=curve),
        none=dict(skip=False),
        unframed=dict(framed=False),
    )


def make_arm(
    config,  # as from `recipe_for`
    tables: dict,  # of a fitted skip, shared by all arms
    seed: int = 0,  # of the weights
    skip: bool = True,  # start from the closed form
    framed: bool = True,  # in the caption's own colour directions
    process=None,  # another path than the line
    times=None,  # another density of t than the config's
) -> tuple:  # tokenizer, Denoiser
    "A fresh model of one arm of a comparison"
    torch.manual_seed(seed)
    tok, den = build(config | dict(skip=skip))
    den.process, den.times = process or den.process, times or den.times
    if skip:
        den.skip.tables, den.skip.process = tables, den.process
        if not framed:
            den.skip = Unframed(den.skip)
    return tok, den


def measure(
    den,  # a trained Denoiser
    tok,  # captions -> Cond
    data,  # captioned pictures
    judge,  # reads the pictures
    n: int,  # drawings
    seed: int,  # of the start noise
    steps: int = 16,  # of the sampler
    held: int = 0,  # drawings of held-out captions
    **how,  # arguments of `drawer`
) -> dict:  # the numbers a sweep keeps
    "A short row of the protocol"
    line = torch.linspace(1, 0, steps + 1)
    draw = drawer(den, tok, data.shape, line, **dict(hold=True, eta=ETA) | how)
    row = evaluate(draw, data, judge, n, seed, held)
    kept = {k: row[k] for k in ("fd", "recall")}
    kept |= dict(obedience=row["obedience"]["all"], digit=row["obedience"]["digit"])
    return kept | dict(heldout=row.get("heldout", {}).get("all"))


def controls(
    scale: str,  # smoke, demo or full
    images: int,  # training pictures of an arm
    n,  # drawings, by data set
    seeds,  # of weights, data and start noise
    precision: str,  # fp32 or bf16
):  # yields ('control.data.arm.seed', make)
    "The same network on the same pictures, with the closed form and without (plain flow matching)"

    @lru_cache(1)  # the ways of drawing follow their model
    def trained(name, arm, seed):
        data, judge = load(name), load_judge(name)
        config = recipe_for(data, scale)

        def started(config):
            tok, den = build(config | dict(skip=arm == "skip"))
            return tok, fit_skip(den, data, tok, config.fit_images)

        made = fit(started, config, data, images, seed, precision)
        floor = reference(data, judge, n[name])["floor"]["fd_floor"]
        one = partial(measure, made.model, made.tok, data, judge, n[name], seed, held=n[name] // 2, above=0.2)
        return config, one, dict(loss=made.about["loss"], images=images, fd_floor=floor)

    def control(*arm):
        config, one, about = trained(*arm)
        return one(w=config.guidance) | about

    def way(how, *arm):
        _, one, about = trained(*arm)
        return one(**how) | about

    for name in ("digits", "mnist", "painted"):
        try:
            load(name)
        except CourseError:
            continue  # MNIST is not on this machine
        for seed in seeds:
            for arm in ("skip", "plain"):
                yield f"control.{name}.{arm}.{seed}", partial(control, name, arm, seed)
                for k, how in WAYS.items() if arm == "skip" else ():
                    yield f"ways.{name}.{k}.{seed}", partial(way, how, name, arm, seed)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "Paths at few steps, densities of t, what skip, frame and guidance interval are worth"
    s, data = SWEEP[scale], Painted()
    start = dict(t_mean=-0.3, t_std=1.4, pairs_in_groups=False)  # of every arm
    config = recipe_for(data, scale) | dict(max_len=12) | start
    judge, precision = load_judge("painted"), best_precision()
    changes = arms(VP(linear_betas()))

    @cache
    def tables():
        tok, den = build(config)
        return fit_skip(den, data, tok, config.fit_images).skip.tables

    def setting():
        floor = reference(data, judge, s["n"])["floor"]["fd_floor"]
        about = dict(
            images=s["images"], n=s["n"], digits=s["digits"], steps=config.steps, precision=precision
        )
        return about | dict(pairs_in_groups=False, seeds=list(seeds), fd_floor=floor)

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(name, seed):
        start = partial(make_arm, tables=tables(), seed=seed, **changes[name])
        made = fit(start, config, data, s["images"], seed, precision)
        return partial(measure, made.model, made.tok, data, judge, s["n"], seed), made.about["loss"]

    def arm(name, seed):
        one, loss = trained(name, seed)
        return one(held=s["n"] // 2, w=2.0, above=0.2) | dict(loss=loss)

    def path(name, seed):
        return [trained(name, seed)[0](k) for k in s["nfe"]]

    def guided(seed):
        one = trained("base", seed)[0]
        return [one(held=s["n"] // 2, w=w, above=a) for w, a in s["guidance"]]

    yield "setting", setting
    yield "nfe", lambda: list(s["nfe"])
    yield "guidance", lambda: [list(g) for g in s["guidance"]]
    for seed in seeds:
        for name in changes:
            yield f"arms.{name}.{seed}", partial(arm, name, seed)
            if name in ("uniform", "vp"):
                yield f"paths.{name}.{seed}", partial(path, name, seed)
            if name == "base":
                yield f"guided.{seed}", partial(guided, seed)
    n = dict.fromkeys(("painted", "mnist"), s["n"]) | dict(digits=s["digits"])
    yield from controls(scale, s["images"], n, seeds, precision)
