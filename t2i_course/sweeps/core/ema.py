"""The sweep of the EMA chapter: averaging against lowering the learning rate, at three learning rates on
a small denoiser, and with a recipe that draws digits."""

import math
from functools import lru_cache, partial

import torch
from torch import nn

from t2i_course.core.data import Draws, glyph_split, glyphs
from t2i_course.core.ema import EMA, state_for
from t2i_course.core.metrics import evaluate, judge_for, reference
from t2i_course.core.sources import load
from t2i_course.core.training import State, feed, train, warm_linear
from t2i_course.flow.flow_matching import QUICK, build, recipe_for

RATES = dict(low=1e-3, usual=4e-3, high=2e-2)  # `usual` is the default of State and of most recipes
SHARES = dict(h5=0.005, h20=0.02, h50=0.05, h100=0.1, h300=0.3)  # half-lives as shares of the run
SWEEP = dict(
    smoke=dict(lengths=(640,), n=40, images=320),
    demo=dict(lengths=(6_400, 25_600, 102_400), n=500, images=9_600),
    full=dict(lengths=(6_400, 25_600, 102_400, 409_600), n=5_000, images=96_000),
)
TOYS = 10  # seeds of the small denoiser, which trains in seconds


def flat(f):
    "Up within the first 5% as in warm_linear, and then it stays"
    return min(f / 0.05, 1.0)


SCHEDULES = dict(constant=flat, falling=warm_linear)


# ---- the small denoiser ----
@lru_cache(1)
def drawings() -> tuple:  # digits to learn from, digits that are never trained on
    g, _ = glyphs()
    return tuple(2 * g[glyph_split()[k]].flatten(1) - 1 for k in ("train", "test"))


def digits(draws):
    clean, _ = drawings()
    i = draws.choice("glyph", len(clean))
    return clean[i], i


@torch.no_grad()
def unseen_loss(net) -> float:
    x0 = drawings()[1].repeat(8, 1)
    noise = Draws(1, torch.arange(len(x0))).normal("eps", 64)
    return (net(x0 + 0.7 * noise) - x0).square().mean().item()


def toy(rate: str, schedule: str, images: int, seed: int) -> dict:
    "One run with six averages: the loss on unseen digits of the weights and of each average"
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64))
    state = State(net, lr=RATES[rate])
    emas = {k: EMA(net, share * images, math.inf) for k, share in SHARES.items()}
    emas["ramp"] = EMA(net, math.inf, 0.05)  # as recipes do: 5% of the images seen so far

    def loss(x0, cond, draws):
        return (net(x0 + 0.7 * draws.normal("eps", 64)) - x0).square().mean(1)

    out = {}
    for r in train(state, loss, digits, images=images, seed=seed, schedule=SCHEDULES[schedule]):
        for e in emas.values():
            e.update(net, len(r.draws), r.images)
        if r.images == images // 2:
            out["half"] = measured(net, dict(ramp=emas["ramp"]))
    return out | measured(net, emas)


def measured(net, emas: dict) -> dict:
    out = dict(raw=unseen_loss(net))
    for k, e in emas.items():
        with e.applied(net):
            out[k] = unseen_loss(net)
    return out


# ---- a recipe that draws ----
def recipe(schedule: str, scale: str, images: int, n: int, seed: int) -> dict:
    """Flow matching on digits, half-way and at the end: distance of the drawings made with the weights (raw)
    and with their average (ramp)"""
    data = load("digits")
    config = recipe_for(data, scale) | dict(skip=False)  # no closed form: the network has everything to learn
    if scale != "smoke":
        config |= {k: v for k, v in QUICK.items() if k != "fit_images"}
    torch.manual_seed(seed)
    tok, model = build(config)
    model.prepare(data, tok, config)
    state, out = state_for(model, config), {}
    batch, judge = config.batch, judge_for(data)

    def distance():
        row = evaluate(model.painter(tok, config), data, judge, n, seed, 0)
        return dict(fd=row["fd"], right=row["obedience"]["all"])

    records = train(
        state,
        model.loss,
        feed(data, tok),
        images=images,
        batch=batch,
        seed=seed,
        schedule=SCHEDULES[schedule],
    )
    for r in records:
        if r.images not in (images // 2, images):
            continue
        own = dict(raw=distance())
        with state.ema.applied(model.net):
            own["ramp"] = distance()
        out["half" if r.images < images else "end"] = own
    return out


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of the recipe; the small denoiser has TOYS of its own
):  # yields (key, make), and make() gives the value
    "Every learning rate, with and without a fall, at every length; then the recipe"
    s = SWEEP[scale]
    toys = range(TOYS if scale != "smoke" else 1)

    def setting():
        data = load("digits")
        floor = reference(data, judge_for(data), s["n"])["floor"]["fd_floor"]
        own = dict(rates=RATES, shares=SHARES, lengths=list(s["lengths"]), toys=list(toys))
        return own | dict(images=s["images"], n=s["n"], fd_floor=floor)

    yield "setting", setting
    for seed in toys:
        for images in s["lengths"]:
            for rate in RATES:
                for schedule in SCHEDULES:
                    key = f"toy.{rate}.{schedule}.{images}.seed{seed}"
                    yield key, partial(toy, rate, schedule, images, seed)
    for seed in seeds:
        for schedule in SCHEDULES:
            key = f"recipe.{schedule}.seed{seed}"
            yield key, partial(recipe, schedule, scale, s["images"], s["n"], seed)
