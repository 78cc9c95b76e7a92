"Priors over the codes of VQ-VAE-2: with and without gates, attention, captions; ways to ask, what stays."

from functools import lru_cache, partial

import torch

from t2i_course.ar.pixelcnn import (
    Histogram,
    Plain,
    bits_per_code,
    build,
    codes_of,
    make_prior,
    recipe_for,
    uses_for,
)
from t2i_course.codec import vqvae2
from t2i_course.codec.vqvae import OnCodes
from t2i_course.codec.vqvae2 import Levels
from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import at_most, evaluate, judge_for
from t2i_course.core.sources import load


@torch.no_grad()
def kept(
    model,  # an OnCodes with a trained TwoLevelPrior
    tok,  # captions -> Cond
    data,  # captioned pictures with attributes
    judge,  # reads them
    config,  # its temperature and guidance are not used
    n: int,  # unseen pictures
    seed: int = 0,  # of the drawing
) -> dict:  # attribute -> share that shows what the picture showed: fine codes own, fine drawn anew, all anew
    "Keep the coarse codes, draw the fine ones from p(fine|coarse) without a caption: what stays?"
    model.net.eval()
    codes, b = codes_of(model.codec, data, "test", 52, n)
    cond, draws, plain = (
        tok([""] * n),
        Draws(seed, torch.arange(n)),
        config | dict(guidance=1.0, temperature=1.0),
    )
    ways = dict(
        own=codes,
        fine=model.prior.sample(cond, draws, plain, codes.top),
        all=model.prior.sample(cond, draws, plain),
    )
    read = {k: judge.read(model.codec.decode(c).float()) for k, c in ways.items()}
    return {a: {k: (r[a] == v).double().mean().item() for k, r in read.items()} for a, v in b.attrs.items()}


SWEEP = dict(
    smoke=dict(codec=128, images=128, n=12, read=64, painted=96, ways=((1.0, 1.0), (0.9, 2.0))),
    demo=dict(
        codec=12_000,
        images=10_000,
        n=400,
        read=4_000,
        painted=40_000,
        ways=((1.0, 1.0), (0.7, 1.0), (1.0, 2.0), (0.7, 2.0), (0.8, 3.0), (0.8, 5.0)),
    ),
    full=dict(
        codec=2_000_000,
        images=2_000_000,
        n=5_000,
        read=20_000,
        painted=4_000_000,
        ways=((1.0, 1.0), (0.7, 1.0), (1.0, 2.0), (0.7, 2.0), (0.8, 3.0), (0.8, 5.0)),
    ),
)

ARMS = dict(plain=dict(kind=Plain), gated=dict(attention=False), pixelcnn=dict())


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and drawings
):  # yields ('key.path', make), and make() gives the value
    "Bits a code with and without blind spot, gates, attention, the right caption; ways to draw; what stays"
    s, data, painted = SWEEP[scale], load("digits"), load("painted")
    judge, config, precision = judge_for(data), recipe_for(data, scale), best_precision()

    def codec_of(config, data, images, seed):
        changes = uses_for(config)["codec"][1]
        return fit(vqvae2.build, vqvae2.recipe_for(data, scale) | changes, data, images, seed, precision)

    @lru_cache(1)  # one codec for every arm of a seed
    def coded(seed):
        codec = codec_of(config, data, s["codec"], seed)
        return codec, *codes_of(codec.model.codec, data, "test", 50, at_most(data, s["n"]))  # codes, batch

    def histogram(seed):
        codec, codes, _ = coded(seed)
        seen, _ = codes_of(codec.model.codec, data, "train", 51, s["read"])
        tables = {k: Histogram(getattr(seen, k), n) for k, n in zip(Levels._fields, config.n_codes)}
        return {
            k: t.bits(getattr(codes, k)).mean().item() / getattr(codes, k)[0].numel()
            for k, t in tables.items()
        }

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(name, seed):
        codec = coded(seed)[0].model.codec

        def on_codes(config):
            tok, prior = make_prior(config, codec, **ARMS[name])
            return tok, OnCodes(codec, prior)

        return fit(on_codes, config, data, s["images"], seed, precision)

    def bits(name, said, seed):
        arm, (_, codes, b) = trained(name, seed), coded(seed)
        others = b.captions[1:] + b.captions[:1]
        captions = dict(own=b.captions, other=others, none=[""] * len(b.captions))[said]
        return bits_per_code(arm.model.prior, arm.tok, codes, captions)

    def row(name, seed):
        arm = trained(name, seed)
        params = parameters(arm.model.artist)
        return arm.row(data, judge, s["n"], seed, recipe=f"pixelcnn.{name}", params=params)

    def way(t, w, seed):
        arm = trained(list(ARMS)[-1], seed)
        draw = arm.model.painter(arm.tok, config | dict(temperature=t, guidance=w))
        row = evaluate(draw, data, judge, s["n"], seed)
        short = {k: row[k] for k in ("fd", "precision", "recall", "seconds_per_1000")}
        return short | dict(obedience=row["obedience"]["all"], temperature=t, guidance=w)

    def what_stays(seed):
        config = recipe_for(painted, scale)
        codec = codec_of(config, painted, round(config.share * s["painted"]), seed)
        images = round((1 - config.share) * s["painted"])
        arm = fit(partial(build, codec=codec), config, painted, images, seed, precision)
        return kept(arm.model, arm.tok, painted, judge_for(painted), config, s["n"], seed)

    ways = [list(w) for w in s["ways"]]
    yield "setting", partial(setting, s, seeds, data, judge, ways=ways, n_codes=config.n_codes)
    for seed in seeds:
        yield f"bits.histogram.seed{seed}", partial(histogram, seed)
        for name in ARMS:
            yield f"bits.{name}.seed{seed}", partial(bits, name, "own", seed)
            if name == "pixelcnn":
                yield f"bits.other_caption.seed{seed}", partial(bits, name, "other", seed)
                yield f"bits.no_caption.seed{seed}", partial(bits, name, "none", seed)
            yield f"arms.{name}.seed{seed}", partial(row, name, seed)
        for t, w in s["ways"]:
            yield f"ways.seed{seed}.t{round(100 * t)}w{round(100 * w)}", partial(way, t, w, seed)
    for seed in seeds:
        yield f"kept.seed{seed}", partial(what_stays, seed)
