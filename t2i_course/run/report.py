"""Everything that was measured, as tables and a figure."""

import json
from pathlib import Path

from t2i_course.core.data import results_path
from t2i_course.core.files import CourseError, make_folder, say, write_whole


def found_rows(value):
    "Every measured row inside a result"
    if isinstance(value, dict):
        if {"obedience", "recipe"} <= value.keys() or {"accuracy", "method"} <= value.keys():
            yield value
        else:
            for v in value.values():
                yield from found_rows(v)
    elif isinstance(value, list):
        for v in value:
            yield from found_rows(v)


def report_line(name: str, r: dict, date: str) -> str:
    "A measured row as a line of the table"
    held, matched = (
        f"{100 * h['all']:.1f}%" if h else "-"
        for h in (r.get("heldout"), (r.get("heldout") or {}).get("seen_matched"))
    )
    obeys = f"{100 * (r['obedience']['all'] if 'obedience' in r else r['accuracy']):.1f}%"
    floors = r["fd_floors"] if "fd_floors" in r else r["fd"] / r["fd_floor"] if "fd" in r else None
    far, method = f"{floors:.1f}" if floors is not None else "-", r.get("recipe") or r["method"]
    seed, n = r.get("train_seed", r.get("seed", "-")), r.get("n", "-")
    return (
        f"{name:16} {method[:26]:26} {r['data'][:8]:8} {r['train_seconds']:8.0f} {r.get('steps', '-'):>6} "
        f"{seed:>4} {n:>6} {obeys:>6} {held:>8} {matched:>8} "
        f"{far:>8} {r['recall']:6.2f}  {r.get('date', date)}"
    )


def report(
    folder=None,  # default results/
    picture=None,  # where the figure goes; default report.png in the folder
):
    "The report card, as a table and a figure, and one table of every measured row in results/"
    from t2i_course.capstone.report_card import HEAD, entries, figure, lines, text_table

    folder = Path(folder) if folder else results_path("x").parent
    card = folder / "report_card.json"
    if card.exists():
        try:
            rows = entries(json.loads(card.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as e:
            raise CourseError(f"{card} cannot be read ({e}): make it again with t2i run report_card") from e
        print(text_table(HEAD, lines(rows)), "", sep="\n")
        picture = Path(picture or folder / "report.png")
        make_folder(picture.parent)
        write_whole(picture, lambda p: p.write_bytes(figure(rows).png()))
        print(f"figure: {picture}\n")
    elif picture:
        raise CourseError(f"{card} is not there: make it with t2i run report_card")
    table = []
    for f in sorted(folder.glob("*.json")):
        try:
            found = json.loads(f.read_text(encoding="utf-8"))
            table += [report_line(f.stem, r, found.get("date", "")) for r in found_rows(found)]
        except (ValueError, KeyError, TypeError) as e:
            say(f"skipped {f}, which t2i did not write ({type(e).__name__}: {e})")
    if not table:
        raise CourseError(f"{folder} holds no results: make some with t2i run flow_matching")
    print(
        f"{'file':16} {'method':26} {'data':8} {'train s':>8} {'steps':>6} {'seed':>4} {'drawn':>6} "
        f"{'obeys':>6} {'held-out':>8} {'matched':>8} {'FD/floor':>8} {'recall':>6}  date",
        *table,
        sep="\n",
    )
