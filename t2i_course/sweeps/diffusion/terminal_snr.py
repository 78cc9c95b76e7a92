"How bright a drawing each schedule, target, spacing and offset allows: the terminal SNR sweep."

from functools import lru_cache, partial

from t2i_course.core.experiments import Arm, best_precision, fit
from t2i_course.core.metrics import evaluate, load_judge, reference
from t2i_course.diffusion.ddpm import VP, drawer, sample, uniform_times
from t2i_course.diffusion.schedules import EDM, edm_times, log_normal, scaled_linear_betas
from t2i_course.diffusion.terminal_snr import (
    OnSphere,
    Papers,
    build,
    leading,
    make_loss,
    measure,
    offset_start,
    rescale_zero_terminal_snr,
    settings,
    trailing,
)

SWEEP = dict(  # training pictures, drawings, steps of the sampler, and few of them
    smoke=dict(images=96, n=24, steps=3, few=2),
    demo=dict(images=20_000, n=400, steps=25, few=10),
    full=dict(images=2_000_000, n=2_000, steps=50, few=10),
)


def trained_arm(
    config: dict,  # as from `settings`
    data,  # captioned pictures
    images: int,  # training pictures
    seed: int = 0,  # of weights, data and noise
    process=None,  # gives coefs(t)
    times=uniform_times,  # draws -> t
    plus: float = 1.0,  # see `snr_weight`
    offset: float = 0.0,  # strength of the offset noise
    precision: str = "fp32",  # or bf16
) -> Arm:
    "Train one arm"
    loss = partial(make_loss, plus=plus, offset=offset)
    return fit(partial(build, process=process, times=times), config, data, images, seed, precision, loss=loss)


def arms() -> dict:  # name -> what differs
    "Every model of the chapter"
    betas = scaled_linear_betas()
    chain, zero, edm = VP(betas), VP(rescale_zero_terminal_snr(betas)), OnSphere(EDM())
    return dict(
        eps=dict(process=chain, plus=0.0),
        v=dict(process=chain),
        offset05=dict(process=chain, offset=0.05),
        offset10=dict(process=chain, offset=0.1),
        zero=dict(process=zero),
        edm=dict(process=edm, times=log_normal(edm)),
        edm_up=dict(process=edm, times=log_normal(edm, 1.0)),
    )


def walks(
    name: str,  # of the arm
    process,  # its process
    steps: int,  # of the sampler
    few: int,  # a smaller number
    offset: float,  # strength of the offset noise in training
) -> dict:  # name -> times, sampler
    "The ways in which an arm is asked to draw; the first is the one measured in full"
    if name.startswith("edm"):
        return dict(trailing=(edm_times(steps, process), sample))
    out = dict(trailing=(trailing(steps), sample))
    if name in ("eps", "v", "zero"):
        out |= dict(leading=(leading(steps), sample))
    if name in ("v", "zero"):
        out |= dict(trailing_few=(trailing(few), sample), leading_few=(leading(few), sample))
        out |= dict(fresh=(trailing(steps), partial(sample, eta=1.0)))
    if offset:
        out |= dict(matched=(trailing(steps), offset_start(sample, offset)))
    return out


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "Every arm of `arms`, drawn from in every way of `walks`"
    s, data, judge = SWEEP[scale], Papers(), load_judge("painted")
    precision = best_precision()
    config, changes = settings(data, s["images"], scale), arms()
    ways = {k: walks(k, c["process"], s["steps"], s["few"], c.get("offset", 0.0)) for k, c in changes.items()}

    def setting():
        floor = reference(data, judge, s["n"])["floor"]["fd_floor"]
        return dict(s, w=1.0, eta=0.0, precision=precision, seeds=list(seeds), fd_floor=floor)

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(name, seed):
        return trained_arm(config, data, s["images"], seed, precision=precision, **changes[name])

    def drawn(name, way, seed):
        (ts, sampler), arm = ways[name][way], trained(name, seed)
        return drawer(arm.model, arm.tok, data.shape, ts, sampler=sampler)

    def brightness(name, way, seed):
        return measure(drawn(name, way, seed), data, judge, s["n"], seed)

    def row(name, way, seed):
        row = evaluate(drawn(name, way, seed), data, judge, s["n"], seed, s["n"] // 2)
        made = trained(name, seed).about | dict(recipe=f"terminal_snr.{name}")
        return row | made | dict(nfe=len(ways[name][way][0]) - 1)

    yield "setting", setting
    for seed in seeds:
        for name in changes:
            for k, way in enumerate(ways[name]):
                yield f"brightness.{name}.{way}.seed{seed}", partial(brightness, name, way, seed)
                if not k:
                    yield f"arms.{name}.seed{seed}", partial(row, name, way, seed)
