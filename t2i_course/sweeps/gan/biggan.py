"""The sweep of the BigGAN chapter: norms against concatenation, angles of filters, truncation, batch size."""

import time
from functools import lru_cache, partial
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for, train_arm
from t2i_course.core.metrics import at_most, evaluate, load_judge, reference
from t2i_course.core.training import feed, has_bf16, pick_device, train
from t2i_course.gan.biggan import fresh, recipe_for, spectrum

SWEEP = dict(
    smoke=dict(images=128, n=40, batch_images=1024, looks=2, thresholds=(0.5, 2.0)),
    demo=dict(
        images=24_000, n=400, batch_images=16_384, looks=5, thresholds=(0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 10.0)
    ),
    full=dict(
        images=1_000_000,
        n=400,
        batch_images=2_000_000,
        looks=20,
        thresholds=(0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 10.0),
    ),
)

ARMS = dict(base={}, free=dict(ortho=0.0), concat=dict(concat=True))

BATCHES = 32, 128, 512


def watched(
    config: dict,  # as from `recipe_for`
    data,  # captioned pictures
    images: int,  # training pictures
    looks: int,  # how often the pictures are measured on the way
    judge,  # see `spectrum`
    n: int,  # pictures a look
    seed: int = 0,  # of weights, data and noise
    precision: str = "fp32",
) -> list:  # one row a look
    "Train with a constant rate and measure on the way; the longest gaps between looks are at the end"
    tok, model = fresh(config, seed)
    model.net.to(pick_device())
    state, rows = state_for(model, config, precision), []
    marks = [images * 2 ** (i - looks + 1) for i in range(looks)]
    for r in train(
        state,
        model.loss,
        feed(data, tok),
        images=images,
        batch=config["batch"],
        seed=seed,
        schedule=lambda f: min(1.0, f / 0.02),
    ):
        if r.images < marks[len(rows)]:
            continue
        with state.ema.applied(model.net):
            rows.append(
                dict(images=r.images, steps=r.step)
                | spectrum(model.painter(tok, config), data, judge, n, seed)
            )
    return rows


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1),  # of weights, data and noise
):  # yields ('key.path', make), and make() gives the value
    "Norms against concatenation, angles of filters, truncation, and the size of the batch"
    s, data, judge = SWEEP[scale], load("digits"), load_judge("digits")
    precision = "bf16" if has_bf16(pick_device()) else "fp32"
    base = recipe_for(data, scale)

    def setting():
        return dict(
            s,
            precision=precision,
            seeds=list(seeds),
            batch=base["batch"],
            batches=list(BATCHES),
            fd_floor=reference(data, judge, at_most(data, s["n"]))["fd_floor"],
        )

    @lru_cache(1)  # both keys of an arm ask for its model
    def trained(name, seed):
        config, start = base | ARMS[name], time.perf_counter()
        tok, model = fresh(config, seed)
        train_arm(model, tok, data, config, s["images"], seed, precision)
        return config, tok, model, time.perf_counter() - start

    def row(name, seed):
        config, tok, model, took = trained(name, seed)
        row = evaluate(model.painter(tok, config), data, judge, s["n"], seed, 0)
        row |= dict(recipe=f"biggan.{name}", params=sum(p.numel() for p in model.net.parameters()))
        return row | dict(images=s["images"], train_seconds=took, nfe=1)

    def truncation(name, seed):
        config, tok, model, _ = trained(name, seed)
        draws = {t: model.painter(tok, config | dict(truncation=t)) for t in s["thresholds"]}
        return [dict(at=t) | spectrum(d, data, judge, s["n"], seed) for t, d in draws.items()]

    def batch(b, seed):
        return watched(
            base | dict(batch=b), data, s["batch_images"], s["looks"], judge, s["n"], seed, precision
        )

    yield "setting", setting
    for seed in seeds:
        for name in ARMS:
            yield f"arms.{name}.seed{seed}", partial(row, name, seed)
            if name != "concat":
                yield f"truncation.{name}.seed{seed}", partial(truncation, name, seed)
        for b in BATCHES:
            yield f"batch.{b}.seed{seed}", partial(batch, b, seed)
