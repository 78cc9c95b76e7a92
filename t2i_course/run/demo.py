"""The demo: train, draw typed prompts, measure, in a few minutes."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

from t2i_course.core.data import scale as current_scale
from t2i_course.core.files import CourseError, make_folder, write_json
from t2i_course.core.guards import one_writer
from t2i_course.core.runs import open_run
from t2i_course.run.measure import eval_run
from t2i_course.run.rows import FILES, clear_run
from t2i_course.run.sample import sample_run
from t2i_course.run.sheets import write_sheet
from t2i_course.run.train import train_run


PROMPTS = [
    "a bold red three on white",
    "a thin blue two on pink",
    "a bold yellow nine on black",
    "a bold orange six on black",
    "a green zero leaning right on white",
    "a bold purple five on gray",
    "a thin red four on white",
    "a bold blue eight on white",
    # from here on: pairs of digit and ink never trained on
    "a bold blue zero on pink",
    "a bold green three on black",
    "a red six leaning left on black",
    "a bold yellow five on black",
]


MARK = ".demo"  # stands in a folder that a demo has made


@contextmanager
def claim_demo_folder(
    out: Path,  # where the demo wants to write
):
    "An earlier demo is cleared away, a stranger's files never; inside, nobody else writes there"
    with one_writer(make_folder(out)):
        found = [n for n in FILES if (out / n).exists()] + [p.name for p in out.glob("checkpoint-*")]
        if found and not made_by_demo(out):
            raise CourseError(
                f"{out} holds {', '.join(found)}, which t2i demo did not make: choose another --out, "
                "or take them away yourself"
            )
        if found:
            clear_run(out)
        (out / MARK).touch()
        yield


def made_by_demo(out: Path) -> bool:
    return (out / MARK).exists()


# a fast machine sees so many pictures in half a minute; a slow one stops at the limit and measures fewer
CLOCK = dict(smoke=dict(images=1_024, seconds=60.0, n=64), demo=dict(images=40_000, seconds=150.0, n=1000))


CLOCK["full"] = CLOCK["demo"]
PATIENCE = 45.0  # seconds that the demo's drawings for measuring may take


def demo(
    seconds=None,  # time limit of training; default 150
    out="runs/demo",  # run folder; an earlier demo that it holds is replaced
    images=None,  # pictures to train on; default 40,000
) -> dict:  # the measured row
    "Train on painted digits, draw prompts, measure: a minute on a fast machine, at most four on a slow one"
    with claim_demo_folder(Path(out)):
        return make_demo(seconds, Path(out), images)


def make_demo(seconds, out: Path, images) -> dict:
    "The demo, in a folder that is its own"
    clock, began = CLOCK[current_scale()], time.perf_counter()
    images, seconds = images or clock["images"], seconds or clock["seconds"]
    print(
        f"Training a text-to-image model on {images:,} painted digits, for {seconds:g} seconds at most "
        "(flow matching with a closed-form head start) ...",
        flush=True,
    )
    train_run("flow_matching", "painted", seconds=seconds, images=images, out=out)
    print(
        clock_text(json.loads((out / "train.json").read_text(encoding="utf-8")), images, seconds), flush=True
    )
    model = open_run(out)
    model.draw(PROMPTS[:1])  # warm
    start = time.perf_counter()
    x, texts = sample_run(model, PROMPTS)
    each = (time.perf_counter() - start) / len(texts)
    write_sheet(
        out / "samples.png",
        x,
        texts,
        "what the model drew (last four: digit and ink never seen together in training)",
    )
    n = judged(each, clock["n"])
    fewer = f" (not {clock['n']:,}, because drawing is slow here)" if n < clock["n"] else ""
    print(f"Measuring with {n:,} captions and handwriting it never saw{fewer} ...", flush=True)
    row = eval_run(out, n=n) | dict(demo_seconds=time.perf_counter() - began)
    write_json(out / "metrics.json", row)
    print(f"""
all of it took {row["demo_seconds"]:.0f} s
pictures   {out / "samples.png"}
numbers    {out / "metrics.json"}
model      {out / "model.safetensors"}
draw your own: t2i sample {out} --prompt "a thin blue four on pink" --out four.png
What to open next (make lab): nbs/00_start/01_tour.ipynb, then the parts of this model:
  captions and pictures 01_core/01_data, text encoder 01_core/02_conditioning, training 01_core/03_training,
  metrics 01_core/05_metrics, network and guidance 04_diffusion/01_ddpm,
  the head start 04_diffusion/08_closed_form, the method itself 06_flow/01_flow_matching""")
    return row


def clock_text(
    found: dict,  # train.json: images, seconds
    images,  # planned
    seconds,  # the limit
) -> str:
    "Which of the two clocks ended the training"
    seen, took = found["images"], found["seconds"]
    rate = f"{seen:,} pictures in {took:.0f} s, {seen / took:,.0f} a second"
    if seen >= images:
        return f"Trained on {rate}: all that were planned."
    return (
        f"Trained on {rate}: the time limit of {seconds:g} s came before the planned {images:,} pictures. "
        "On a faster or less busy machine the model would draw better after the same time."
    )


def judged(
    each: float,  # seconds that a drawing takes here
    most: int,  # drawings on a fast machine
) -> int:
    "How many captions: as many again are drawn of held-out pairs and their partners, a fifth of seen ones"
    return max(min(most, 200), min(most, int(PATIENCE / (2.2 * each)) // 100 * 100))
