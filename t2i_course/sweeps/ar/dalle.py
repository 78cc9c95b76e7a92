"The DALL-E recipe with its palette and without, asked in several ways; masks, loss weights, counts."

import time
from functools import lru_cache, partial

import torch

from t2i_course.ar.dalle import (
    SHORT,
    Prior,
    best_of,
    build,
    candidates,
    counted,
    in_turns,
    recipe_for,
    right,
    sample_codes,
    split_nll,
)
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import train_arm
from t2i_course.core.metrics import at_most, evaluate, load_judge, reference
from t2i_course.core.training import has_bf16, pick_device


class OnCodes:
    "A prior over the codes of a finished codec, as `train_arm` wants it"

    def __init__(
        self,
        prior: Prior,  # to be trained
        codec,  # stays as it is
    ):
        self.net, self.codec = prior, codec.eval()

    def to(self, device):
        self.codec.to(device)
        return self

    def loss(self, x0, cond, draws):
        return self.net.loss(self.codec.codes(x0), cond, draws)


SWEEP = dict(
    smoke=dict(images=640, arm=128, n=24, m=8, best=(1, 2), small=dict(dim=32, n_layers=4, n_heads=2)),
    demo=dict(
        images=26_000, arm=6_000, n=400, m=300, best=(1, 2, 4, 8), small=dict(dim=64, n_layers=4, n_heads=4)
    ),
    full=dict(
        images=2_000_000,
        arm=200_000,
        n=5_000,
        m=1_000,
        best=(1, 2, 4, 8, 16, 32),
        small=dict(dim=256, n_layers=8, n_heads=8),
    ),
)

ARMS = dict(  # name -> share of an arm's training pictures, what differs
    dense=(1, {}),
    sparse=(1, dict(sparse=True)),
    even=(1, dict(text_weight=0.5)),
    silent=(1, dict(text_weight=0.0)),
    counted=(1, dict(counts=True)),
    early=(0.1, {}),
    early_counted=(0.1, dict(counts=True)),
)

DRAWING = ((1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (2.0, 0.75), (2.0, 0.5), (2.0, 0.25))  # guidance, temperature


def trained(
    config: dict,  # as from `recipe_for`
    data,  # captioned pictures
    images: int,  # training pictures
    seed: int,  # of weights and data
    precision: str,  # fp32 or bf16
) -> tuple:  # tokenizer, DallE, seconds
    torch.manual_seed(seed)
    tok, model = build(config)
    start = time.perf_counter()
    train_arm(model, tok, data, config, images, seed, precision)
    return tok, model, time.perf_counter() - start


def asked(
    whole,  # whole() -> tokenizer, trained DallE
    data,  # captioned pictures
    judge,  # reads the pictures
    config: dict,  # as from `recipe_for`
    s: dict,  # a row of SWEEP
    seed: int,  # of the drawings
):  # yields (key, make)
    "The same model asked in several ways: guidance and temperature, best of n, with and without the cache"

    def drawing(w, t):
        tok, model = whole()
        row = evaluate(
            model.painter(tok, config | dict(guidance=w, temperature=t)), data, judge, s["m"], seed, 0
        )
        return dict(
            guidance=w, temperature=t, obedience=row["obedience"]["all"], fd=row["fd"], recall=row["recall"]
        )

    def best():
        tok, model = whole()
        captions = data.batch("test", Draws(5, torch.arange(s["m"]))).captions
        x, scorer, own = candidates(
            model, tok, captions, max(s["best"]), dict(temperature=1.0, guidance=1.0), seed
        )
        ok = torch.stack([right(judge, p, data, captions) for p in x])
        by = {
            k: [best_of(ok, fit, n) for n in s["best"]]
            for k, fit in dict(scorer=scorer, prior=own, ceiling=ok.float()).items()
        }
        return dict(n=list(s["best"]), **by)

    def cached():
        tok, model = whole()
        some = data.batch("test", Draws(5, torch.arange(min(64, s["m"])))).captions
        job = partial(sample_codes, model.prior.net, tok(some), Draws(seed, torch.arange(len(some))))
        took = in_turns(dict(cached=job, uncached=partial(job, cached=False)), 5)
        return {k: [1000 / len(some) * v for v in t] for k, t in took.items()}

    for w, t in DRAWING:
        yield f"drawing.w{w:g}_t{100 * t:.0f}.{seed}", partial(drawing, w, t)
    yield f"best.{seed}", best
    yield f"cache.{seed}", cached


def fit_arm(
    codec,  # trained; stays as it is
    tok,  # captions -> Cond
    data,  # captioned pictures
    config: dict,  # of the prior, as from `recipe_for`
    images: int,  # training pictures
    seed: int,  # of weights and data
    precision: str,  # fp32 or bf16
) -> Prior:  # trained
    "Another prior on the codes of a finished codec"
    torch.manual_seed(seed)
    prior = build(config)[1].prior
    if prior.net.counts is not None:
        prior.net.counts.fit(*counted(data, tok, config["count_images"])(codec, pick_device()))
    train_arm(OnCodes(prior, codec), tok, data, config, images, seed, precision)
    return prior


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1),  # of weights, data and drawings
):  # yields ('key.path', make), and make() gives the value
    "The model with its palette and without; how it is asked; masks, loss weights and counts on its codes"
    s, data = SWEEP[scale], load("painted")
    judge, precision = load_judge("painted"), "bf16" if has_bf16(pick_device()) else "fp32"
    config = recipe_for(data, scale) | SHORT
    changes = dict(plain=dict(palette=False, n_codes=4 * config["n_codes"]), palette={})

    def setting():
        return dict(
            s,
            precision=precision,
            seeds=list(seeds),
            temperature=config["temperature"],
            guidance=config["guidance"],
            fd_floor=reference(data, judge, at_most(data, s["n"]))["fd_floor"],
        )

    @lru_cache(1)  # all arms use the codes of the model with its palette
    def whole(name, seed):
        return trained(config | changes[name], data, s["images"], seed, precision)

    def row(name, seed):
        tok, model, took = whole(name, seed)
        row = evaluate(model.painter(tok, config), data, judge, s["n"], seed, s["n"] // 2)
        return row | dict(
            recipe="dalle",
            params=sum(p.numel() for p in model.net.parameters()),
            images=s["images"],
            train_seconds=took,
            nfe=model.calls(config),
            **split_nll(model.prior.net, model.codec, data, tok, 2 * s["n"]),
        )

    def arm(name, seed):
        (tok, model, _), (share, change) = whole("palette", seed), ARMS[name]
        prior = fit_arm(
            model.codec, tok, data, config | s["small"] | change, round(share * s["arm"]), seed, precision
        )
        return split_nll(prior.net, model.codec, data, tok, 2 * s["n"])

    yield "setting", setting
    for seed in seeds:
        for name in changes:
            yield f"row.{name}.{seed}", partial(row, name, seed)
        yield from asked(lambda seed=seed: whole("palette", seed)[:2], data, judge, config, s, seed)
        for name in ARMS:
            yield f"arms.{name}.{seed}", partial(arm, name, seed)
