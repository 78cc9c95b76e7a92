"A learner opens JupyterLab, runs a chapter and moves its explorer; then the same explorer on a static page."
import json
import os
import re
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

NOTEBOOK = "nbs/06_flow/01_flow_matching.ipynb"
TOKEN = "the-browser-test"
MINUTES = 60_000
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
    "JupyterLab on a copy of the repository: its address and the folder of the copy."
    folder = tmp_path_factory.mktemp("lab")
    copy = copy_to(folder / "course")
    if not (copy / NOTEBOOK).exists(): pytest.fail(f"{NOTEBOOK} is not there")
    port, log = free_port(), folder / "log"
    env = {**os.environ, **settings(folder), "T2I_SCALE": "smoke", "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
               "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={copy}"]
    with log.open("w") as out, subprocess.Popen(command, cwd=copy, env=env, stdout=out, stderr=out) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={TOKEN}", server, log)
            yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?token={TOKEN}&reset"
        finally: server.terminate()


# --- The explorer ---

def move(slider, to):
    "Set a range input and tell the page, as a hand would."
    slider.evaluate("""(slider, end) => {
        slider.value = end == 'first' ? slider.min : slider.max;
        slider.dispatchEvent(new Event('input', {bubbles: true}));
        slider.dispatchEvent(new Event('change', {bubbles: true}));
    }""", to)


def check_explorer(explorer):
    "Moving the slider from end to end, and by a key, changes a picture that is really drawn."
    slider, picture = explorer.locator("input[type=range]").first, explorer.locator("img").first
    slider.scroll_into_view_if_needed()
    expect(picture).to_be_visible()
    move(slider, "first")
    first = picture.get_attribute("src")
    move(slider, "last")
    expect(picture).not_to_have_attribute("src", first)
    last = picture.get_attribute("src")
    assert first.startswith("data:image/")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    slider.focus()
    slider.press("ArrowLeft")
    expect(picture).not_to_have_attribute("src", last)


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


def test_explorer_in_jupyterlab(page, lab):
    page.goto(lab)
    start_kernel(page)
    page.evaluate("""() => document.querySelectorAll('.t2i-explorer').forEach(old => old.remove())""")
    run_all(page)
    check_explorer(page.locator(".jp-OutputArea-output .t2i-explorer").last)


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
