"""What is given at --resume has to be what the run was started with; only folders may have moved."""

import json
from pathlib import Path

from t2i_course.core.config import set_fields, to_json
from t2i_course.core.files import CourseError, make_folder, say, write_json
from t2i_course.core.prepare import read_json
from t2i_course.core.runfiles import model_hash, place_of, read_config, seen_from, whole, write_config
from t2i_course.core.sources import is_path
from t2i_course.run.data import open_data

PLAN = "plan.json"  # in the folder of a run that waits for those it needs
PLANNED = ("recipe", "data", "scale", "seconds", "images", "seed", "precision", "size")


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


def keep_plan(
    out: Path,  # a run folder without a run
    config,  # settings of the run that is to come
    given: dict,  # option -> value
):
    "What was asked for, while the runs that it needs are trained: enough to go on by --resume --out alone"
    write_json(make_folder(out) / PLAN, {k: config[k] for k in PLANNED} | asked(given))


def asked(
    given: dict,  # option -> value
) -> dict:
    "What has no place of its own in the settings, as a file has it"
    use = {role: whole(run) for role, run in (given["use"] or {}).items()}
    own = dict(use=use, items=given["items"] or (), changes=given["changes"] or {})
    return json.loads(json.dumps(own))


def planned(
    out: Path,  # a run folder
    given: dict,  # option -> value, None where it was not given
) -> dict:  # the same, with what was given when the run was asked for
    "What is given once more has to be what it was; the pictures may have moved"
    if not (out / PLAN).exists():
        return given
    plan, now = read_json(out / PLAN, "delete it and repeat the first command"), given | asked(given)
    for name, own in list(plan.items()):
        value = now[name]
        if value in (None, own, [], {}) or (name, value) == ("precision", "auto"):
            continue
        if name == "data" and is_path(value) and is_path(own):
            plan["data"] = value
        else:
            option = dict(items="set", changes="set").get(name, name)
            refuse(out, option, f"--{option} {own}" if own else f"no --{option}")
    return given | plan


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
