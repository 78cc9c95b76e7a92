"Rows of the diffusers pipeline, and what its autoencoder alone would get."

import time
from dataclasses import asdict
from functools import cache, partial

import torch

from t2i_course.codec.vae import psnr
from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.metrics import at_most, evaluate, judge_for, obedience
from t2i_course.scale.pipeline import TINY, Run, Settings, as_pipeline, make_parts, painter, train_vae

SWEEP = dict(
    smoke=dict(
        data=("digits", "painted"),
        n=24,
        draw=3,
        digits=TINY | dict(steps=2),
        painted=TINY | dict(steps=2, vae_images=64),
    ),
    demo=dict(
        data=("digits",),
        n=400,
        draw=12,
        digits=dict(steps=200, warmup=12, vae_images=3_000),
        painted=dict(steps=450, warmup=25, vae_images=12_000, vae_seen=0.1),
    ),
    full=dict(
        data=("digits", "painted"),
        n=2_000,
        draw=50,
        digits=dict(steps=20_000, warmup=500, vae_images=200_000),
        painted=dict(
            steps=100_000, warmup=1_000, vae_images=1_000_000, vae_widths=(64, 128, 256), widths=(128, 256)
        ),
    ),
)


def ours(
    name: str,  # digits or painted
    scale: str = "demo",  # smoke, demo or full
    seed: int = 0,
) -> Settings:
    "Small networks that begin from nothing want larger steps than a large network that is tuned"
    return Settings(**dict(lr=2e-3, schedule="linear", accumulate=4, seed=seed) | SWEEP[scale][name])


def fit(
    data,  # captioned pictures
    s: Settings,
    vae=None,  # a trained autoencoder; trained here when left out
    progress=None,  # called with each Record of the autoencoder and each Update
) -> Run:  # trained
    "Both stages"
    parts = make_parts(data, s)
    if vae:
        parts = parts._replace(vae=vae)
    else:
        train_vae(parts.vae, data, s, progress=progress)
    run = Run(parts, data, s)
    for u in run.train():
        if progress:
            progress(u)
    return run


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of text encoder, U-Net, order and noise; the autoencoder is shared
):  # yields ('key.path', make), and make() gives the value
    "The pipeline's rows, with what its autoencoder alone would get; no painted digits at demo scale"
    sweep = SWEEP[scale]
    worlds = {name: load(name) for name in sweep["data"]}
    sizes = {name: at_most(data, sweep["n"]) for name, data in worlds.items()}

    def setting():
        return dict(
            n=sweep["n"],
            steps=sweep["draw"],
            guidance=2.0,
            seeds=list(seeds),
            **{name: asdict(ours(name, scale)) for name in sweep["data"]},
        )

    @cache
    def autoencoder(name):
        s, start = ours(name, scale, seeds[0]), time.perf_counter()
        vae = make_parts(worlds[name], s).vae
        train_vae(vae, worlds[name], s)
        return vae, time.perf_counter() - start

    def codec(name):
        data, (vae, took) = worlds[name], autoencoder(name)
        x = data.batch("test", Draws(3, torch.arange(sizes[name])))
        with torch.no_grad():
            y = vae.decode(vae.encode(x.x.to(vae.device)).latent_dist.mean).sample.cpu()
        return dict(
            psnr=psnr(x.x, y.clamp(-1, 1)).mean().item(),
            params=parameters(vae),
            seconds=took,
            images=ours(name, scale).vae_images,
            obedience=obedience(judge_for(data), y.clamp(-1, 1), data, x.captions),
        )

    def row(name, seed):
        data, (vae, _), s = worlds[name], autoencoder(name), ours(name, scale, seed)
        run, n = fit(data, s, vae), sizes[name]
        with run.averaged() as parts:
            row = evaluate(painter(as_pipeline(parts), sweep["draw"]), data, judge_for(data), n, seed, n // 4)
        row |= dict(
            recipe=f"pipeline.{name}",
            params=parameters(run.net) + parameters(vae),
            train_seconds=run.progress.seconds,
        )
        return row | dict(images=s.steps * s.accumulate * s.batch, nfe=2 * sweep["draw"])

    yield "setting", setting
    for name in worlds:
        yield f"codec.{name}", partial(codec, name)
        for seed in seeds:
            yield f"arms.{name}.seed{seed}", partial(row, name, seed)
