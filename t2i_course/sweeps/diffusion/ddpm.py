"The sweeps of the DDPM chapter on digits: target, weighting of the loss, variance of the sampler."

from functools import lru_cache, partial

import torch

from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.experiments import fit
from t2i_course.core.metrics import evaluate
from t2i_course.diffusion.ddpm import (
    Denoiser,
    bits_per_dim,
    build,
    drawer,
    eps,
    recipe_for,
    times,
    v,
    vlb_weight,
    weighted,
    x0,
)

ROWS = ("digits", "painted")  # measured with the recipe as it stands
SWEEP = dict(  # drawings, training pictures of an arm
    smoke=dict(n=32, images=320),
    demo=dict(n=400, images=30_000),
    full=dict(n=10_000, images=1_000_000),
)
ARMS = dict(eps=(eps, False), x0=(x0, False), v=(v, False), vlb=(eps, True))  # target, weighted by the bound?


def weighted_by_bound(
    den: Denoiser,  # on a VP process
):  # loss(x0, cond, draws) -> (b)
    "The loss with the bound's weights, divided by their mean so that the learning rate fits both"
    T = den.process.n_steps
    mean = vlb_weight(den.process, (torch.arange(T) + 0.5) / T).mean()
    return weighted(den, lambda t: vlb_weight(den.process, t) / mean)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # a run each
):  # yields (key, make), and make() gives the value
    "Every target and weighting; the first of them drawn with both variances"
    data = load("digits")
    n, images = (SWEEP[scale][k] for k in ("n", "images"))
    config = recipe_for(data, scale) | dict(max_len=12)

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(arm, seed):
        target, by_bound = ARMS[arm]

        def change(den):
            den.target = target

        made = fit(
            build, config, data, images, seed, change=change, loss=weighted_by_bound if by_bound else None
        )
        return made.tok, made.model

    def objective(arm, seed):
        tok, den = trained(arm, seed)
        draw = drawer(den, tok, data.shape, times(config, 25), config.guidance)
        test = data.batch("test", Draws(seed, torch.arange(min(n, 256))))
        bits = bits_per_dim(den, test.x, tok(test.captions), Draws(seed, torch.arange(len(test.x))))
        return dict(evaluate(draw, data, n=n), bits=bits.mean().item())

    def variance(large, n_steps, seed):
        tok, den = trained("eps", seed)
        draw = drawer(den, tok, data.shape, times(config, n_steps), large=large)
        return evaluate(draw, data, n=2 * n // 5)

    for seed in seeds:
        for arm in ARMS:
            yield f"objective.{arm}.seed{seed}", partial(objective, arm, seed)
            if arm != "eps":
                continue
            for n_steps in (50,) if scale == "smoke" else (50, 1000):
                for name, large in dict(posterior=False, beta=True).items():
                    yield f"variance.{name}.{n_steps}.seed{seed}", partial(variance, large, n_steps, seed)
