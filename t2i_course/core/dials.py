"""The one dial of the course, `T2I_SCALE`, and the numbers that longer runs left in `results/`."""

import json
import os
from pathlib import Path

from t2i_course.core.files import CourseError


def scale() -> str:  # smoke, demo or full
    "The one dial: T2I_SCALE; without it smoke in tests and demo for a reader"
    s = os.environ.get("T2I_SCALE") or ("smoke" if os.environ.get("IN_TEST") else "demo")
    if s not in ("smoke", "demo", "full"):
        raise CourseError(f"T2I_SCALE is '{s}'; it may be smoke, demo or full")
    return s


def dial(
    smoke,  # value in tests (seconds)
    demo,  # value for a reader on two cores (minutes)
    full,  # value on a GPU
):
    "One of three values, by `scale()`"
    return dict(smoke=smoke, demo=demo, full=full)[scale()]


def results_path(
    name: str,  # chapter
) -> Path:  # results/<name>.json of the checkout we are in
    "Looked for from the working folder upwards, then beside the package"
    here = Path.cwd().resolve()
    for p in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (p / "results").is_dir() and (p / "settings.ini").is_file():
            return p / "results" / f"{name}.json"
    return here / "results" / f"{name}.json"


def results(
    name: str,  # chapter
) -> dict:  # what was measured; empty when nothing was
    "Numbers measured by `t2i run`, with how they were made"
    p = results_path(name)
    return json.loads(p.read_text(encoding="utf-8")) if p.exists() else {}
