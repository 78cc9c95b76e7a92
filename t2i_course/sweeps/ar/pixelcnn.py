"Priors over the codes of VQ-VAE-2: with and without gates, attention, captions; ways to ask, what stays."

import time
from functools import lru_cache, partial

import torch

from t2i_course.ar.pixelcnn import (
    Histogram,
    Plain,
    TwoLevelModel,
    bits_per_code,
    build,
    codes_of,
    make_codec,
    make_prior,
    recipe_for,
)
from t2i_course.codec.vqvae2 import CodesModel, Levels
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import train_arm
from t2i_course.core.metrics import at_most, evaluate, judge_for, reference
from t2i_course.core.training import has_bf16, pick_device


@torch.no_grad()
def kept(
    model,  # a trained TwoLevelModel
    tok,  # captions -> Cond
    data,  # captioned pictures with attributes
    judge,  # reads them
    n: int,  # unseen pictures
    seed: int = 0,  # of the drawing
) -> dict:  # attribute -> share that shows what the picture showed: fine codes own, fine drawn anew, all anew
    "Keep the coarse codes, draw the fine ones from p(fine|coarse) without a caption: what stays?"
    model.net.eval()
    codes, b = codes_of(model.codec, data, "test", 52, n)
    cond, draws, plain = tok([""] * n), Draws(seed, torch.arange(n)), dict(guidance=1.0, temperature=1.0)
    ways = dict(
        own=codes,
        fine=model.prior.sample(cond, draws, plain, codes.top),
        all=model.prior.sample(cond, draws, plain),
    )
    read = {k: judge.read(model.codec.decode_codes(c).float()) for k, c in ways.items()}
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
    seeds=(0, 1),  # of weights, data and drawings
):  # yields ('key.path', make), and make() gives the value
    "Bits a code with and without blind spot, gates, attention, the right caption; ways to draw; what stays"
    s, data, painted = SWEEP[scale], load("digits"), load("painted")
    judge, precision = judge_for(data), "bf16" if has_bf16(pick_device()) else "fp32"
    config = recipe_for(data, scale)

    def setting():
        return dict(
            s,
            ways=[list(w) for w in s["ways"]],
            precision=precision,
            seeds=list(seeds),
            n_codes=list(config["n_codes"]),
            fd_floor=reference(data, judge, at_most(data, s["n"]))["fd_floor"],
        )

    @lru_cache(1)  # one codec for every arm of a seed
    def coded(seed):
        torch.manual_seed(seed)
        codec = make_codec(config)
        tok, _ = make_prior(config, codec)
        train_arm(CodesModel(codec), tok, data, config, s["codec"], seed, precision)
        return codec, *codes_of(codec, data, "test", 50, at_most(data, s["n"]))  # codec, codes, their batch

    def histogram(seed):
        codec, codes, _ = coded(seed)
        seen, _ = codes_of(codec, data, "train", 51, s["read"])
        tables = {k: Histogram(getattr(seen, k), n) for k, n in zip(Levels._fields, codec.n_codes)}
        return {
            k: t.bits(getattr(codes, k)).mean().item() / getattr(codes, k)[0].numel()
            for k, t in tables.items()
        }

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(name, seed):
        codec, start = coded(seed)[0], time.perf_counter()
        tok, prior = make_prior(config, codec, **ARMS[name])
        model = TwoLevelModel(
            codec, prior, 0.0, (config["lr"], config["lr"])
        )  # the codec is trained: its share is 0
        train_arm(model, tok, data, config, s["images"], seed, precision)
        return tok, model, time.perf_counter() - start

    def bits(name, said, seed):
        (tok, model, _), (_, codes, b) = trained(name, seed), coded(seed)
        captions = dict(own=b.captions, other=b.captions[1:] + b.captions[:1], none=[""] * len(b.captions))[
            said
        ]
        return bits_per_code(model.prior, tok, codes, captions)

    def row(name, seed):
        tok, model, took = trained(name, seed)
        row = evaluate(model.painter(tok, config), data, judge, s["n"], seed)
        row |= dict(
            recipe=f"pixelcnn.{name}",
            params=sum(p.numel() for p in model.net.parameters()),
            images=s["images"],
        )
        return row | dict(train_seconds=took, nfe=model.calls(config))

    def way(t, w, seed):
        tok, model, _ = trained(list(ARMS)[-1], seed)
        row = evaluate(
            model.painter(tok, config | dict(temperature=t, guidance=w)), data, judge, s["n"], seed
        )
        short = {k: row[k] for k in ("fd", "precision", "recall", "seconds_per_1000")} | dict(
            obedience=row["obedience"]["all"]
        )
        return short | dict(temperature=t, guidance=w)

    def what_stays(seed):
        torch.manual_seed(seed)
        config = recipe_for(painted, scale)
        tok, model = build(config)
        train_arm(model, tok, painted, config, s["painted"], seed, precision)
        return kept(model, tok, painted, judge_for(painted), s["n"], seed)

    yield "setting", setting
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
