"""The sweep of the VQ-VAE-2 chapter: two levels, two with fine codes hidden at times, one of equal bits."""

import math
import time
from functools import lru_cache, partial
import torch
from t2i_course.codec.vqvae import VQVAE
from t2i_course.codec.vqvae2 import CodesModel, make_codec, measure, recipe_for, said_where
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.sources import load
from t2i_course.core.ema import train_arm
from t2i_course.core.metrics import at_most, evaluate, judge_for, reference
from t2i_course.core.training import has_bf16, pick_device


def one_level(
    config: dict,  # as from `recipe_for`
) -> VQVAE:
    "A single grid, as fine as the finer of the two: K such that h w log2 K equals the bits of both levels"
    c, (a, b) = config, config["n_codes"]
    k = round(2 ** (math.log2(a) / 4 + math.log2(b)))
    widths = (c["widths"][0], int(1.25 * c["widths"][1]))  # and about as many weights
    return VQVAE(c["shape"][0], widths, k, c["dim"], 2 * c["depth"]).to(memory_format=torch.channels_last)


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
    seeds=(0, 1),  # of weights and data
):  # yields ('key.path', make), and make() gives the value
    "Two levels, two levels with the fine codes hidden now and then, and one level with equal bits"
    s, data = SWEEP[scale], load("painted")
    judge, precision = judge_for(data), "bf16" if has_bf16(pick_device()) else "fp32"
    config = recipe_for(data, scale)

    def setting():
        return dict(
            s,
            precision=precision,
            seeds=list(seeds),
            n_codes=list(config["n_codes"]),
            fd_floor=reference(data, judge, at_most(data, s["n"]))["fd_floor"],
        )

    @lru_cache(1)  # both keys of an arm ask for its model
    def trained(name, seed):
        torch.manual_seed(seed)
        start, model = time.perf_counter(), CodesModel(arms()[name](config))
        tok = WordTokenizer(config["words"], config["max_len"])
        train_arm(model, tok, data, config, s["images"], seed, precision)
        return tok, model, time.perf_counter() - start

    def row(name, seed):
        tok, model, took = trained(name, seed)
        row = evaluate(model.painter(tok, config), data, judge, s["n"], seed, s["n"] // 2) | measure(
            model.codec, data, s["n"]
        )
        row |= dict(
            recipe=f"vqvae2.{name}", params=sum(p.numel() for p in model.net.parameters()), images=s["images"]
        )
        return row | dict(train_seconds=took, nfe=1)

    def where(name, seed):
        return said_where(trained(name, seed)[1].codec, data, judge, s["n"], s["read"])

    yield "setting", setting
    for seed in seeds:
        for name in arms():
            yield f"arms.{name}.seed{seed}", partial(row, name, seed)
            if name != "one":
                yield f"where.{name}.seed{seed}", partial(where, name, seed)
