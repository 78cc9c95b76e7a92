"""Recipes and sweeps, found by where they stand: there is no list to add a new chapter to."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path

from t2i_course._modidx import d as index
from t2i_course.core.files import CourseError

PACKAGE = Path(__file__).parents[1]
FACE = {"Config", "recipe_for", "build"}  # what a recipe exports, see core.contracts.Recipe


@cache
def recipes() -> dict:  # name -> dotted module, in the order of the course's parts
    "Every module that nbdev's index lists with the face of a recipe"
    found = []
    for module, entries in index["syms"].items():
        if FACE <= {name.removeprefix(f"{module}.") for name in entries}:
            page = next(iter(entries.values()))[0]
            found.append((page, module.rpartition(".")[2], module))
    return {name: module for _, name, module in sorted(found)}


def recipe(
    name: str,  # of a recipe
):  # its module
    "The module of a recipe, or a sentence that names those there are"
    if name not in recipes():
        raise CourseError(f"there is no '{name}': choose {', '.join(recipes())}")
    return import_module(recipes()[name])


@cache
def sweeps() -> dict:  # name -> dotted module
    "Every module below sweeps/ with `experiments`, or with `make` where it writes something else than arms"
    found = sorted(PACKAGE.glob("sweeps/*/*.py"))
    found = [p for p in found if re.search(r"^def (experiments|make)\(", p.read_text(encoding="utf-8"), re.M)]
    return {p.stem: f"{PACKAGE.name}.sweeps.{p.parent.name}.{p.stem}" for p in found}


def sweep(
    name: str,  # 'flow_matching', or '01_flow_matching' as its notebook is called
) -> tuple:  # its name, its module
    "The long measurements of a chapter"
    name = re.sub(r"^\d\d_", "", name)
    if name not in sweeps():
        raise CourseError(f"there is no '{name}': choose {', '.join(('demo', *sweeps()))}")
    return name, import_module(sweeps()[name])
