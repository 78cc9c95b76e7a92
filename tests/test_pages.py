"What a page owes its reader. What is not kept everywhere yet stands in `still.json`, page by page."
import json
import re
from collections import Counter

import nbformat
import pytest
import still
from quiz import questions
from stated import over_the_course, stated
from tree import LIB, ROOT, Cell, Notebook, chapters

CHAPTERS = chapters()
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=str)


# --- Quiz ---

@every_chapter
def test_right_letters_are_spread(chapter):
    "No letter holds more than two of the five: whoever always takes b must fail."
    found = questions(chapter)
    letters = Counter(question.right for question in found)
    assert len(found) == 5 and max(letters.values()) <= 2, letters
    for question in found: assert question.right in question.options, question


def test_right_letters_are_spread_over_the_course():
    letters = Counter(question.right for chapter in CHAPTERS for question in questions(chapter))
    assert max(letters.values()) <= .4 * letters.total(), letters


@pytest.mark.parametrize("place", range(5))
def test_no_place_of_the_quiz_has_its_letter(place):
    "The pages together, question by question: the third answer is not c everywhere."
    letters = Counter(questions(chapter)[place].right for chapter in CHAPTERS)
    assert max(letters.values()) <= .5 * letters.total(), letters


# --- Limits, with the list of what is still beyond them ---

@pytest.mark.parametrize("rule", still.RULES)
def test_what_is_still_to_be_mended_gets_less(rule):
    "A page that became worse is mended; one that became better leaves the list: `python tests/still.py`."
    new, old = still.measured(rule), still.listed(rule)
    assert not still.worse(old, new), f"{rule}: mend the page, not the list"
    assert new == old, f"{rule}: a page became better: bring the list down with `python tests/still.py`"


def test_the_list_of_what_is_still_to_be_mended_has_no_other_rule():
    assert set(json.loads(still.FILE.read_text(encoding="utf-8"))) == set(still.RULES)


# --- Numbers in the prose ---

def with_cells(*cells):
    "A page in memory: markdown as text, code as (source, what it printed)."
    page = Notebook(ROOT / "nbs" / "page.ipynb")
    page.cells = [Cell("markdown", cell, []) if isinstance(cell, str) else Cell("code", cell[0], [dict(text=cell[1])]) for cell in cells]
    return page


@pytest.mark.parametrize("prose, wanted", [
    ("The model obeys 93.1% of its captions.", [False]),
    ("It obeys 12.5%, at a loss of 0.25.", [True, True]),  # both printed, one of them as 0.125
    ("We take 0.999, and 0.99 would do.", [True, False]),  # the first is a setting
    ("It obeys 93.1% (table 3).", [True]),
    ("Obeys 93% <!-- results/ddpm.json#row.x -->, not 94%.", [True, False]),
    ("With Python 3.12 `x = 7.77` and $y = 8.88$ in 90 percent.", [False]),
], ids=["alone", "printed", "setting", "cited", "marked", "not numbers"])
def test_a_number_in_the_prose_needs_a_source(prose, wanted):
    page = with_cells("## Measured", prose, ("decay = .999", "0.125\nloss 0.2504"), "## Quiz", "Is it 77.7%?")
    assert [number.marked or number.known for number in stated(page)] == wanted


def test_a_number_printed_in_another_section_is_no_source():
    page = with_cells("## First", ("1", "0.731"), "## Second", "It is 0.731 here.", "## Summary", "It is 0.731.")
    assert [number.known for number in stated(page)] == [False, True]


def test_numbers_are_checked_all_over_the_course():
    "How many there are may only grow: a rule that finds nothing to check would pass, too."
    found = over_the_course()
    numbers = sum(found.values(), [])
    assert sum(map(bool, found.values())) >= 28 and len(numbers) >= 380
    assert sum(number.marked for number in numbers) >= 68


# --- Outputs that belong to their code ---

def page_of(folder, *cells):
    "A small notebook on disk: code, or (code, output)."
    notebook = nbformat.v4.new_notebook()
    for cell in cells:
        source, *texts = cell if isinstance(cell, tuple) else (cell,)
        outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in texts]
        notebook.cells.append(nbformat.v4.new_code_cell(source, outputs=outputs))
    path = folder / "page.ipynb"
    nbformat.write(notebook, path)
    return path


def test_a_page_is_new_as_long_as_its_code_says_the_same(tmp_path):
    code = lambda *cells: still.PAGES["code_of"](page_of(tmp_path, *cells))
    same = code("a = 1\nprint(a+1)")
    assert same == code("# a comment\na=1\n\nprint(a + 1) # another") == code(("a = 1\nprint(a+1)", "2")) != code("a = 1\nprint(a+2)")
    assert same != code("a = 1", "print(a+1)") and code("!t2i run ddpm") != code("!t2i run dit")
    assert same == code("a = 1\nprint(a+1)", "#| eval: false\nprint(3)"), "a recorded cell is not run"


def test_a_run_keeps_recorded_cells_and_finds_errors_and_warnings(tmp_path):
    path = page_of(tmp_path, "import warnings\nprint(6*7)", ("#| eval: false\nprint(1/0)", "recorded"), "warnings.warn('old'); 1")
    notebook, seconds = still.PAGES["executed"](path)
    assert [cell.outputs[0].get("text") for cell in notebook.cells[:2]] == ["42\n", "recorded"] and seconds > 0
    assert len(list(still.PAGES["faults"](notebook))) == 1


def test_stamps_say_how_a_page_was_run():
    stamps, pages = still.PAGES["stamps"](), {str(chapter) for chapter in CHAPTERS} | {"nbs/index.ipynb"}
    assert stamps and set(stamps) <= pages, "a page was renamed: run it again with tools/pages.py"
    for stamp in stamps.values():
        assert stamp["scale"] == "demo" and re.fullmatch(r"20\d\d-\d\d-\d\d", stamp["date"]) and stamp["hardware"]
        assert {"python", "torch", "t2i_course"} <= set(stamp["versions"]) and stamp["seconds"] > 0


def test_the_metrics_page_shows_the_judges_that_are_shipped():
    page, = (chapter for chapter in CHAPTERS if chapter.address == "core.metrics")
    printed = "".join("".join(output.get("text", "")) for output in page.outputs)
    cards = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / LIB / "weights").glob("*.json")}
    cards = {name: card for name, card in cards.items() if "config" not in card}  # the others are models
    shown = {name: re.search(rf"^{name} +\d+ kB +hash (\w+)", printed, re.M) for name in cards}
    assert len(cards) >= 4 and all(shown.values()), f"not shown: {[name for name, line in shown.items() if not line]}"
    for name, line in shown.items(): assert cards[name]["sha256"].startswith(line[1]), f"{name} has changed since the page was run"
