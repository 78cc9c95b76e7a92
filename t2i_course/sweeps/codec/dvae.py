"""The sweep of the dVAE chapter: temperature, KL weight, soft against hard codes, transformers."""

import time
from functools import partial
import torch
from t2i_course.codec.dvae import KINDS, build, inspect, recipe_for
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import train_arm
from t2i_course.core.metrics import at_most, evaluate, judge_for, reference
from t2i_course.core.training import has_bf16


def fit(
    data,  # captioned pictures
    config: dict,  # as from `recipe_for`
    images: int,  # training pictures
    seed: int = 0,  # of weights and noise
    precision: str = "fp32",
) -> tuple:  # tokenizer, trained VQModel, seconds
    "Train one codec"
    torch.manual_seed(seed)
    tok, model = build(config | dict(anneal=min(config["anneal"], int(0.75 * images))))
    start = time.perf_counter()
    train_arm(model, tok, data, config, images, seed, precision)
    model.codec.eval()
    return tok, model, time.perf_counter() - start


BARE = dict(kind="vit", n_codes=256, restart=0.0, start="normal")  # nothing keeps codes alive

ARMS = dict(  # name -> what differs from the recipe
    dvae=dict(),
    beta0=dict(beta=0.0),
    beta20=dict(beta=0.02),
    beta80=dict(beta=0.08),
    warm=dict(last=1.0),
    mild=dict(last=0.25),
    cold=dict(anneal=1),
    vq=dict(kind="conv"),
    vit=dict(kind="vit"),
    short_unit=BARE,
    short=BARE | dict(unit=False),
    wide_unit=BARE | dict(dim=64),
    wide=BARE | dict(dim=64, unit=False),
)

SWEEP = dict(
    smoke=dict(images=128, painted=64, n=24),
    demo=dict(images=5_000, painted=8_000, n=400),
    full=dict(images=500_000, painted=1_000_000, n=5_000),
)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1),  # of weights and noise
):  # yields (key, make), and make() gives the value
    "On digits temperature, KL weight, quantiser and network; on painted digits a row of each kind"
    s, digits, painted = SWEEP[scale], load("digits"), load("painted")
    precision, judge = "bf16" if has_bf16() else "fp32", judge_for(painted)

    def test(data, n):
        return data.batch("test", Draws(3, torch.arange(n))).x

    unseen = partial(test, digits, at_most(digits, s["n"]))

    def setting():
        return dict(
            s,
            precision=precision,
            variance=unseen().var().item(),
            fd_floor=reference(painted, judge, s["n"])["fd_floor"],
        )

    def on_digits(name, seed):
        tok, model, took = fit(digits, recipe_for(digits, scale) | ARMS[name], s["images"], seed, precision)
        params = sum(p.numel() for p in model.net.parameters())
        return inspect(model.codec, unseen()) | dict(params=params, images=s["images"], train_seconds=took)

    def on_painted(kind, seed):
        config = recipe_for(painted, scale) | dict(kind=kind)
        tok, model, took = fit(painted, config, s["painted"], seed, precision)
        row = evaluate(model.painter(tok, config), painted, judge, s["n"], seed, s["n"] // 2)
        about = dict(
            recipe=f"dvae.{kind}",
            params=sum(p.numel() for p in model.net.parameters()),
            images=s["painted"],
            train_seconds=took,
            nfe=1,
        )
        return row | about | inspect(model.codec, test(painted, s["n"]))

    yield "setting", setting
    for seed in seeds:
        for name in ARMS:
            yield f"arms.{name}.{seed}", partial(on_digits, name, seed)
        for kind in KINDS:
            yield f"painted.{kind}.{seed}", partial(on_painted, kind, seed)
