"""The sweep of the KL autoencoder's chapter: its four losses, each taken away in turn, on painted digits."""

from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from t2i_course.codec.vae import (
    VAE,
    Perceptual,
    active_units,
    fit_whitened,
    kl_to_normal,
    psnr,
    recipe_for,
    reparameterise,
)
from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, setting
from t2i_course.core.metrics import load_judge, obedience, train_judge
from t2i_course.core.sources import load
from t2i_course.core.training import pick_device

SWEEP = dict(
    smoke=dict(images=96, n=24, reader=3),
    demo=dict(images=6_000, n=400, reader=200),
    full=dict(images=2_000_000, n=2_000, reader=1500),
)

ARMS = dict(  # what differs from the recipe
    all=dict(),
    no_kl=dict(kl=0.0),
    no_perceptual=dict(perceptual=0.0),
    no_adversarial=dict(adversarial=0.0),
    error_only=dict(kl=0.0, perceptual=0.0, adversarial=0.0),
    strong_kl=dict(kl=1e-2),
)


@torch.no_grad()
def examine(
    codec: VAE,  # a trained one
    x: Tensor,  # (n c h w) unseen pictures
    seen: Perceptual,  # measures, whatever the codec was trained with
    draws: Draws,  # the noise of the posterior
) -> dict:
    "What a codec does to pictures, and what its latents are like"
    z = codec.encode(x)
    (mean, logvar), noise = z.chunk(2, 1), draws.normal("posterior", z.shape[1] // 2, *z.shape[2:])
    x0 = codec.sample(z, noise)
    y = codec.decode(x0).clamp(-1, 1)
    edge = lambda v: v.diff(dim=2).abs().mean() + v.diff(dim=3).abs().mean()
    raw = reparameterise(mean, logvar, noise).std((0, 2, 3))
    return dict(
        psnr=psnr(x, y).mean().item(),
        seen=seen(x, y).mean().item(),
        sharpness=(edge(y) / edge(x)).item(),
        raw_std=raw.tolist(),
        std=x0.std((0, 2, 3)).tolist(),
        noise_std=(logvar / 2).exp().mean().item(),
        kl=kl_to_normal(mean, logvar).flatten(1).sum(1).mean().item(),
        active=active_units(mean),
    )


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and noise
):  # yields ('key.path', make), and make() gives the value
    "Each loss taken away in turn, on painted digits; read by the judge and by a reader that took no part"
    s, data, judge = SWEEP[scale], load("painted"), load_judge("painted")
    precision = best_precision()

    @cache
    def reader():
        return train_judge(data, s["reader"], seed=1, width=0.5)

    @cache
    def test():
        return data.batch("test", Draws(3, torch.arange(s["n"])))[:2]

    def shared():
        x, captions = test()
        judges = dict(judge=judge, reader=reader())
        read = {k: obedience(j, x, data, captions)["all"] for k, j in judges.items()}
        return setting(s, seeds, data, judge) | read

    @lru_cache(1)  # both keys of an arm ask for its model
    def trained(name, seed):
        return fit_whitened(data, recipe_for(data, scale) | ARMS[name], s["images"], seed, precision)

    def losses(name, seed):
        codec, device, (x, captions) = trained(name, seed).model.codec, pick_device(), test()
        with torch.no_grad():
            y = codec(x.to(device)).cpu().clamp(-1, 1)
        noise = Draws(seed, torch.arange(len(x)), device)
        own = examine(codec, x.to(device), Perceptual(judge).to(device), noise)
        judges = dict(judge=judge, reader=reader())
        return own | {k: obedience(j, y, data, captions)["all"] for k, j in judges.items()}

    def row(name, seed):
        arm = trained(name, seed)
        params = parameters(arm.model.codec)
        return arm.row(data, judge, s["n"], seed, s["n"] // 2, recipe=f"vae.{name}", params=params)

    yield "setting", shared
    for seed in seeds:
        for name in ARMS:
            yield f"losses.{name}.seed{seed}", partial(losses, name, seed)
            yield f"arms.{name}.seed{seed}", partial(row, name, seed)
