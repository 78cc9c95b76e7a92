"""The sweep of the dVAE chapter: temperature, KL weight, soft against hard codes, transformers."""

from functools import partial

import torch

from t2i_course.codec.dvae import KINDS, build, inspect, recipe_for
from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import at_most, judge_for
from t2i_course.core.sources import load

BARE = dict(kind="vit", n_codes=256, restart=0.0, start="normal")  # nothing keeps codes alive

ARMS = dict(  # name -> what differs from the recipe
    dvae=dict(),
    beta0=dict(beta=0.0),
    beta20=dict(beta=0.02),
    beta80=dict(beta=0.08),
    warm=dict(last=1.0),
    mild=dict(last=0.25),
    cold=dict(anneal=1e-6),
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
    seeds=(0, 1, 2),  # of weights and noise
):  # yields (key, make), and make() gives the value
    "On digits temperature, KL weight, quantiser and network; on painted digits a row of each kind"
    s, digits, painted = SWEEP[scale], load("digits"), load("painted")
    precision, judge = best_precision(), judge_for(painted)

    def test(data, n):
        return data.batch("test", Draws(3, torch.arange(n))).x

    unseen = partial(test, digits, at_most(digits, s["n"]))

    def shared():
        return setting(s, seeds, painted, judge, variance=unseen().var().item())

    def on_digits(name, seed):
        arm = fit(build, recipe_for(digits, scale) | ARMS[name], digits, s["images"], seed, precision)
        about = {k: arm.about[k] for k in ("params", "images", "train_seconds")}
        return inspect(arm.model.codec.eval(), unseen()) | about

    def on_painted(kind, seed):
        config = recipe_for(painted, scale) | dict(kind=kind)
        arm = fit(build, config, painted, s["painted"], seed, precision)
        row = arm.row(painted, judge, s["n"], seed, s["n"] // 2, recipe=f"dvae.{kind}")
        return row | inspect(arm.model.codec.eval(), test(painted, s["n"]))

    yield "setting", shared
    for seed in seeds:
        for name in ARMS:
            yield f"arms.{name}.{seed}", partial(on_digits, name, seed)
        for kind in KINDS:
            yield f"painted.{kind}.{seed}", partial(on_painted, kind, seed)
