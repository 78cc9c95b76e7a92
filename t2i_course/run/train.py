"""Training as a command: a new run or one that goes on, alone or shared among processes."""

import json
import os
import time
from datetime import date
from pathlib import Path

import torch

from t2i_course.core.ema import state_for
from t2i_course.core.files import CourseError, between, load_tensors, save_tensors, say, write_json
from t2i_course.core.guards import same_threads, undisturbed
from t2i_course.core.runs import config_hash, cut_log, follow, read_config
from t2i_course.core.runs import resume as take_up
from t2i_course.core.training import ALONE, feed, pick_device, spent, train
from t2i_course.run.data import expect, run_data
from t2i_course.run.places import default_run
from t2i_course.run.progress import progress_bar
from t2i_course.run.register import module
from t2i_course.run.settings import run_folder
from t2i_course.run.stamp import in_hardware


@same_threads()
def train_run(
    recipe=None,  # see RECIPES; default flow_matching
    data=None,  # name of a data set, or a folder as ./FOLDER; default painted
    scale=None,  # smoke, demo or full; default T2I_SCALE, else demo
    seconds=None,  # wall time of training, fitting a skip included
    images=None,  # or images seen, the clock that makes a run repeatable; of both, whichever ends first
    seed=None,  # of every random number; default 0
    out=None,  # run folder; default runs/RECIPE-DATA-SEED
    resume=False,  # go on with the run in `out`: what is given must be what it was started with
    precision=None,  # auto, fp32, bf16 or fp16; default auto
    quiet=False,  # no progress bar
    save_every=20.0,  # seconds between checkpoints
    changes=None,  # entries of the recipe to replace in a new run
    codec=None,  # data of latents: the run of the codec that made them
    size=None,  # side of a folder's pictures, which are cropped and resized; default 32
    shard=None,  # ddp or fsdp, under torchrun: how the processes share the work
    **outside,  # what comes from outside the network, see `fit_run`
) -> Path:  # the run folder
    "Train a recipe; leaves config.json, model.safetensors, a checkpoint and log.jsonl"
    between(seconds, 1e-3, 1e8, "--seconds")
    between(images, 1, 1e12, "--images", whole=True)
    between(seed, 0, 2**62, "--seed", whole=True)
    given = dict(
        recipe=recipe,
        data=data,
        scale=scale,
        seconds=seconds,
        images=images,
        seed=seed,
        precision=precision,
        changes=changes,
        codec=codec,
        size=size,
    )
    out = Path(out or default_run(recipe, data, seed))
    ranks = sharers(shard, out)
    if ranks.rank:  # process 0 has written the config, or has stopped with a sentence
        ranks.wait()
        fit_run(out, read_config(out), quiet, save_every, ranks, shard, **outside)
    else:
        with run_folder(out, resume, given) as (config, ds):
            ranks.wait()
            fit_run(out, config, quiet, save_every, ranks, shard, ds=ds, **outside)
    ranks.close()
    return out


def sharers(
    shard=None,  # ddp, fsdp or None
    out=None,  # run folder
) -> object:  # a scale.fsdp.Ranks, or Alone
    "The processes that torchrun has started, or this one alone"
    n = int(os.environ.get("WORLD_SIZE", 1))
    if shard is None:
        if n > 1:
            raise CourseError(
                f"torchrun has started {n} processes: say how they share the work, --shard ddp or --shard "
                f"fsdp"
            )
        if not any(Path(out).glob("checkpoint-*")):
            return ALONE
        from t2i_course.scale.fsdp import One

        return One()  # several processes have begun the run
    if "RANK" not in os.environ:
        raise CourseError(
            f"--shard {shard} needs processes: torchrun --nproc-per-node 2 -m t2i_course train ... "
            f"--shard {shard}"
        )
    from t2i_course.scale.fsdp import Ranks

    return Ranks(minutes=30)  # process 0 may have a large folder to read before the others see the config


def fit_run(
    out: Path,  # run folder
    config: dict,  # everything that makes the run what it is
    quiet: bool = False,  # no progress bar
    save_every: float = 20.0,  # seconds between checkpoints
    ranks=ALONE,  # the processes that share the work
    shard: str = None,  # ddp or fsdp
    checkpointing: bool = False,  # compute activations again instead of keeping them
    compiled: bool = False,  # torch.compile, block by block
    accumulate: int = 1,  # micro-batches a step
    ds=None,  # the run's pictures, where they are open already
):
    "The training: what the model becomes is in the config, how the work is done in the other arguments"
    device, (ds, same) = pick_device(), (ds, True) if ds else run_data(out, config)
    if not same:
        raise CourseError(
            f"the pictures or captions in {config['data']} are not those that {out} was started with: "
            f"some were added, "
            "removed or changed. Put them back, or train into another folder."
        )
    if ranks.rank == 0 and not in_hardware(config["precision"], device):
        say(f"no units for {config['precision']} here: it is emulated, many times more slowly than fp32")
    if ranks.size == 1:
        torch.set_num_threads(min(config["threads"], os.cpu_count() or 1))
    with undisturbed():
        torch.manual_seed(config["seed"])
        tok, den = module(config["recipe"]).build(config)
    den.net.to(device)
    den.to(device)
    called = den.net
    if shard or checkpointing or compiled:
        if not callable(den.loss):
            raise CourseError(
                f"{config['recipe']} trains in turns, each with weights of its own: --shard, --checkpointing "
                "and --compile are for recipes with one loss, such as ddpm, flow_matching or dit"
            )
        from t2i_course.scale.fsdp import parallelize

        called = parallelize(
            den.net, shard or "none", config["precision"], checkpointing, compiled, ranks if shard else None
        )
    state = state_for(den, config, config["precision"])
    den.net = called
    saved = take_up(state, out, config, ranks)
    if saved is not None:
        if finished(out, state, config):
            return (
                say(f"{out} is trained to the end already: nothing was changed") if ranks.rank == 0 else None
            )
        if ranks.rank == 0:
            say(f"going on at {state.images:,} images")
    if ranks.rank == 0:
        cut_log(out, state.step)
    if ranks.rank == 0 and saved is None:
        expect(ds, config["images"])
    head_start(state, ds, tok, den, config, saved, ranks, quiet)
    tables = den.skip.tables if getattr(den, "skip", None) is not None else {}
    records = train(
        state,
        den.loss,
        feed(ds, tok),
        images=config["images"],
        seconds=config["seconds"],
        accumulate=accumulate,
        batch=config["batch"],
        seed=config["seed"],
        clip=config.get("clip", 1.0),
        ranks=ranks,
    )
    bar = progress_bar(state, config, quiet or ranks.rank)
    with open(out / "log.jsonl" if ranks.rank == 0 else os.devnull, "a", encoding="utf-8") as log:
        for r in follow(state, records, out, config, tables, save_every, ranks):
            if shard and not quiet and r.step == 1:
                say(share_line(state, ranks), everyone=True)
            bar(r)
            if r.step % 20 == 0:
                print(log_line(r), file=log, flush=True)
    bar(None)
    write_model(out, state, tables, config, getattr(den, "artist", den.net), ranks)


def share_line(state, ranks) -> str:
    "What this process holds of the run"
    from t2i_course.scale.fsdp import held

    parts = ", ".join(f"{k} {v / 2**20:.2f} MB" for k, v in held(state).items())
    return f"process {ranks.rank} of {ranks.size} holds: {parts}"


def finished(out: Path, state, config: dict) -> bool:
    "Is the model of a run written and whole, and its budget used?"
    if spent(state, config["images"], config["seconds"]) < 1 or not (out / "model.safetensors").exists():
        return False
    try:
        load_tensors(out / "model.safetensors")
    except CourseError:
        say(f"{out / 'model.safetensors'} is damaged: writing it again from the checkpoint")
        return False
    return (out / "train.json").exists()


def head_start(state, ds, tok, den, config: dict, saved: dict, ranks=ALONE, quiet=False):
    "Fit the closed-form skip, or take it from the checkpoint; its time counts as training"
    if getattr(den, "skip", None) is None:
        return
    if saved:
        den.skip.tables = {k: v.to(state.device) for k, v in saved.items()}
        return
    from t2i_course.diffusion.preconditioning import fit_skip

    if ranks.rank == 0 and not quiet:
        say(f"fitting the closed form to {config['fit_images']:,} pictures ...")
    start = time.perf_counter()
    fit_skip(den, ds, tok, config["fit_images"], config["seed"])
    ranks.same(den.skip.tables)  # each process has fitted it; the last bit may differ from one to the other
    state.seconds += ranks.first(time.perf_counter() - start)


def log_line(r) -> str:
    "A record as a line of log.jsonl"
    return json.dumps(dict(step=r.step, images=r.images, seconds=round(r.seconds, 2), loss=round(r.loss, 5)))


def write_model(out: Path, state, tables: dict, config: dict, artist, ranks=ALONE):
    "The averaged weights last: where model.safetensors is, the run is complete"
    shadow = {
        k: ranks.whole(v) for k, v in state.ema.shadow.items()
    }  # together, before process 0 goes on alone
    if ranks.rank:
        return
    params, trained = (
        sum(p.numel() for p in m.parameters()) for m in (artist, state.net)
    )  # a GAN draws with half of it
    write_json(
        out / "train.json",
        dict(
            images=state.images,
            seconds=state.seconds,
            steps=state.step,
            params=params,
            params_trained=trained,
            date=str(date.today()),
        ),
    )
    tensors = {f"net.{k}": v for k, v in shadow.items()}
    tensors |= {f"skip.{k}": v for k, v in tables.items()}
    save_tensors(out / "model.safetensors", tensors, config=config_hash(config))
