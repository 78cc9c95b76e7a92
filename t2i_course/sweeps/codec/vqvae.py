"""The sweep of the VQ-VAE chapter: grids and sizes of the codebook, beta, ways to learn the codebook."""

from functools import cache, lru_cache, partial

import torch

from t2i_course.codec.vqvae import blocked, build, inspect, recipe_for
from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import at_most, judge_for
from t2i_course.core.sources import load
from t2i_course.core.training import pick_device

SWEEP = dict(
    smoke=dict(images=128, painted=64, n=24),
    demo=dict(images=6_000, painted=10_000, n=400),
    full=dict(images=500_000, painted=1_000_000, n=2_000),
)

BETAS = (0.0, 0.05, 1.0, 4.0)  # beside the usual .25

BOOKS = dict(  # how the codebook learns, begins, and whether codes are restarted
    ema=dict(),
    gradient=dict(ema=None),
    ema_alone=dict(restart=0.0),
    gradient_alone=dict(ema=None, restart=0.0),
    ema_normal=dict(restart=0.0, start="normal"),
    ema_uniform=dict(restart=0.0, start="uniform"),
    gradient_normal=dict(ema=None, restart=0.0, start="normal"),
    gradient_uniform=dict(ema=None, restart=0.0, start="uniform"),
    normal_revived=dict(start="normal"),
)

THROUGH = dict(no=dict(), no_gradient=dict(ema=None))  # trained without the straight-through step

GRIDS = {"8x8": dict(widths=(32, 64)), "6x6": dict(widths=(32, 64), trim=1), "4x4": dict(widths=(32, 64, 96))}

BOOK_SIZES = (64, 512)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and restarts
):  # yields ('key.path', make), and make() gives the value
    "Grids and codebooks on painted digits; on digits beta, ways to learn the codebook, straight-through"
    s, painted, digits = SWEEP[scale], load("painted"), load("digits")
    precision, device = best_precision(), pick_device()
    judge, base = judge_for(painted), recipe_for(digits, scale)
    arms = {f"book.{name}": (own, False) for name, own in BOOKS.items()}
    arms |= {f"beta.{round(100 * b)}": (dict(beta=b), False) for b in BETAS}  # a point would end the key
    arms |= {f"through.{name}": (own, True) for name, own in THROUGH.items()}

    @cache
    def test():
        return {
            d.name: d.batch("test", Draws(3, torch.arange(at_most(d, s["n"])))).x.to(device)
            for d in (painted, digits)
        }

    def shared():
        variance = {k: v.var().item() for k, v in test().items()}
        return setting(s, seeds, painted, judge, variance=variance)

    @lru_cache(1)  # both keys of an arm ask for its model
    def trained(grid, k, seed):
        config = recipe_for(painted, scale) | GRIDS[grid] | dict(n_codes=k)
        return fit(build, config, painted, s["painted"], seed, precision)

    def codes(*arm):
        return inspect(trained(*arm).model.codec, test()["painted"])

    def row(grid, k, seed):
        name = f"vqvae.{grid}x{k}"
        return trained(grid, k, seed).row(painted, judge, s["n"], seed, s["n"] // 2, recipe=name)

    def on_digits(name, seed):
        own, without = arms[name]
        config = base | own
        change = blocked(config) if without else None
        return inspect(
            fit(build, config, digits, s["images"], seed, precision, change).model.codec, test()["digits"]
        )

    yield "setting", shared
    for seed in seeds:
        for grid in GRIDS:
            for k in BOOK_SIZES:
                yield f"grids.{grid}.{k}.seed{seed}", partial(codes, grid, k, seed)
                yield f"arms.{grid}.{k}.seed{seed}", partial(row, grid, k, seed)
        for name in arms:
            yield f"{name}.seed{seed}", partial(on_digits, name, seed)
