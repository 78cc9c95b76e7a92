"""The report card: every paradigm with the same clock, measured and drawn."""

from functools import partial
from pathlib import Path

import torch

from t2i_course.core.data import scale as current_scale
from t2i_course.core.files import write_whole
from t2i_course.core.sources import load
from t2i_course.run.arms import code_version, make_arms
from t2i_course.run.demo import PROMPTS
from t2i_course.run.model import Model
from t2i_course.run.register import CHAPTERS, RECIPES, module
from t2i_course.run.rows import measured_rows


def report_card(
    head: dict,  # how and when it is made
    path: Path,  # results/report_card.json
    seeds,  # of the runs
    seconds,  # training time of each
):
    "Every recipe that stands for a paradigm, with the same clock; pictures of the first seed beside numbers"
    from t2i_course.capstone.report_card import drawing_flops, experiments, training_memory, variety
    from t2i_course.core.metrics import load_judge
    from t2i_course.core.plots import mosaic

    data, judge, work = load("painted"), load_judge("painted"), Path("runs") / "rows"

    def row(recipe, paradigm):
        found = measured_rows(recipe, "painted", seeds, seconds, work)
        models = [Model(work / f"{recipe}-painted-{seconds:g}s-{s}") for s in seeds]
        for r, m in zip(found["rows"], models):
            r["variety"] = variety(m.draw, data, judge, PROMPTS)
        m = models[0]
        return found | dict(
            paradigm=paradigm,
            multiply_adds=drawing_flops(m.den.painter(m.tok, m.config), PROMPTS[:4]),
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
    from PIL import Image

    picture = Image.fromarray(mosaic(torch.cat([drawn(r) for r in paradigms]), len(PROMPTS)).numpy())
    write_whole(path.with_suffix(".png"), lambda p: picture.save(p, "png"))
    print(f"wrote {path}")
