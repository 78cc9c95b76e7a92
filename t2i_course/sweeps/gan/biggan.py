"""The sweep of the BigGAN chapter: norms against concatenation, angles of filters, truncation, batch size."""

from functools import lru_cache, partial

from t2i_course.core.ema import state_for
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import load_judge
from t2i_course.core.sources import load
from t2i_course.core.training import feed, pick_device, train
from t2i_course.gan.biggan import build, fresh, recipe_for, spectrum

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
    config,  # as from `recipe_for`
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
        batch=config.batch,
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
    seeds=(0, 1, 2),  # of weights, data and noise
):  # yields ('key.path', make), and make() gives the value
    "Norms against concatenation, angles of filters, truncation, and the size of the batch"
    s, data, judge = SWEEP[scale], load("digits"), load_judge("digits")
    precision, base = best_precision(), recipe_for(data, scale)

    @lru_cache(1)  # both keys of an arm ask for its model
    def trained(name, seed):
        return fit(build, base | ARMS[name], data, s["images"], seed, precision)

    def row(name, seed):
        return trained(name, seed).row(data, judge, s["n"], seed, 0, recipe=f"biggan.{name}")

    def truncation(name, seed):
        arm = trained(name, seed)
        draws = {t: arm.model.painter(arm.tok, arm.config | dict(truncation=t)) for t in s["thresholds"]}
        return [dict(at=t) | spectrum(d, data, judge, s["n"], seed) for t, d in draws.items()]

    def batch(b, seed):
        return watched(
            base | dict(batch=b), data, s["batch_images"], s["looks"], judge, s["n"], seed, precision
        )

    yield "setting", partial(setting, s, seeds, data, judge, batch=base.batch, batches=list(BATCHES))
    for seed in seeds:
        for name in ARMS:
            yield f"arms.{name}.seed{seed}", partial(row, name, seed)
            if name != "concat":
                yield f"truncation.{name}.seed{seed}", partial(truncation, name, seed)
        for b in BATCHES:
            yield f"batch.{b}.seed{seed}", partial(batch, b, seed)
