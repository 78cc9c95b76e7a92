"The sweeps of the schedules chapter: what is learned at each noise level; later starts; steps of another."

from functools import lru_cache, partial

import torch

from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, fit
from t2i_course.core.metrics import evaluate, load_judge, reference
from t2i_course.core.sources import load
from t2i_course.diffusion.ddpm import drawer, recipe_for, sample
from t2i_course.diffusion.schedules import guess_errors, make_arm, schedules, walk
from t2i_course.sweeps.diffusion.samplers import OnModel

RUNS = dict(mnist="samplers")
SEEDS = 10  # of noise, on one model; the first three also train networks
SWEEP = dict(  # training pictures, drawings of a trained network, steps; the same of the finished run
    smoke=dict(images=320, n=24, steps=4, look=16, drawn=16, starts=(1.0, 0.8), few=(3,)),
    demo=dict(
        images=20_000, n=5_000, steps=25, look=359, drawn=300, starts=(1.0, 0.9, 0.8, 0.7, 0.6), few=(10, 50)
    ),
    full=dict(
        images=1_000_000,
        n=5_000,
        steps=50,
        look=359,
        drawn=1_000,
        starts=(1.0, 0.9, 0.8, 0.7, 0.6),
        few=(10, 50),
    ),
)
ARMS = ("linear", "cosine", "sigmoid", "sigmoid beta")
LEVELS = torch.linspace(-8, 6, 15)


def trained_arms(
    scale: str,  # smoke, demo or full
    seeds,  # of weights, data and start noise
):  # yields ('key.path', make)
    "The same network on each schedule, on digits"
    s, processes, data, judge = SWEEP[scale], schedules(), load("digits"), load_judge("digits")
    config = recipe_for(data, scale) | dict(max_len=12)

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(name, seed):
        build = partial(make_arm, process=processes[name])
        return fit(build, config, data, s["images"], seed, best_precision())

    def errors(name, seed):
        made, test = trained(name, seed), data.batch("test", Draws(0, torch.arange(s["look"])))
        return guess_errors(made.model, test.x, made.tok(test.captions), LEVELS)

    def row(name, start, seed):
        made, n = trained(name, seed), max(1, round(s["steps"] * start))
        process = made.model.process
        draw = drawer(made.model, made.tok, data.shape, walk(process, process, n, start))
        drawn = evaluate(draw, data, judge, s["n"], seed, 0)
        return drawn | made.about | dict(recipe=f"ddpm, v, {name}", nfe=n, start=start, w=1.0, eta=1.0)

    for seed in seeds:
        for name in ARMS:
            key = name.replace(" ", "_")
            yield f"error.{key}.seed{seed}", partial(errors, name, seed)
            yield f"trained.{key}.seed{seed}", partial(row, name, 1.0, seed)
            if name in ("linear", "cosine"):
                for start in (0.8, 0.6):
                    yield f"later.{key}.{round(100 * start)}.seed{seed}", partial(row, name, start, seed)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=tuple(range(10)),  # of start noise; the first three also of weights and data
    mnist=None,  # a finished run of DDPM's chain
):  # yields ('key.path', make), and make() gives the value
    "Trained networks by log-SNR; one well-trained model with a later start, and on other schedules' steps"
    s, processes = SWEEP[scale], schedules()
    on = OnModel(mnist, s["drawn"])

    def setting():
        judge, about = load_judge("digits"), dict(images=s["images"], n=s["n"], steps=s["steps"], target="v")
        floor = reference(load("digits"), judge, s["n"])["floor"]["fd_floor"]
        about |= dict(w=1.0, precision=best_precision(), seeds=list(seeds[:3]), levels=LEVELS.tolist())
        return about | dict(fd_floor=floor, mnist=on.setting(seeds=list(seeds)))

    def started(start, seed):
        n = max(1, round(s["steps"] * start))
        return on.row(sample, partial(spread, "linear", start), n, seed, start=start, steps=n)

    def spread(other, start, process, n):
        return walk(process, process if other == "linear" else processes[other], n, start)

    def crossed(other, n, seed):
        return on.row(sample, partial(spread, other, 1.0), n, seed, steps=n)

    yield "setting", setting
    yield from trained_arms(scale, seeds[:3])
    for seed in seeds:
        for start in s["starts"]:
            yield f"start.{round(100 * start)}.seed{seed}", partial(started, start, seed)
        for other in ("linear", "cosine", "EDM"):
            for n in s["few"]:
                yield f"steps.{other}.{n}.seed{seed}", partial(crossed, other, n, seed)
