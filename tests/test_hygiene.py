"The rules of the house, one test a rule. CONTRIBUTING.md says why each is there."
import ast
import configparser
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict

import pytest
from execnb.nbio import nb2str
from nbdev.clean import clean_nb
from tree import LIB, ROOT, chapters, copy_to, files, generated, modules, notebooks

NOTEBOOKS, CHAPTERS = notebooks(), chapters()
# written by hand, below all chapters that use them
GROUND = {"files", "sources", "downloads", "contracts", "counting", "shards", "figures", "cards", "protocols", "machine",
          "processes", "resuming", "dials", "text"}
STILL = json.loads((ROOT / "tests" / "still.json").read_text(encoding="utf-8"))
FOLD = runpy.run_path(str(ROOT / "tools" / "fold.py"))["fold"]
BY_MODULE = {chapter.address: chapter for chapter in CHAPTERS}
every_notebook = pytest.mark.parametrize("nb", NOTEBOOKS, ids=str)
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=str)


# --- Numbers and addresses ---

@every_chapter
def test_chapter_stands_in_a_numbered_room(chapter):
    assert re.fullmatch(r"nbs/\d\d_[a-z0-9_]+/\d\d_[a-z0-9_]+\.ipynb", str(chapter))


def test_chapters_count_from_one_inside_their_part():
    assert CHAPTERS
    parts = defaultdict(list)
    for chapter in CHAPTERS: parts[chapter.path.parent.name].append(chapter.path.name[:2])
    for part, numbers in parts.items(): assert sorted(numbers) == [f"{n:02}" for n in range(1, len(numbers) + 1)], part
    assert len({part[:2] for part in parts}) == len(parts), parts
    assert len({chapter.address for chapter in CHAPTERS}) == len(CHAPTERS)


@every_notebook
def test_chapters_are_named_not_numbered(nb):
    "A number moves when a chapter is put in before it."
    for cell in nb.cells: assert not re.search(r"\b[Cc]hapters?\s+\d", cell.source), cell.source


@every_notebook
def test_no_code_of_a_working_list_is_on_a_page(nb):
    "Rows of a plan and numbers of errata (E041) mean nothing to a reader; a paper's section may look like a row."
    text = re.sub(r"sections? [\d.]+", "", nb.markdown)
    assert not re.findall(r"\bE\d{3}\b|(?<![\d.])[2-7]\.\d\.\d{1,2}[a-z]?\b(?!\.)|\([2-9]\.\d{1,2}[a-z]\)", text)


@every_chapter
def test_one_module_at_the_same_address(chapter):
    exports = [cell for cell in chapter.code_cells if cell.exported]
    assert len(chapter.modules) <= 1
    if exports: assert chapter.modules == [chapter.address]
    for cell in exports:
        elsewhere = [cell.directive(name) for name in ("export", "exports", "exporti")]
        assert not any(elsewhere), f"one chapter, one module:\n{cell.source}"


# --- Imports ---

def imported_modules(tree):
    "Every module a piece of code imports, as (dotted name, level)."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom): yield node.module or "", node.level
        if isinstance(node, ast.Import): yield from ((alias.name, 0) for alias in node.names)


@every_chapter
def test_exported_imports_come_from_chapters_before(chapter):
    trees = [cell.code for cell in chapter.code_cells if cell.exported]
    for name, level in [found for tree in trees for found in imported_modules(tree)]:
        assert level == 0, f"write `from {LIB}... import`: nbdev makes it relative"
        if name.split(".")[0] != LIB: continue
        if name.removeprefix(f"{LIB}.core.") in GROUND: continue
        source = BY_MODULE.get(name.removeprefix(f"{LIB}."))
        assert source, f"{name} is not the module of a chapter"
        assert source.order < chapter.order, f"{name} is explained later"


@every_chapter
def test_package_is_imported_from_not_as(chapter):
    "nbdev leaves `import t2i_course.x as y` as it stands, and the export would not be relative."
    nodes = [node for cell in chapter.code_cells if cell.exported for node in ast.walk(cell.code)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name.split(".")[0] == LIB]


@every_notebook
def test_imports_stand_alone(nb):
    "A cell mixing imports with other code is run while the pages are made, in an otherwise empty namespace."
    imports = (ast.Import, ast.ImportFrom)
    for cell in nb.code_cells:
        if "nbdev_export()" in cell.source or cell.directive("eval") == "false": continue
        nodes = cell.code.body if cell.exported else ast.walk(cell.code)
        has_import = any(isinstance(node, imports) for node in nodes)
        assert not has_import or all(isinstance(node, imports) for node in cell.code.body), cell.source


def declared():
    "What pip installs with the package and its tests."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    names = f"{settings['DEFAULT']['requirements']} {settings['DEFAULT']['dev_requirements']}".split()
    names = [re.match(r"[\w-]+", name)[0].replace("-", "_") for name in names]
    return {{"scikit_learn": "sklearn"}.get(name, name) for name in names}


def test_no_test_is_skipped_where_something_declared_is_missing():
    "A proof that ours equals another library's must be red where that library is missing, not skipped."
    for path in files():
        if not path.match("tests/*.py"): continue
        skipped = re.findall(r"""importor[s]kip\(\s*["']([\w]+)""", path.read_text(encoding="utf-8"))
        assert not declared() & set(skipped), f"{path.name}: import it plainly"


HEAVY = ["accelerate", "diffusers", "matplotlib.pyplot", "peft", "sklearn", "torchmetrics", "torchvision",
         "transformers"]


def names_of_modules():
    "Dotted names of everything in the package that is made to be imported."
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in modules()]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("_modidx")]


def test_import_is_light():
    "Importing any module of the package costs torch and nothing else."
    code = f"""
import importlib, sys
for name in {names_of_modules()}:
    importlib.import_module(name)
    print(name, *[heavy for heavy in {HEAVY} if heavy in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not [line for line in run.stdout.splitlines() if " " in line]


# --- The package and its notebooks ---

EXPORT = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the repository in which the package was exported anew, every warning an error."
    copy = copy_to(tmp_path_factory.mktemp("export"))
    for path in modules():
        if generated(path): (copy / path.relative_to(ROOT)).unlink()
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", EXPORT]
    run = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return copy


def test_export_leaves_a_clean_tree(exported):
    "The same files with the same text: run `make export` when this fails."
    made = {path.relative_to(exported / LIB) for path in (exported / LIB).rglob("*.py")}
    kept = {path.relative_to(ROOT / LIB) for path in modules()}
    assert made == kept
    for path in kept: assert (exported / LIB / path).read_text() == (ROOT / LIB / path).read_text(), path


def test_no_orphan_module():
    sources = {path: generated(path) for path in modules()}
    assert not [path for path, source in sources.items() if source and not source.exists()]


def test_index_of_names_points_at_modules():
    index = {}
    exec((ROOT / LIB / "_modidx.py").read_text(), index)
    missing = [name for name in index["d"]["syms"] if not (ROOT / f"{name.replace('.', '/')}.py").exists()]
    assert not missing


def ruff(*args):
    command = [sys.executable, "-m", "ruff", *args, "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_ruff_passes_on_the_code():
    "No unresolved or unused name, no star import."
    ruff("check", LIB, "tests", "tools", "setup.py")


def test_ruff_formats_what_is_written_by_hand():
    "One shape for all of it, one statement a line, nothing wider than 110: `ruff format` on the files it names."
    by_hand = [str(path) for path in modules() if not generated(path) and path.name != "_modidx.py"]
    ruff("format", "--check", *by_hand)
    ruff("check", "--select", "E501,E701,E702,E703", "--config", "lint.pycodestyle.max-line-length=110", *by_hand)


def wide(path):
    "Lines over 110 of a generated module; its first line and `__all__` and the `# %%` are not written by us."
    text = path.read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    skipped = {1, *(n for node in nodes for n in range(node.lineno, node.end_lineno + 1))}
    lines = enumerate(text.split("\n"), start=1)
    return [f"{path.name}:{n}" for n, line in lines if len(line) > 110 and n not in skipped and not line.startswith("# %%")]


def test_no_code_that_is_exported_is_wider_than_110():
    "A reader has no room for more: put the comment on a line of its own, or wrap."
    assert not [line for path in modules() if generated(path) for line in wide(path)]


def test_ruff_resolves_every_name_in_the_notebooks():
    "Read from top to bottom, a notebook uses only names it has defined."
    ruff("check", "--select", "F821,F822,F823,F403,F405", "nbs")


# --- Notebooks as files ---

@every_notebook
def test_notebook_is_clean(nb):
    "`nbdev_clean` has nothing to do. The settings keep `jupyter`: JupyterLab folds checkers and solutions by it."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    kept = settings["DEFAULT"]["allowed_cell_metadata_keys"].split()
    notebook = json.loads(nb.text)
    clean_nb(notebook, allowed_cell_metadata_keys=kept)
    assert nb2str(notebook) == nb.text


@every_notebook
def test_checkers_and_solutions_are_folded(nb):
    "In JupyterLab, too, a reader opens them by a click: run `python tools/fold.py` when this fails."
    for cell in json.loads(nb.text)["cells"]:
        assert not FOLD(cell), f"{'fold' if cell['metadata'] else 'do not fold'} this cell:\n{''.join(cell['source'])}"


def test_folding_finds_checkers_and_solutions_and_survives_cleaning():
    sources = {"#| hide\ndef check_1(f): pass": True, '#| code-fold: true\n#| code-summary: "Solution"\ndef solution_1(): pass': True,
               "def check_1(f): pass": False, "#| hide\nimport nbdev; nbdev.nbdev_export()": False, "x = 1": False}
    cells = [dict(cell_type="code", id=str(n), metadata=dict(jupyter=dict(source_hidden=True)) if n > 2 else {}, outputs=[],
                  execution_count=None, source=source.splitlines(keepends=True)) for n, source in enumerate(sources)]
    assert [FOLD(cell) for cell in cells] == [True, True, False, True, True]
    clean_nb(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5), allowed_cell_metadata_keys=["jupyter"])
    assert [cell["metadata"] == dict(jupyter=dict(source_hidden=True)) for cell in cells] == list(sources.values())


@every_notebook
def test_notebook_is_small(nb):
    assert nb.path.stat().st_size < 1_000_000


def texts(output):
    "What a saved output says in plain text."
    yield "".join(output.get("text", ""))
    yield "".join(output.get("data", {}).get("text/plain", ""))


@every_notebook
def test_no_error_and_no_warning_is_saved(nb):
    for output in nb.outputs:
        assert output["output_type"] != "error", output.get("evalue")
        assert output.get("name") != "stderr", output.get("text")
        for text in texts(output): assert not re.search(r"\b\w*Warning: |Traceback \(most recent", text), text


# --- The parts of a chapter ---

@every_chapter
def test_begins_with_title_and_claim(chapter):
    "The cell becomes the page's title and description: anything else in it would be lost."
    title = chapter.cells[0] if chapter.cells[0].kind == "markdown" else chapter.cells[1]
    assert re.fullmatch(r"# [^\n]+\n+> [^\n]+\n?", title.source), title.source


@every_chapter
def test_shows_a_picture(chapter):
    "A page that waits to be run again (tests/still.json) shows what it has."
    if str(chapter) in STILL["outputs older than the code"]: return
    shown = [key for output in chapter.outputs for key in output.get("data", {})]
    assert [key for key in shown if key.startswith("image/")] or "t2i-explorer" in json.dumps(chapter.outputs)


FOLDED = r"<details|collapse=\"?true|code-fold: true"


def exercises(chapter):
    "The cells of each `### ` exercise, as lists."
    groups = []
    for cell in chapter.section("Exercises"):
        if cell.kind == "markdown" and cell.source.startswith("### "): groups.append([])
        if groups: groups[-1].append(cell)
    return groups


@every_chapter
def test_has_three_exercises_with_folded_solutions(chapter):
    "`test_exercises.py` puts answers to their checkers."
    groups = exercises(chapter)
    assert len(groups) == 3
    for cells in groups: assert re.search(FOLDED, "\n".join(cell.source for cell in cells)), f"{cells[0].source}: fold the solution"


@every_chapter
def test_has_five_quiz_questions_with_folded_answers(chapter):
    text = "\n".join(cell.source for cell in chapter.section("Quiz"))
    assert len(re.findall(r"<details|collapse=\"?true", text)) == 5


@every_chapter
def test_ends_with_summary_references_and_export(chapter):
    assert chapter.section("Summary")
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|arXiv:[a-z-]+/\d{7}", chapter.markdown)
    last = chapter.cells[-1]
    assert last.directive("hide") is not None and "nbdev_export()" in last.source


# --- Measured numbers ---
# A number that comes from a run is written with its source: 93.1% <!-- results/flow_matching.json#demo -->

MARK = re.compile(r"<!--\s*results[/:](?P<file>[\w./-]+\.json)#(?P<path>[\w.\[\]-]+)\s*-->")
UNIT = r"[*_`]*(?:\s[A-Za-z]{1,12})?[*_`]*\s*"
NUMBER = re.compile(rf"(?P<number>[-−]?\d[\d,]*(?:\.\d+)?)(?P<percent>\s?%)?{UNIT}$")


def test_the_contributors_example_of_a_mark_is_true():
    "CONTRIBUTING shows a number with its source: the file, the path and the number must be there."
    found = list(measured((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert found
    for number, percent, file, path in found: assert as_written(lookup(file, path), number, percent) == number


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"\b((?:nbs|tests|tools|results|t2i_course)/[\w./-]*\w)", text)
    examples = {"nbs/PP_part/NN_name.ipynb"}
    assert [name for name in named if not (ROOT / name).exists() and name not in examples] == []


def lookup(file, path):
    "The value at `a.b.0.c` in a result file."
    value = json.loads((ROOT / "results" / file).read_text(encoding="utf-8"))
    for key in re.findall(r"[^.\[\]]+", path):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def as_written(value, number, percent):
    "`value` with as many decimals as `number` shows."
    decimals = len(number.partition(".")[2])
    return f"{value * 100 if percent else value:.{decimals}f}"


def measured(text):
    "Every marked number: (number, is it a percentage, file, path)."
    for mark in MARK.finditer(text):
        found = NUMBER.search(text[:mark.start()].rpartition("\n")[2])
        assert found, f"no number before {mark.group(0)}"
        number = found["number"].replace(",", "").replace("−", "-")
        yield number, bool(found["percent"]), mark["file"], mark["path"]


@every_notebook
def test_measured_numbers_are_in_results(nb):
    for number, percent, file, path in measured(nb.markdown):
        value = lookup(file, path)
        assert as_written(value, number, percent) == number, f"{file}#{path} is {value}"


@every_notebook
def test_percentages_name_their_source(nb):
    "A percentage with decimals was measured: by us, then it is marked; by others, then the line cites them."
    for line in nb.markdown.splitlines():
        if MARK.search(line) or "arXiv" in line or "](http" in line: continue
        assert not re.search(r"\d\.\d+\s?%", line), line


def keys(value):
    "All keys of a nested JSON value."
    if isinstance(value, dict): return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


RESULTS = [path for path in files() if path.match("results/*.json") and path.name != "pages.json"]  # that one has a stamp a page


HEAD = dict(chapter=r"[a-z0-9_]+", command=r"t2i .+", date=r"20\d\d-\d\d-\d\d", hardware=r".+ cores?|.*(?i:cpu|gpu|cuda|nvidia).*")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_result_file_says_at_its_top_how_it_was_made(path):
    "Not somewhere: a row may quote another run's command."
    head = json.loads(path.read_text(encoding="utf-8"))
    for key, form in HEAD.items(): assert re.fullmatch(form, str(head.get(key))), f"{key}: {head.get(key)}"
    assert head.get("seeds") and all(type(seed) is int for seed in head["seeds"])
    assert {"python", "torch", "t2i_course"} <= set(head.get("versions", {}))
    assert head.get("scale") in ("demo", "full"), "smoke scale is for tests"


def test_every_row_of_the_demo_says_how_it_was_made():
    "Its rows come from different machines, so that the top of the file speaks of the last one only."
    demo = json.loads((ROOT / "results" / "demo.json").read_text(encoding="utf-8"))
    rows = {key: row for key, row in demo.items() if key in ("with_bf16", "without_bf16")}
    assert rows
    for name, row in rows.items():
        for key in ("command", "date", "hardware"): assert re.fullmatch(HEAD[key], str(row.get(key))), f"{name}: {key}"
        assert type(row.get("train_seed")) is int and row.get("n"), name


# --- Shipped weights ---

WEIGHTS = [path for path in files() if path.suffix == ".safetensors"]


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.name)
def test_weights_come_with_hash_and_command(path):
    card = path.with_suffix(".json").read_text(encoding="utf-8")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert "command" in keys(json.loads(card))


def test_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS) < 2_600_000


# --- The tree ---

HOMES = r"(?<![\w.~/])/(?:home|Users|root|work|mnt)/[\w.]|[A-Z]:\\\\?Users"
PLACES = re.compile(HOMES + r"|pypi[.]org|python[h]osted")
TEXT = {".py", ".ipynb", ".md", ".yml", ".ini", ".toml", ".txt", ".json", ".scss", ".in", ""}


def test_no_place_of_one_machine_in_the_tree():
    "No absolute path, no package registry: the repository works wherever it is cloned."
    found = []
    for path in files():
        if path.suffix not in TEXT or path.name == "LICENSE": continue
        for match in PLACES.finditer(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(ROOT)}: {match.group(0)}")
    assert not found


def test_no_large_file_in_the_tree():
    large = [path.name for path in files() if path.stat().st_size > 1_000_000]
    assert large == ["mnist_ddpm.safetensors"], large
