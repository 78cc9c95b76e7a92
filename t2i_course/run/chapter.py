"""A chapter's measurements: its rows, the arms of its sweep, the row of the demo."""

import json
from functools import partial
from pathlib import Path

from t2i_course.core.data import scale as current_scale
from t2i_course.core.files import CourseError, write_json
from t2i_course.core.training import has_bf16, pick_device
from t2i_course.run.arms import code_version, make_arms
from t2i_course.run.card import report_card
from t2i_course.run.demo import demo
from t2i_course.run.register import CHAPTERS, module
from t2i_course.run.rows import measured_rows
from t2i_course.run.stamp import result_file, stamp


def run_chapter(
    chapter,  # 'flow_matching', or '01_flow_matching' as its notebook is called
    seeds=(0, 1),  # of the runs
    seconds=None,  # training time of a row; default 60
    out=None,  # file to write; default results/CHAPTER.json
):
    "The measurements of a chapter; finished arms are kept, and skipped by the same code on the same machine"
    name = chapter.split("_", 1)[1] if chapter[:2].isdigit() and "_" in chapter else chapter
    if name == "demo":
        return demo_row(result_file(out, "demo"), seconds)
    mod = module(name, CHAPTERS)
    if name == "metrics":
        return mod.make_judges(out)
    path = result_file(out, name)
    seconds = seconds or (120 if name == "report_card" else 60 if current_scale() != "smoke" else 3)
    rows = dict(ddpm=["digits", "painted"], dit=["painted"], flow_matching=["painted"]).get(name, [])
    head = (
        stamp(name, seeds)
        | (dict(seconds=seconds) if rows or name == "report_card" else {})
        | dict(code=code_version(CHAPTERS[name]))
    )
    if name == "report_card":
        return report_card(head, path, seeds, seconds)
    arms = [
        (f"row.{d}", partial(measured_rows, name, d, seeds, seconds, Path("runs") / "rows")) for d in rows
    ]
    make_arms(arms + list(mod.experiments(current_scale(), seeds)), head, path, getattr(mod, "MAY_AGREE", ()))
    print(f"{path} is complete")


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
