"What `make test` starts ends with it, however it ends; and the package sets the short spin before torch loads."
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tree import ROOT, notebooks

# a step that starts a child in a session of its own (as torchrun does), says who they are, and sleeps
SLEEPER = """
import json, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1] + ".part", "w").write(json.dumps([os.getpid(), child.pid]))
os.replace(sys.argv[1] + ".part", sys.argv[1])
time.sleep(float(sys.argv[2]))
"""
# what is started in the background of a script inherits that Ctrl-C is ignored: here it counts again
STEP = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.path.insert(0, 'tools'); "
        "import run_tests; sys.exit(run_tests.step(sys.argv[1:]))")


def driver(note, seconds=600., **env):
    "A driver with the sleeper as its step."
    command = [sys.executable, "-c", STEP, sys.executable, "-c", SLEEPER, str(note), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "CI"} | env)


def until(true, what):
    "Wait for something; the limit only keeps a failure from lasting for ever."
    for _ in range(6000):
        if true(): return
        time.sleep(.02)
    pytest.fail(what)


def gone(pid):
    try: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_stopped_driver_takes_everything_with_it(tmp_path, name):
    process = driver(tmp_path / "note")
    until((tmp_path / "note").exists, "the step did not begin")
    pids = json.loads((tmp_path / "note").read_text())
    assert not any(map(gone, pids))
    process.send_signal(getattr(signal, name))
    assert process.wait() != 0
    until(lambda: all(map(gone, pids)), f"{name} ended the driver and not {pids}")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to an ancestor that asks for them")
def test_what_a_step_leaves_behind_is_ended(tmp_path):
    assert driver(tmp_path / "note", seconds=0).wait() == 0
    assert all(map(gone, json.loads((tmp_path / "note").read_text())))


def test_a_step_says_how_it_ended():
    command = [sys.executable, "-c", STEP, sys.executable, "-c", "import sys; sys.exit(7)"]
    assert subprocess.run(command, cwd=ROOT).returncode == 7


def test_a_hung_step_is_ended_in_ci_and_nowhere_else(tmp_path):
    short = STEP.replace("sys.exit(run", "run_tests.HANG = 3; sys.exit(run")
    command = [sys.executable, "-c", short, sys.executable, "-c", SLEEPER, str(tmp_path / "note")]
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    assert subprocess.run([*command, "600"], cwd=ROOT, env=env | {"CI": "true"}).returncode == 124
    assert all(map(gone, json.loads((tmp_path / "note").read_text())))
    assert subprocess.run([*command, "4"], cwd=ROOT, env=env).returncode == 0


def test_a_notebook_that_fails_is_named_and_the_others_run(tmp_path):
    "In a small nbdev project of its own."
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text(encoding="utf-8"))
    (tmp_path / "nbs").mkdir()
    cells = {"bad": "1/0", "good": "1+1", "later": "2+2", "last": "3+3"}
    for name, source in cells.items():
        cell = dict(cell_type="code", id="a", metadata={}, execution_count=None, outputs=[], source=source)
        (tmp_path / "nbs" / f"{name}.ipynb").write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    command = [sys.executable, ROOT / "tools" / "run_tests.py", "--notebooks", "1"]  # one worker runs them all
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and "ZeroDivisionError" in run.stderr
    assert "3 notebooks passed, 1 failed" in run.stdout and "failed: bad.ipynb" in run.stdout


# --- The short spin ---

def spin_of(*command, **env):
    "What libgomp says it has read, when a command loads torch."
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                         env=kept | {"OMP_DISPLAY_ENV": "VERBOSE"} | env)
    assert run.returncode == 0, run.stderr
    return re.findall(r"GOMP_SPINCOUNT = '(\w+)'", run.stderr)


SCRIPT = "import t2i_course.cli as cli; cli.main(['train', '--list'])"  # what the console script t2i does


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what torch uses on Linux")
@pytest.mark.parametrize("command", [("-c", SCRIPT), ("-m", "t2i_course", "train", "--list"),
                                     ("-c", "import t2i_course, torch")], ids=["t2i", "module", "kernel"])
def test_short_spin_is_set_before_torch_loads(command):
    assert set(spin_of(*command)) == {"10000"}


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what torch uses on Linux")
def test_what_the_user_set_stays():
    load = ("-c", "import t2i_course, torch")
    assert set(spin_of(*load, GOMP_SPINCOUNT="77")) == {"77"}
    assert "10000" not in spin_of(*load, OMP_WAIT_POLICY="passive")


def test_lab_starts_kernels_with_the_short_spin_unless_the_user_has_set_one(monkeypatch):
    command = runpy.run_path(str(ROOT / "tools" / "lab.py"))["command"]
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"): monkeypatch.delenv(name, raising=False)
    assert command([])[1]["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in command([])[1]
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert command([])[1]["GOMP_SPINCOUNT"] == "77"


def test_lab_trusts_the_course_and_nothing_else(tmp_path, monkeypatch, capsys):
    "A page that git knows gets a signature; one that came from elsewhere does not; a failure is one sentence."
    from nbformat import read
    from nbformat.sign import NotebookNotary
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"): monkeypatch.setenv(name, str(tmp_path))
    tool = runpy.run_path(str(ROOT / "tools" / "lab.py"))
    page = ROOT / "nbs" / "01_core" / "06_plots.ipynb"
    assert str(page) in tool["pages"]() and set(tool["pages"]()) <= {str(nb.path) for nb in notebooks()}
    monkeypatch.setitem(tool["trust"].__globals__, "pages", lambda: [str(page)])
    tool["trust"]()
    notebook = read(page, 4)
    with NotebookNotary(data_dir=str(tmp_path)) as notary:
        assert notary.check_signature(notebook)
        notebook.cells[-1].source += " "
        assert not notary.check_signature(notebook)
    monkeypatch.setitem(tool["trust"].__globals__, "pages", lambda: [str(tmp_path / "missing.ipynb")])
    tool["trust"]()
    assert "Trust Notebook" in capsys.readouterr().out
