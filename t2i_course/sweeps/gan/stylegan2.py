"""The sweep of the chapter on StyleGAN2: path length regularisation, truncation, growing, style mixing."""

from functools import lru_cache, partial

import torch

from t2i_course.core.conditioning import Cond
from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import evaluate, frechet, load_judge
from t2i_course.core.sources import load
from t2i_course.gan.stylegan2 import Large, Tinted, build, followers, path_lengths, recipe_for, smaller


# after the perceptual path length of arXiv:1812.04948, section 4.1
@torch.no_grad()
def smoothness(
    gen,  # a StyleGenerator
    cond: Cond,  # (b)
    draws: Draws,  # two z for each picture
    features,  # features(x) -> (b d)
    steps: int = 8,  # of the way from one w to the other
) -> dict:
    # ppl: mean squared step times steps^2; detour: the same over the squared distance of the ends, at least 1
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


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and noise
):  # yields ('key.path', make), and make() gives the value
    "Path length regularisation, truncation, growing, style mixing"
    s, data, judge = SWEEP[scale], load("digits"), load_judge("digits")
    precision, n, large = best_precision(), s["n"], Large()
    small, arms = lambda x: judge.features(smaller(x)), dict(path=recipe_for(data, scale).path, none=0.0)

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(arm, seed):
        config = recipe_for(data, scale) | dict(path=arms[arm])
        return fit(build, config, data, s["images"], seed, precision)

    def row(name, seed):
        arm = trained(name, seed)
        params = parameters(arm.model.artist)
        return arm.row(data, judge, n, seed, recipe=f"stylegan2.{name}", params=params)

    def path(name, seed):
        arm, draws = trained(name, seed), Draws(seed, torch.arange(n))
        gan, cond = arm.model.artist, arm.tok(data.batch("test", draws).captions)
        return path_spread(gan, cond, draws, data.shape) | smoothness(gan, cond, draws, judge.features)

    def truncation(centre, seed):
        arm, curve = trained("path", seed), []
        for psi in s["psi"]:
            config = arm.config | dict(truncation=psi, centre=centre)
            row = evaluate(arm.model.painter(arm.tok, config), data, judge, n, seed)
            curve.append(
                {k: row[k] for k in ("fd", "precision", "recall")} | dict(obedience=row["obedience"]["all"])
            )
        return curve

    def growing(grow, seed):
        b, other = (large.batch("test", Draws(seed, torch.arange(i, i + n))) for i in (0, n))
        config = recipe_for(large, scale) | dict(grow=grow)
        arm = fit(build, config, large, s["grown"], seed, precision)
        x = arm.model.painter(arm.tok, config)(b.captions, seed)
        digit = (judge.read(smaller(x))["digit"] == b.attrs["digit"]).double().mean().item()
        return dict(fd=frechet(small(x), small(other.x)), seconds=arm.about["train_seconds"], digit=digit)

    def mixing(seed):
        tint = Tinted()
        arm = fit(build, recipe_for(tint, scale), tint, s["tinted"], seed, precision)
        return followers(arm.model.artist, tint, judge, arm.tok, n, seed)

    yield "setting", partial(setting, s | dict(psi=list(s["psi"])), seeds, data, judge)
    for seed in seeds:
        for arm in arms:
            yield f"arms.{arm}.seed{seed}", partial(row, arm, seed)
            yield f"path.{arm}.seed{seed}", partial(path, arm, seed)
            for centre in ("all", "caption") if arm == "path" else ():
                yield f"truncation.{centre}.seed{seed}", partial(truncation, centre, seed)
        for arm, grow in dict(direct=0.0, growing=1.0).items():
            yield f"growing.{arm}.seed{seed}", partial(growing, grow, seed)
        yield f"mixing.seed{seed}", partial(mixing, seed)
