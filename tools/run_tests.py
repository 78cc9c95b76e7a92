"""`make test` and `make test-browser`: notebooks and pytest on the cores there are; what they start ends with them.

    python tools/run_tests.py                         every notebook at smoke scale, then pytest
    python tools/run_tests.py pytest -k resume        pytest alone, with its own options
    python tools/run_tests.py --workers 4 notebooks   notebooks alone, four at a time

Whatever ends this program (Ctrl-C, SIGTERM, even SIGKILL) ends all that it has started.
"""
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 8              # workers, however many cores there are: each takes one to two gigabytes
HANG = 60 * 60        # seconds after which a step counts as hung where nobody watches (CI); elsewhere nothing limits it
STEPS = ("notebooks", "pytest", "browser")
POSIX = os.name == "posix"


def cores():
    "The cores this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- The guard: a process between us and a step, which outlives us just long enough to end the step ---

def adopt_orphans():
    "On Linux a process whose parent has died becomes a child of this one, and so is found when it is to be ended."
    if sys.platform == "linux": ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_children(patience=3.):
    "Ask everything below this process to stop, and after `patience` seconds make it stop."
    import psutil
    below = psutil.Process().children(recursive=True)
    for stop in ("terminate", "kill"):
        for process in below:
            try: getattr(process, stop)()
            except psutil.NoSuchProcess: pass
        _, below = psutil.wait_procs(below, patience)
        below += [p for p in psutil.Process().children(recursive=True) if p not in below]
        if not below: return


def guard(command):
    "Run a command until it ends or the one who asked for it is gone; then end all that it has started."
    adopt_orphans()
    if POSIX: signal.signal(signal.SIGTERM, lambda *_: alone.set())
    alone = threading.Event()
    def listen():  # the other end of this pipe closes with its owner, however that one ends
        while os.read(0, 1024): pass
        alone.set()
    threading.Thread(target=listen, daemon=True).start()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None and not alone.wait(.1): pass
    code = process.poll()
    end_children()
    return 130 if code is None else code


def step(command, env=None):
    "Run a command under a guard; its exit status, or 124 where it hung."
    if POSIX:  # asked to stop: leave by the way that ends what was started
        for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, lambda n, _: sys.exit(128 + n))
    detached = {"start_new_session": True} if POSIX else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    guarded = [sys.executable, __file__, "--guard", *map(str, command)]
    child = subprocess.Popen(guarded, cwd=ROOT, env=env, stdin=subprocess.PIPE, **detached)
    try: return child.wait(HANG if os.environ.get("CI") else None)
    except subprocess.TimeoutExpired:
        print(f"\nstopped: not done after {HANG // 60} minutes", flush=True)
        return 124
    finally:
        child.stdin.close()
        child.wait()


# --- The steps ---

def run_notebook(path):
    "One notebook in this worker: did it pass, and how long did it take?"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    start = time.time()
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
    return passed, time.time() - start


def run_notebooks(workers):
    "All notebooks, the later chapters first, because they take longest; prints what took longest."
    from nbdev.doclinks import nbglob
    paths = sorted((path.absolute() for path in nbglob(as_path=True) if not (path.parent / ".notest").exists()), reverse=True)
    start, found = time.time(), {}
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(run_notebook, path): path for path in paths}
        for job in as_completed(jobs):
            path = jobs[job]
            try: found[path] = job.result()
            except Exception as e:  # a worker was killed: all that were waiting for it are lost too
                found[path] = False, 0.
                print(f"{path.name}: {type(e).__name__}: {e}", file=sys.stderr)
            print(f"[{len(found)}/{len(paths)}] {path.name:28} {found[path][1]:6.1f} s"
                  + ("" if found[path][0] else "   FAILED"), flush=True)
    failed = [path.name for path, (passed, _) in found.items() if not passed]
    longest = sorted(found, key=lambda path: -found[path][1])[:10]
    print("\nthe ten longest notebooks: " + ", ".join(f"{path.stem} {found[path][1]:.0f} s" for path in longest))
    print(f"{len(paths) - len(failed)} notebooks passed, {len(failed)} failed in {time.time() - start:.2f}s")
    if failed: print("failed: " + ", ".join(sorted(failed)))
    return bool(failed)


def pytest_command(workers, options):
    "pytest, on several workers where pytest-xdist is installed."
    try: import xdist  # noqa: F401
    except ImportError:
        workers = 1
        print("pytest-xdist is not installed: the tests run on one worker", flush=True)
    spread = ["-n", workers, "--dist", "loadgroup", "--no-loadscope-reorder"] if workers > 1 else []
    return [sys.executable, "-m", "pytest", *spread, *options]


def main(words):
    "Run the steps that are named, or notebooks and pytest; the exit status of the first that failed."
    workers = min(cores(), MOST)
    if words[:1] == ["--workers"]: workers, words = int(words[1]), words[2:]
    names = [words[0]] if words else ["notebooks", "pytest"]
    if names[0] not in STEPS or (names[0] != "pytest" and words[1:]): sys.exit(__doc__)
    here = {"T2I_SCALE": "smoke", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env, took, code = os.environ | here, {}, 0
    commands = {"notebooks": [sys.executable, __file__, "--notebooks", workers],
                "pytest": pytest_command(workers, words[1:]) if "pytest" in names else [],
                "browser": [sys.executable, "-m", "pytest", "tests/browser"]}
    for name in names:
        start = time.time()
        found = step(commands[name], env)
        code, took[name] = code or found, time.time() - start
        if found in (124, 130): break
    parts = " + ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())
    if names != ["browser"]: parts += f", on {workers} worker{'s' * (workers > 1)}"
    print(f"\n{parts}: {'passed' if not code else 'FAILED'}", flush=True)
    return code


if __name__ == "__main__":
    kind, rest = sys.argv[1:2], sys.argv[2:]
    try:
        if kind == ["--guard"]: sys.exit(guard(rest))
        if kind == ["--notebooks"]:
            import run_tests  # by its name: in a worker, `__main__` is the notebook that ran last
            sys.exit(run_tests.run_notebooks(int(rest[0])))
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt: sys.exit(130)
