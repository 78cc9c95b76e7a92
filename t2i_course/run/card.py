"""The report card: every paradigm with the same clock, measured and drawn."""

from functools import partial
from pathlib import Path

import torch

from t2i_course.core.files import write_whole
from t2i_course.core.register import recipe, recipes
from t2i_course.core.runs import open_run
from t2i_course.core.sources import load
from t2i_course.run.demo import PROMPTS
from t2i_course.run.rows import measured_rows

ROWS = Path("runs") / "rows"


def paradigm_arms(
    sweep,  # its `paradigm` adds to a row what the others have no use for
    seeds,  # of the runs
    seconds,  # training time of each
) -> tuple:  # arms, what is written beside them, modules that the numbers depend on
    "A row for every recipe that stands for a paradigm"
    stands = {name: p for name in recipes() if (p := getattr(recipe(name), "PARADIGM", None))}
    arms = [
        (f"row.{name}", partial(paradigm_row, sweep, name, p, seeds, seconds)) for name, p in stands.items()
    ]
    modules = [sweep.__name__, *(recipes()[name] for name in stands)]
    return arms, dict(prompts=PROMPTS, pictures=list(stands)), modules


def paradigm_row(sweep, name: str, paradigm: str, seeds, seconds) -> dict:
    "Quality as in every row, and what drawing and training cost"
    found = measured_rows(name, "painted", seeds, seconds, ROWS)
    runs = [open_run(run_of(name, seconds, s)) for s in seeds]
    return found | dict(paradigm=paradigm) | sweep.paradigm(found["rows"], runs, load("painted"), PROMPTS)


def run_of(name: str, seconds, seed) -> Path:
    return ROWS / f"{name}-painted-{seconds:g}s-{seed}"


def pictures_of(
    names,  # of recipes
    seeds,  # of the runs; the first of them draws
    seconds,  # training time of each
    path: Path,  # a .png file
):
    "What each of them draws of the same prompts, one row a recipe"
    from PIL import Image

    from t2i_course.core.plots import mosaic

    def drawn(name):
        measured_rows(name, "painted", seeds[:1], seconds, ROWS)  # trains only if the run is gone
        return open_run(run_of(name, seconds, seeds[0])).draw(PROMPTS)

    picture = Image.fromarray(mosaic(torch.cat([drawn(name) for name in names]), len(PROMPTS)).numpy())
    write_whole(path, lambda p: picture.save(p, "png"))
    print(f"wrote {path}")
