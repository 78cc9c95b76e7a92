"The sweeps of the chapter on fresh noise: SDE samplers against calls of the network, and how much noise."

from functools import partial

from t2i_course.diffusion.ddpm import sample
from t2i_course.diffusion.samplers import uniform
from t2i_course.diffusion.sde import SDE_SAMPLERS
from t2i_course.sweeps.diffusion.samplers import CALLS, OnModel

RUNS = dict(mnist="samplers")  # the run of that sweep: the two files are compared seed by seed
SEEDS = 10  # of noise, on one model
SWEEP = dict(
    smoke=dict(n=16, nfe=(3, 5), steps=(4,)),
    demo=dict(n=400, nfe=CALLS, steps=(10, 50)),
    full=dict(n=5_000, nfe=CALLS + (100, 250), steps=(10, 50, 250)),
)
SHARES = (25, 50, 75)  # hundredths of eta; 0 and 100 are `ddim` and `ancestral`


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=tuple(range(10)),  # of the start noise and of the fresh noise
    mnist=None,  # the run that everything is measured on
):  # yields ('key.path', make), and make() gives the value
    "Samplers with fresh noise against calls of the network; eta between the ODE and DDPM"
    s = SWEEP[scale]
    on = OnModel(mnist, s["n"])

    def look(name, nfe, seed):
        return on.row(SDE_SAMPLERS[name], uniform, nfe, seed, steps=nfe, calls=nfe)

    def dialled(share, n, seed):
        return on.row(partial(sample, eta=share / 100), uniform, n, seed, steps=n, calls=n)

    yield "setting", partial(on.setting, nfe=list(s["nfe"]), steps=list(s["steps"]))
    for seed in seeds:
        for name in SDE_SAMPLERS:
            for nfe in s["nfe"]:
                yield f"nfe.{name}.{nfe}.seed{seed}", partial(look, name, nfe, seed)
        for n in s["steps"]:
            for share in SHARES:
                yield f"eta.{n}.{share}.seed{seed}", partial(dialled, share, n, seed)
