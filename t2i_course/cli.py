"""The `t2i` command: what can be typed, and the help for it. What the commands do stands in run/ and bench/."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from typer import Argument, Option

from t2i_course.core.files import CourseError, between, say
from t2i_course.core.guards import Stopped
from t2i_course.core.register import recipe, recipes, sweeps
from t2i_course.run.chapter import run_chapter
from t2i_course.run.data import prepare_data, write_data
from t2i_course.run.demo import demo
from t2i_course.run.doctor import doctor
from t2i_course.run.measure import eval_run
from t2i_course.run.report import report
from t2i_course.run.sample import draw_file
from t2i_course.run.sheets import SHEET
from t2i_course.run.stamp import _typed
from t2i_course.run.train import train_run
from t2i_course.run.words import Command, Commands, Sample, of_the_system

app = typer.Typer(
    name="t2i",
    help="Train, sample and measure the text-to-image models of t2i_course.",
    epilog="Start with: t2i demo",
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

SETS = "digits, painted, painted2, mnist, fashion, cifar10 or a folder as ./FOLDER"
SIZE = "side of a folder's pictures, which are cropped to their central square and resized (default 32)"
Split = Annotated[str, Option(metavar="NAME", help="train, test, or painted: heldout")]
Side = Annotated[Optional[int], Option("--size", metavar="N", help=SIZE)]
File = Annotated[Optional[str], Option("--out", metavar="FILE", help="file to write")]
Quiet = Annotated[bool, Option("--quiet", help="no progress bar")]
Seed = Annotated[int, Option(metavar="N", help="of every random number")]
Run = Annotated[str, Argument(metavar="RUN", help="run folder")]


def command(**how):
    "A command whose options may have several words behind them"
    return app.command(**dict(cls=Command) | how)


@command(name="demo")
def demo_command(
    images: Annotated[Optional[int], Option(metavar="N", help="pictures to train on (default 40000)")] = None,
    seconds: Annotated[
        Optional[float], Option(metavar="N", help="time limit of training (default 150)")
    ] = None,
    out: Annotated[str, Option(metavar="RUN", help="run folder")] = "runs/demo",
):
    "Train on painted digits, draw, measure: a minute on a fast machine, at most four on a slow one."
    demo(between(seconds, 0.1, 1e6, "--seconds"), out, between(images, 1, 1e12, "--images", whole=True))


@command(epilog=lambda: f"Recipes: {', '.join(recipes())}")
def train(
    name: Annotated[Optional[str], Argument(metavar="RECIPE", help="see --list")] = None,
    all_of_them: Annotated[bool, Option("--list", help="the recipes")] = False,
    data: Annotated[
        Optional[str],
        Option(
            help=f"{SETS}, of captioned images (default painted); with --resume: the new place of a folder that "
            "was moved",
        ),
    ] = None,
    scale: Annotated[
        Optional[Literal["smoke", "demo", "full"]],
        Option(help="size of the model and default length (default: T2I_SCALE, else demo)"),
    ] = None,
    seconds: Annotated[Optional[float], Option(metavar="N", help="wall time of training")] = None,
    images: Annotated[
        Optional[int],
        Option(
            metavar="N",
            help="images seen: the clock that makes runs repeatable; with --seconds, what is first",
        ),
    ] = None,
    precision: Annotated[
        Optional[Literal["auto", "fp32", "bf16", "fp16"]],
        Option(help="auto, the default: bf16 where the processor or GPU has units for it, else fp32"),
    ] = None,
    seed: Annotated[Optional[int], Option(metavar="N", help="of every random number (default 0)")] = None,
    resume: Annotated[
        bool,
        Option(
            "--resume", help="go on with the run in --out; other options may be left out, and may not differ"
        ),
    ] = False,
    out: Annotated[
        Optional[str], Option(metavar="RUN", help="run folder (default runs/RECIPE-DATA-SEED)")
    ] = None,
    save_every: Annotated[float, Option(metavar="N", help="seconds between checkpoints")] = 20.0,
    quiet: Quiet = False,
    size: Side = None,
    items: Annotated[
        Optional[list[str]],
        Option(
            "--set", metavar="FIELD=VALUE", help="fields of the recipe's config, such as lr=1e-4 batch=128"
        ),
    ] = None,
    use: Annotated[
        Optional[list[str]],
        Option(
            metavar="ROLE=RUN", help="finished runs to stand on; one that is needed is else trained first"
        ),
    ] = None,
    codec: Annotated[Optional[str], Option(metavar="RUN", help="short for --use codec=RUN")] = None,
    shard: Annotated[
        Optional[Literal["ddp", "fsdp"]],
        Option(help="under torchrun: a copy of the model in each process, or a shard of it"),
    ] = None,
    accumulate: Annotated[int, Option(metavar="N", help="micro-batches a step")] = 1,
    checkpointing: Annotated[
        bool,
        Option(
            "--checkpointing", help="compute activations again in the backward pass instead of keeping them"
        ),
    ] = False,
    compiled: Annotated[bool, Option("--compile", help="torch.compile, block by block")] = False,
):
    "Train a recipe into a run folder."
    if all_of_them:
        for k in recipes():
            print(f"{k:15} {recipe(k).__doc__.strip().splitlines()[0]}")
        return
    between(save_every, 0, 1e6, "--save-every")
    between(accumulate, 1, 4096, "--accumulate", whole=True)
    known = resume and out and (Path(out) / "config.json").exists()  # the run knows its recipe
    if not (name or known):
        raise CourseError(f"say which recipe to train: {', '.join(recipes())}")
    out = train_run(
        name,
        data,
        scale,
        seconds,
        images,
        seed,
        out,
        resume,
        precision,
        items=items or (),
        use=roles(use or [], codec),
        size=size,
        quiet=quiet,
        save_every=save_every,
        shard=shard,
        checkpointing=checkpointing,
        compiled=compiled,
        accumulate=accumulate,
    )
    if not int(os.environ.get("RANK", 0)):
        print(f'{out}: trained. Draw with: t2i sample {out} --prompt "..." --out picture.png')


def roles(
    use: list,  # ROLE=RUN
    codec,  # a run, or None
) -> dict:  # role -> run
    "What the run stands on; None where nothing was said"
    found = dict(codec=codec) if codec else {}
    for item in use:
        role, equals, run = item.partition("=")
        if not (role and equals and run):
            raise CourseError(f"--use wants ROLE=RUN, such as codec=runs/vae-painted-0; got '{item}'")
        if found.get(role, run) != run:
            raise CourseError(f"two runs are given as the {role}: {found[role]} and {run}")
        found[role] = run
    return found or None


@command(cls=Sample)
def sample(
    context: typer.Context,
    run: Run,
    out: Annotated[
        str,
        Option(
            metavar="FILE",
            help=f"picture.png (a labelled sheet of at most {SHEET}) or pictures.npz (images, captions)",
        ),
    ],
    prompt: Annotated[
        Optional[list[str]], Option(metavar="TEXT", help="captions; may be given several times")
    ] = None,
    captions: Annotated[
        Optional[str],
        Option(
            metavar="FILE",
            help="UTF-8 file or pipe (- is standard input), one caption a line; a blank line draws without "
            "condition",
        ),
    ] = None,
    per_caption: Annotated[int, Option(metavar="N", help="pictures of each caption")] = 1,
    seed: Annotated[int, Option(metavar="N", help="of the noise")] = 0,
):
    "Draw captions with a trained run."
    draw_file(run, out, prompt, captions, per_caption, seed, **context.meta["options"])


@command(name="eval")
def eval_command(
    run: Run,
    n: Annotated[int, Option(metavar="N", help="drawings")] = 1000,
    seed: Annotated[int, Option(metavar="N", help="of captions and noise")] = 0,
    data: Annotated[
        Optional[str],
        Option(metavar="FOLDER", help="the new place of its pictures, if their folder was moved"),
    ] = None,
):
    "Measure a run: obedience, Frechet distance, recall, copying."
    between(n, 8, 100_000, "--n", whole=True)
    between(seed, 0, 2**62, "--seed", whole=True)
    eval_run(run, n, seed, data=data)


@command(name="run", epilog=lambda: f"Chapters: {', '.join(('demo', *sweeps()))}")
def run_command(
    chapter: Annotated[str, Argument(help="name of a chapter")],
    seeds: Annotated[int, Option(metavar="N", help="how many")] = 2,
    seconds: Annotated[
        Optional[float], Option(metavar="N", help="training time of a row (default 60)")
    ] = None,
    out: File = None,
):
    "Make the measurements of a chapter (results/CHAPTER.json); again: go on with the first that is missing."
    run_chapter(chapter, first_seeds(seeds), between(seconds, 0.1, 1e6, "--seconds"), out)


def first_seeds(n: int) -> tuple:
    "0, 1, ... n-1"
    return tuple(range(between(n, 1, 100, "--seeds", whole=True)))


@command(name="data")
def data_command(
    name: Annotated[str, Argument(metavar="DATA", help=SETS)],
    out: Annotated[str, Option(metavar="FILE", help="file.npz")],
    split: Split = "train",
    n: Annotated[int, Option(metavar="N", help="pictures")] = 1000,
    seed: Seed = 0,
    size: Side = None,
):
    "Write captioned pictures of a data set to a file."
    write_data(name, out, split, n, seed, size)


@command()
def prepare(
    data: Annotated[str, Argument(help=SETS)],
    images: Annotated[int, Option(metavar="N", help="how many")],
    out: Annotated[
        str, Option(metavar="FOLDER", help="of the shards; prepare again to go on after an interruption")
    ],
    size: Side = None,
    split: Split = "train",
    shard_size: Annotated[int, Option(metavar="N", help="images a shard")] = 4096,
    codec: Annotated[
        Optional[str], Option(metavar="RUN", help="a trained vae run: store its latents instead of pictures")
    ] = None,
    store: Annotated[
        Literal["float32", "float16", "uint8"], Option(help="how numbers are kept; float32 is exact")
    ] = "float32",
    seed: Seed = 0,
    quiet: Quiet = False,
):
    "Write captioned pictures, or their latents, to shards that training reads by index."
    prepare_data(data, out, images, size, split, shard_size, codec, store, seed, quiet)


@command()
def bench(
    what: Annotated[
        Literal["painted", "digits", "speed"],
        Argument(help="painted digits, MNIST beside two published recipes, or steps beside diffusers"),
    ] = "painted",
    seconds: Annotated[
        Optional[list[float]],
        Option(metavar="N", help="training times (default painted 60 180, digits 2.5 to 240)"),
    ] = None,
    seeds: Annotated[
        Optional[int], Option(metavar="N", help="how many (default painted 2, digits 3)")
    ] = None,
    peers: Annotated[
        Optional[list[str]],
        Option(metavar="[diffusers|torchcfm]", help="digits: which published recipes (default both)"),
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
    folder: Annotated[Optional[str], Argument(help="default: results/")] = None,
    figure: Annotated[
        Optional[str], Option(metavar="FILE", help="where it goes (default report.png beside the results)")
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
    _typed.append([str(v) for v in (sys.argv[1:] if argv is None else argv)])
    code, line = 0, ""
    try:
        code = typer.main.get_command(app).main(_typed[-1], prog_name="t2i", standalone_mode=False) or 0
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
    finally:
        _typed.pop()
    if line:
        say(line, everyone=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
