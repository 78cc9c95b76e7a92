"The sweeps of the likelihood chapter: weighting of the loss, bits of three targets, learned variance."

from functools import lru_cache, partial

import torch

from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import evaluate, judge_for
from t2i_course.diffusion.ddpm import Denoiser, build, drawer, recipe_for, times
from t2i_course.diffusion.likelihood import (
    bits_per_dim,
    bits_with,
    build_learned,
    three,
    varied,
    vlb_weight,
    weighted,
)
from t2i_course.diffusion.schedules import cosine_betas

# A seed of the demo scale trains on 240,000 pictures and calls the network 2.8 million times,
# to draw and to count bits: about 8 minutes on two cores
SWEEP = dict(
    smoke=dict(
        arm=320,  # training pictures of an arm
        images=192,  # of a network with a learned variance
        n=16,  # drawings of a row
        learned=(3, 4),  # steps with a learned variance
        look=4,  # pictures whose bits are counted
    ),
    demo=dict(arm=30_000, images=60_000, n=5000, learned=(5, 10, 25, 50), look=128),
    full=dict(arm=1_000_000, images=4_000_000, n=10_000, learned=(10, 25, 50, 100, 200, 400, 1000), look=360),
)
ARMS = dict(eps="eps", x0="x0", v="v", vlb="eps")  # what the network is asked for


def weighted_by_bound(
    den: Denoiser,  # on a VP process
):  # loss(x0, cond, draws) -> (b)
    "The loss with the bound's weights, divided by their mean so that the learning rate fits both"
    T = den.process.n_steps
    mean = vlb_weight(den.process, (torch.arange(T) + 0.5) / T).mean()
    return weighted(den, lambda t: vlb_weight(den.process, t) / mean)


def silenced(den):
    "Take the bound out of the loss"
    den.hybrid = 0.0


def unseen(
    data,  # captioned pictures
    tok,  # captions -> Cond
    n: int,  # pictures
    seed: int,  # of their choice and of their noise
) -> tuple:  # pictures, their captions, draws
    "Test pictures whose bits are counted"
    test = data.batch("test", Draws(seed, torch.arange(n)))
    return test.x, tok(test.captions), Draws(seed, torch.arange(len(test.x)))


def objectives(
    data,  # captioned pictures
    config,  # of the recipe
    s: dict,  # a row of SWEEP
    seed: int,
):  # yields (key, make)
    "Bits of every target; where the weighting is the question, drawings too"

    def objective(arm):
        loss = weighted_by_bound if arm == "vlb" else None
        made = fit(build, config | dict(target=ARMS[arm]), data, s["arm"], seed, loss=loss)
        bits = bits_per_dim(made.model, *unseen(data, made.tok, 2 * s["look"], seed)).mean().item()
        if ARMS[arm] != "eps":
            return dict(bits=bits)
        draw = drawer(made.model, made.tok, data.shape, times(config, 25), config.guidance)
        return dict(evaluate(draw, data, n=s["n"]), bits=bits)

    for arm in ARMS:
        yield f"objective.{arm}.seed{seed}", partial(objective, arm)


def learned_variances(
    data,  # captioned pictures
    config,  # of the recipe
    s: dict,  # a row of SWEEP
    seed: int,
):  # yields (key, make)
    "A network with a learned variance, one without, and what the fixed variances do to both"
    judge = judge_for(data)

    @lru_cache(1)  # all that is measured on a model follows it
    def trained(arm):
        change = silenced if arm == "simple" else None
        make = partial(build_learned, betas=cosine_betas())
        made = fit(make, config, data, s["images"], seed, best_precision(), change=change)
        return made.tok, made.model

    @lru_cache(1)
    def all_bits(arm, shares):
        tok, den = trained(arm)
        return bits_with(den, *unseen(data, tok, s["look"], seed), list(shares), 64)

    def bits(arm, shares, i):
        return all_bits(arm, shares)[i].mean().item()

    def drawn(arm, share, n):
        tok, den = trained(arm)
        sampler = partial(varied, share=share)
        draw = drawer(den, tok, data.shape, times(config, n), sampler=sampler, guide=three)
        o = evaluate(draw, data, judge, s["n"], seed)
        return {k: o[k] for k in ("fd", "precision", "recall")} | dict(obedience=o["obedience"]["all"])

    for arm in ("hybrid", "simple"):
        shares = dict(posterior=0.0, beta=1.0) | (dict(learned=None) if arm == "hybrid" else {})
        for i, name in enumerate(shares):
            yield f"bits.{arm}.{name}.seed{seed}", partial(bits, arm, tuple(shares.values()), i)
        for name, share in shares.items():
            for n in s["learned"]:
                yield f"learned.{arm}.{name}.{n}.seed{seed}", partial(drawn, arm, share, n)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "Which weight, which target, which variance"
    s, data = SWEEP[scale], load("digits")
    config = recipe_for(data, scale) | dict(max_len=12)
    yield "setting", partial(setting, s, seeds, data, base="target v, cosine betas", guidance=1.0)
    for seed in seeds:
        yield from objectives(data, config, s, seed)
        yield from learned_variances(data, config, s, seed)
