"""`make lab`: JupyterLab on the course, with its own notebooks trusted, so that the explorers move before a cell was run.

    python tools/lab.py                 opens the tour
    python tools/lab.py --port 8899     JupyterLab's own options follow

JupyterLab disarms the sliders of a notebook that it does not trust. Trust is a signature in a database of the reader's own
Jupyter: no file of the repository changes, and a notebook that came from elsewhere is not in the list. Signing takes
a few seconds; notebooks that are signed already are left alone."""
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST = "nbs/00_start/01_tour.ipynb"


def pages():
    "The notebooks of the course: what git knows, or what the folders hold where there is no git."
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "nbs/*.ipynb"]
    try: known = subprocess.run(git, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError): known = []
    found = [ROOT / name for name in known if name] or [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/*/*.ipynb")]
    return [str(path) for path in found if path.is_file()]


def trust():
    "Sign the notebooks, as `jupyter trust` does; a failure is said, and JupyterLab starts all the same."
    try:
        from nbformat.sign import TrustNotebookApp
        with contextlib.redirect_stdout(io.StringIO()):
            app = TrustNotebookApp()
            app.initialize(pages())
            app.start()
    except (Exception, SystemExit) as e:
        print(f"The notebooks could not be trusted ({e}). Where a slider does not move: View > Activate Command Palette, "
              "Trust Notebook.", flush=True)


def command(options):
    "What starts JupyterLab, and its environment."
    env = dict(os.environ)
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & env.keys(): env["GOMP_SPINCOUNT"] = "10000"  # read when torch is loaded
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return [sys.executable, "-m", "jupyterlab", *root, f"--LabApp.default_url=/lab/tree/{FIRST}", *options], env


if __name__ == "__main__":
    trust()
    words, env = command(sys.argv[1:])
    os.chdir(ROOT)  # which JupyterLab shows
    if os.name == "posix": os.execve(words[0], words, env)
    sys.exit(subprocess.call(words, env=env))
