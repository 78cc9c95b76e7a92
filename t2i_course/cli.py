"""The `t2i` command: train, sample, eval, run, data, bench, report, doctor, demo."""

import argparse
import errno
import os
import sys
from importlib import import_module
from pathlib import Path

from t2i_course.bench.digits import BUDGETS, digits
from t2i_course.bench.painted import painted
from t2i_course.bench.peers import PEERS
from t2i_course.bench.speed import speed
from t2i_course.core.files import CourseError, between, say
from t2i_course.core.guards import Stopped
from t2i_course.core.training import pick_device
from t2i_course.run.chapter import run_chapter
from t2i_course.run.data import prepare_data, write_data
from t2i_course.run.demo import demo
from t2i_course.run.doctor import doctor
from t2i_course.run.measure import eval_run
from t2i_course.run.model import OPTIONS
from t2i_course.run.register import CHAPTERS, RECIPES
from t2i_course.run.report import report
from t2i_course.run.sample import draw_file
from t2i_course.run.sheets import SHEET
from t2i_course.run.stamp import _typed, result_file, stamp
from t2i_course.run.train import train_run


DATA = "digits, painted, painted2, mnist, fashion, cifar10 or a folder as ./FOLDER"


SIZE = "side of a folder's pictures, which are cropped to their central square and resized (default 32)"


def cmd_train(a):
    "t2i train"
    if a.list:
        for k, v in RECIPES.items():
            print(f"{k:15} {import_module(v).__doc__.strip().splitlines()[0]}")
        return
    between(a.save_every, 0, 1e6, "--save-every")
    known = a.resume and a.out and (Path(a.out) / "config.json").exists()  # the run knows its recipe
    if not (a.recipe or known):
        raise CourseError(f"say which recipe to train: {', '.join(RECIPES)}")
    out = train_run(
        a.recipe,
        a.data,
        a.scale,
        a.seconds,
        a.images,
        a.seed,
        a.out,
        a.resume,
        a.precision,
        a.quiet,
        a.save_every,
        codec=a.codec,
        size=a.size,
        shard=a.shard,
        checkpointing=a.checkpointing,
        compiled=a.compile,
        accumulate=between(a.accumulate, 1, 4096, "--accumulate", whole=True),
    )
    if not int(os.environ.get("RANK", 0)):
        print(f'{out}: trained. Draw with: t2i sample {out} --prompt "..." --out picture.png')


def cmd_sample(a):
    "t2i sample"
    draw_file(
        a.run, a.out, a.prompt, a.captions, a.per_caption, a.seed, **{k: getattr(a, k) for k in OPTIONS}
    )


def cmd_eval(a):
    "t2i eval"
    between(a.n, 8, 100_000, "--n", whole=True)
    between(a.seed, 0, 2**62, "--seed", whole=True)
    eval_run(a.run, a.n, a.seed, data=a.data)


def cmd_data(a):
    "t2i data"
    write_data(a.name, a.out, a.split, a.n, a.seed, a.size)


def cmd_prepare(a):
    "t2i prepare"
    prepare_data(a.data, a.out, a.images, a.size, a.split, a.shard_size, a.codec, a.store, a.seed, a.quiet)


def first_seeds(n) -> tuple:
    "0, 1, ... n-1"
    return tuple(range(between(n, 1, 100, "--seeds", whole=True)))


def cmd_run(a):
    "t2i run"
    run_chapter(a.chapter, first_seeds(a.seeds), between(a.seconds, 0.1, 1e6, "--seconds"), a.out)


def cmd_bench(a):
    "t2i bench"
    for s in a.seconds or ():
        between(s, 0.1, 1e6, "--seconds")
    seeds = first_seeds(a.seeds or (2 if a.what == "painted" else 3))
    path, head = result_file(a.out, f"bench_{a.what}"), stamp("bench", seeds)
    if a.what == "painted":
        painted(head, path, a.seconds or (60, 180), seeds)
    if a.what == "speed":
        speed(head, path, pick_device(), say)
    if a.what == "digits":
        budgets = dict.fromkeys(BUDGETS, tuple(a.seconds)) if a.seconds else None
        digits(head, path, budgets, seeds, tuple(PEERS if a.peers is None else a.peers), say=say)


class Parser(argparse.ArgumentParser):
    "An argument that cannot be read is one sentence too"

    def error(self, message):
        raise CourseError(f"{message}; see {self.prog} --help")


def add_train(command):
    "Options of t2i train"
    a = command("train", "train a recipe into a run folder", cmd_train)
    a("recipe", nargs="?", help=", ".join(RECIPES))
    a("--list", action="store_true", help="the recipes")
    a(
        "--data",
        help=f"{DATA}, of captioned images (default painted); with --resume: the new place of a folder "
        f"that was moved",
    )
    a(
        "--scale",
        choices=["smoke", "demo", "full"],
        help="size of the model and default length (default: T2I_SCALE, else demo)",
    )
    a("--seconds", type=float, metavar="N", help="wall time of training")
    a(
        "--images",
        type=int,
        metavar="N",
        help="images seen: the clock that makes runs repeatable; with --seconds, whichever is first",
    )
    a(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="auto, the default: bf16 where the processor or GPU has units for it, else fp32",
    )
    a("--seed", type=int, metavar="N", help="of every random number (default 0)")
    a(
        "--resume",
        action="store_true",
        help="go on with the run in --out; other options may be left out, and may not differ",
    )
    a("--out", metavar="RUN", help="run folder (default runs/RECIPE-DATA-SEED)")
    a("--save-every", type=float, default=20.0, metavar="N", help="seconds between checkpoints (default 20)")
    a("--quiet", action="store_true", help="no progress bar")
    a("--size", type=int, metavar="N", help=SIZE)
    a("--codec", metavar="RUN", help="with --data of latents: the vae run that t2i prepare was given")
    a(
        "--shard",
        choices=["ddp", "fsdp"],
        help="under torchrun: a copy of the model in each process, or a shard of it",
    )
    a("--accumulate", type=int, default=1, metavar="N", help="micro-batches a step (default 1)")
    a(
        "--checkpointing",
        action="store_true",
        help="compute activations again in the backward pass instead of keeping them",
    )
    a("--compile", action="store_true", help="torch.compile, block by block")


def add_sample(command):
    "Options of t2i sample"
    a = command("sample", "draw captions with a trained run", cmd_sample)
    a("run", help="run folder")
    a("--prompt", nargs="+", action="extend", metavar="TEXT", help="captions; may be given several times")
    a(
        "--captions",
        metavar="FILE",
        help="UTF-8 file or pipe (- is standard input), one caption a line; a blank line draws without "
        "condition",
    )
    a("--per-caption", type=int, default=1, metavar="N", help="pictures of each caption (default 1)")
    a("--steps", type=int, metavar="N", help="sampler steps (default the recipe's)")
    a(
        "--guidance",
        type=float,
        metavar="W",
        help="guidance scale; 1 = none, 0 = the empty caption (default the recipe's)",
    )
    a("--temperature", type=float, metavar="X", help="autoregressive recipes: of the softmax over codes")
    a(
        "--candidates",
        type=int,
        metavar="N",
        help="autoregressive recipes: draw N, keep the one that fits best",
    )
    a("--truncation", type=float, metavar="X", help="GAN recipes: how far from the mean latents may lie")
    a("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    a(
        "--out",
        required=True,
        metavar="FILE",
        help=f"picture.png (a labelled sheet of at most {SHEET}) or pictures.npz (images, captions)",
    )


def add_rest(command):
    "Options of the commands around training and sampling"
    a = command("eval", "measure a run: obedience, Frechet distance, recall, copying", cmd_eval)
    a("run", help="run folder")
    a("--n", type=int, default=1000, metavar="N", help="drawings (default 1000)")
    a("--seed", type=int, default=0, metavar="N", help="of captions and noise (default 0)")
    a("--data", metavar="FOLDER", help="the new place of its pictures, if their folder was moved")
    a = command(
        "run",
        "make the measurements of a chapter (results/CHAPTER.json); again: go on with the first that is "
        "missing",
        cmd_run,
    )
    a("chapter", help=", ".join(("demo", *CHAPTERS)))
    a("--seeds", type=int, default=2, metavar="N", help="how many (default 2)")
    a("--seconds", type=float, metavar="N", help="training time of a row (default 60)")
    a("--out", metavar="FILE", help="file to write")
    a = command("data", "write captioned pictures of a data set to a file", cmd_data)
    a("name", help=DATA)
    a("--split", default="train", help="train, test, or painted: heldout (default train)")
    a("--n", type=int, default=1000, metavar="N", help="pictures (default 1000)")
    a("--seed", type=int, default=0, metavar="N", help="of every random number (default 0)")
    a("--size", type=int, metavar="N", help=SIZE)
    a("--out", required=True, metavar="FILE", help="file.npz")
    a = command(
        "prepare",
        "write captioned pictures, or their latents, to shards that training reads by index",
        cmd_prepare,
    )
    a("data", help=DATA)
    a("--images", type=int, required=True, metavar="N", help="how many")
    a("--size", type=int, metavar="N", help=SIZE)
    a(
        "--out",
        required=True,
        metavar="FOLDER",
        help="of the shards; prepare again to go on after an interruption",
    )
    a("--split", default="train", help="train, test, or painted: heldout (default train)")
    a("--shard-size", type=int, default=4096, metavar="N", help="images a shard (default 4096)")
    a("--codec", metavar="RUN", help="a trained vae run: store its latents instead of pictures")
    a(
        "--store",
        choices=["float32", "float16", "uint8"],
        default="float32",
        help="how numbers are kept (default float32, which is exact)",
    )
    a("--seed", type=int, default=0, metavar="N", help="of the pictures (default 0)")
    a("--quiet", action="store_true", help="no progress bar")
    a = command(
        "bench",
        "quality against training time (results/bench_painted.json, bench_digits.json, bench_speed.json)",
        cmd_bench,
    )
    a(
        "what",
        nargs="?",
        choices=["painted", "digits", "speed"],
        default="painted",
        help="painted digits, MNIST beside two published recipes (about an hour), or steps of U-Net and "
        "DiT beside diffusers; default painted",
    )
    a(
        "--seconds",
        type=float,
        nargs="+",
        metavar="N",
        help="training times (default painted 60 180, digits 2.5 to 240)",
    )
    a("--seeds", type=int, metavar="N", help="how many (default painted 2, digits 3)")
    a(
        "--peers",
        nargs="*",
        choices=["diffusers", "torchcfm"],
        help="digits: which of the published recipes (default both)",
    )
    a("--out", metavar="FILE", help="file to write")
    a = command(
        "report", "the report card and one table of all results", lambda a: report(a.folder, a.figure)
    )
    a("folder", nargs="?", help="default: results/")
    a("--figure", metavar="FILE", help="where the figure goes (default report.png beside the results)")
    command("doctor", "what this machine offers and what is missing", lambda a: doctor())


def parser() -> Parser:
    "All commands of t2i"
    p = Parser(
        "t2i",
        description="Train, sample and measure the text-to-image models of t2i_course.",
        epilog="Start with: t2i demo",
        allow_abbrev=False,
    )
    sub = p.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, text, run):
        q = sub.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        q.set_defaults(do=run)
        return q.add_argument

    a = command(
        "demo",
        "train on painted digits, draw, measure: a minute on a fast machine, at most four on a slow one",
        lambda a: demo(
            between(a.seconds, 0.1, 1e6, "--seconds"),
            a.out,
            between(a.images, 1, 1e12, "--images", whole=True),
        ),
    )
    a("--images", type=int, metavar="N", help="pictures to train on (default 40000)")
    a("--seconds", type=float, metavar="N", help="time limit of training (default 150)")
    a("--out", default="runs/demo", metavar="RUN", help="run folder (default runs/demo)")
    add_train(command)
    add_sample(command)
    add_rest(command)
    return p


def lost(e: RuntimeError) -> bool:
    "Does this error say that another process is gone?"
    return any(w in str(e).lower() for w in ("connection", "peer", "timed out", "nccl", "socket", "gloo"))


def main(argv=None) -> int:
    "Entry point; a mistake of the user is one sentence and exit code 2"
    for stream in (sys.stdout, sys.stderr):  # captions may hold letters that the terminal has no code for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _typed.append([str(v) for v in (sys.argv[1:] if argv is None else argv)])
    try:
        a = parser().parse_args(argv)
        a.do(a)
    except CourseError as e:
        say(f"t2i: {e}", everyone=True)
        return 2
    except Stopped as e:
        say(f"\nt2i: {e}", everyone=True)
        return 130
    except KeyboardInterrupt:
        say("\nt2i: stopped", everyone=True)
        return 130
    except BrokenPipeError:
        return 1
    except RuntimeError as e:  # gloo and NCCL report a lost process in many words
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not lost(e):
            raise
        say(
            f"t2i: process {os.environ['RANK']} has lost another one ({str(e).splitlines()[0][:120]}). "
            "Go on from the last checkpoint: the same command with --resume.",
            everyone=True,
        )
        return 3
    except OSError as e:  # a disk that fills up while a line is logged, a file without the right to read it
        if not e.filename and e.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise
        what = f"{e.strerror}: {e.filename}" if e.filename else e.strerror
        full = e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        say(
            f"t2i: {what}. {'Free some space.' if full else 'Check the path and its permissions.'}",
            everyone=True,
        )
        return 2
    finally:
        _typed.pop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
