"The sweep of the preconditioning chapter: from DDPM to EDM with one change a row."

from functools import cache, lru_cache, partial

import torch

from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import evaluate, judge_for
from t2i_course.core.sources import load
from t2i_course.diffusion.ddpm import VP, drawer, eps, linear_betas, recipe_for, sample, uniform_times
from t2i_course.diffusion.preconditioning import ScalarSkip, fit_skip, make_arm
from t2i_course.diffusion.samplers import heun
from t2i_course.diffusion.schedules import EDM, edm_times, log_normal

SWEEP = dict(  # training pictures, drawings, pictures that sigma_data is measured on, Heun's steps
    smoke=dict(images=192, n=16, fit=512, steps=3),
    demo=dict(images=12_000, n=5_000, fit=8192, steps=9),
    full=dict(images=2_000_000, n=10_000, fit=65_536, steps=18),
)
SHIFT = 0.5  # mean of ln sigma in training, in place of EDM's -1.2
CHANGES = dict(  # what each row changes beside the row above it
    ddpm=dict(target="the noise", process="VP", density="DDPM's", levels="even in t", sampler="Euler"),
    skip=dict(target="EDM's"),
    process=dict(process="EDM"),
    density=dict(density="EDM's"),
    levels=dict(levels="EDM's"),
    heun=dict(sampler="Heun"),
    shifted=dict(density="shifted"),
)


def rows() -> dict:  # name -> every choice of this row
    "The ladder, written out: each row is the one above it with one change"
    out, now = {}, {}
    for name, change in CHANGES.items():
        now = now | change
        out[name] = now
    return out


def same_levels(
    vp,  # the process of DDPM
    edm,  # the process of EDM
    t,  # (n) times of DDPM's
):  # (n) times of EDM's with the same ratio of noise to signal, at most 1
    "DDPM's noise levels on EDM's clock"
    c = vp.coefs(t)
    return edm.time(c.sigma.double() / c.alpha.double()).clamp(1e-5, 1)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "The ladder from DDPM to EDM, drawn without guidance and without fresh noise"
    s, data = SWEEP[scale], load("digits")
    config, judge = recipe_for(data, scale) | dict(max_len=12), judge_for(data)
    vp, edm, precision = VP(linear_betas()), EDM(), best_precision()
    calls = 2 * s["steps"] - 1

    @cache
    def sigma():
        tok, den = make_arm(config, vp, ScalarSkip(vp))
        return fit_skip(den, data, tok, s["fit"]).skip.tables["sigma_data"].item()

    def about():
        more = dict(calls=calls, guidance=1.0, eta=0.0, sigma_data=sigma(), shift=SHIFT, changes=CHANGES)
        return setting(s, seeds, data, judge, **more)

    def times_of(how, process):
        if how["density"] == "DDPM's":
            return (
                uniform_times if process is vp else lambda d: same_levels(vp, edm, uniform_times(d)).float()
            )
        return log_normal(process, **(dict(mean=SHIFT) if how["density"] == "shifted" else {}))

    @lru_cache(1)  # rows that differ in drawing alone follow each other
    def trained(target, process, density, seed):
        process = vp if process == "VP" else edm
        skip = ScalarSkip(process, sigma()) if target == "EDM's" else None
        times = times_of(dict(density=density), process)

        def build(config):
            return make_arm(config, process, skip, eps, times, seed)

        return fit(build, config, data, s["images"], seed, precision)

    def levels_of(how, process):
        n = s["steps"] if how["sampler"] == "Heun" else calls
        if how["levels"] == "EDM's":
            return edm_times(n, process)
        even = torch.linspace(1, 0, n + 1)
        return even if process is vp else torch.cat([same_levels(vp, edm, even[:-1]), even[-1:].double()])

    def row(name, how, seed):
        made = trained(how["target"], how["process"], how["density"], seed)
        den, sampler = made.model, heun if how["sampler"] == "Heun" else sample
        draw = drawer(den, made.tok, data.shape, levels_of(how, den.process), eta=0.0, sampler=sampler)
        return evaluate(draw, data, judge, s["n"], seed) | made.about | dict(nfe=calls, recipe=name)

    yield "setting", about
    for seed in seeds:
        for name, how in rows().items():
            yield f"ladder.{name}.seed{seed}", partial(row, name, how, seed)
