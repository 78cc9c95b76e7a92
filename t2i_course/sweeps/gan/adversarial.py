"""The sweep of the chapter on adversarial training: gradients, rings, penalties, modes and settings."""

import math
from functools import partial

import torch

from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.ema import state_for
from t2i_course.core.experiments import best_precision, setting
from t2i_course.core.files import CourseError
from t2i_course.core.metrics import evaluate, load_judge
from t2i_course.core.sources import load
from t2i_course.core.training import feed, pick_device, train
from t2i_course.gan.adversarial import (
    KINDS,
    Stacked,
    ahead,
    build,
    covered,
    heap_counts,
    modes_of,
    points,
    recipe_for,
    train_ring,
)

GENTLE = dict(lr=3e-3, lr_disc=3e-3)  # the logistic loss without pairs does not survive the recipe's steps

PENALTIES = dict(  # StyleGAN2's loss
    none=GENTLE | dict(gamma=0.0), every1=GENTLE | dict(gamma=1.0), every16=GENTLE | dict(gamma=1.0, every=16)
)

SETTINGS = (  # factor on the recipe's learning rate, beta_1
    (1.0, 0.0),
    (0.25, 0.0),
    (4.0, 0.0),
    (1.0, 0.5),
    (1.0, 0.9),
)

RINGS = dict(  # name -> how the ring is trained; Adam's usual beta_1 is .9
    vanilla=dict(),
    r3=dict(loss="relativistic", gamma=0.1, fake_too=True),
    vanilla_half=dict(betas=(0.5, 0.999)),
    vanilla_slow=dict(lr=(5e-3, 5e-4)),
    r3_slow=dict(loss="relativistic", gamma=0.1, fake_too=True, lr=(5e-3, 5e-4)),
)


def fresh(
    config,  # as from `recipe_for`
    seed: int,  # of the weights
) -> tuple:  # config, tokenizer, GAN
    torch.manual_seed(seed)
    return config, *build(config)


def endured(
    model,  # a fresh GAN; ends with the averaged weights
    tok,  # captions -> Cond
    data,  # captioned pictures
    config: dict,  # as from `recipe_for`
    images: int,  # training pictures
    seed: int = 0,  # of data and noise
    precision: str = "fp32",
    clip: float = 1.0,  # largest norm of a gradient
) -> tuple:  # seconds a step; True where a loss became infinite and training stopped
    "Train one arm, also one that may not survive its setting"
    model.net.to(pick_device())
    model.to(pick_device())
    state = state_for(model, config, precision)
    stopped = False
    try:
        for r in train(
            state, model.loss, feed(data, tok), images=images, batch=config.batch, seed=seed, clip=clip
        ):
            pass
    except CourseError:
        stopped = True  # the average is that of the steps before
    model.net.load_state_dict(state.ema.shadow)
    return state.seconds / max(1, state.step), stopped


SWEEP = dict(
    smoke=dict(images=128, few=128, ring=6_400, ahead=4, n=24, stacked=64, settings=2),
    demo=dict(images=12_000, few=8_000, ring=153_600, ahead=60, n=400, stacked=3_000, settings=5),
    full=dict(images=1_000_000, few=500_000, ring=1_000_000, ahead=200, n=2_000, stacked=25_000, settings=5),
)


def _short(draw, data, judge, n: int, seed: int) -> dict:
    row = evaluate(draw, data, judge, n, seed, 0)
    return dict(fd=row["fd"], recall=row["recall"], obedience=row["obedience"]["all"])


def _toys(s: dict, data, scale: str, seed: int):
    def gradient():
        config, tok, gan = fresh(recipe_for(data, scale) | KINDS["vanilla"] | dict(lr_disc=2e-3), seed)
        return ahead(gan, tok, data, s["ahead"], seed=seed)

    def ring(how):
        x = points(train_ring(how, s["ring"], seed))
        counts = heap_counts(x)
        return dict(
            counts=counts.tolist(), covered=covered(counts, len(x)), good=counts.sum().item() / len(x)
        )

    yield f"gradient.seed{seed}", gradient
    for name, how in RINGS.items():
        yield f"ring.{name}.seed{seed}", partial(ring, how)


def _penalties(s: dict, data, judge, scale: str, seed: int, precision: str):
    def penalty(change):
        config, tok, gan = fresh(recipe_for(data, scale) | KINDS["r1"] | change, seed)
        took, stopped = endured(gan, tok, data, config, s["images"], seed, precision, clip=math.inf)
        return _short(gan.painter(tok, config), data, judge, s["n"], seed) | dict(
            seconds_per_step=took, stopped=stopped
        )

    def r3():
        config, tok, gan = fresh(recipe_for(data, scale), seed)
        took, _ = endured(gan, tok, data, config, s["images"], seed, precision)
        row = evaluate(gan.painter(tok, config), data, judge, s["n"], seed)
        return row | dict(
            recipe="adversarial",
            params=parameters(gan.artist),
            images=s["images"],
            train_seconds=took * s["images"] / config.batch,
            nfe=1,
        )

    for name, change in PENALTIES.items():
        yield f"penalty.{name}.seed{seed}", partial(penalty, change)
    yield f"arms.r3.seed{seed}", r3


def _modes(s: dict, judge, scale: str, seed: int, precision: str):
    data, n = Stacked(), s["stacked"]

    def real():
        b = data.batch("test", Draws(seed, torch.arange(n)))
        return dict(modes=len(modes_of(b.x, judge).unique()), true=len(b.attrs["mode"].unique()))

    def modes(name):
        config, tok, gan = fresh(recipe_for(data, scale) | KINDS[name] | dict(n_layers=0), seed)
        endured(gan, tok, data, config, s["images"], seed, precision)
        draw = gan.painter(tok, config)
        return dict(modes=len(modes_of(draw([data.caption] * n, seed).clamp(-1, 1), judge).unique()))

    yield f"stacked.real.seed{seed}", real
    for name in ("vanilla", "r3"):
        yield f"stacked.{name}.seed{seed}", partial(modes, name)


def _settings(s: dict, data, judge, scale: str, seed: int, precision: str):
    usual = recipe_for(data, scale)

    def row(name, factor, beta):
        rates = dict(lr=factor * usual.lr, lr_disc=factor * usual.lr_disc, betas_gan=[beta, 0.99])
        config, tok, gan = fresh(usual | KINDS[name] | rates, seed)
        _, stopped = endured(gan, tok, data, config, s["few"], seed, precision)
        return _short(gan.painter(tok, config), data, judge, s["n"], seed) | dict(
            factor=factor, beta=beta, stopped=stopped
        )

    for i, (factor, beta) in enumerate(SETTINGS[: s["settings"]]):
        for name in ("vanilla", "r3"):
            yield f"settings.{name}.{i}.seed{seed}", partial(row, name, factor, beta)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and noise
):  # yields ('key.path', make), and make() gives the value
    "Gradients, rings, penalties, modes and settings, on points and on digits"
    s, data = SWEEP[scale], load("digits")
    judge, precision = load_judge("digits"), best_precision()
    settings = [list(v) for v in SETTINGS[: s["settings"]]]
    yield "setting", partial(setting, s, seeds, data, judge, settings=settings)
    for seed in seeds:
        yield from _toys(s, data, scale, seed)
        yield from _penalties(s, data, judge, scale, seed, precision)
        yield from _modes(s, judge, scale, seed, precision)
        yield from _settings(s, data, judge, scale, seed, precision)
