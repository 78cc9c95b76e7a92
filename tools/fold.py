"""Checkers and solutions are folded in JupyterLab as they are on the site: a click opens them.

    python tools/fold.py                           every page; `make export` does this
    python tools/fold.py nbs/01_core/01_data.ipynb  the pages that are named

The cells carry `"jupyter": {"source_hidden": true}`, and no other cell does. `nbdev_clean` keeps this, because `settings.ini`
allows the key."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDED = {"source_hidden": True}


def is_folded(source):
    "Is this the source of a hidden checker or of a solution?"
    checker = re.search(r"^#\|\s*hide\s*$", source, re.M) and re.search(r"^def check_\d", source, re.M)
    return bool(checker or re.search(r"^#\|\s*code-summary:\s*\W*Solution", source, re.M))


def fold(cell):
    "Bring one cell's metadata to the rule; was it another way before?"
    old = cell["metadata"].pop("jupyter", None)
    if cell["cell_type"] == "code" and is_folded("".join(cell["source"])): cell["metadata"]["jupyter"] = dict(FOLDED)
    return cell["metadata"].get("jupyter") != old


def fold_page(page):
    "Write a page again if a cell of it had to change."
    notebook = json.loads(page.read_text(encoding="utf-8"))
    if not sum(map(fold, notebook["cells"])): return False
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    page.write_text(text + "\n", encoding="utf-8")
    return True


if __name__ == "__main__":
    pages = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    for page in pages:
        if ".ipynb_checkpoints" not in page.parts and fold_page(page): print(f"{page.stem}: folded")
