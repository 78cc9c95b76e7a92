"""A learner opens JupyterLab by what `make lab` runs. The committed explorers move before anything was run, checkers and
solutions are folded; then a chapter is run. The same explorers move on a static page."""
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest
from chromium import find
from playwright.sync_api import expect, sync_playwright
from tree import ROOT, copy_to

is_folded = runpy.run_path(str(ROOT / "tools" / "fold.py"))["is_folded"]

NOTEBOOK = "nbs/06_flow/01_flow_matching.ipynb"   # the one that is run
PLOTS = "nbs/01_core/06_plots.ipynb"
PAGES = [NOTEBOOK, PLOTS, "nbs/00_start/01_tour.ipynb"]
STRANGER = "nbs/01_core/elsewhere.ipynb"
TOKEN = "the-browser-test"
MINUTES = 60_000
expect.set_options(timeout=2 * MINUTES)   # a busy machine is slow to draw
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
QUIET = {
    "apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}


# --- Browser and server ---

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "A fresh Chromium; headless by our flag, because playwright's own would ask for its own build."
    profile, size = tmp_path_factory.mktemp("profile"), {"width": 1280, "height": 900}
    with sync_playwright() as playwright:
        launch = playwright.chromium.launch_persistent_context
        context = launch(profile, executable_path=find(), args=FLAGS, headless=False, viewport=size)
        yield context
        context.close()


@pytest.fixture
def page(browser):
    "A new tab."
    page = browser.new_page()
    page.set_default_timeout(3 * MINUTES)
    yield page
    page.close()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def settings(folder):
    "JupyterLab's own folders, so that nothing of the user's is read or written; no news, no update check."
    for name, values in QUIET.items():
        path = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
              "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython", "T2I_DATA": "pictures"}
    for name in places.values(): (folder / name).mkdir(exist_ok=True)
    return {name: str(folder / place) for name, place in places.items()}


def wait_for(url, process, log, seconds=600):
    "Until the server answers; what it said, when it does not."
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        try: return urlopen(url, timeout=5).read()
        except OSError: time.sleep(0.3)
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the repository, started as `make lab` starts it: notebook -> its address."
    folder = tmp_path_factory.mktemp("lab")
    copy = copy_to(folder / "course")
    for name in PAGES: assert (copy / name).exists(), f"{name} is not there"
    port, log = free_port(), folder / "log"
    env = {**os.environ, **settings(folder), "T2I_SCALE": "smoke", "PYTHONPATH": str(copy)}
    command = [sys.executable, copy / "tools" / "lab.py", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
    with log.open("w") as out, subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={TOKEN}", server, log)
            stranger(copy)
            yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?token={TOKEN}&reset"
        finally: server.terminate()


def stranger(copy):
    "A notebook that came after the start: the same page with one more word, so that its signature is another."
    notebook = json.loads((copy / PLOTS).read_text(encoding="utf-8"))
    notebook["cells"][-1]["source"].append("# changed elsewhere")
    (copy / STRANGER).write_text(json.dumps(notebook), encoding="utf-8")


def sources(name):
    "The sources of the cells of a page."
    return ["".join(cell["source"]) for cell in json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]]


# --- The explorer ---

def move(slider, to):
    "Set a range input and tell the page, as a hand would."
    slider.evaluate("""(slider, end) => {
        slider.value = end == 'first' ? slider.min : slider.max;
        slider.dispatchEvent(new Event('input', {bubbles: true}));
        slider.dispatchEvent(new Event('change', {bubbles: true}));
    }""", to)


def check_explorer(explorer):
    "Moving the slider from end to end, and by a key, changes the label and a picture that is really drawn."
    slider, picture = explorer.locator("input[type=range]").first, explorer.locator("img").first
    label = explorer.locator("output").first
    slider.scroll_into_view_if_needed()
    expect(picture).to_be_visible()
    move(slider, "first")
    first, said = picture.get_attribute("src"), label.inner_text()
    move(slider, "last")
    expect(picture).not_to_have_attribute("src", first)
    expect(label).not_to_have_text(said)
    last = picture.get_attribute("src")
    assert first.startswith("data:image/")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    slider.focus()
    slider.press("ArrowLeft")
    expect(picture).not_to_have_attribute("src", last)


EXPLORER = ".jp-OutputArea-output .t2i-explorer"


def opened(page, address):
    "Open a notebook and wait until its explorers are there; no cell is run."
    page.goto(address)
    expect(page.locator(EXPLORER).first).to_be_attached(timeout=10 * MINUTES)
    return page.locator(EXPLORER)


def not_run(page):
    "Has no cell a number?"
    return not page.locator(".jp-CodeCell .jp-InputPrompt").filter(has_text=re.compile(r"\[[*\d]")).count()


def start_kernel(page):
    "Wait until the kernel is idle; accept the dialog that asks for one."
    select = page.locator(".jp-Dialog .jp-mod-accept")
    idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    expect(select.or_(idle).first).to_be_visible(timeout=10 * MINUTES)
    if select.is_visible(): select.click()
    expect(idle.first).to_be_visible(timeout=10 * MINUTES)
    page.wait_for_timeout(2000)   # JupyterLab says idle a moment before it takes commands


def run_all(page):
    "Run -> Run All Cells, and wait until the last one has its number or one of them failed."
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('[data-command="runmenu:run-all"]').click()
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    expect(prompts.filter(has_text=re.compile(r"\[[*\d]")).first).to_be_visible(timeout=10 * MINUTES)
    done = prompts.last.filter(has_text=re.compile(r"\[\d+\]"))
    error = page.locator(".jp-OutputArea-output").filter(has_text="Traceback (most recent call last)")
    expect(done.or_(error).first).to_be_visible(timeout=40 * MINUTES)
    assert not error.count(), error.first.inner_text()


@pytest.mark.parametrize("name", PAGES)
def test_committed_explorers_move_before_a_cell_was_run(page, lab, name):
    explorers = opened(page, lab(name))
    for explorer in explorers.all(): check_explorer(explorer)
    assert not_run(page)


def test_checkers_and_solutions_are_folded_in_jupyterlab(page, lab):
    opened(page, lab(PLOTS))
    folded = sum(map(is_folded, sources(PLOTS)))
    placeholders = page.locator(".jp-CodeCell .jp-InputPlaceholder")
    expect(placeholders).to_have_count(folded, timeout=MINUTES)
    assert folded == 6
    visible = page.locator(".jp-CodeCell .jp-InputArea-editor:visible")
    for text in ("def check_1", "def solution_1"): expect(visible.filter(has_text=text)).to_have_count(0)
    placeholders.first.click()
    expect(placeholders).to_have_count(folded - 1)


def test_a_notebook_from_elsewhere_moves_when_the_reader_trusts_it(page, lab):
    "What the plots page tells a reader: the command palette has `Trust Notebook`."
    explorers = opened(page, lab(STRANGER))
    slider = explorers.first.locator("input")
    assert slider.is_disabled() or slider.get_attribute("oninput") is None
    page.get_by_role("menuitem", name="View", exact=True).click()
    page.locator('.lm-Menu [data-command="apputils:activate-command-palette"]').click()
    page.locator(".lm-CommandPalette-input:visible").fill("Trust Notebook")
    page.locator('.lm-CommandPalette-item[data-command="notebook:trust"]').first.click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    expect(page.locator(EXPLORER).first.locator("input")).to_have_attribute("oninput", re.compile("closest"), timeout=MINUTES)
    check_explorer(page.locator(EXPLORER).first)
    assert not_run(page)


def test_explorer_in_jupyterlab(page, lab):
    "A chapter that is run draws its explorers anew."
    explorers = opened(page, lab(NOTEBOOK))
    explorers.evaluate_all("all => all.forEach(old => old.setAttribute('data-old', ''))")
    start_kernel(page)
    run_all(page)
    check_explorer(page.locator(f"{EXPLORER}:not([data-old])").last)


@pytest.fixture(scope="module")
def static_page(tmp_path_factory):
    "The committed notebook as one HTML file, and the environment left alone."
    folder = tmp_path_factory.mktemp("static")
    shutil.copy(ROOT / NOTEBOOK, folder / "page.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "page.ipynb"]
    env = {**os.environ, **settings(folder)}
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    return folder / "page.html"


def test_explorer_on_a_static_page(page, static_page):
    page.route(re.compile("^https?:"), lambda route: route.abort())   # offline
    page.goto(static_page.as_uri())
    explorers = page.locator(".t2i-explorer")
    expect(explorers.first).to_be_attached()
    for explorer in explorers.all(): check_explorer(explorer)
