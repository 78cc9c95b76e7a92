"""Runs: opened when they are finished, followed while they train, taken up again exactly."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from t2i_course.core.config import Config
from t2i_course.core.ema import freeze
from t2i_course.core.files import CourseError, between, load_tensors, write_whole
from t2i_course.core.guards import Stopped, asked_to_stop, undisturbed
from t2i_course.core.register import recipe
from t2i_course.core.runfiles import belongs, config_hash, model_hash, place_of, read_config
from t2i_course.core.training import ALONE, has_bf16, load_trained, pick_device


# ---- finished runs ----
def in_hardware(
    precision: str,  # fp32, bf16 or fp16
    device: str,
) -> bool:
    "Does the device compute in this precision? If not, it emulates it, many times more slowly than float32"
    if precision == "fp32":
        return True
    return has_bf16(device) if precision == "bf16" else not device.startswith("cpu")


@dataclass
class Finished:
    "A finished run: to draw with, or for another run to stand on"

    tok: object  # captions -> Cond
    model: object  # as the recipe builds it, with the averaged weights; nothing of it learns any more
    config: Config
    run: Path  # its folder

    def draw(
        self,
        captions,  # n texts; '' draws without condition
        seed=0,  # of the noise
        each=None,  # each(k) hears of every k pictures that are drawn
        **options,  # of the model; None where the config's own value is wanted
    ) -> torch.Tensor:  # (n c h w) in [-1,1]
        "Pictures of captions; the noise of a picture depends on the seed and its place alone"
        config = self.config | self.checked(options)
        if (
            getattr(config, "guidance", None) == 0
        ):  # outside the guidance interval, among candidates and in retrieval too
            captions, config = [""] * len(captions), config | dict(guidance=self.config.guidance or 1.0)
        low = torch.float16 if config.precision == "fp16" else torch.bfloat16
        device = pick_device()
        draw = self.model.painter(self.tok, config)
        narrow = config.precision != "fp32" and in_hardware(config.precision, device)
        with torch.autocast(torch.device(device).type, low, enabled=narrow):
            return draw(captions, seed, each).clamp(-1, 1)

    def checked(
        self,
        options: dict,  # name -> value, None where it was not given
    ) -> dict:  # those that were given
        "Options of the model, each in its range"
        given = {k: v for k, v in options.items() if v is not None}
        for name, value in given.items():
            if name not in self.model.options:
                have = ", ".join(self.model.options)
                raise CourseError(f"{self.config.recipe} has no option {name}; it has {have or 'none'}")
            low, high, whole, _ = self.model.options[name]
            between(value, low, high, f"--{name.replace('_', '-')}", whole)
        return given


def open_run(
    run,  # a run folder
) -> Finished:
    "A finished run, with all it stands on; a damaged, changed or unfinished one is refused with a sentence"
    run, config = Path(run), read_config(run)
    path = run / "model.safetensors"
    if not path.exists():
        raise CourseError(f"{run} is not trained to the end yet: go on with t2i train --resume --out {run}")
    tensors, note = load_tensors(path)
    if not belongs(note, config):
        raise CourseError(
            f"{path} belongs to other settings than {run}/config.json. Train again into another folder."
        )
    uses = open_uses(run, config)
    with undisturbed():
        tok, model = recipe(config.recipe).build(config, **uses)
    freeze(model)

    def own(prefix):
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    device = pick_device()
    try:
        load_trained(model.net, own("net."))
        model.net.to(device).eval().requires_grad_(False)
        model.to(device)
        model.extra = {k: v.to(device) for k, v in own("extra.").items()}
    except (RuntimeError, KeyError) as e:
        why = str(e).splitlines()[0]
        raise CourseError(
            f"{path} belongs to another network ({why}), of another version of {config.recipe} or of this "
            "package: train again into another folder"
        ) from e
    return Finished(tok, model, config, run)


def open_uses(
    run,  # a run folder, which need not be finished
    config: Config,  # its settings
) -> dict:  # role -> Finished
    "The finished runs that a run stands on, still the ones that it was trained with"
    found = {}
    for role, used in config.uses.items():
        path = place_of(run, used["run"])
        if not (path / "config.json").is_file():
            raise CourseError(
                f"{run} uses the {role} of {path}, which is not there: put it back, move both together, "
                f"or write down its new place with: t2i train --resume --out {run} --use {role}=RUN"
            )
        if used["model"] != model_hash(path):
            raise CourseError(
                f"{run} was trained with another {role} than the one that is now in {path} "
                "(the hash of its model differs): put the old one back, or train again"
            )
        found[role] = open_run(path)
    return found


# ---- a run that trains ----
def follow(
    state,  # a State of core.training
    records,  # the generator `train(state, ...)`
    run,  # run folder
    config: Config,  # settings of the run; a checkpoint of another config is refused
    extra=dict,  # extra() gives further tensors to keep with the run
    every: float = 20.0,  # seconds between checkpoints
    ranks=ALONE,  # the processes that share the work: they save together
):  # yields the records
    "Train with a safety net: checkpoints as time passes, on Ctrl-C, on SIGTERM and at the end"

    def save():
        ranks.save(state, Path(run), dict(config=config_hash(config)), extra())

    last = time.monotonic()
    with asked_to_stop() as stop:
        for r in records:
            yield r
            asked, late = ranks.sum(stop(), ranks.rank == 0 and time.monotonic() - last > every)
            if asked:
                save()
                raise Stopped(f"stopped at {r.images:,} images and saved; go on with --resume")
            if late:
                save()
                last = time.monotonic()
        save()


def resume(
    state,  # a fresh State of the same network
    run,  # run folder
    config: Config,  # settings of the run
    ranks=ALONE,  # the processes that share the work: they load together
) -> dict:  # the extra tensors; None when there is no checkpoint yet
    "Load the last checkpoint into the state; clears away what a killed process left half-written"
    if not ranks.rank:
        for part in Path(run).glob(".*.part"):
            part.unlink(missing_ok=True)
    return ranks.load(state, Path(run), lambda note: belongs(note, config))


def cut_log(
    run,  # run folder
    step: int,  # of the checkpoint that training goes on from
):
    "Drop the lines of log.jsonl that a resumed run will write again, and one cut short by a kill"
    path = Path(run) / "log.jsonl"
    if not path.exists():
        return

    def keeps(line):
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    lines = path.read_bytes().splitlines(keepends=True)  # closed before it is replaced
    write_whole(path, lambda p: p.write_bytes(b"".join(l for l in lines if keeps(l))))
