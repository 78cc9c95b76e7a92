"""The exercises of a page, run as a reader meets them: the cells that they need, then checker, template and solution.

`grade` and `accepts_only` are replaced by functions that write down what they were given, so that a test can put any answer
to the page's own checker."""
import ast
import builtins
import contextlib
import dis
import io
import re
from dataclasses import dataclass, field
from types import CodeType, FunctionType, GeneratorType

import torch
from t2i_course.core.exercises import kind_of

SKIPPED = ("notest", "slow", "gpu")


# --- Which cells an exercise needs ---

def bound_and_used(cell):
    "Names that a cell binds for the cells behind it, and names that must be there before it runs (or before what it defines is called)."
    code = compile(without_magics(cell), "cell", "exec")
    bound, used = [], set()
    for step in dis.get_instructions(code):
        if step.opname == "STORE_NAME": bound.append(step.argval)
        if step.opname == "LOAD_NAME" and step.argval not in bound: used.add(step.argval)
    for inner in codes_in(code): used |= {step.argval for step in dis.get_instructions(inner)
                                          if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval not in bound}
    return set(bound), used


def codes_in(code):
    "The code objects inside a code object, at any depth."
    for inner in code.co_consts:
        if isinstance(inner, CodeType): yield from (inner, *codes_in(inner))


def without_magics(cell):
    return "" if re.search(r"^%%", cell.source, re.M) else re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M)


def changes(cell, names):
    "Does a cell put something into an object of these names, or train it? `model.x = 1`, `x[0] = 1`, `x.add_(1)`, `for r in train(state)`."
    for node in ast.walk(cell.code):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store) and root(node) in names: return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and root(node.func) in names \
            and re.search(r"_$|^(append|update|load_state_dict|fit|hold|requires_grad_)$", node.func.attr): return True
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and getattr(node.iter.func, "id", "") == "train" \
            and {n.id for arg in node.iter.args[:2] for n in ast.walk(arg) if isinstance(n, ast.Name)} & names: return True  # state, loss
    return False


def root(node):
    "`a` of `a.b[c].d`; a call in between makes another object."
    while isinstance(node, (ast.Attribute, ast.Subscript)): node = node.value
    return getattr(node, "id", None)


def runs(cell):
    return cell.kind == "code" and "nbdev_export()" not in cell.source and cell.directive("eval") != "false" \
        and all(cell.directive(flag) is None for flag in SKIPPED)


def needed(cells, wanted):
    "Those of `cells` that the cells `wanted`, which stand behind them, depend on; in their order."
    cells, builtin = [cell for cell in cells if runs(cell)], set(dir(builtins))
    names, found = set().union(*(bound_and_used(cell)[1] for cell in wanted)) - builtin, set()
    while True: # again, because a function may call one that is defined behind it
        before = len(found)
        for i, cell in reversed(list(enumerate(cells))):
            bound, used = bound_and_used(cell)
            if i not in found and not bound & names and not changes(cell, names): continue
            found.add(i)
            names = (names - bound) | (used - builtin)
        if len(found) == before: return [cells[i] for i in sorted(found)]


# --- Running them ---

@dataclass
class Exercise:
    "What an exercise gave to `grade` and to `accepts_only`."
    name: str
    check: object = None      # as the page passes it to grade
    template: object = None   # the untouched answer
    proof: object = None      # as the page passes it to accepts_only
    right: object = None      # the solution
    wrong: list = field(default_factory=list)


def groups(chapter):
    "The code cells of each `### ` exercise, with its heading."
    found = []
    for cell in chapter.section("Exercises"):
        if cell.kind == "markdown" and cell.source.startswith("### "): found.append((cell.source.splitlines()[0][4:], []))
        elif cell.kind == "code" and found: found[-1][1].append(cell)
    return found


def run(cell, ns):
    "Run a cell quietly."
    source = without_magics(cell)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(source, f"<{cell.source.splitlines()[0][:40]}>", "exec"), ns)


def exercises(chapter):
    "Every exercise of a chapter, and the namespace in which they live."
    import matplotlib
    matplotlib.use("Agg")
    section = chapter.section("Exercises")
    start = next(i for i, cell in enumerate(chapter.cells) if cell is section[0])
    ns, found = dict(__name__="__main__", display=lambda *_, **__: None), []
    wanted = [cell for _, cells in groups(chapter) for cell in cells]
    for cell in needed(chapter.cells[:start], wanted): run(cell, ns)
    for name, cells in groups(chapter):
        now = Exercise(name)
        ns["grade"] = lambda check, answer, hint="", now=now: vars(now).update(check=check, template=answer)
        ns["accepts_only"] = lambda check, right, *wrong, now=now: vars(now).update(proof=check, right=right, wrong=list(wrong))
        for cell in cells:
            if runs(cell): run(cell, ns)
        found.append(now)
    return found, ns


# --- Putting an answer to a checker ---

def put(check, answer):
    "The page's verdict on an answer, quietly, and with the same random numbers for every answer."
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()): return kind_of(check, answer)


def snapshot(value):
    "A copy that later steps do not change, without its graph."
    if torch.is_tensor(value): return value.detach().clone()
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list): return type(value)(map(snapshot, value))
    return value


def nothing_like(value):
    "Zeros in the shape of a value."
    if torch.is_tensor(value): return torch.zeros_like(value)
    if isinstance(value, (bool, int, float)): return type(value)(0)
    if isinstance(value, (tuple, list)): return type(value)(map(nothing_like, value))
    return type(value)() if isinstance(value, (dict, set, str)) else None


def answers_without_thought(exercise):
    "{what it is: an answer that needs no understanding}, from what the solution returns while it is checked."
    right, seen = exercise.right, []
    if isinstance(right, type): return {"None": lambda *_, **__: None}
    if not callable(right): return {"None": None, "0": 0} | {"zeros": nothing_like(right)}
    def watched(*args, **kwargs):
        value = right(*args, **kwargs)
        seen.append((bool(args or kwargs), snapshot(value)))
        return value
    put(exercise.proof, watched)
    found = {"None": lambda *_, **__: None, "0": lambda *_, **__: 0}
    values = [value for _, value in seen if value is not None and not isinstance(value, (FunctionType, GeneratorType))]
    if not values: return found
    found["zeros of the solution's shape"] = lambda *args, **kwargs: nothing_like(right(*args, **kwargs))
    if any(given for given, _ in seen): found["always the solution's first value"] = lambda *_, **__: snapshot(values[0])
    return found
