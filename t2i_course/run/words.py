"""How a command line is read beyond what typer knows: several words an option, options of models."""

import errno
import os

import typer
from typer.core import TyperCommand, TyperGroup

from t2i_course.core.files import CourseError
from t2i_course.run.sample import option_of, options_of_all

# typer keeps click to itself: the error that all of its complaints about a command line are made of
Complaint = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
MAY_BE_BARE = {"--peers"}  # without a word behind it: none of them


def told(
    help: str,
    metavar=None,  # what stands behind the option
    *names,  # of the option; its parameter's if left out
):
    "An option with something behind it"
    return typer.Option(*names, metavar=metavar, help=help)


def flag(help: str, name: str):
    "An option with nothing behind it, and no opposite"
    return typer.Option(name, help=help)


def roles(
    use: list,  # ROLE=RUN
    codec,  # a run, or None
) -> dict:  # role -> run
    "What a run stands on; None where nothing was said"
    found = dict(codec=codec) if codec else {}
    for item in use:
        role, equals, run = item.partition("=")
        if not (role and run):
            raise CourseError(f"--use wants ROLE=RUN, such as codec=runs/vae-painted-0; got '{item}'")
        if found.get(role, run) != run:
            raise CourseError(f"two runs are given as the {role}: {found[role]} and {run}")
        found[role] = run
    return found or None


def sentence(complaint, path: str) -> CourseError:
    "A complaint about the command line as a sentence"
    return CourseError(f"{complaint.format_message().rstrip('.')}; see {path} --help")


def spread(
    args,  # of a command, as they were typed
    many,  # its options that may have several words behind them
    every,  # all of its options
) -> list:
    "`--prompt A B` as typer reads it: `--prompt A --prompt B`"
    out, name, words = [], None, 1
    for arg in [*args, None]:
        ends = arg is None or arg in every or arg.startswith("--")
        if ends and not words:
            if name not in MAY_BE_BARE:
                raise CourseError(f"{name} wants something behind it")
            out += [name, ""]
        if ends:
            name, words = (arg, 0) if arg in many else (None, 1)
        if arg is None or ends and name:
            continue
        out += [name, arg] if name else [arg]
        words += 1
    return out


class Command(TyperCommand):
    "A command: complaints are one sentence, and options may have several words behind them"

    def parse_args(self, ctx, args):
        every = {word for p in self.params for word in (*p.opts, *p.secondary_opts)} | {"--help"}
        many = {word for p in self.params if getattr(p, "multiple", False) for word in p.opts}
        try:
            return super().parse_args(ctx, spread(self.known(ctx, args, every), many, every))
        except Complaint as e:
            raise sentence(e, ctx.command_path) from e

    def known(self, ctx, args, every) -> list:
        "The arguments that this command declares"
        return args

    def format_epilog(self, ctx, formatter):
        if callable(self.epilog):  # made when it is asked for
            self.epilog = self.epilog()
        super().format_epilog(ctx, formatter)


class Sample(Command):
    "The options of `t2i sample` are those of the model: what the command does not declare is kept for it"

    def known(self, ctx, args, every) -> list:
        out, ctx.meta["options"], words = [], {}, iter(args)
        for arg in words:
            name, equals, text = arg.partition("=")
            if not name.startswith("--") or name in every or arg == "--":
                out.append(arg)
                continue
            text = text if equals else next(words, None)
            if text is None:
                raise CourseError(f"{name} wants a number behind it; see {ctx.command_path} --help")
            ctx.meta["options"][name[2:].replace("-", "_")] = text
        return out

    def format_options(self, ctx, formatter):
        super().format_options(ctx, formatter)
        with formatter.section("Options of the models, each has some of them"):
            rows = [
                (f"{option_of(k)} N", f"{text}  [{low:g} to {high:g}]")
                for k, (low, high, _, text) in options_of_all().items()
            ]
            formatter.write_dl(rows)


class Commands(TyperGroup):
    "All commands of t2i"

    def parse_args(self, ctx, args):
        if not args:
            raise CourseError(f"say what to do: {', '.join(self.commands)}; see t2i --help")
        try:
            return super().parse_args(ctx, args)
        except Complaint as e:
            raise sentence(e, "t2i") from e

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except Complaint as e:
            raise sentence(e, "t2i") from e


def lost(e: RuntimeError) -> bool:
    "Does this error say that another process is gone?"
    said = str(e).lower()
    return any(w in said for w in ("connection", "peer", "timed out", "nccl", "socket", "gloo"))


def of_the_system(e: Exception) -> tuple:  # exit code, sentence
    "What the machine or another process did; any other error goes on its way"
    if isinstance(e, RuntimeError):  # gloo and NCCL report a lost process in many words
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not lost(e):
            raise e
        said = str(e).splitlines()[0][:120]
        return 3, (
            f"t2i: process {os.environ['RANK']} has lost another one ({said}). "
            "Go on from the last checkpoint: the same command with --resume."
        )
    full = e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    if not e.filename and not full:
        raise e
    what = f"{e.strerror}: {e.filename}" if e.filename else e.strerror
    return 2, f"t2i: {what}. {'Free some space.' if full else 'Check the path and its permissions.'}"
