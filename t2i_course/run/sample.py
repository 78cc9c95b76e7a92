"""Drawing as a command."""

import os
import sys
from pathlib import Path

import numpy as np

from t2i_course.core.files import CourseError, between, make_folder, say, write_npz
from t2i_course.run.model import OPTIONS, Model
from t2i_course.run.progress import counting
from t2i_course.run.sheets import fits_sheet, to_bytes, write_sheet


def sample_run(
    run,  # run folder, or a Model
    captions,  # texts; '' draws without condition
    per_caption=1,  # pictures of each, one after the other
    steps=None,  # sampler steps; default the recipe's
    guidance=None,  # scale; default the recipe's
    seed=0,  # of the noise
    quiet=False,  # no progress bar
    **others,  # further options, see OPTIONS
) -> tuple:  # images uint8 (n h w c), captions
    "Draw captions with a trained run; says what the model could not read"
    between(per_caption, 1, 10_000, "--per-caption", whole=True)
    between(seed, 0, 2**62, "--seed", whole=True)
    m = run if isinstance(run, Model) else Model(run)
    for c in dict.fromkeys(captions):
        for note in m.tok.notes(c):
            say(note)
        if not c.strip():
            say("an empty caption: drawn without condition")
    texts = [c for c in captions for _ in range(per_caption)]
    with counting(len(texts), "drawing", quiet) as each:
        return to_bytes(m.draw(texts, seed, steps, guidance, each, **others)), texts


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
    **options,  # of the recipe; None where one was not given
):
    "Draw captions with a run, into a labelled sheet or a file of arrays"
    if (prompts is None) == (captions is None):
        raise CourseError("say what to draw: either --prompt TEXT ... or --captions FILE")
    ext = Path(out).suffix.lower()
    if ext not in (".png", ".npz"):
        raise CourseError(f"--out must end in .png or .npz; got '{out}'")
    between(per_caption, 1, 10_000, "--per-caption", whole=True)
    texts = [typed(p) for p in prompts] if prompts is not None else read_captions(captions)
    if ext == ".png":
        fits_sheet(len(texts) * per_caption)
    for k, v in options.items():
        between(v, *OPTIONS[k][:2], f"--{k}", whole=OPTIONS[k][2])
    model = Model(run)
    make_folder(Path(out).parent)
    x, texts = sample_run(model, texts, per_caption, seed=seed, **options)
    if ext == ".png":
        write_sheet(out, x, texts)
    else:
        write_npz(out, images=x, captions=np.array(texts, dtype=f"U{max(1, max(map(len, texts)))}"))
    print(f"wrote {len(texts)} picture{'s' * (len(texts) != 1)} to {out}")
