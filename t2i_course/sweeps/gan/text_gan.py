"""The sweep of the text GAN chapter: word attention, matching loss, seeking; two stages; two digits."""

from functools import lru_cache, partial

import torch

from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import at_most, evaluate, judge_for
from t2i_course.core.sources import load
from t2i_course.gan.text_gan import build, by_demands, recipe_for, sketcher, spread

ARMS = dict(  # what differs from the recipe
    full=dict(),
    no_attention=dict(attention=False),
    no_matching=dict(matching=0.0, guide=0.0),
    no_seeking=dict(seek=0.0, info=0.0),
    stack=dict(stack=0.5),
)

SWEEP = dict(
    smoke=dict(images=128, n=24), demo=dict(images=8_000, n=400), full=dict(images=4_000_000, n=10_000)
)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and z
):  # yields ('key.path', make), and make() gives the value
    "Word attention, matching loss, seeking; two stages against one; two digits; obedience by demands"
    s, precision = SWEEP[scale], best_precision()
    data, two = load("painted"), load("painted2")
    n, judges = at_most(data, s["n"]), {d.name: judge_for(d) for d in (data, two)}
    arms = {k: (v, data) for k, v in ARMS.items()} | dict(two=({}, two))

    def row(draw, data, seed, about):
        b = data.batch("test", Draws(900 + seed, torch.arange(2 * n)))
        counts = by_demands(judges[data.name], draw(b.captions, seed), data, b.captions)
        return (
            evaluate(draw, data, judges[data.name], n, seed)
            | dict(by_demands={str(k): v for k, v in counts.items()}, spread=spread(draw, b.captions[:16]))
            | about
        )

    @lru_cache(1)  # a sketch comes from the model before it
    def trained(name, seed):
        change, d = arms[name]
        arm = fit(build, recipe_for(d, scale) | change, d, s["images"], seed, precision)
        params = [parameters(m) for m in (arm.model.artist, arm.model.net)]
        arm.about |= dict(recipe=name, params=params[0], params_trained=params[1])
        return arm

    def finished(name, seed):
        arm = trained(name, seed)
        about = arm.about | dict(nfe=arm.model.calls(arm.config))
        return row(arm.model.painter(arm.tok, arm.config), arms[name][1], seed, about)

    def sketched(name, sketch, seed):  # what the second part starts from
        arm = trained(name, seed)
        about = arm.about | dict(recipe=sketch, nfe=1)
        return row(sketcher(arm.model, arm.tok), arms[name][1], seed, about)

    yield "setting", partial(setting, dict(images=s["images"], n=n), seeds, data, judges["painted"])
    for seed in seeds:
        for name in arms:
            yield f"arms.{name}.{seed}", partial(finished, name, seed)
            sketch = dict(full="sketch", stack="stage1").get(name)
            if sketch:
                yield f"arms.{sketch}.{seed}", partial(sketched, name, sketch, seed)
