"""What is given at --resume has to be what the run was started with; only folders may have moved."""

import json
from pathlib import Path

from t2i_course.core.config import set_fields, to_json
from t2i_course.core.files import CourseError, say
from t2i_course.core.runfiles import model_hash, place_of, read_config, seen_from, whole, write_config
from t2i_course.core.sources import is_path
from t2i_course.run.data import open_data


def same_run(
    out: Path,  # a run folder
    given: dict,  # option -> value, None where it was not given
):  # its settings
    "The settings of a run that goes on; what differs from them is refused"
    config = read_config(out)
    if given["recipe"] not in (None, config.recipe):
        raise CourseError(
            f"{out} is a run of {config.recipe}, not of {given['recipe']}: resume with {config.recipe}, "
            "or train into another folder"
        )
    for name in ("scale", "images", "seconds", "seed", "size", "precision"):
        value, own = given[name], getattr(config, name)
        if value in (None, own) or (name, value) == ("precision", "auto"):
            continue
        old = f"--{name} {own}" if own is not None else f"no --{name}"
        if name in ("images", "seconds"):
            old = " ".join(f"--{k} {v}" for k in ("images", "seconds") if (v := getattr(config, k)))
        refuse(out, name, old)
    same_fields(out, config, given)
    moved = dict(uses=moved_uses(out, config, given["use"] or {}))
    moved |= dict(data=moved_data(out, config | moved, given["data"]))
    if moved != dict(uses=config.uses, data=config.data):
        what = ", ".join(k for k, v in moved.items() if v != getattr(config, k))
        config = config | moved
        write_config(out, config)
        say(f"{out / 'config.json'}: new place of {what} written down")
    return config


def refuse(out: Path, name: str, old: str):
    raise CourseError(f"{out} was started with {old}; resume without --{name}, or train into another folder")


def same_fields(
    out: Path,  # a run folder
    config,  # its settings
    given: dict,  # option -> value
):
    "Fields that are set once more have to be set to what they are"
    items = given["items"] or ()
    wanted = (set_fields(config, items) if items else config) | (given["changes"] or {})
    for k, v in json.loads(json.dumps(to_json(wanted))).items():
        own = to_json(config).get(k)
        if v != own:
            raise CourseError(f"{out} was started with {k} = {own}, not {v}: train into another folder")


def moved_data(
    out: Path,  # a run folder
    config,  # its settings
    data,  # where the pictures are said to lie now, or None
) -> str:  # as the config calls them
    "The new place of a folder, where it holds the same pictures"
    old = config.data
    if data is None or (whole(data) if is_path(data) else data) == old:
        return old
    if not is_path(old) or not is_path(data):
        refuse(out, "data", f"--data {old}")
    codec = config.uses.get("codec")
    now = open_data(data, config.size, codec and place_of(out, codec["run"]))
    if now.fingerprint != config.fingerprint:
        raise CourseError(
            f"{out} was started with other pictures or captions than those in {data}: name the folder "
            "that holds them, or train into another folder"
        )
    return whole(data)


def moved_uses(
    out: Path,  # a run folder
    config,  # its settings
    use: dict,  # role -> run, as given now
) -> dict:  # as the config has them
    "New places of the runs it stands on, where they are still the same"
    found = dict(config.uses)
    for role, run in use.items():
        old = found.get(role)
        word = "codec" if role == "codec" else f"use {role}"  # as people type it
        if old is None:
            refuse(out, word, f"no --{word}")
        if str(place_of(out, old["run"])) == whole(run):
            continue
        if old["model"] != model_hash(run):
            refuse(out, word, f"--{word} {place_of(out, old['run'])}")
        found[role] = old | dict(run=seen_from(out, run))
    return found
