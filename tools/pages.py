"""Run pages at demo scale and write down that their outputs belong to their code.

    python tools/pages.py nbs/04_diffusion/01_ddpm.ipynb ...   run, clean and stamp these pages
    python tools/pages.py --older                              name the pages whose outputs are older than their code

The stamps stand in results/pages.json. A page's stamp holds as long as its code cells say the same (comments and layout
aside) and the shipped judges are the same."""
import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMPS = ROOT / "results" / "pages.json"
SKIP = "never run"  # the tag of cells that are shown with their recorded output


def never_run(source):
    "Cells that are not run here: recorded ones, and the last one, which exports."
    return bool(re.search(r"^#\|\s*eval:\s*false", source, re.M)) or "nbdev_export()" in source


def tree_of(source):
    "The syntax tree of a cell as text; magics and cells of another language stand for themselves."
    if re.search(r"^\s*[%!]", source, re.M): return source
    return ast.dump(ast.parse(source))


def code_of(page):
    "Hash of the code cells of a page, comments and layout left out."
    cells = json.loads(Path(page).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    trees = [tree_of(source) for source in sources if not never_run(source)]
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:12]


def judges(page):
    "Hash of the cards of the shipped judges, and of the shipped models that a page opens by their names."
    h, text = hashlib.sha256(), Path(page).read_text(encoding="utf-8")
    for path in sorted((ROOT / "t2i_course" / "weights").glob("*.json")):
        card = path.read_bytes()
        if "config" not in json.loads(card) or f"shipped('{path.stem}')" in text: h.update(card)
    return h.hexdigest()[:12]


def stamps():
    "What is written down: page -> how its outputs were made."
    return json.loads(STAMPS.read_text(encoding="utf-8")) if STAMPS.exists() else {}


def name_of(page):
    "A page as the stamps name it."
    return Path(page).resolve().relative_to(ROOT).as_posix()


def is_older(page):
    "Were the outputs of a page made by other code than it shows, or never stamped?"
    stamp = stamps().get(name_of(page), {})
    return stamp.get("scale") != "demo" or (stamp["code"], stamp["judges"]) != (code_of(page), judges(page))


def faults(notebook):
    "Errors and warnings in the outputs of a notebook."
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
            bad = output["output_type"] == "error" or output.get("name") == "stderr"
            if bad or re.search(r"\b\w*Warning: |Traceback \(most recent", text):
                yield (output.get("evalue") or text).strip()[:300]


def executed(page):
    "The notebook with new outputs, and the seconds it took."
    import nbformat
    from nbclient import NotebookClient
    os.environ.update(T2I_SCALE="demo", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(page, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type != "code": continue
        if never_run(cell.source): cell.metadata["tags"] = [SKIP]
        else: cell.outputs = []
    start = time.perf_counter()
    where = dict(metadata=dict(path=str(Path(page).parent)))
    how = dict(timeout=3600, kernel_name="python3", skip_cells_with_tag=SKIP, coalesce_streams=True)
    NotebookClient(notebook, resources=where, **how).execute()
    return notebook, time.perf_counter() - start


def run(page):
    "Run a page in place and stamp it. A page that fails stays as it was."
    import nbformat
    from t2i_course.run.stamp import hardware, versions
    code = code_of(page)  # of what is run, even if somebody edits the page meanwhile
    notebook, seconds = executed(page)
    found = list(faults(notebook))
    if found: raise SystemExit("\n".join([f"{name_of(page)} is left as it was:", *found]))
    nbformat.write(notebook, page)
    subprocess.run([str(Path(sys.executable).with_name("nbdev_clean")), "--fname", str(page)], cwd=ROOT, check=True)
    stamp = dict(code=code, judges=judges(page), scale="demo", seconds=round(seconds), date=time.strftime("%Y-%m-%d"),
                 hardware=hardware(), versions=versions())
    STAMPS.write_text(json.dumps(dict(sorted((stamps() | {name_of(page): stamp}).items())), indent=1) + "\n", encoding="utf-8")
    print(f"{name_of(page)}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*")
    parser.add_argument("--older", action="store_true", help="name the pages whose outputs are older than their code")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.older: print(*[name_of(page) for page in sorted((ROOT / "nbs").rglob("*.ipynb")) if is_older(page)], sep="\n")
    for page in args.pages: run(page)
