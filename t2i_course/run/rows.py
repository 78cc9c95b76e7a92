"""Runs that stand behind measured rows: kept while their settings are the same, else made anew."""

import json
import shutil
from pathlib import Path

from t2i_course.core.config import to_json
from t2i_course.core.data import scale as current_scale
from t2i_course.core.files import CourseError, say
from t2i_course.core.guards import one_writer
from t2i_course.core.runfiles import read_config
from t2i_course.run.data import open_data
from t2i_course.run.measure import drawings, eval_run
from t2i_course.run.settings import given_for, needs, settings
from t2i_course.run.stamp import alike, versions
from t2i_course.run.train import needed_run, train_run


# what a run consists of. The config goes last: what is left of an interruption is still known as a run
FILES = (
    "model.safetensors",
    "train.json",
    "metrics.json",
    "samples.png",
    "log.jsonl",
    "checkpoint.safetensors",
    "plan.json",
    "config.json",
)


def clear_run(
    out: Path,  # a folder that holds a run which may go
):
    "Take the files of a run away, and nothing else"
    for part in out.glob(".*.part"):
        part.unlink(missing_ok=True)
    for folder in out.glob("checkpoint-*"):
        if folder.is_dir():
            shutil.rmtree(folder)
    for name in FILES:
        (out / name).unlink(missing_ok=True)


def cleared(
    out: Path,  # a run folder, which need not exist
    wanted,  # settings that the run should have, but for the runs it stands on
) -> bool:  # is there nothing now?
    "A run with other settings, of another scale, machine or version, is taken away: it is trained anew"
    gone = [cleared(needed_run(out, need.role), wanted_of(need, wanted)) for need in needs(wanted)]
    if not (out / "config.json").exists():
        return True
    with one_writer(out):
        try:
            config = read_config(out)
        except CourseError:
            config = None
        if config and not any(gone) and alike(to_json(config), to_json(wanted), but=("uses",)):
            return False
        say(f"{out} was made with other settings or by another version: it is made anew")
        clear_run(out)
    return True


def begun(
    out: Path,  # a run folder, which need not exist
    wanted,  # settings that the run should have, but for the runs it stands on
) -> bool:
    "Is there a run, or one of those that it needs? The folders that `cleared` looks at"
    there = any(begun(needed_run(out, need.role), wanted_of(need, wanted)) for need in needs(wanted))
    return there or (out / "config.json").exists()


def wanted_of(
    need,  # a Need
    wanted,  # settings of the run that has it
):
    "The settings that a needed run should have"
    given = {k: wanted[k] for k in ("data", "scale", "seed", "precision", "size")}
    return settings(**given_for(need, wanted, given))


def kept_row(
    out: Path,  # a run folder
    n: int,  # drawings of the row that is wanted
) -> dict:  # None when there is none
    "The measured row of a run that `cleared` has left standing"
    try:
        row = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = [(row.get("versions") or {}).get(k) == versions()[k] for k in ("torch", "t2i_course")]
    return row if row.get("n_asked", row.get("n")) == n and all(same) else None


def measured_rows(recipe, data, seeds, seconds, work: Path) -> dict:
    "Train and measure once a seed; mean and spread of the main numbers"
    rows, n = [], 64 if current_scale() == "smoke" else drawings(open_data(data))
    for s in seeds:
        out = work / f"{recipe}-{data}-{seconds:g}s-{s}"
        wanted = settings(recipe, data, current_scale(), seconds, None, s, "auto")
        cleared(out, wanted)
        row = kept_row(out, n)
        if row is None:
            train_run(recipe, data, seconds=seconds, seed=s, out=out, resume=begun(out, wanted))
            row = eval_run(out, n=n)
        rows.append(row)
    main = dict(
        obedience=lambda r: r["obedience"]["all"],
        fd_floors=lambda r: r["fd"] / r["fd_floor"],
        recall=lambda r: r["recall"],
    )
    if "heldout" in rows[0]:
        main["heldout"] = lambda r: r["heldout"]["all"]
        if all("seen_matched" in r["heldout"] for r in rows):
            main["seen_matched"] = lambda r: r["heldout"]["seen_matched"]["all"]

    def summary(values):
        return dict(mean=sum(values) / len(values), spread=max(values) - min(values))

    return dict(rows=rows, **{k: summary([f(r) for r in rows]) for k, f in main.items()})
