"The sweeps of the DiT chapter: sizes, patches and conditionings on digits; DiT and U-Net on painted digits."

from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.experiments import best_precision, fit
from t2i_course.core.metrics import evaluate, frechet, judge_for, real_floor
from t2i_course.core.training import pick_device
from t2i_course.diffusion.ddpm import SIZES as UNET_SIZES, UNetConfig, drawer, text_unet
from t2i_course.diffusion.preconditioning import fit_skip
from t2i_course.transformer.dit import (
    Config,
    build,
    counted_macs,
    denoiser,
    macs,
    n_params,
    recipe_for,
    unseen_loss,
)

ROWS = ("painted",)  # measured with the recipe as it stands
MINI = dict(  # as the paper's four, small
    S=dict(width=32, depth=2, heads=2),
    B=dict(width=48, depth=3, heads=3),
    L=dict(width=64, depth=4, heads=4),
    XL=dict(width=80, depth=5, heads=5),
)
SIZES, PATCHES = tuple(MINI), (4, 2)
SWEEP = dict(  # training pictures on digits and on painted digits, drawings, steps, pictures to fit on
    smoke=dict(images=64, painted=64, n=16, steps=2, fit=512, sizes=("S",), patches=PATCHES),
    demo=dict(images=6_000, painted=5_000, n=160, steps=16, fit=8192, sizes=SIZES, patches=PATCHES),
    full=dict(images=500_000, painted=1_000_000, n=5_000, steps=50, fit=65_536, sizes=SIZES, patches=PATCHES),
)


def mini(
    config: Config,  # as from `recipe_for`
    size: str,  # S, B, L or XL
    patch: int,  # pixels on a side of a patch
    cond: str = "zero",  # how time and caption come in
) -> Config:
    "A small DiT without a closed form, and many small steps"
    small = dict(patch=patch, cond=cond, skip=False, n_layers=0, dim=32, batch=16, lr=3e-3, half_life=20_000)
    return config | MINI[size] | small


def score(
    den,  # a trained Denoiser
    tok,  # captions -> Cond
    data,  # single digits
    judge,  # reads the pictures
    real: Tensor,  # (m d) features of the training pictures
    n: int,  # drawings
    seed: int = 0,  # of their noise
    steps: int = 20,  # of the sampler
) -> dict:  # the numbers a sweep keeps
    "All captions in turn, no guidance, no fresh noise; the distance is to the training pictures"
    captions = [data.sayings[i % len(data.sayings)] for i in range(n)]
    draw = drawer(den, tok, data.shape, torch.linspace(1, 0, steps + 1), eta=0.0)
    x = draw(captions, seed).clamp(-1, 1)
    shown = judge.read(x)[data.attribute]
    right = sum(data.demands(c)[data.attribute] == s for c, s in zip(captions, shown.tolist())) / n
    return dict(fd=frechet(judge.features(x), real), obedience=right, loss=unseen_loss(den, tok, data))


@dataclass(kw_only=True)
class UNetBeside(Config, UNetConfig):
    "The recipe of the chapter, and the sizes of a U-Net"


def build_unet(
    config: UNetBeside,  # with the sizes of the U-Net
) -> tuple:  # tokenizer, Denoiser with a fresh network
    "The same model with the U-Net of the DDPM chapter in place of the transformer"
    tok, net = text_unet(config, config.skip)
    return tok, denoiser(config, tok, net)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "Sizes and patches, four ways of conditioning on digits; DiT and U-Net on painted digits"
    s, data, painted = SWEEP[scale], load("digits"), load("painted")
    judge, device = judge_for(data), pick_device()
    precision = best_precision()
    base, big = recipe_for(data, scale), recipe_for(painted, scale)
    size = "L" if "L" in s["sizes"] else "S"

    @cache
    def see(split):
        draws = Draws(0, torch.arange(len(data.labels[split])))
        return judge.features(data.batch(split, draws).x)

    def floor():  # captions come in turn: labels have nearly the same share in drawings and pictures
        parts = [data.batch(k, Draws(0, torch.arange(len(data.labels[k])))) for k in ("train", "test")]
        features = torch.cat([see("train"), see("test")])
        labels = torch.cat([b.attrs[data.attribute] for b in parts])
        return real_floor(features, s["n"], len(see("train")), labels)["fd_floor"]

    def setting():
        return dict(
            images=s["images"],
            painted_images=s["painted"],
            n=s["n"],
            steps=s["steps"],
            precision=precision,
            seeds=list(seeds),
            fd_floor=floor(),
            size=size,
        )

    fitted = {}

    def trained(build, config, data, seed, images=None, seconds=None):
        def started(config):
            tok, den = build(config)
            den.net.to(device)
            den.to(device)
            if den.skip is not None:  # painted digits only; fitted once
                if not fitted:
                    fitted.update(fit_skip(den, data, tok, s["fit"]).skip.tables)
                den.skip.tables = dict(fitted)
            return tok, den

        made = fit(started, config, data, images, seed, precision, seconds=seconds)
        about = made.about | dict(params=n_params(made.model.net), train_loss=made.about["loss"])
        return made.tok, made.model, about

    def digits_row(seed, *arm):
        tok, den, made = trained(build, mini(base, *arm), data, seed, s["images"])
        row = made | score(den, tok, data, judge, see("train"), s["n"], seed, s["steps"])
        return row | dict(macs=macs(den.net.net, base.max_len))

    def painted_row(recipe, seed, build, config, **budget):
        tok, den, made = trained(build, config, painted, seed, **budget)
        row = evaluate(den.painter(tok, config), painted, n=s["n"], seed=seed, n_heldout=s["n"] // 4)
        counted = counted_macs(den.net.net, den.net.encoder(den.null), painted.shape[1])
        return row | made | dict(nfe=den.calls(config), recipe=recipe, macs=counted)

    @lru_cache(1)  # its seconds are the budget of another arm
    def dit_row(start, seed):
        config = big | dict(skip=start, steps=s["steps"])
        return painted_row("dit", seed, build, config, images=s["painted"])

    def unet_row(recipe, start, seed, **budget):
        sizes = {k: UNET_SIZES[scale][k] for k in ("widths", "depths", "d_emb")}
        config = UNetBeside(**vars(big | dict(skip=start, steps=s["steps"])), **sizes)
        return painted_row(recipe, seed, build_unet, config, **budget)

    def unet_longer(start, seed):
        return unet_row("unet, equal seconds", start, seed, seconds=dit_row(start, seed)["train_seconds"])

    yield "setting", setting
    for seed in seeds:
        for patch in s["patches"]:
            for name in s["sizes"]:
                yield f"study.{name}.{patch}.seed{seed}", partial(digits_row, seed, name, patch)
        yield f"study.{size}.8.seed{seed}", partial(digits_row, seed, size, 8)
        for cond in ("adaln", "cross", "tokens"):
            yield f"ways.{cond}.seed{seed}", partial(digits_row, seed, size, 4, cond)
        for start, which in ((False, "plain"), (True, "skip")):
            yield f"painted.{which}.dit.seed{seed}", partial(dit_row, start, seed)
            yield (
                f"painted.{which}.unet.seed{seed}",
                partial(unet_row, "unet", start, seed, images=s["painted"]),
            )
            yield f"painted.{which}.unet_longer.seed{seed}", partial(unet_longer, start, seed)
