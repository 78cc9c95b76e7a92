"""The `t2i` command: what can be typed, and help. What the commands do stands in run/ and bench/."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument

from t2i_course.core.files import CourseError, between, say
from t2i_course.core.guards import Stopped
from t2i_course.core.register import recipe, recipes, sweeps
from t2i_course.run.chapter import at_scale, run_chapter
from t2i_course.run.data import prepare_data, write_data
from t2i_course.run.demo import demo
from t2i_course.run.doctor import doctor
from t2i_course.run.measure import eval_run
from t2i_course.run.report import report
from t2i_course.run.same import PLAN
from t2i_course.run.sample import draw_file
from t2i_course.run.sheets import SHEET
from t2i_course.run.stamp import typing
from t2i_course.run.train import train_run
from t2i_course.run.words import Command, Commands, Sample, flag, of_the_system, roles, told

app = typer.Typer(
    help="Train, sample and measure the text-to-image models of t2i_course.",
    epilog="Start with: t2i demo",
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def n(help: str, *names):
    "An option with a number behind it"
    return told(help, "N", *names)


def command(**how):
    "A command whose options may have several words behind them"
    return app.command(**dict(cls=Command) | how)


SETS = "digits, painted, painted2, mnist, fashion, cifar10 or a folder as ./FOLDER"
SIZE = "side of a folder's pictures, which are cropped to their central square and resized (default 32)"
Side = Annotated[int | None, n(SIZE, "--size")]
Split = Annotated[str, told("train, test, or painted: heldout", "NAME")]
File = Annotated[str | None, told("file to write", "FILE", "--out")]
Quiet = Annotated[bool, flag("no progress bar", "--quiet")]
Seed = Annotated[int, n("of every random number")]
Run = Annotated[str, Argument(metavar="RUN", help="run folder")]
Name = Annotated[str, Argument(metavar="DATA", help=SETS)]
DATA = (
    f"{SETS}, of captioned images (default painted); with --resume: the new place of a folder that was moved"
)


@command(name="demo")
def demo_command(
    images: Annotated[int | None, n("pictures to train on (default 40000)")] = None,
    seconds: Annotated[float | None, n("time limit of training (default 150)")] = None,
    out: Annotated[str, told("run folder", "RUN")] = "runs/demo",
):
    "Train on painted digits, draw, measure: a minute on a fast machine, at most four on a slow one."
    demo(between(seconds, 0.1, 1e6, "--seconds"), out, between(images, 1, 1e12, "--images", whole=True))


@command(name="train", epilog=lambda: f"Recipes: {', '.join(recipes())}")
def train_command(
    name: Annotated[str | None, Argument(metavar="RECIPE", help="see --list")] = None,
    all_of_them: Annotated[bool, flag("the recipes", "--list")] = False,
    data: Annotated[str | None, told(DATA, "DATA")] = None,
    scale: Annotated[
        Literal["smoke", "demo", "full"] | None,
        told("size of the model and default length (default: T2I_SCALE, else demo)"),
    ] = None,
    seconds: Annotated[float | None, n("wall time of training")] = None,
    images: Annotated[
        int | None, n("images seen: the clock that makes runs repeatable; with --seconds, whichever is first")
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"] | None,
        told("auto, the default: bf16 where the processor or GPU has units for it, else fp32"),
    ] = None,
    seed: Annotated[int | None, n("of every random number (default 0)")] = None,
    resume: Annotated[
        bool,
        flag("go on with the run in --out; other options may be left out, and may not differ", "--resume"),
    ] = False,
    out: Annotated[str | None, told("run folder (default runs/RECIPE-DATA-SEED)", "RUN")] = None,
    save_every: Annotated[float, n("seconds between checkpoints")] = 20.0,
    quiet: Quiet = False,
    size: Side = None,
    items: Annotated[
        list[str] | None, told("fields of the config: lr=1e-4 batch=128", "FIELD=VALUE", "--set")
    ] = None,
    use: Annotated[
        list[str] | None,
        told(
            "finished runs to stand on; what is needed and not given is trained first, into OUT-ROLE, on a "
            "share of the clock (--set share=0.3)",
            "ROLE=RUN",
        ),
    ] = None,
    codec: Annotated[
        str | None, told("short for --use codec=RUN; also of the codec that made shards of latents", "RUN")
    ] = None,
    shard: Annotated[
        Literal["ddp", "fsdp"] | None,
        told("under torchrun: a copy of the model in each process, or a shard of it"),
    ] = None,
    accumulate: Annotated[int, n("micro-batches a step")] = 1,
    checkpointing: Annotated[
        bool,
        flag("compute activations again in the backward pass instead of keeping them", "--checkpointing"),
    ] = False,
    compiled: Annotated[bool, flag("torch.compile, block by block", "--compile")] = False,
):
    "Train a recipe into a run folder."
    if all_of_them:
        for k in recipes():
            print(f"{k:15} {recipe(k).__doc__.strip().splitlines()[0]}")
        return
    between(save_every, 0, 1e6, "--save-every")
    between(accumulate, 1, 4096, "--accumulate", whole=True)
    # the run knows its recipe, also one that waits for another
    known = resume and out and any((Path(out) / f).exists() for f in ("config.json", PLAN))
    if not (name or known):
        raise CourseError(f"say which recipe to train: {', '.join(recipes())}")
    how = dict(quiet=quiet, save_every=save_every, shard=shard, accumulate=accumulate)
    how |= dict(checkpointing=checkpointing, compiled=compiled)
    given = dict(items=items or (), use=roles(use or [], codec), size=size)
    out = train_run(name, data, scale, seconds, images, seed, out, resume, precision, **given, **how)
    if not int(os.environ.get("RANK", 0)):
        print(f'{out}: trained. Draw with: t2i sample {out} --prompt "..." --out picture.png')


@command(name="sample", cls=Sample)
def sample_command(
    context: typer.Context,
    run: Run,
    out: Annotated[
        str,
        told(f"picture.png (a labelled sheet of at most {SHEET}) or pictures.npz (images, captions)", "FILE"),
    ],
    prompt: Annotated[list[str] | None, told("captions; may be given several times", "TEXT")] = None,
    captions: Annotated[
        str | None,
        told(
            "UTF-8 file or pipe (- is standard input), one caption a line; a blank one is no condition",
            "FILE",
        ),
    ] = None,
    per_caption: Annotated[int, n("pictures of each caption")] = 1,
    seed: Annotated[int, n("of the noise")] = 0,
):
    "Draw captions with a trained run."
    draw_file(run, out, prompt, captions, per_caption, seed, context.meta["options"])


@command(name="eval")
def eval_command(
    run: Run,
    n: Annotated[int | None, n("drawings (default 1000, of digits 5000)")] = None,
    seed: Annotated[int, n("of captions and noise")] = 0,
    data: Annotated[str | None, told("where its pictures lie now, if they were moved", "FOLDER")] = None,
):
    "Measure a run: obedience, Frechet distance, recall, copying."
    between(n, 8, 100_000, "--n", whole=True)
    between(seed, 0, 2**62, "--seed", whole=True)
    eval_run(run, n, seed, data=data)


@command(name="run", epilog=lambda: f"Chapters: {', '.join(('demo', *sweeps()))}")
def run_command(
    chapter: Annotated[str, Argument(metavar="CHAPTER", help="name of a chapter, or demo")],
    seeds: Annotated[int | None, n("how many (default 3, or what the chapter asks for)")] = None,
    seconds: Annotated[float | None, n("training time of a row (default 60, report_card 120)")] = None,
    scale: Annotated[
        Literal["smoke", "demo", "full"] | None,
        told("size of models and sweeps (default: T2I_SCALE, else demo)"),
    ] = None,
    out: Annotated[str | None, told("file to write; of metrics a folder", "FILE", "--out")] = None,
):
    "Make the measurements of a chapter (results/CHAPTER.json); again: go on with the first that is missing."
    with at_scale(scale):
        own = None if seeds is None else first_seeds(seeds)
        run_chapter(chapter, own, between(seconds, 0.1, 1e6, "--seconds"), out)


def first_seeds(n: int) -> tuple:
    "0, 1, ... n-1"
    return tuple(range(between(n, 1, 100, "--seeds", whole=True)))


@command(name="data")
def data_command(
    name: Name,
    out: Annotated[str, told("file.npz", "FILE")],
    split: Split = "train",
    n: Annotated[int, n("pictures")] = 1000,
    seed: Seed = 0,
    size: Side = None,
):
    "Write captioned pictures of a data set to a file."
    write_data(name, out, split, n, seed, size)


@command(name="prepare")
def prepare_command(
    data: Name,
    images: Annotated[int, n("how many")],
    out: Annotated[str, told("of the shards; prepare again to go on after an interruption", "FOLDER")],
    size: Side = None,
    split: Split = "train",
    shard_size: Annotated[int, n("images a shard")] = 4096,
    codec: Annotated[str | None, told("a trained vae: store its latents instead of pictures", "RUN")] = None,
    store: Annotated[
        Literal["float32", "float16", "uint8"], told("how numbers are kept; float32 is exact")
    ] = "float32",
    seed: Seed = 0,
    quiet: Quiet = False,
):
    "Write captioned pictures, or their latents, to shards that training reads by index."
    prepare_data(data, out, images, size, split, shard_size, codec, store, seed, quiet)


@command(name="bench")
def bench_command(
    what: Annotated[
        Literal["painted", "digits", "speed"],
        Argument(help="painted digits, MNIST beside two published recipes, or steps beside diffusers"),
    ] = "painted",
    seconds: Annotated[
        list[float] | None, n("training times (default painted 60 180, digits 2.5 to 240)")
    ] = None,
    seeds: Annotated[int | None, n("how many (default painted 2, digits 3)")] = None,
    peers: Annotated[
        list[str] | None, told("digits: which published recipes (default both)", "[diffusers|torchcfm]")
    ] = None,
    out: File = None,
):
    "Quality against training time (results/bench_painted.json, bench_digits.json, bench_speed.json)."
    from t2i_course.bench.command import bench

    for s in seconds or ():
        between(s, 0.1, 1e6, "--seconds")
    bench(what, seconds, seeds and first_seeds(seeds), peers, out)


@command(name="report")
def report_command(
    folder: Annotated[str | None, Argument(metavar="FOLDER", help="default: results/")] = None,
    figure: Annotated[
        str | None, told("where it goes (default report.png beside the results)", "FILE")
    ] = None,
):
    "The report card and one table of all results."
    report(folder, figure)


@command(name="doctor")
def doctor_command():
    "What this machine offers and what is missing."
    doctor()


def main(argv=None) -> int:
    "Entry point; a mistake of the user is one sentence and exit code 2"
    for stream in (sys.stdout, sys.stderr):  # captions may hold letters that the terminal has no code for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code, line = 0, ""
    try:
        with typing(sys.argv[1:] if argv is None else argv) as words:
            code = typer.main.get_command(app).main(words, prog_name="t2i", standalone_mode=False) or 0
    except CourseError as e:
        code, line = 2, f"t2i: {e}"
    except Stopped as e:
        code, line = 130, f"\nt2i: {e}"
    except (KeyboardInterrupt, typer.Abort):
        code, line = 130, "\nt2i: stopped"
    except BrokenPipeError:
        code = 1
    except (RuntimeError, OSError) as e:
        code, line = of_the_system(e)
    if line:
        say(line, everyone=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
