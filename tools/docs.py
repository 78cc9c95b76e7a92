"Make the pages in _proc that quarto renders: `python tools/docs.py` at the top of the repository."
import os
import shutil
from pathlib import Path

from nbdev import quarto
from nbdev.config import get_config


def process():
    "Run nbdev_proc_nbs from nothing, without its attempt to install quarto."
    cfg = get_config()
    pages = cfg.config_path / "_proc"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copy(cfg.config_path / "_quarto.yml", cfg.nbs_path)
    quarto._ensure_quarto = lambda: None
    quarto.nbdev_proc_nbs.__wrapped__(n_workers=0)
    return pages


def site_address():
    "Where nbdev's back-tick links point to: the address of the published site."
    cfg = get_config()
    return f"{cfg.doc_host}{cfg.doc_baseurl}/"


def make_links_relative(pages):
    "Links to the published site become relative, so that a copy on a disk works offline."
    for page in sorted(pages.rglob("*.ipynb")):
        home = os.path.relpath(pages, page.parent)
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace(f"]({site_address()}", f"]({home}/"), encoding="utf-8")


def main():
    pages = process()
    make_links_relative(pages)
    print(f"{len(list(pages.rglob('*.ipynb')))} pages in {pages.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
