"""The sweep of the chapter on StyleGAN2: path length regularisation, truncation, growing, style mixing."""

import time
from functools import lru_cache, partial
import torch
from t2i_course.core.conditioning import Cond
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import train_arm
from t2i_course.core.metrics import at_most, evaluate, frechet, load_judge, reference
from t2i_course.core.training import has_bf16, pick_device
from t2i_course.gan.stylegan2 import Large, Tinted, build, followers, path_lengths, recipe_for, smaller


# after the perceptual path length of arXiv:1812.04948, section 4.1
@torch.no_grad()
def smoothness(
    gen,  # a StyleGenerator
    cond: Cond,  # (b)
    draws: Draws,  # two z for each picture
    features,  # features(x) -> (b d)
    steps: int = 8,  # of the way from one w to the other
) -> (
    dict
):  # ppl: mean squared step times steps^2; detour: the same over the squared distance of the ends, at least 1
    "How far a drawing travels while w goes straight; a detour of 1 is an even and straight way"
    a, b = (gen.w(draws.normal(k, gen.z_dim), cond) for k in ("from", "to"))
    f = torch.stack(
        [features(gen.synthesis(gen.spread(torch.lerp(a, b, k / steps)))) for k in range(steps + 1)]
    )
    ppl = (f[1:] - f[:-1]).square().sum(2).mean(0) * steps**2
    return dict(
        ppl=ppl.mean().item(),
        detour=(ppl.mean() / (f[-1] - f[0]).square().sum(1).mean().clamp_min(1e-9)).item(),
    )


def path_spread(
    gen,  # a StyleGenerator
    cond: Cond,  # (b)
    draws: Draws,  # z and y of each picture
    shape,  # (c h w)
    n_y: int = 8,  # pictures y for each w: what is left then is the difference between one w and another
) -> dict:  # mean of ||J^T y||, and its standard deviation over the w, in units of the mean
    "Is a step in w a step of the same size everywhere?"
    ws, noise = gen.ws(draws.normal("z", gen.z_dim), cond).detach(), gen.synthesis.noise(draws)
    v = torch.stack(
        [path_lengths(gen.synthesis, ws, noise, draws.normal(f"y{k}", *shape)).detach() for k in range(n_y)]
    )
    v = v.square().mean(0).sqrt()
    return dict(length=v.mean().item(), spread=(v.std() / v.mean()).item())


SWEEP = dict(
    smoke=dict(images=128, grown=128, tinted=128, n=24, psi=(0.5, 1.0)),
    demo=dict(images=10_000, grown=8_000, tinted=14_000, n=400, psi=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)),
    full=dict(
        images=2_000_000,
        grown=1_000_000,
        tinted=1_000_000,
        n=2_000,
        psi=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    ),
)


def fit(
    data,  # captioned pictures
    scale: str,  # smoke, demo or full
    images: int,  # training pictures
    seed: int = 0,  # of weights, data and noise
    precision: str = "fp32",
    **change,  # entries of the recipe
) -> tuple:  # tokenizer, StyleGAN, config, seconds
    "Train one arm"
    torch.manual_seed(seed)
    config = recipe_for(data, scale) | change
    tok, gan = build(config)
    start = time.perf_counter()
    train_arm(gan, tok, data, config, images, seed, precision)
    return tok, gan, config, time.perf_counter() - start


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1),  # of weights, data and noise
):  # yields ('key.path', make), and make() gives the value
    "Path length regularisation, truncation, growing, style mixing"
    s, data, judge = SWEEP[scale], load("digits"), load_judge("digits")
    precision, n, large = "bf16" if has_bf16(pick_device()) else "fp32", s["n"], Large()
    small, arms = lambda x: judge.features(smaller(x)), dict(path=recipe_for(data, scale)["path"], none=0.0)

    def setting():
        fd_floor = reference(data, judge, at_most(data, n))["fd_floor"]
        return dict(s, psi=list(s["psi"]), precision=precision, seeds=list(seeds), fd_floor=fd_floor)

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(arm, seed):
        return fit(data, scale, s["images"], seed, precision, path=arms[arm])

    def row(arm, seed):
        tok, gan, config, took = trained(arm, seed)
        row = evaluate(gan.painter(tok, config), data, judge, n, seed)
        row |= dict(recipe=f"stylegan2.{arm}", params=sum(p.numel() for p in gan.artist.parameters()), nfe=1)
        return row | dict(images=s["images"], train_seconds=took)

    def path(arm, seed):
        tok, gan, _, _ = trained(arm, seed)
        draws = Draws(seed, torch.arange(n))
        cond = tok(data.batch("test", draws).captions)
        smooth = smoothness(gan.artist, cond, draws, judge.features)
        return path_spread(gan.artist, cond, draws, data.shape) | smooth

    def truncation(centre, seed):
        tok, gan, config, _ = trained("path", seed)
        curve = []
        for psi in s["psi"]:
            row = evaluate(
                gan.painter(tok, config | dict(truncation=psi, centre=centre)), data, judge, n, seed
            )
            curve.append(
                {k: row[k] for k in ("fd", "precision", "recall")} | dict(obedience=row["obedience"]["all"])
            )
        return curve

    def growing(grow, seed):
        b, other = (large.batch("test", Draws(seed, torch.arange(i, i + n))) for i in (0, n))
        tok, gan, config, took = fit(large, scale, s["grown"], seed, precision, grow=grow)
        x = gan.painter(tok, config)(b.captions, seed)
        shown = judge.read(smaller(x))["digit"]
        return dict(
            fd=frechet(small(x), small(other.x)),
            seconds=took,
            digit=(shown == b.attrs["digit"]).double().mean().item(),
        )

    def mixing(seed):
        tint = Tinted()
        tok, gan, config, took = fit(tint, scale, s["tinted"], seed, precision)
        return followers(gan.artist, tint, judge, tok, n, seed)

    yield "setting", setting
    for seed in seeds:
        for arm in arms:
            yield f"arms.{arm}.seed{seed}", partial(row, arm, seed)
            yield f"path.{arm}.seed{seed}", partial(path, arm, seed)
            for centre in ("all", "caption") if arm == "path" else ():
                yield f"truncation.{centre}.seed{seed}", partial(truncation, centre, seed)
        for arm, grow in dict(direct=0, growing=s["grown"]).items():
            yield f"growing.{arm}.seed{seed}", partial(growing, grow, seed)
        yield f"mixing.seed{seed}", partial(mixing, seed)
