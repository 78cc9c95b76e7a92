"""Drawing as a command."""

import os
import sys
from functools import cache
from pathlib import Path

import numpy as np

from t2i_course.core.files import CourseError, between, make_folder, say, write_npz
from t2i_course.core.register import recipe, recipes
from t2i_course.core.runs import Finished, open_run
from t2i_course.run.progress import counting
from t2i_course.run.sheets import fits_sheet, to_bytes, write_sheet


def sample_run(
    run,  # run folder, or an opened one
    captions,  # texts; '' draws without condition
    per_caption=1,  # pictures of each, one after the other
    seed=0,  # of the noise
    quiet=False,  # no progress bar
    **options,  # of the model, such as steps or guidance; default as its config says
) -> tuple:  # images uint8 (n h w c), captions
    "Draw captions with a trained run; says what the model could not read"
    between(per_caption, 1, 10_000, "--per-caption", whole=True)
    between(seed, 0, 2**62, "--seed", whole=True)
    run = run if isinstance(run, Finished) else open_run(run)
    options = with_use(run, options)
    for c in dict.fromkeys(captions):
        for note in run.tok.notes(c):
            say(note)
        if not c.strip():
            say("an empty caption: drawn without condition")
    texts = [c for c in captions for _ in range(per_caption)]
    with counting(len(texts), "drawing", quiet) as each:
        return to_bytes(run.draw(texts, seed, each, **options)), texts


def with_use(
    run: Finished,
    options: dict,  # name -> value, None where it was not given
) -> dict:
    "The options that the model has; those that only other models have are left aside, with a sentence"
    given = {k: v for k, v in options.items() if v is not None}
    idle = [k for k in given if k not in run.model.options]
    unknown = [k for k in idle if k not in options_of_all()]
    if unknown:
        have = ", ".join(map(option_of, run.model.options))
        raise CourseError(f"{run.config.recipe} has no option {option_of(unknown[0])}; it has {have}")
    if idle:
        say(f"{run.config.recipe} has no use for {', '.join(map(option_of, idle))}: left aside")
    return {k: v for k, v in given.items() if k not in idle}


def known(
    options,  # names, as they were typed
    own,  # name -> what is known of it
):
    "Options that neither the run nor any recipe has are refused"
    for name in options:
        if name not in own and name not in options_of_all():
            have = ", ".join(map(option_of, own))
            raise CourseError(
                f"there is no option {option_of(name)}; there are {have}; see t2i sample --help"
            )


def as_numbers(
    options: dict,  # name -> what was typed, None where it was not given
    own: dict,  # name -> (lowest, highest, whole number?, help), of the run's model
) -> dict:
    "What is typed behind an option is a number, and a whole one where the option counts"
    known(options, own)
    out = {}
    for name, text in options.items():
        whole = (own[name] if name in own else options_of_all()[name])[2]
        try:
            out[name] = (int if whole else float)(text)
        except ValueError as e:
            kind = "whole number" if whole else "number"
            raise CourseError(f"{option_of(name)} wants a {kind}; got '{text}'") from e
    return out


def option_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@cache
def options_of_all() -> dict:  # name -> (lowest, highest, whole number?, help)
    "The options of every model in the modules of the recipes"
    found = {}
    for name in recipes():
        for kind in vars(recipe(name)).values():
            own = getattr(kind, "options", None) if isinstance(kind, type) else None
            found |= own if isinstance(own, dict) else {}
    return found


def read_captions(
    path,  # a UTF-8 file, one caption a line; a pipe is read as well, - is standard input
) -> list:  # captions; '' draws without condition
    "The captions of a file"
    piped, path = str(path) == "-", Path(path)
    if not piped and (not path.exists() or path.is_dir()):
        raise CourseError(
            f"caption file {path} {'is a folder' if path.is_dir() else 'does not exist'}: give a UTF-8 "
            f"text file"
        )
    raw = sys.stdin.buffer.read() if piped else path.read_bytes()
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise CourseError(
            f"{path} is not UTF-8 text (byte {e.start}). Save it as UTF-8, one caption a line."
        ) from e
    if not text:
        raise CourseError(f"{path} is empty: write one caption a line (a blank line draws without condition)")
    return text.removesuffix("\n").split("\n")


def typed(
    text: str,  # an argument, as Python has decoded it by the locale
) -> str:
    "A caption that was typed in UTF-8, whatever the locale says"
    try:
        text = os.fsencode(text).decode("utf-8")
    except UnicodeError:
        pass  # it was typed in the encoding of the locale
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise CourseError(
            f"the caption '{text}' is not UTF-8: type it so, or write it to a UTF-8 file for --captions"
        )
    return text


def draw_file(
    run,  # run folder
    out,  # picture.png or pictures.npz
    prompts=None,  # captions, as they were typed
    captions=None,  # or a file of them
    per_caption=1,  # pictures of each
    seed=0,  # of the noise
    options=None,  # name -> what was typed, of the model's own options
):
    "Draw captions with a run, into a labelled sheet or a file of arrays"
    options = options or {}
    if (prompts is None) == (captions is None):
        known(options, options_of_all())  # a misspelt --prompt is called by its name
        raise CourseError("say what to draw: either --prompt TEXT ... or --captions FILE")
    ext = Path(out).suffix.lower()
    if ext not in (".png", ".npz"):
        raise CourseError(f"--out must end in .png or .npz; got '{out}'")
    between(per_caption, 1, 10_000, "--per-caption", whole=True)
    texts = [typed(p) for p in prompts] if prompts is not None else read_captions(captions)
    if ext == ".png":
        fits_sheet(len(texts) * per_caption)
    run = open_run(run)
    options = with_use(run, as_numbers(options, run.model.options))
    run.checked(options)
    make_folder(Path(out).parent)
    x, texts = sample_run(run, texts, per_caption, seed, **options)
    if ext == ".png":
        write_sheet(out, x, texts)
    else:
        write_npz(out, images=x, captions=np.array(texts, dtype=f"U{max(1, max(map(len, texts)))}"))
    print(f"wrote {len(texts)} picture{'s' * (len(texts) != 1)} to {out}")
