"The sweep of the chapter on the U-Net: the recipe with its parts changed, one at a time."

from functools import cache, partial

from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import judge_for
from t2i_course.core.sources import load
from t2i_course.diffusion.preconditioning import fit_skip
from t2i_course.diffusion.unet import build, recipe_for

SWEEP = dict(  # training pictures, drawings
    smoke=dict(images=64, n=16),
    demo=dict(images=30_000, n=1_000),
    full=dict(images=1_000_000, n=5_000),
)
ARMS = dict(  # what is changed in the recipe
    base={},
    no_self_attention=dict(look=False),
    scale_shift=dict(scale_shift=True),
    gelu=dict(gated=False),
)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "Painted digits, around the closed form"
    s, data, precision = SWEEP[scale], load("painted"), best_precision()
    config, judge = recipe_for(data, scale), judge_for(data)

    @cache
    def tables():  # of the closed form; all arms share them
        tok, den = build(config)
        return fit_skip(den, data, tok, config.fit_images).skip.tables

    def started(config):
        tok, den = build(config)
        den.skip.tables = tables()
        return tok, den

    def row(arm, seed):
        made = fit(started, config | ARMS[arm], data, s["images"], seed, precision)
        return made.row(data, judge, s["n"], seed, recipe=arm)

    yield "setting", partial(setting, s, seeds, data, judge)
    for seed in seeds:
        for arm in ARMS:
            yield f"arms.{arm}.seed{seed}", partial(row, arm, seed)
