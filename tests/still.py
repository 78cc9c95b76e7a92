"""What is still to be mended, page by page: `tests/still.json`, a list that may only get shorter.

Each rule measures every page. A page within the limit is not in the list; a page beyond it stands there with its number of
today. `python tests/still.py` brings the numbers up to date after a page became better, and refuses where one became worse."""
import ast
import json
import math
import re
import runpy

from quiz import questions
from stated import over_the_course
from tree import ROOT, chapters, notebooks

FILE = ROOT / "tests" / "still.json"
PAGES = runpy.run_path(str(ROOT / "tools" / "pages.py"))
WORDS, LINES, LONGEST = 3_500, 25, 2


def prose(markdown):
    "The text that is read: no code blocks, comments, displayed equations, tags or addresses; a formula is one word."
    text = re.sub(r"```.*?```|<!--.*?-->|\$\$.*?\$\$", " ", markdown, flags=re.S)
    text = re.sub(r"\$[^$\n]+\$", " x ", text)
    return re.sub(r"</?[A-Za-z][^<>]*>|\]\([^)]*\)", " ", text)


def words(page):
    "Words of prose on a page beyond the limit, in full hundreds: one word more or less is not worth a change of the list."
    n = len(re.findall(r"[^\W_][\w'’.-]*", prose(page.markdown)))
    return 100 * math.ceil(n / 100) if n > WORDS else 0


def lines(cell):
    "Lines of a code cell, directives not counted."
    return len(re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).rstrip().splitlines())


def long_cells(page):
    "How many code cells are longer than the limit."
    return sum(lines(cell) > LINES for cell in page.code_cells)


def lines_too_many(page):
    "Lines beyond the limit, all cells together: so that a long cell does not become longer either."
    return sum(max(0, lines(cell) - LINES) for cell in page.code_cells)


def longest_is_right(page):
    "Questions in which the longest option is the right one, where they are more than half of the quiz."
    n = sum(question.right_is_longest for question in questions(page))
    return n if n > LONGEST else 0


def fixed_answers(page):
    "Exercises whose answer has no arguments: one number is right, and a reader may try until it is found."
    trees = [node for cell in page.section("Exercises") if cell.kind == "code" for node in cell.code.body]
    empty = [node for node in trees if isinstance(node, ast.FunctionDef) and ast.unparse(node.body[-1]) == "raise NotImplementedError"]
    return sum(not node.args.args for node in empty)


def older_outputs(page):
    "1 where the outputs were made by other code than the page shows, or where nobody wrote down by which."
    return int(PAGES["is_older"](page.path))


def without_source(page):
    "Decimals and percentages in the prose that are neither marked nor printed near by, neither a setting nor cited."
    return sum(not number.marked and not number.known for number in over_the_course()[str(page)])


RULES = {
    "words of prose": (words, notebooks),
    "cells over 25 lines": (long_cells, notebooks),
    "lines beyond 25": (lines_too_many, notebooks),
    "longest option is right": (longest_is_right, chapters),
    "numbers without a source": (without_source, notebooks),
    "exercises without arguments": (fixed_answers, chapters),
    "outputs older than the code": (older_outputs, notebooks),
}


def measured(rule):
    "{page: number} of every page beyond the limit of a rule."
    measure, pages = RULES[rule]
    numbers = {str(page): measure(page) for page in pages()}
    return {page: number for page, number in numbers.items() if number}


def listed(rule):
    "What the list says."
    return json.loads(FILE.read_text(encoding="utf-8")).get(rule, {})


def worse(old, new):
    "Pages that are not in the list, or worse than it says."
    return [f"{page}: {number}, the list allows {old.get(page, 'none')}" for page, number in new.items() if number > old.get(page, 0)]


def lower():
    "Write today's numbers, unless a page became worse."
    new = {rule: measured(rule) for rule in RULES}
    found = [f"{rule}: {line}" for rule in RULES for line in worse(listed(rule), new[rule])]
    if found: raise SystemExit("\n".join(["Nothing written: mend the page, not the list.", *found]))
    FILE.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{rule}: {len(pages)} pages" for rule, pages in new.items()))


if __name__ == "__main__": lower()
