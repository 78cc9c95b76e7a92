"The sweeps of the DDPM chapter on digits: target, variance of the sampler."

from functools import lru_cache, partial

from t2i_course.core.sources import load
from t2i_course.core.experiments import fit
from t2i_course.core.metrics import evaluate
from t2i_course.diffusion.ddpm import TARGETS, build, drawer, recipe_for, times

ROWS = ("digits", "painted")  # measured with the recipe as it stands
# A seed of the demo scale trains for 2 minutes (rows) and on 90,000 pictures (arms), and calls the network
# 3 million times to draw: about 9 minutes on two cores
SWEEP = dict(
    smoke=dict(
        n=32,  # drawings of an arm
        images=320,  # training pictures of an arm
        variance={50: 32},  # steps -> drawings
    ),
    demo=dict(n=5000, images=30_000, variance={50: 5000, 1000: 500}),
    full=dict(n=10_000, images=1_000_000, variance={50: 10_000, 1000: 4000}),
)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # a run each
):  # yields (key, make), and make() gives the value
    "Every target; the first of them drawn with both variances"
    data, s = load("digits"), SWEEP[scale]
    config = recipe_for(data, scale) | dict(max_len=12)

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(target, seed):
        made = fit(build, config | dict(target=target), data, s["images"], seed)
        return made.tok, made.model

    def objective(target, seed):
        tok, den = trained(target, seed)
        return evaluate(drawer(den, tok, data.shape, times(config, 25), config.guidance), data, n=s["n"])

    def variance(large, n_steps, n, seed):
        tok, den = trained("eps", seed)
        return evaluate(drawer(den, tok, data.shape, times(config, n_steps), large=large), data, n=n)

    for seed in seeds:
        for target in TARGETS:
            yield f"objective.{target}.seed{seed}", partial(objective, target, seed)
            if target != "eps":
                continue
            for n_steps, n in s["variance"].items():
                for name, large in dict(posterior=False, beta=True).items():
                    yield f"variance.{name}.{n_steps}.seed{seed}", partial(variance, large, n_steps, n, seed)
