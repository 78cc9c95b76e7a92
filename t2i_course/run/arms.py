"""The arms of a sweep: made once, kept, and skipped as long as the code that made them is the same."""

import ast
import hashlib
import json
import math
from fractions import Fraction
from importlib.util import find_spec, resolve_name
from pathlib import Path

from t2i_course.core.files import CourseError, say, write_json
from t2i_course.core.shipped import is_model


def code_version(
    *modules,  # dotted names of modules of the package
) -> str:  # changes when their numbers may change
    "Hash of the code of modules and of all they import from the package, without comments, and of the judges"
    top, seen, todo = modules[0].split(".")[0], {}, list(modules)
    while todo:
        name = todo.pop()
        if name in seen or (spec := find_spec(name)) is None:
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        seen[name] = ast.dump(tree)
        here = name if spec.submodule_search_locations else name.rpartition(".")[0]
        for n in ast.walk(tree):
            if isinstance(n, ast.Import):
                todo += [a.name for a in n.names if a.name.split(".")[0] == top]
            if not isinstance(n, ast.ImportFrom):
                continue
            source = resolve_name("." * n.level + (n.module or ""), here) if n.level else n.module
            if source.split(".")[0] != top:
                continue
            todo += [source] + [
                f"{source}.{a.name}" for a in n.names if find_spec(source).submodule_search_locations
            ]
    h = hashlib.sha256(json.dumps(seen, sort_keys=True).encode())
    for p in sorted(Path(find_spec(top).origin).parent.glob("weights/*.json")):
        if not is_model(json.loads(p.read_bytes())):  # sweeps measure on runs, not on what is shipped
            h.update(p.read_bytes())
    return h.hexdigest()[:12]


def value_at(
    d: dict,  # nested
    key: str,  # 'a.b.c' stands for d['a']['b']['c']
):  # the value; None when there is none
    for k in key.split("."):
        d = d.get(k) if isinstance(d, dict) else None
    return d


def kept_arms(
    path,  # results file
    head: dict,  # what it says now of its making
    keys,  # of the arms
) -> dict:  # key -> value
    "What the same code finished, with equal scale and seeds, on this machine: one file never mixes two"
    if not Path(path).exists():
        return {}
    try:
        old = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise CourseError(f"{path} cannot be read ({e}): delete it, or choose another --out") from e
    if any(old.get(k) != v for k, v in head.items() if k not in ("command", "date")):
        return {}
    return {k: v for k in keys if (v := value_at(old, k)) is not None}


def measured_numbers(
    value,  # of an arm
    at="",  # where in the arm
) -> dict:  # place -> number
    "Numbers that only a measurement gives: no times, nothing of six digits or less, no ratio of small counts"
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            p: x
            for k, v in items
            if k != "fd_floor" and "seconds" not in str(k)
            for p, x in measured_numbers(v, f"{at}.{k}").items()
        }
    if not isinstance(value, float) or not math.isfinite(value) or float(f"{value:.6g}") == value:
        return {}
    return {} if abs(Fraction(value).limit_denominator(1000) - Fraction(value)) < 1e-9 else {at: value}


def twin(
    key: str,  # of an arm
    value,  # of this arm
    done: dict,  # key -> value of the others
    equal=(),  # sweeps whose arms may agree
) -> str:  # of another arm with the very same numbers; None when there is none
    "Arms of one sweep differ in one word of their keys; the entries of a list are arms as well"
    if key.split(".")[0] in equal:
        return None
    own = measured_numbers(value)

    def siblings(other):
        a, b = key.split("."), other.split(".")
        return len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1

    for other, v in done.items():
        if own and siblings(other) and measured_numbers(v) == own:
            return other
    entries = [measured_numbers(v) for v in value if isinstance(v, dict)] if isinstance(value, list) else []
    return next((f"{key}, entry {i}" for i, e in enumerate(entries) if e and e in entries[i + 1 :]), None)


def put(
    d: dict,  # changed in place
    key: str,  # 'a.b.c' stands for d['a']['b']['c']
    value,
):
    "Write under a dotted name"
    *path, last = key.split(".")
    for k in path:
        d = d.setdefault(k, {})
    d[last] = value


def make_arms(
    arms,  # (key, make) of each
    head: dict,  # how and when they are made
    path: Path,  # results file
    equal=(),  # sweeps whose arms may agree, see `twin`
    also=None,  # what else is to be written
):
    "Make the arms that the file does not hold yet, and write it after each"
    arms = list(arms)
    done = kept_arms(path, head, [k for k, _ in arms])
    res = head | (also or {})
    for key, value in done.items():
        put(res, key, value)
    if path.exists() and not done:
        say(f"nothing in {path} was made with this code, scale and seeds on this machine: every arm is made")
    for i, (key, make) in enumerate(arms, 1):
        if key in done:
            say(f"{i} of {len(arms)} {key}: kept")
            continue
        say(f"{i} of {len(arms)} {key} ...")
        value = json.loads(json.dumps(make()))  # as it will be read again
        other = twin(key, value, done, equal)
        same = f"{key} and {other} came out the same to the last bit: the setting that differs between "
        "them had no effect"
        if other and head["scale"] == "smoke":
            say(f"  {same} in so short a run")  # a code must be unused for long to be restarted
        elif other:
            raise CourseError(f"{same}. Mend the chapter; the arms before are in {path}.")
        say(f"  {value}")
        done[key] = value
        put(res, key, value)
        write_json(path, res)
