"""The training of a run, from its settings to its model."""

import json
import os
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch

from t2i_course.core.counting import parameters
from t2i_course.core.ema import state_for
from t2i_course.core.files import CourseError, load_tensors, save_tensors, say, write_json
from t2i_course.core.guards import undisturbed
from t2i_course.core.register import recipe
from t2i_course.core.runfiles import belongs, config_hash
from t2i_course.core.runs import cut_log, follow, in_hardware, open_uses, resume
from t2i_course.core.training import ALONE, feed, pick_device, spent, train
from t2i_course.run.data import expect, run_data
from t2i_course.run.progress import progress_bar
from t2i_course.run.settings import clock


@dataclass
class How:
    "How a run is trained: nothing of it changes what the model becomes"

    quiet: bool = False  # no progress bar
    save_every: float = 20.0  # seconds between checkpoints
    shard: str | None = None  # ddp or fsdp: the processes of torchrun share the work
    checkpointing: bool = False  # compute activations again instead of keeping them
    compiled: bool = False  # torch.compile, block by block
    accumulate: int = 1  # micro-batches a step


def fit_run(
    out: Path,  # run folder
    config,  # everything that makes the run what it is
    how: How,
    ranks=ALONE,  # the processes that share the work
    ds=None,  # the run's pictures, where they are open already
):
    "Train a run to its end, and write its model"
    first, device = ranks.rank == 0, pick_device()
    uses = open_uses(out, config)
    ds = ds or same_data(out, config, uses)
    if ranks.size > 1 and complete(out, config):  # whoever trained it: no checkpoint is needed
        return say(f"{out} is trained to the end already: nothing was changed")
    if first and not in_hardware(config.precision, device):
        say(f"no units for {config.precision} here: it is emulated, many times more slowly than fp32")
    if ranks.size == 1:
        torch.set_num_threads(min(config.threads, os.cpu_count() or 1))
    with undisturbed():
        torch.manual_seed(config.seed)
        tok, model = recipe(config.recipe).build(config, **uses)
    model.net.to(device)
    model.to(device)
    called = wrapped(model, config, how, ranks)
    state = state_for(model, config, config.precision)
    model.net = called
    saved = resume(state, out, config, ranks)
    if saved is not None and finished(out, state, config):
        return say(f"{out} is trained to the end already: nothing was changed")
    if saved is not None:
        say(f"going on at {state.images:,} images")
        model.extra = {k: v.to(device) for k, v in saved.items()}
    if first:
        cut_log(out, state.step)
    if saved is None:
        say_expectation(ds, config)
        prepare(state, model, ds, tok, config, ranks)
    write_down(out, state, model, feed(ds, tok), config, how, ranks)
    write_model(out, state, model, config, ranks)


def same_data(out: Path, config, uses: dict):
    "The pictures of a run, which have to be those that it was started with"
    ds, same = run_data(out, config, uses)
    if same:
        return ds
    raise CourseError(
        f"the pictures or captions in {config.data} are not those that {out} was started with: some were "
        "added, removed or changed. Put them back, or train into another folder."
    )


def say_expectation(ds, config):
    expect(ds, clock(config)[0])


def wrapped(model, config, how: How, ranks):
    "What is called in place of the network, where it is sharded, checkpointed or compiled"
    if not (how.shard or how.checkpointing or how.compiled):
        return model.net
    if not callable(model.loss):
        raise CourseError(
            f"{config.recipe} trains in turns, each with weights of its own: --shard, --checkpointing "
            "and --compile are for recipes with one loss, such as ddpm, flow_matching or dit"
        )
    from t2i_course.scale.fsdp import parallelize

    return parallelize(
        model.net,
        how.shard or "none",
        config.precision,
        how.checkpointing,
        how.compiled,
        ranks if how.shard else None,
    )


def prepare(state, model, ds, tok, config, ranks=ALONE):
    "Whatever is fitted before the first step; its time counts as training"
    start = time.perf_counter()
    model.prepare(ds, tok, config)
    ranks.same(model.extra)  # each process has fitted it; the last bit may differ from one to the other
    state.seconds += ranks.first(time.perf_counter() - start)


def write_down(out: Path, state, model, data, config, how: How, ranks):
    "Train, with a bar, a log and checkpoints"
    images, seconds = clock(config)
    records = train(
        state,
        model.loss,
        data,
        images=images,
        seconds=seconds,
        accumulate=how.accumulate,
        batch=config.batch,
        seed=config.seed,
        clip=config.clip,
        ranks=ranks,
    )
    bar = progress_bar(state, images, seconds, how.quiet or ranks.rank)
    with open(out / "log.jsonl" if ranks.rank == 0 else os.devnull, "a", encoding="utf-8") as log:
        for r in follow(state, records, out, config, lambda: model.extra, how.save_every, ranks):
            if how.shard and not how.quiet and r.step == 1:
                say(share_line(state, ranks), everyone=True)
            bar(r)
            if r.step % 20 == 0:
                print(log_line(r), file=log, flush=True)
    bar(None)


def share_line(state, ranks) -> str:
    "What this process holds of the run"
    from t2i_course.scale.fsdp import held

    parts = ", ".join(f"{k} {v / 2**20:.2f} MB" for k, v in held(state).items())
    return f"process {ranks.rank} of {ranks.size} holds: {parts}"


def log_line(r) -> str:
    "A record as a line of log.jsonl"
    return json.dumps(dict(step=r.step, images=r.images, seconds=round(r.seconds, 2), loss=round(r.loss, 5)))


def finished(out: Path, state, config) -> bool:
    "Is the model of a run written and whole, and its budget used?"
    if spent(state, *clock(config)) < 1 or not (out / "model.safetensors").exists():
        return False
    try:
        load_tensors(out / "model.safetensors")
    except CourseError:
        say(f"{out / 'model.safetensors'} is damaged: writing it again from the checkpoint")
        return False
    return (out / "train.json").exists()


def complete(out: Path, config) -> bool:
    "Is a run at its end, as its files tell? Its checkpoint may be of another number of processes"
    try:
        numbers = json.loads((out / "train.json").read_text(encoding="utf-8"))
        note = load_tensors(out / "model.safetensors")[1]
    except (OSError, ValueError):
        return False
    used = SimpleNamespace(images=numbers["images"], seconds=numbers["seconds"])
    return belongs(note, config) and spent(used, *clock(config)) >= 1


def write_model(out: Path, state, model, config, ranks=ALONE):
    "The averaged weights last: where model.safetensors is, the run is complete"
    # together, before process 0 goes on alone
    tensors = {f"net.{k}": ranks.whole(v) for k, v in state.ema.shadow.items()}
    if ranks.rank:
        return
    artist = getattr(model, "artist", model.net)  # a GAN draws with half of what it trains
    numbers = dict(images=state.images, seconds=state.seconds, steps=state.step)
    numbers |= dict(params=parameters(artist))
    numbers |= dict(params_trained=sum(p.numel() for p in state.learning), date=str(date.today()))
    write_json(out / "train.json", numbers)
    tensors |= {f"extra.{k}": v for k, v in model.extra.items()}
    save_tensors(out / "model.safetensors", tensors, config=config_hash(config))
