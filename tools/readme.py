"Write README.md from nbs/index.ipynb: `make readme`."
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "nbs" / "index.ipynb"
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->\n"


def to_root(markdown):
    "Links and pictures of a page in nbs/, as seen from the top of the repository."
    def move(match):
        start, target, end = match.groups()
        if re.match(r"[a-z]+:|#|/", target): return match.group(0)
        path = Path("nbs", target)
        return f"{start}{target[3:] if target.startswith('../') else path.as_posix()}{end}"
    return re.sub(r"(\]\(|src=\")([^)\s\"]+)([)\"])", move, markdown)


def text_outputs(cell):
    "What a code cell printed; a picture belongs in nbs/images, with a link to it."
    for output in cell["outputs"]:
        data = output.get("data", {})
        if any(kind.startswith("image/") for kind in data):
            raise SystemExit("nbs/index.ipynb: save the picture in nbs/images and link to it in markdown.")
        yield "".join(output.get("text", data.get("text/markdown", data.get("text/plain", ""))))


def blocks(cells):
    "The blocks of markdown that the cells of the notebook make; hidden ones make none."
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown" and source:
            yield to_root(source)
        if cell["cell_type"] != "code" or re.search(r"^#\|\s*hide\b", source, re.M): continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if code: yield f"```python\n{code}\n```"
        for text in text_outputs(cell):
            if text.strip(): yield f"```\n{text.rstrip()}\n```"


def readme():
    "The text of README.md."
    cells = json.loads(INDEX.read_text(encoding="utf-8"))["cells"]
    return NOTE + "\n" + "\n\n".join(blocks(cells)) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
