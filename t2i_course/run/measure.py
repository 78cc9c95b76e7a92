"""Measuring as a command: the row of a run, in numbers and in words."""

import json
from datetime import date
from pathlib import Path

from t2i_course.core.files import CourseError, say, write_json
from t2i_course.core.runfiles import place_of, read_config, whole
from t2i_course.core.runs import open_run, open_uses
from t2i_course.core.sources import is_path
from t2i_course.core.training import has_bf16, pick_device
from t2i_course.run.data import run_data
from t2i_course.run.progress import counting
from t2i_course.run.stamp import command, hardware, versions
from t2i_course.run.text import row_text


def eval_run(
    run,  # run folder
    n=None,  # drawings; 1,000 if not said, of digits 5,000
    seed=0,  # of captions and noise
    quiet=False,  # print nothing, show no progress
    data=None,  # where its pictures lie now, if their folder was moved
) -> dict:  # the row
    "The measured row of a run; written to metrics.json in its folder"
    found = open_run(run)
    config = found.config if data is None else moved(found, data)
    pictures, same = run_data(found.run, config, open_uses(found.run, config))
    if not same:
        say(
            f"the pictures or captions in {config.data} are not those that {run} was trained on: compared "
            "with what is there now"
        )
    if not quiet:
        say(f"measuring {found.run}: reading real pictures to compare with ...")

    def draw(captions, seed):
        with counting(len(captions), "drawing", quiet) as each:
            return found.draw(captions, seed, each)

    pictures = pictures.whole() if hasattr(pictures, "whole") else pictures
    n = n or drawings(pictures)
    call = f"eval_run({str(run)!r}, n={n}, seed={seed})"
    row = (found.model.measure or protocol)(draw, pictures, n, seed) | about(found, call)
    write_json(found.run / "metrics.json", row)
    if not quiet:
        print(row_text(row))
    return row


def drawings(
    data,  # the pictures to compare with
) -> int:
    "How many are drawn, if it is not said; a folder that is called as a data set of the course is another"
    from t2i_course.core.metrics import DRAWINGS

    return 1000 if hasattr(data, "crop") else DRAWINGS.get(data.name, 1000)


def moved(
    found,  # a Finished
    data,  # where its pictures lie now
):  # its config
    "Only folders can be moved"
    if not is_path(found.config.data):
        raise CourseError(f"{found.run} was trained on {found.config.data}: leave --data out")
    if not is_path(data):
        raise CourseError(f"--data names the new place of a folder: write it as ./{data}")
    return found.config | dict(data=whole(data))


def protocol(draw, data, n: int, seed: int) -> dict:
    "The evaluation protocol of the course, and how near drawings of training captions come to their pictures"
    from t2i_course.core.metrics import evaluate

    return evaluate(draw, data, n=n, seed=seed, n_trained=n // 5)


def about(
    found,  # a Finished
    call: str,  # where Python calls: the function with its arguments
) -> dict:
    "What stands in the row of a run beside what was measured"
    config, model = found.config, found.model
    cost = costs(found.run, config)
    return dict(
        recipe=config.recipe,
        params=cost["params"],
        params_trained=cost["params_trained"],
        images=cost["images"],
        train_seconds=cost["seconds"],
        steps=cost["steps"],
        train_seed=config.seed,
        nfe=model.calls(config),
        **{k: config[k] for k in model.options if k != "steps"},
        precision_mode=config.precision,
        source=config.source,
        hardware=hardware(),
        bf16_units=has_bf16(pick_device()),
        versions=versions(),
        date=str(date.today()),
        command=command(call),
    )


def costs(
    run,  # run folder
    config,  # its settings
) -> dict:  # as train.json has it
    "What a run cost; the runs that were trained for it, on a share of its clock, count with it"
    cost = json.loads((Path(run) / "train.json").read_text(encoding="utf-8"))
    cost.setdefault("params_trained", cost["params"])
    for used in config.uses.values():
        if not used.get("share"):
            continue
        part = place_of(run, used["run"])
        other = costs(part, read_config(part))
        for k in ("params_trained", "images", "seconds", "steps"):
            cost[k] += other[k]
    return cost
