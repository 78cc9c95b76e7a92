"""A chapter's measurements: its rows, the arms of its sweep, the row of the demo."""

import json
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from t2i_course.core.data import scale as current_scale
from t2i_course.core.files import CourseError, write_json
from t2i_course.core.register import sweep
from t2i_course.core.training import has_bf16, pick_device
from t2i_course.run.arms import code_version, make_arms
from t2i_course.run.bases import names_shipped, runs_of, versions_of
from t2i_course.run.card import paradigm_arms, pictures_of
from t2i_course.run.demo import demo
from t2i_course.run.rows import measured_rows
from t2i_course.run.ship import ship, shipped_from
from t2i_course.run.stamp import result_file, stamp


@contextmanager
def at_scale(
    scale=None,  # smoke, demo or full; None: as T2I_SCALE says
):
    "Inside, the dial stands there"
    old = os.environ.get("T2I_SCALE")
    if scale:
        os.environ["T2I_SCALE"] = scale
    try:
        yield
    finally:
        if scale:
            os.environ.pop("T2I_SCALE")
        if scale and old is not None:
            os.environ["T2I_SCALE"] = old


def run_chapter(
    chapter,  # 'flow_matching', or '01_flow_matching' as its notebook is called
    seeds=(0, 1, 2),  # of the runs
    seconds=None,  # training time of a row; default 60
    out=None,  # file to write; default results/CHAPTER.json
):
    "The measurements of a chapter; finished arms are kept, and skipped by the same code on the same machine"
    if chapter == "demo":
        return demo_row(result_file(out, "demo"), seconds)
    name, mod = sweep(chapter)
    if hasattr(mod, "make"):  # it writes something else than arms
        return mod.make(out)
    path, card = result_file(out, name), hasattr(mod, "paradigm")
    seconds = seconds or (getattr(mod, "SECONDS", 60) if current_scale() != "smoke" or card else 3)
    arms = [(f"row.{d}", partial(row_on, name, d, seeds, seconds)) for d in getattr(mod, "ROWS", ())]
    also, modules = {}, [mod.__name__]
    if card:
        arms, also, modules = paradigm_arms(mod, seeds, seconds)
    head = stamp(name, seeds) | (dict(seconds=seconds) if arms else {}) | dict(code=code_version(*modules))
    runs = runs_of(name, current_scale()) if hasattr(mod, "RUNS") else {}
    if runs:
        head |= dict(runs=versions_of(runs))
    if out is None and current_scale() == "demo":
        ship_runs(name, runs)
    arms += mod.experiments(current_scale(), seeds, **runs)
    make_arms(arms, head, path, getattr(mod, "MAY_AGREE", ()), also)
    if card:
        pictures_of(also["pictures"], seeds, seconds, path.with_suffix(".png"))
    print(f"{path} is complete")


def ship_runs(name: str, runs: dict):
    "The package keeps the model of a run; it is written where the run is not the one that it was made from"
    for role, model in names_shipped(name).items():
        if not shipped_from(runs[role], model):
            ship(runs[role], model, stamp(name, [0]))


def row_on(name: str, data: str, seeds, seconds) -> dict:
    "The measured rows of a recipe on one data set"
    return measured_rows(name, data, seeds, seconds, Path("runs") / "rows")


def demo_row(
    path: Path,  # results/demo.json
    seconds=None,  # time limit of training
):
    "The demo on this machine; the file keeps a row of machines with bfloat16 units and one of those without"
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as e:
        raise CourseError(f"{path} cannot be read ({e}): delete it, or choose another --out") from e
    kind = "with_bf16" if has_bf16(pick_device()) else "without_bf16"
    write_json(path, rows | stamp("demo", [0]) | {kind: demo(seconds)})
