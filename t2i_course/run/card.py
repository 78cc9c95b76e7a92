"""The report card: every paradigm with the same clock, measured and drawn."""

from functools import partial
from pathlib import Path

import torch

<<<<<<< HEAD
from t2i_course.core.counting import multiply_adds
from t2i_course.core.data import scale as current_scale
=======
>>>>>>> w-house
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
<<<<<<< HEAD
    "Every recipe that stands for a paradigm, with the same clock; pictures of the first seed beside numbers"
    from t2i_course.capstone.report_card import experiments, training_memory, variety
    from t2i_course.core.metrics import load_judge
    from t2i_course.core.plots import mosaic

    data, judge, work = load("painted"), load_judge("painted"), Path("runs") / "rows"

    def row(recipe, paradigm):
        found = measured_rows(recipe, "painted", seeds, seconds, work)
        models = [Model(work / f"{recipe}-painted-{seconds:g}s-{s}") for s in seeds]
        for r, m in zip(found["rows"], models):
            r["variety"] = variety(m.draw, data, judge, PROMPTS)
        m = models[0]
        draw = m.den.painter(m.tok, m.config)
        return found | dict(
            paradigm=paradigm,
            multiply_adds=multiply_adds(lambda: draw(PROMPTS[:4], 0)) / 4 / 1e6,  # millions, for one picture
            memory=training_memory(m.den, m.tok, data, m.config["batch"], m.config["precision"]),
            batch=m.config["batch"],
        )

    def drawn(recipe):
        measured_rows(recipe, "painted", seeds[:1], seconds, work)  # trains only if the run is gone
        return Model(work / f"{recipe}-painted-{seconds:g}s-{seeds[0]}").draw(PROMPTS)

    paradigms = {r: p for r in RECIPES if (p := getattr(module(r), "PARADIGM", None))}
    head = head | dict(code=code_version(CHAPTERS["report_card"], *(RECIPES[r] for r in paradigms)))
    arms = [(f"row.{r}", partial(row, r, p)) for r, p in paradigms.items()]
    make_arms(
        arms + list(experiments(current_scale(), seeds)),
        head,
        path,
        also=dict(prompts=PROMPTS, pictures=list(paradigms)),
    )
=======
    "What each of them draws of the same prompts, one row a recipe"
>>>>>>> w-house
    from PIL import Image

    from t2i_course.core.plots import mosaic

    def drawn(name):
        measured_rows(name, "painted", seeds[:1], seconds, ROWS)  # trains only if the run is gone
        return open_run(run_of(name, seconds, seeds[0])).draw(PROMPTS)

    picture = Image.fromarray(mosaic(torch.cat([drawn(name) for name in names]), len(PROMPTS)).numpy())
    write_whole(path, lambda p: picture.save(p, "png"))
    print(f"wrote {path}")
