"""Who imports whom. The rooms stand in one order, cli -> bench -> run -> sweeps -> chapters -> core, and no arrow runs back."""
import ast

import pytest
from tree import LIB, ROOT, chapters, generated

ROOMS = ["core", "chapters", "sweeps", "run", "bench", "cli"]  # each may import from those before it, and from itself
ALONE = {"core.files", "core.config", "core.contracts", "core.counting"}  # the ground under all chapters knows no chapter at all
ORDER = {chapter.address: chapter.order for chapter in chapters()}


def package(root):
    "Every module of a package on disk: dotted name without the package's -> syntax tree."
    paths = [path for path in sorted(root.rglob("*.py")) if path.stem != "_modidx"]
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip(".") for path in paths}
    return {names[path]: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imported(name, tree, known):
    "The modules of the package that one of them imports, wherever the line stands: in a function as well."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] == LIB]
        elif isinstance(node, ast.ImportFrom):
            here = f"{LIB}.{name}".split(".")
            base = ".".join([*here[:len(here) - node.level], *filter(None, [node.module])]) if node.level else node.module
            found = [f"{base}.{alias.name}" for alias in node.names] if base.split(".")[0] == LIB else []
        else: continue
        for dotted in found:
            parts = dotted.split(".")[1:]
            while parts and ".".join(parts) not in known: parts.pop()  # a name inside a module
            if parts: yield ".".join(parts)


def arrows(root=ROOT / LIB):
    "module -> the modules it imports"
    trees = package(root)
    trees.pop("", None)
    return {name: set(imported(name, tree, trees)) - {name} for name, tree in trees.items()}


def room(name):
    "In which room a module stands; None for a file that stands in none."
    first = name.split(".")[0]
    if first in ("cli", "__main__"): return "cli"
    return first if first in ROOMS else "chapters" if name in ORDER or name + "." in {k[:len(name) + 1] for k in ORDER} else None


def circle(graph):
    "Modules that import each other in a ring; empty where there is none."
    done, path = set(), []

    def walk(name):
        if name in path: return path[path.index(name):] + [name]
        if name in done: return []
        path.append(name)
        for other in sorted(graph[name]):
            if found := walk(other): return found
        done.add(path.pop())
        return []
    return next(filter(None, map(walk, sorted(graph))), [])


def backwards(graph):
    "Arrows from a lower room to a higher one, from a chapter to a later one, and from the ground to a chapter."
    for name, others in graph.items():
        for other in others:
            lower, higher = room(name), room(other)
            if None in (lower, higher) or ROOMS.index(higher) > ROOMS.index(lower): yield name, other
            elif name in ORDER and other in ORDER and ORDER[other] >= ORDER[name]: yield name, other
            elif name in ALONE and other not in ALONE: yield name, other


GRAPH = arrows()


def test_the_reading_finds_what_is_there():
    "An import in a function and a relative one are seen, or the tests below could not fail."
    assert "core.data" in GRAPH["core.training"] and "run.train" in GRAPH["run.demo"]
    inside = ast.parse("def f():\n    from ..run import train, demo as d\n    import t2i_course.cli\n    from . import data")
    assert set(imported("core.x", inside, {"run.train", "run.demo", "cli", "core.data", "run"})) == {"run.train", "run.demo", "cli", "core.data"}


@pytest.mark.parametrize("name, other", [("core.data", "run.train"), ("diffusion.ddpm", "run.train"), ("core.files", "core.data"),
                                         ("run.train", "cli"), ("run.train", "bench.speed"), ("core.data", "core.plots")])
def test_an_arrow_back_would_be_found(name, other):
    assert list(backwards({name: {other}, other: set()})) == [(name, other)]


def test_a_circle_would_be_found():
    ring = dict(a={"b"}, b={"c"}, c={"a"}, d={"a"})
    assert circle(ring) == ["a", "b", "c", "a"] and not circle(ring | dict(c=set()))


def test_no_import_circle(): assert not circle(GRAPH)


def test_no_arrow_runs_back(): assert not sorted(backwards(GRAPH))


def test_every_module_stands_in_a_room():
    assert not [name for name in GRAPH if room(name) is None]


HAND = {"core", "run", "bench", "sweeps", "cli", "__main__", "__init__"}


def by_hand():
    "The modules that people write; `__init__.py` of a folder and nbdev's index are made by nbdev."
    paths = [path for path in sorted((ROOT / LIB).rglob("*.py")) if not generated(path) and path.stem != "_modidx"]
    return [path for path in paths if path.read_text(encoding="utf-8").strip()]


def test_hand_written_code_stands_in_its_rooms():
    assert by_hand() and {path.relative_to(ROOT / LIB).parts[0].removesuffix(".py") for path in by_hand()} <= HAND


@pytest.mark.parametrize("path", by_hand(), ids=lambda path: path.relative_to(ROOT / LIB).as_posix())
def test_hand_written_files_are_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= (300 if path.name == "cli.py" else 250), lines


@pytest.mark.parametrize("path", by_hand(), ids=lambda path: path.relative_to(ROOT / LIB).as_posix())
def test_a_docstring_is_one_string(path):
    "The second of two strings on lines of their own would be a statement that does nothing."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        lone = [n.value for n in body if isinstance(n, ast.Expr)] if isinstance(body, list) else []
        texts = [isinstance(value, ast.Constant) and isinstance(value.value, str) for value in lone]
        assert not any(a and b for a, b in zip(texts, texts[1:])), ast.get_docstring(node)
