"The sweeps of the samplers chapter: solvers of the ODE against calls of the network, and spacings of steps."

from functools import cache, cached_property, partial

import torch

from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision
from t2i_course.core.metrics import RandomFeatures, distinct, evaluate, frechet, judge_for, real_floor
from t2i_course.core.sources import load
from t2i_course.diffusion.ddpm import drawer, guided
from t2i_course.diffusion.samplers import GRIDS, SAMPLERS, heun, solver_errors, steps_for, uniform

RUNS = dict(
    mnist=dict(recipe="ddpm", data="mnist", images=1_000_000, changes=dict(target="v"), ship="mnist_ddpm")
)
CALLS = (5, 8, 10, 15, 20, 50)
SEEDS = 10  # of noise, on one model
SEED = 20  # of the real pictures, as in the protocol
SWEEP = dict(
    smoke=dict(
        n=16,  # drawings of a noise seed
        nfe=(3, 5),  # calls of the network
        few=(5,),  # those at which spacings are compared
        pictures=4,  # that are followed to the solution of the ODE
        fine=6,  # steps of this solution
    ),
    demo=dict(n=400, nfe=CALLS, few=(10, 20), pictures=20, fine=100),
    full=dict(n=5_000, nfe=CALLS + (100, 250), few=(10, 20), pictures=100, fine=200),
)


class OnModel:
    "What is measured on one finished run: its data, its judge and a row for each way to draw"

    def __init__(
        self,
        run,  # a Finished
        n: int,  # drawings of a row
    ):
        self.run, self.n = run, n

    @property
    def data(self):
        return _load(self.run.config.data)

    @property
    def device(self):
        return next(self.run.model.net.parameters()).device

    def real(self, split: str, most: int):
        "Real pictures of a split, each once, with what they show"
        return self.data.batch(split, Draws(SEED, torch.arange(min(most, distinct(self.data, split)))))

    @cached_property
    def details(self):
        "Features that see blur, which a judge does not: they are random, so they ignore nothing"
        return RandomFeatures(self.real("train", 2_000).x)

    @cached_property
    def unseen(self) -> dict:
        "Features of the test pictures, which neither the model nor the judge learned from"
        x = self.real("test", 10_000).x
        return dict(fd_unseen=judge_for(self.data).features(x), fd_detail=self.details(x))

    def setting(self, **more) -> dict:
        "What all arms share, and what real pictures get in the place of the drawings"
        judge, both, floors = judge_for(self.data), [self.real(k, 10_000) for k in ("test", "train")], {}
        labels = torch.cat([b.attrs[next(iter(judge.attributes))] for b in both])
        seen = dict(fd_unseen=judge.features, fd_detail=self.details)
        for name, test in self.unseen.items():
            pool = torch.cat([test.double(), seen[name](both[1].x).double()])
            floors[f"{name}_floor"] = real_floor(pool, self.n, len(test), labels)["fd_floor"]
        about = dict(model=f"{self.run.config.recipe}, target {self.run.config.target}", guidance=1.0)
        about |= dict(data=self.data.name, images=self.run.config.images, n=self.n) | floors
        return about | dict(precision=best_precision(), **more)

    def full_row(self, sampler, ts, seed, **about) -> dict:
        "A row of the protocol, and the distances to unseen pictures"
        den, drawn = self.run.model, []
        paint = drawer(den, self.run.tok, self.run.config.shape, ts, sampler=sampler)

        def draw(captions, seed):
            drawn.append(paint(captions, seed).cpu().clamp(-1, 1))
            return drawn[-1]

        row = evaluate(draw, self.data, judge_for(self.data), self.n, seed, n_heldout=0)
        row["fd_unseen"] = frechet(judge_for(self.data).features(drawn[0]), self.unseen["fd_unseen"])
        row["fd_detail"] = frechet(self.details(drawn[0]), self.unseen["fd_detail"])
        return row | dict(params=parameters(den.net), images=self.run.config.images) | about

    def row(self, sampler, grid, n, seed, **about) -> dict:
        "The numbers of a sampler that are compared: the same captions for all, start noise by the seed"
        o = self.full_row(sampler, grid(self.run.model.process, n), seed)
        keys = ("fd", "fd_unseen", "fd_detail", "precision", "recall")
        return {k: o[k] for k in keys} | dict(obedience=o["obedience"]["all"]) | about

    def pictures(self, split, n, seed):
        "Pictures of a split, on the device of the model"
        return self.data.batch(split, Draws(seed, torch.arange(n)))


@cache
def _load(name):
    return load(name)


def calls_of(sampler, nfe: int) -> dict:
    "Steps, and the calls that they really are"
    n = steps_for(sampler, nfe)
    return dict(steps=n, calls=2 * n - 1 if sampler is heun else n)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=tuple(range(10)),  # of the start noise
    mnist=None,  # the run that everything is measured on
):  # yields ('key.path', make), and make() gives the value
    "Solvers against calls of the network; spacings; distance from the solution of the ODE"
    s = SWEEP[scale]
    on = OnModel(mnist, s["n"])

    def look(name, grid, nfe, seed):
        about = calls_of(SAMPLERS[name], nfe)
        return on.row(SAMPLERS[name], GRIDS[grid], about["steps"], seed, **about)

    @cache
    def solved(grid, seed):
        den, labels = mnist.model, on.pictures("test", s["pictures"], seed).captions
        noise = Draws(seed, torch.arange(len(labels))).normal("start", *mnist.config.shape).to(on.device)
        predict = guided(den, mnist.tok(labels))
        return solver_errors(predict, den.process, noise, s["nfe"], s["fine"], GRIDS[grid])

    def whole(seed):
        ts, about = uniform(None, 20), dict(recipe="ddpm, target v, dpmpp_2m", nfe=20)
        return on.full_row(SAMPLERS["dpmpp_2m"], ts, seed, **about)

    yield "setting", partial(on.setting, nfe=list(s["nfe"]), pictures=s["pictures"], fine=s["fine"])
    for seed in seeds:
        yield f"rows.seed{seed}", partial(whole, seed)
        for name in SAMPLERS:
            for nfe in s["nfe"]:
                yield f"nfe.{name}.{nfe}.seed{seed}", partial(look, name, "uniform", nfe, seed)
        for grid in GRIDS:
            for name in SAMPLERS:
                yield (
                    f"solver.{grid}.{name}.seed{seed}",
                    lambda grid=grid, name=name, seed=seed: solved(grid, seed)[name],
                )
                for nfe in s["few"] if grid != "uniform" else ():
                    yield f"spacing.{grid}.{name}.{nfe}.seed{seed}", partial(look, name, grid, nfe, seed)
