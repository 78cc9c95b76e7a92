"""What stands in a run folder: its config, the hash of its model, the ways to other folders."""

import hashlib
import json
import os
from pathlib import Path

from safetensors import safe_open

from t2i_course.core.config import Config, from_json, to_json
from t2i_course.core.files import CourseError, write_json
from t2i_course.core.register import recipe
from t2i_course.core.sources import is_path


def read_json(
    run,  # a run folder
) -> dict:  # its config.json as it stands there
    "Raises CourseError when the folder is not a run"
    path = Path(run) / "config.json"
    if not path.is_file():
        raise CourseError(
            f"{run} is not a run folder (it has no config.json). "
            f"Make one with: t2i train flow_matching --out {run}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CourseError(f"{path} is not valid JSON ({e}). Train again into another folder.") from e
    if not isinstance(values, dict) or "recipe" not in values:
        raise CourseError(f"{path} lacks recipe. Train again into another folder.")
    return values


def read_config(
    run,  # a run folder
) -> Config:  # its config.json, in the class of its recipe
    "The settings of a run, its data with their whole path; unknown and missing fields are refused"
    values = read_json(run)
    if is_path(values.get("data", "")):
        values["data"] = str(place_of(run, values["data"]))
    try:
        module = recipe(values["recipe"])
    except CourseError as e:
        raise CourseError(f"{run} was trained by a recipe that is not here: {e}") from e
    return from_json(module.Config, values, Path(run) / "config.json")


def write_config(
    run,  # an existing folder
    config: Config,  # its data with their whole path
):
    "config.json, with the data as seen from the run"
    values = to_json(config)
    if is_path(values["data"]):
        values["data"] = seen_from(run, values["data"])
    write_json(Path(run) / "config.json", values)


def config_hash(
    config: Config,  # settings of a run
) -> str:  # 16 hex digits
    "Ties checkpoints and models to their settings; where folders lie does not matter, they may be moved"
    values = to_json(config)
    values["uses"] = {role: used["model"] for role, used in values["uses"].items()}
    if is_path(values["data"]):
        del values["data"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def belongs(
    note: dict,  # of a checkpoint or model
    config: Config,  # settings of a run
) -> bool:
    "Was it made with these settings?"
    return note.get("config") == config_hash(config)


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
        return json.loads(header.get("note", "{}"))["sha256"]
    except Exception as e:
        raise CourseError(f"{path} cannot be read ({e}): it is damaged. Take it from a backup.") from e


def whole(
    path,  # as a user types it
) -> str:
    "The whole path of a folder"
    return str(Path(path).expanduser().resolve())


def seen_from(
    run,  # run folder
    path,  # another folder
) -> str:  # the way there
    "The path of a folder as seen from a run, so that both can be moved together"
    try:
        way = Path(os.path.relpath(whole(path), whole(run))).as_posix()
    except ValueError:
        return whole(path)  # on another drive
    return way if way.startswith("..") else f"./{way}"


def place_of(
    run,  # run folder
    way: str,  # as from `seen_from`
) -> Path:
    "Where a folder lies"
    return Path(os.path.normpath(Path(run).resolve() / way))  # a whole path stays as it is
