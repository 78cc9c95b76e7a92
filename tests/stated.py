"""Numbers that the prose of a page states, and where each comes from.

A decimal or a percentage must be marked (`93.1% <!-- results/ddpm.json#row.x -->`), printed by a code cell near it, a setting in the
code near it, or stand in a line that cites its source. What is none of these nobody can check, and it goes stale unseen."""
import ast
import re
from dataclasses import dataclass
from functools import cache

from tree import notebooks

MARK = re.compile(r"<!--\s*results[/:](?P<file>[\w./-]+\.json)#(?P<path>[\w.\[\]-]+)\s*-->")
MARKED = re.compile(r"[*_`]*(?:\s[A-Za-z]{1,12})?[*_`]*\s*<!--\s*results[/:]")  # what may stand between a number and its mark
STATED = re.compile(r"(?<![\w.,/^_\\:#-])(?P<number>\d[\d,]*\.\d+|\d[\d,]*(?=\s?(?:%|percent\b)))(?![\w/]|\.\d)(?P<percent>\s?(?:%|percent\b))?")
CITED = re.compile(r"arXiv|\]\(http|\b(?:[Ss]ections?|[Tt]ables?|[Aa]ppendix|[Ff]igure) [\dA-Z]|\b(?:published|official|released)\b")
PRODUCT = re.compile(r"(?:Python [\d., or]*|(?:PyTorch|Diffusion|accelerate|Slurm|[Vv]ersion|Xeon|BY) )$")  # the number of a version stands behind it
LEVEL = re.compile(r"(?:one-sided,? )?95%(?:\)| (?:confidence )?interval)|one-sided,? (?:at )?(?:5|95)%")  # says how sure, and is no measurement
UNCHECKED = re.compile(r"Exercises|Quiz|References|At full scale|What others used")  # checked by code, or quoted from papers
EVERYWHERE = re.compile(r"$|Summary")  # sections that speak of the whole page: its beginning, and the summary


@dataclass
class Stated:
    "One number in the prose of a page."
    number: str   # as written
    percent: bool # is it a percentage?
    marked: bool
    known: bool   # is it printed, a setting, or cited?
    line: str     # where it stands


def sections(page):
    "{heading of a section: its cells}; what stands before the first has the heading ''."
    found, title = {}, ""
    for cell in page.cells:
        if cell.kind == "markdown" and (heading := re.match(r"## +(.*)", cell.source)): title = heading[1].strip()
        found.setdefault(title, []).append(cell)
    return found


def printed(cells):
    "Every number in the outputs of cells."
    for cell in cells:
        for output in cell.outputs:
            data = output.get("data", {})
            text = "".join("".join(part) for part in (output.get("text", ""), *(data.get(f"text/{k}", "") for k in ("plain", "markdown", "html"))))
            for match in re.finditer(r"(?<![\w.])-?\d*\.?\d+(?:e[-+]?\d+)?", re.sub(r"base64,[^\"]+", "", text)): yield abs(float(match[0]))


def settings(cells):
    "Every number in the code of cells."
    for cell in cells:
        if cell.kind != "code": continue
        for node in ast.walk(cell.code):
            if isinstance(node, ast.Constant) and type(node.value) in (int, float): yield abs(float(node.value))


def is_among(number, percent, values):
    "Does one of the values, rounded to the decimals of the number, say the same?"
    decimals, wanted = len(number.partition(".")[2]), float(number)
    return any(round(v, decimals) == wanted or percent and round(100 * v, decimals) == wanted for v in values)


def lines(cells):
    "The lines of prose of cells, without blocks of code, formulas and names."
    for cell in cells:
        if cell.kind != "markdown": continue
        text = re.sub(r"```.*?```|\$\$.*?\$\$", "", cell.source, flags=re.S)
        yield from (re.sub(r"`[^`\n]*`|\$[^$\n]*\$", "", line) for line in text.splitlines())


def stated(page):
    "Every decimal and every percentage of a page's prose."
    parts = sections(page)
    for title, cells in parts.items():
        if UNCHECKED.match(title): continue
        near = page.cells if EVERYWHERE.match(title) else cells
        values = {*printed(near), *settings(near)}
        for line in lines(cells):
            for match in STATED.finditer(line):
                if PRODUCT.search(line[:match.start()]): continue
                if any(level.start() <= match.start() < level.end() for level in LEVEL.finditer(line)): continue
                number, percent = match["number"].replace(",", ""), bool(match["percent"])
                known = bool(CITED.search(line)) or is_among(number, percent, values)
                yield Stated(match[0], percent, bool(MARKED.match(line[match.end():])), known, line)


@cache
def over_the_course():
    "{page: its numbers} of every page on disk."
    return {str(page): list(stated(page)) for page in notebooks()}
