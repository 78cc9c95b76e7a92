"The sweeps of the samplers chapter: quality against calls, eta, spacing, inversion."

import math
from functools import cache, lru_cache, partial

import torch

from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.experiments import best_precision, fit
from t2i_course.core.metrics import evaluate, judge_for, reference
from t2i_course.diffusion.ddpm import build, drawer, guided, recipe_for, sample, v
from t2i_course.diffusion.samplers import (
    SAMPLERS,
    dpmpp_2m,
    heun,
    inversion_error,
    leading,
    rho_times,
    solver_errors,
    steps_for,
    uniform,
)

CALLS = (5, 8, 10, 15, 20, 50, 100)
SWEEP = dict(
    smoke=dict(
        images=192,  # of training
        n=16,  # drawings of a row
        nfe=(3, 5),  # calls of the network
        long=(6,),  # calls of the two samplers that may need them
        pictures=4,  # that are inverted
        invert=(3, 5),  # steps up, and as many down
    ),
    demo=dict(
        images=60_000,
        n=400,
        nfe=CALLS,
        long=(250, 1000),
        pictures=64,
        invert=(10, 20, 50, 100),
    ),
    full=dict(
        images=4_000_000,
        n=10_000,
        nfe=CALLS,
        long=(250, 1000),
        pictures=1000,
        invert=(10, 20, 50, 100, 200, 500),
    ),
)


def asked_for(den, target):
    "Change what the network is asked for"
    den.target = target


def base_sweep(
    base,  # base() -> tokenizer, trained Denoiser
    short,  # short(tok, den, sampler, ts) -> a short row
    data,  # captioned pictures
    s: dict,  # a row of SWEEP
    etas,  # numbers of steps of the sweep over eta
    fine: int,  # steps of the ODE's solution
    seed: int,  # of the noise
):  # yields (key, make)
    "Everything that is measured on one model: samplers, eta, spacing, inversion"

    def look(sampler, grid, n, **about):
        tok, den = base()
        return short(tok, den, sampler, grid(den.process, n)) | about

    for nfe in s["nfe"] + s["long"]:
        for name, sampler in SAMPLERS.items():
            if nfe in s["long"] and name not in ("ancestral", "ddim"):
                continue
            n = steps_for(sampler, nfe)
            calls = 2 * n - 1 if sampler is heun else n
            yield f"nfe.{name}.{nfe}", partial(look, sampler, uniform, n, steps=n, calls=calls)
    for n in etas:
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            yield f"eta.{n}.{int(100 * share)}", partial(look, partial(sample, eta=share), uniform, n)
    grids = dict(uniform=uniform, leading=leading, rho7=rho_times, log_snr=partial(rho_times, rho=math.inf))
    for name, grid in grids.items():
        for way in ("ddim", "heun", "dpmpp_2m"):
            yield f"spacing.{name}.{way}", partial(look, SAMPLERS[way], grid, steps_for(SAMPLERS[way], 10))
    yield from inversions(base, data, s, fine, seed)


def inversions(
    base,  # base() -> tokenizer, trained Denoiser
    data,  # captioned pictures
    s: dict,  # a row of SWEEP
    fine: int,  # steps of the ODE's solution
    seed: int,  # of pictures and noise
):  # yields (key, make)
    "How far samplers are from the ODE's solution, and how well pictures come back from their noise"

    @cache
    def test():
        b, (tok, _) = data.batch("test", Draws(seed, torch.arange(s["pictures"]))), base()
        return b.x, tok(b.captions)

    @cache
    def solved():
        (_, den), (_, cond) = base(), test()
        noise = Draws(seed, torch.arange(len(cond))).normal("start", *data.shape)
        return solver_errors(guided(den, cond), den.process, noise, s["nfe"], fine)

    def inverted(name, n):
        (tok, den), (x, cond) = base(), test()
        plain, loud, silent = guided(den, cond), guided(den, cond, 3.0), guided(den, tok([""] * len(cond)))
        up, rounds, down = dict(
            caption=(plain, 1, None),
            empty=(silent, 1, None),
            guided=(loud, 1, None),
            caption_4_rounds=(plain, 4, None),
            guided_down_only=(plain, 1, loud),
        )[name]
        off, std = inversion_error(up, den.process, x, n, rounds, down)
        return dict(rms=off, noise_std=std)

    for name in ("ddim", "heun", "dpmpp_2m"):
        yield f"solver.{name}", lambda name=name: solved()[name]
    for n in s["invert"]:
        for name in ("caption", "empty", "guided", "caption_4_rounds", "guided_down_only"):
            yield f"inversion.{name}.{n}", partial(inverted, name, n)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "Samplers against calls of the network, eta, spacing, inversion"
    s, data = SWEEP[scale], load("digits")
    judge, config = judge_for(data), recipe_for(data, scale) | dict(max_len=12)
    precision = best_precision()
    etas, fine = (s["nfe"][:1], 10) if scale == "smoke" else ((10, 50), 250)

    def row(seed, tok, den, sampler, ts):
        draw = drawer(den, tok, data.shape, ts, sampler=sampler)
        return evaluate(draw, data, judge, s["n"], seed)

    def short(*args):
        o = row(*args)
        return {k: o[k] for k in ("fd", "precision", "recall")} | dict(obedience=o["obedience"]["all"])

    def setting():
        floor = reference(data, judge, s["n"])["floor"]["fd_floor"]
        about = dict(images=s["images"], n=s["n"], precision=precision, seeds=list(seeds))
        return about | dict(guidance=1.0, base="target v, linear betas", fd_floor=floor)

    @lru_cache(1)  # all that is measured on a model follows it
    def trained(seed):
        return fit(build, config, data, s["images"], seed, precision, change=partial(asked_for, target=v))

    def base(seed):
        return trained(seed).tok, trained(seed).model

    def full_row(seed):
        made = trained(seed)
        drawn = row(seed, made.tok, made.model, dpmpp_2m, uniform(made.model.process, 20))
        return drawn | made.about | dict(recipe="ddpm, target v, dpmpp_2m", nfe=20)

    yield "setting", setting
    for seed in seeds:
        yield f"rows.seed{seed}", partial(full_row, seed)
        for key, make in base_sweep(partial(base, seed), partial(short, seed), data, s, etas, fine, seed):
            yield f"{key}.seed{seed}", make
