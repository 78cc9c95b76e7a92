"The pages: every link leads somewhere, every cross-reference resolves, the sidebar is complete."
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from tree import ROOT, chapters, copy_to, unnumbered

SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


# --- The sidebar ---

def pages_in(contents):
    "Every page that a sidebar names, in order."
    for item in contents:
        if isinstance(item, str): yield item
        elif "href" in item: yield item["href"]
        if isinstance(item, dict): yield from pages_in(item.get("contents", []))


def test_every_chapter_is_in_the_sidebar_once():
    listed = list(pages_in(SITE["website"]["sidebar"]["contents"]))
    written = [chapter.path.relative_to(ROOT / "nbs").as_posix() for chapter in chapters()]
    assert sorted(listed) == sorted([*written, "index.ipynb"])


def test_sidebar_is_in_reading_order():
    listed = [page for page in pages_in(SITE["website"]["sidebar"]["contents"]) if page != "index.ipynb"]
    assert listed == sorted(listed)


def test_site_needs_no_server():
    assert SITE["format"]["html"]["html-math-method"] == "mathml"
    assert list(SITE["format"]) == ["html"]


# --- The pages ---

@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "What nbdev_proc_nbs makes of the notebooks, in a copy of the repository."
    copy = copy_to(tmp_path_factory.mktemp("docs"))
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"} | {"PYTHONPATH": str(copy)}
    run = subprocess.run([sys.executable, "tools/docs.py"], cwd=copy, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Found cells containing imports and other code" not in run.stderr
    return copy / "_proc"


def prose(page):
    "The words of a page: its markdown cells and markdown outputs, without code."
    texts = []
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code": texts.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts += ["".join(data.get(kind, "")) for kind in ("text/markdown", "text/html")]
    fenced = re.sub(r"^(```|~~~).*?^\1", "", "\n\n".join(texts), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "`code`", fenced)


def page_of(target):
    "The file in _proc behind a path: a notebook renders as its name without the number."
    if target.suffix != ".html": return target if target.exists() else None
    for page in target.parent.glob("*.ipynb"):
        if unnumbered(page.stem) == target.stem: return page
    return None


def anchors(page):
    "What `page#...` can point at: headings, and identifiers given by hand or by nbdev."
    text = page.read_text(encoding="utf-8") if page.suffix != ".ipynb" else prose(page)
    headings = re.findall(r"^#{1,6} +(.+?)(?:\s*\{.*\})?\s*$", text, re.M)
    slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", heading.lower()).strip()) for heading in headings}
    return slugs | set(re.findall(r"\{[^}]*?#([\w:.-]+)", text)) | set(re.findall(r"\bid=\"([^\"]+)\"", text))


LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|\b(?:href|src)=[\"']([^\"']+)[\"']")
ELSEWHERE = re.compile(r"(https?|mailto|data|attachment):|//")


def broken(page):
    "The relative links of a page that lead nowhere."
    for match in LINK.finditer(prose(page)):
        link = match.group(1) or match.group(2)
        if ELSEWHERE.match(link): continue
        path, _, anchor = unquote(link).partition("#")
        target = page_of(Path(os.path.normpath(page.parent / path))) if path else page
        if target is None: yield link
        elif anchor and target.suffix == ".ipynb" and anchor.lower() not in anchors(target): yield link


def test_no_broken_links(pages):
    found = {str(page.relative_to(pages)): list(broken(page)) for page in pages.rglob("*.ipynb")}
    assert not {page: links for page, links in found.items() if links}


def test_every_cross_reference_resolves(pages):
    "`@fig-x` names something on the same page: quarto does not resolve it across pages."
    for page in pages.rglob("*.ipynb"):
        words, source = prose(page), page.read_text(encoding="utf-8")
        used = set(re.findall(r"(?<![\w\\])@((?:fig|tbl|eq|sec|lst|thm)-[\w-]+)", words))
        made = set(re.findall(r"\{[^}]*?#([\w-]+)", words)) | set(re.findall(r"#\| label: ([\w-]+)", source))
        assert used <= made, f"{page.name}: {used - made}"


def test_pages_lost_no_notebook(pages):
    assert len(list(pages.rglob("*.ipynb"))) == len(chapters()) + 1


# --- The front page ---

def test_readme_is_the_index_notebook():
    "Run `make readme` when this fails."
    tool = runpy.run_path(str(ROOT / "tools" / "readme.py"))
    assert (ROOT / "README.md").read_text(encoding="utf-8") == tool["readme"]()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_python_of_the_top_level_pages_imports_what_there_is(name):
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if re.match(r"(from|import) ", line)]
    assert lines
    for line in lines: exec(line, {})


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_top_level_pages(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    links = [(match.group(1) or match.group(2)).partition("#")[0] for match in LINK.finditer(text)]
    assert not [link for link in links if link and not ELSEWHERE.match(link) and not (ROOT / link).exists()]
