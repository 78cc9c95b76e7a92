"""Training as a command: a new run or one that goes on, alone or shared among processes."""

import os
import shlex
from pathlib import Path

from t2i_course.core.files import CourseError, between, say
from t2i_course.core.guards import Stopped, same_threads
from t2i_course.core.runfiles import read_config
from t2i_course.core.sources import is_path
from t2i_course.core.training import ALONE
from t2i_course.run.data import are_latents
from t2i_course.run.fit import How, fit_run
from t2i_course.run.same import PLAN, keep_plan, planned
from t2i_course.run.settings import draft, given_for, holds_run, needs, run_folder, say_needs


@same_threads()
def train_run(
    recipe=None,  # name of a recipe; default flow_matching
    data=None,  # name of a data set, or a folder as ./FOLDER; default painted
    scale=None,  # smoke, demo or full; default T2I_SCALE, else demo
    seconds=None,  # wall time of training, with everything that is fitted before it
    images=None,  # or images seen, the clock that makes a run repeatable; of both, whichever ends first
    seed=None,  # of every random number; default 0
    out=None,  # run folder; default runs/RECIPE-DATA-SEED
    resume=False,  # go on with the run in `out`: what is given must be what it was started with
    precision=None,  # auto, fp32, bf16 or fp16; default auto
    changes=None,  # field -> value: of the recipe, replaced in a new run
    items=(),  # the same as text: lr=1e-4
    use=None,  # role -> finished run that this one stands on; what is needed and not given is trained first
    size=None,  # side of a folder's pictures, which are cropped and resized; default 32
    shard=None,  # ddp or fsdp, under torchrun: how the processes share the work
    **how,  # what does not change the model, see `run.fit.How`
) -> Path:  # the run folder
    "Train a recipe; leaves config.json, model.safetensors, a checkpoint and log.jsonl"
    between(seconds, 1e-3, 1e8, "--seconds")
    between(images, 1, 1e12, "--images", whole=True)
    between(seed, 0, 2**62, "--seed", whole=True)
    given = dict(recipe=recipe, data=data, scale=scale, seconds=seconds, images=images, seed=seed)
    given |= dict(precision=precision, changes=changes, items=items, use=use, size=size)
    out = Path(out or default_run(recipe, data, seed))
    ranks = sharers(shard)
    try:
        train_all(out, resume, given, How(**how, shard=shard), ranks)
    except Stopped as e:  # perhaps in a run that this one needs: the command is about this one
        raise Stopped(f"{e}: {again(out, shard)}") from e
    ranks.close()
    return out


def again(
    out: Path,  # run folder
    shard=None,  # ddp or fsdp
) -> str:
    "The command that goes on with a run"
    if shard is None:
        return shlex.join(["t2i", "train", "--resume", "--out", str(out)])
    module = f"-m t2i_course train --resume --out {shlex.quote(str(out))} --shard {shard}"
    return f"torchrun --nproc-per-node {os.environ.get('WORLD_SIZE', 2)} {module}"


def train_all(
    out: Path,  # run folder
    resume: bool,  # may it hold a run?
    given: dict,  # option -> value, None where it was not given
    how,  # a How
    ranks,  # the processes that share the work
    ds=None,  # the pictures, if they are open already
):
    "The runs that are needed and were not given, one after the other, then the run itself"
    given, shares = dict(given), {}
    plan, config = [], None
    if not ranks.rank and not holds_run(out):
        if resume:
            if not (out / PLAN).exists():
                say(f"{out} holds no run yet: starting from the beginning")
            given = planned(out, given)
        config, ds = draft(out, given, ds)
        for need in needs(config):
            plan.append((*need, given_for(need, config, given)))
            say_needs(needed_run(out, need.role), need, config)
        if plan and (resume or not any(holds_run(needed_run(out, role)) for role, *_ in plan)):
            keep_plan(out, config, given)
    for role, *_, share, own in ranks.tell(plan):
        folder = needed_run(out, role)
        train_all(folder, resume, own, how, ranks, None if are_latents(own["data"] or "") else ds)
        given["use"] = (given["use"] or {}) | {role: str(folder)}
        shares[role] = share
    if shares:  # now it is known what the run stands on
        given, config = given | dict(shares=shares), None
    train_one(out, resume, given, how, ranks, config, ds)


def needed_run(out: Path, role: str) -> Path:
    "Where a run that another one needs is trained"
    return out.with_name(f"{out.name}-{role}")


def train_one(out: Path, resume: bool, given: dict, how, ranks, config=None, ds=None):
    "One run; process 0 writes its config, or stops with a sentence, before the others read it"
    if ranks is ALONE and any(out.glob("checkpoint-*")):
        from t2i_course.scale.fsdp import One

        ranks = One()  # several processes have begun this run
    if ranks.rank:
        ranks.wait()
        return fit_run(out, read_config(out), how, ranks)
    with run_folder(out, resume, given, config, ds) as (config, ds):
        ranks.wait()
        fit_run(out, config, how, ranks, ds)


def default_run(recipe, data, seed) -> str:
    "runs/RECIPE-DATA-SEED, without what a file name cannot hold"
    name = Path(data or "painted")
    name = (name.expanduser().resolve() if is_path(data or "painted") else name).name
    name = "".join("_" if c in '<>:"|?*' else c for c in name)
    return f"runs/{recipe or 'flow_matching'}-{name}-{seed or 0}"


def sharers(
    shard=None,  # ddp, fsdp or None
):  # a scale.fsdp.Ranks, or Alone
    "The processes that torchrun has started, or this one alone"
    n = int(os.environ.get("WORLD_SIZE", 1))
    if shard is None:
        if n > 1:
            raise CourseError(
                f"torchrun has started {n} processes: say how they share the work, --shard ddp or --shard "
                f"fsdp"
            )
        return ALONE
    if "RANK" not in os.environ:
        raise CourseError(
            f"--shard {shard} needs processes: torchrun --nproc-per-node 2 -m t2i_course train ... "
            f"--shard {shard}"
        )
    from t2i_course.scale.fsdp import Ranks

    return Ranks(minutes=30)  # process 0 may have a large folder to read before the others see the config
