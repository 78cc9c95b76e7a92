"""Run folders: what a training run leaves on disk, saved whole or not at all, and taken up again exactly."""

import hashlib
import json
import os
import time
from pathlib import Path

from safetensors import safe_open

from t2i_course.core.files import CourseError, write_whole
from t2i_course.core.guards import Stopped, asked_to_stop
from t2i_course.core.sources import is_path
from t2i_course.core.training import ALONE


# what every config.json says
NEEDED = ("recipe", "data", "shape", "images", "seconds", "seed", "precision", "threads")


def read_config(
    run,  # a run folder
) -> dict:  # its config.json
    "The settings of a run; raises CourseError when the folder is not a run"
    path = Path(run) / "config.json"
    if not path.is_file():
        raise CourseError(
            f"{run} is not a run folder (it has no config.json). "
            f"Make one with: t2i train flow_matching --out {run}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CourseError(f"{path} is not valid JSON ({e}). Train again into another folder.") from e
    missing = [k for k in NEEDED if not isinstance(config, dict) or k not in config]
    if missing:
        raise CourseError(f"{path} lacks {', '.join(missing)}. Train again into another folder.")
    return config


def model_hash(
    run,  # run folder
) -> str:  # sha256 of its model, as the file says
    "What a run that builds on this one remembers of it"
    path = Path(run) / "model.safetensors"
    if not path.is_file():
        raise CourseError(
            f"{run} has no trained model: finish it with t2i train --resume --out {run}, or put it back"
        )
    try:
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
        return json.loads(header.get("note", "{}")).get("sha256") or header.get("sha256")
    except Exception as e:
        raise CourseError(f"{path} cannot be read ({e}): it is damaged. Take it from a backup.") from e


def config_hash(
    config: dict,  # settings of a run
) -> str:  # 16 hex digits
    "Ties checkpoints and models to the settings they were made with; where folders lie does not matter,"
    "they may be moved"
    config = {k: v for k, v in config.items() if k != "codec" and not (k == "data" and is_path(v))}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def belongs(
    note: dict,  # of a checkpoint or model
    config: dict,  # settings of a run
) -> bool:
    "Was it made with these settings? The hash of earlier versions held the places of folders too"
    whole = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    return note.get("config") in (config_hash(config), whole)


def codec_place(
    run,  # run folder
    config: dict,  # its settings
) -> Path:  # run folder of the codec that it was trained with; None when there is none
    "Written down as seen from the run, so that both can be moved together"
    if not config.get("codec"):
        return None
    path = Path(config["codec"])  # earlier versions wrote the whole path
    return path if path.is_absolute() else Path(os.path.normpath(Path(run).resolve() / path))


def codec_run(
    run,  # run folder
    config: dict,  # its settings
) -> Path:  # run folder of its codec, None when there is none
    "The same, and still the codec that the run was trained with"
    path = codec_place(run, config)
    if path is None:
        return None
    if not (path / "config.json").is_file():
        raise CourseError(
            f"{run} uses the codec of {path}, which is not there: put it back, move both together, "
            f"or write down its new place with: t2i train --resume --out {run} --codec RUN"
        )
    if config.get("codec_model") not in (None, model_hash(path)):
        raise CourseError(
            f"{run} was trained with another codec than the one that is now in {path} "
            "(the hash of its model differs): put the old one back, or train again"
        )
    return path


def seen_from(
    run,  # run folder
    path,  # another folder
) -> str:  # the way there
    "The path of a folder as seen from a run"
    path = Path(path).resolve()
    try:
        return Path(os.path.relpath(path, Path(run).resolve())).as_posix()
    except ValueError:
        return str(path)  # on another drive


def follow(
    state,  # a State of core.training
    records,  # the generator `train(state, ...)`
    run,  # run folder
    config: dict,  # settings of the run; a checkpoint of another config is refused
    extra: dict = None,  # further tensors to keep with the run (a fitted skip)
    every: float = 20.0,  # seconds between checkpoints
    ranks=ALONE,  # the processes that share the work: they save together
):  # yields the records
    "Train with a safety net: checkpoints as time passes, on Ctrl-C, on SIGTERM and at the end"

    def save():
        ranks.save(state, Path(run), dict(config=config_hash(config)), extra)

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
    config: dict,  # settings of the run
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
