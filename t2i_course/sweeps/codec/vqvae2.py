"""The sweep of the VQ-VAE-2 chapter: two levels, two with fine codes hidden at times, one of equal bits."""

import math
from functools import lru_cache, partial

import torch

from t2i_course.codec.vqvae import VQVAE, VQModel
from t2i_course.codec.vqvae2 import make_codec, measure, recipe_for, said_where
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import judge_for
from t2i_course.core.sources import load


def one_level(
    config,  # as from `recipe_for`
) -> VQVAE:
    "A single grid, as fine as the finer of the two: K such that h w log2 K equals the bits of both levels"
    c, (a, b) = config, config.n_codes
    k = round(2 ** (math.log2(a) / 4 + math.log2(b)))
    widths = (c.widths[0], int(1.25 * c.widths[1]))  # and about as many weights
    return VQVAE(c.shape[0], widths, k, c.dim, 2 * c.depth).to(memory_format=torch.channels_last)


SWEEP = dict(
    smoke=dict(images=320, n=24, read=200),
    demo=dict(images=12_000, n=400, read=4_000),
    full=dict(images=2_000_000, n=2_000, read=20_000),
)


def arms() -> dict:  # name -> config -> codec
    "What is compared"
    return dict(two=make_codec, hidden=lambda c: make_codec(c | dict(hide=0.5)), one=one_level)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights and data
):  # yields ('key.path', make), and make() gives the value
    "Two levels, two levels with the fine codes hidden now and then, and one level with equal bits"
    s, data = SWEEP[scale], load("painted")
    judge, precision, config = judge_for(data), best_precision(), recipe_for(data, scale)

    def build(name, config):
        return WordTokenizer(config.words, config.max_len), VQModel(arms()[name](config))

    @lru_cache(1)  # both keys of an arm ask for its model
    def trained(name, seed):
        return fit(partial(build, name), config, data, s["images"], seed, precision)

    def row(name, seed):
        arm = trained(name, seed)
        row = arm.row(data, judge, s["n"], seed, s["n"] // 2, recipe=f"vqvae2.{name}")
        return row | measure(arm.model.codec, data, s["n"])

    def where(name, seed):
        return said_where(trained(name, seed).model.codec, data, judge, s["n"], s["read"])

    yield "setting", partial(setting, s, seeds, data, judge, n_codes=list(config.n_codes))
    for seed in seeds:
        for name in arms():
            yield f"arms.{name}.seed{seed}", partial(row, name, seed)
            if name != "one":
                yield f"where.{name}.seed{seed}", partial(where, name, seed)
