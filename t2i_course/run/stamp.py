"""Who made a result, when, with what and on what."""

import json
import os
import platform
import shlex
import sys
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from t2i_course.core.data import results_path
from t2i_course.core.data import scale as current_scale
from t2i_course.core.files import make_folder
from t2i_course.core.training import has_bf16, pick_device


def installed() -> str:
    "The version of the installed package, or 'source'"
    try:
        return metadata.version("t2i_course")
    except metadata.PackageNotFoundError:
        return "source"


def versions() -> dict:
    "What a result was made with"
    return dict(python=platform.python_version(), torch=torch.__version__, t2i_course=installed())


def hardware() -> str:
    "The GPU's name, or the processor's and its cores"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = (l.split(":")[1].strip() for l in lines if l.startswith("model name"))
        name = next(names, name)
    return f"{name}, {os.cpu_count()} cores"


_typed = []  # the command line that `main` is at work on


@contextmanager
def typing(
    argv,  # what stands behind `t2i`
):  # the same as texts
    "Inside, this is the command line that is at work"
    _typed.append([str(v) for v in argv])
    try:
        yield _typed[-1]
    finally:
        _typed.pop()


def command(
    call="",  # where Python calls: the function with its arguments
) -> str:
    "The command that is running, as it was typed; or the call, where no command is"
    if not _typed:
        return f"python: {call}"
    as_module = Path(sys.argv[0]).name == "__main__.py"
    return shlex.join([*(("python", "-m", "t2i_course") if as_module else ("t2i",)), *_typed[-1]])


def stamp(chapter: str, seeds) -> dict:
    "Who made a result, when, on what"
    call = (
        f"bench(seeds={tuple(seeds)})" if chapter == "bench" else f"run_chapter('{chapter}', {tuple(seeds)})"
    )
    return dict(
        chapter=chapter,
        command=command(call),
        date=str(date.today()),
        hardware=hardware(),
        bf16_units=has_bf16(pick_device()),
        versions=versions(),
        seeds=list(seeds),
        scale=current_scale(),
    )


def alike(
    old: dict,  # of a run or row that is there
    new: dict,  # of the one that is wanted
    but=(),  # what does not count
) -> bool:
    "The same settings, and versions of torch and of this package; another Python does not matter"

    def said(c):
        versions = c.get("versions") or {}
        c = c | dict(versions=[versions.get(k) for k in ("torch", "t2i_course")])
        return json.loads(json.dumps({k: v for k, v in c.items() if k not in but}))

    return said(old) == said(new)


def result_file(out, name: str) -> Path:
    "The file named by --out, or results/NAME.json; its folder is made"
    path = Path(out) if out else results_path(name)
    make_folder(path.parent)
    return path
