"The DALL-E recipe with its palette and without, asked in several ways; masks, loss weights, counts."

from functools import lru_cache, partial

import torch

from t2i_course.ar.dalle import (
    SHORT,
    best_of,
    build,
    candidates,
    codec_for,
    recipe_for,
    right,
    sample_codes,
    split_nll,
)
from t2i_course.core.counting import in_turns, parameters
from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import evaluate, load_judge
from t2i_course.core.sources import load


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


def ready(
    config,  # as from `recipe_for`
    codec,  # a finished run
    data,  # captioned pictures
) -> tuple:  # tokenizer, DallE
    "Built and prepared: with its counts, where it begins with counts"
    tok, model = build(config, codec=codec)
    model.prepare(data, tok, config)
    return tok, model


def asked(
    whole,  # whole() -> Arm with a trained DallE
    data,  # captioned pictures
    judge,  # reads the pictures
    config,  # as from `recipe_for`
    s: dict,  # a row of SWEEP
    seed: int,  # of the drawings
):  # yields (key, make)
    "The same model asked in several ways: guidance and temperature, best of n, with and without the cache"

    def drawing(w, t):
        arm = whole()
        tok, model = arm.tok, arm.model
        row = evaluate(
            model.painter(tok, config | dict(guidance=w, temperature=t)), data, judge, s["m"], seed, 0
        )
        return dict(
            guidance=w, temperature=t, obedience=row["obedience"]["all"], fd=row["fd"], recall=row["recall"]
        )

    def best():
        arm = whole()
        tok, model = arm.tok, arm.model
        captions = data.batch("test", Draws(5, torch.arange(s["m"]))).captions
        plain = config | dict(temperature=1.0, guidance=1.0)
        x, scorer, own = candidates(model, tok, captions, max(s["best"]), plain, seed)
        ok = torch.stack([right(judge, p, data, captions) for p in x])
        by = {
            k: [best_of(ok, fit, n) for n in s["best"]]
            for k, fit in dict(scorer=scorer, prior=own, ceiling=ok.float()).items()
        }
        return dict(n=list(s["best"]), **by)

    def cached():
        arm = whole()
        tok, model = arm.tok, arm.model
        some = data.batch("test", Draws(5, torch.arange(min(64, s["m"])))).captions
        job = partial(sample_codes, model.prior.net, tok(some), Draws(seed, torch.arange(len(some))))
        took = in_turns(dict(cached=job, uncached=partial(job, cached=False)), 5)
        return {k: [1000 / len(some) * v for v in t] for k, t in took.items()}

    for w, t in DRAWING:
        yield f"drawing.w{w:g}_t{100 * t:.0f}.{seed}", partial(drawing, w, t)
    yield f"best.{seed}", best
    yield f"cache.{seed}", cached


def fit_arm(
    codec,  # a finished run; stays as it is
    data,  # captioned pictures
    config,  # of the prior, as from `recipe_for`
    images: int,  # training pictures
    seed: int,  # of weights and data
):  # Arm: the trained prior, without a scorer
    "Another prior on the codes of a finished codec"
    made = partial(ready, codec=codec, data=data)
    return fit(made, config | dict(scorer=False), data, images, seed, best_precision())


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and drawings
):  # yields ('key.path', make), and make() gives the value
    "The model with its palette and without; how it is asked; masks, loss weights and counts on its codes"
    s, data, judge = SWEEP[scale], load("painted"), load_judge("painted")
    config = recipe_for(data, scale) | SHORT
    changes = dict(plain=dict(palette=False, n_codes=4 * config.n_codes), palette={})

    @lru_cache(1)  # all arms use the codes of the model with its palette
    def whole(name, seed):
        own = config | changes[name]
        codec = codec_for(own, data, round(own.share * s["images"]), seed)
        images = round((1 - own.share) * s["images"])
        arm = fit(partial(ready, codec=codec, data=data), own, data, images, seed, best_precision())
        took = codec.about["train_seconds"] + arm.about["train_seconds"]
        arm.about |= dict(images=s["images"], train_seconds=took)
        arm.about["params"] = parameters(arm.model.artist)
        return codec, arm

    def nats(arm):
        return split_nll(arm.model.prior.net, arm.model.codec, data, arm.tok, 2 * s["n"])

    def row(name, seed):
        _, arm = whole(name, seed)
        return arm.row(data, judge, s["n"], seed, s["n"] // 2, recipe="dalle", **nats(arm))

    def arm(name, seed):
        (codec, _), (share, change) = whole("palette", seed), ARMS[name]
        return nats(fit_arm(codec, data, config | s["small"] | change, round(share * s["arm"]), seed))

    about = dict(temperature=config.temperature, guidance=config.guidance)
    yield "setting", partial(setting, s, seeds, data, judge, **about)
    for seed in seeds:
        for name in changes:
            yield f"row.{name}.{seed}", partial(row, name, seed)
        yield from asked(lambda seed=seed: whole("palette", seed)[1], data, judge, config, s, seed)
        for name in ARMS:
            yield f"arms.{name}.{seed}", partial(arm, name, seed)
