"""Guards around a run: one writer in a folder, a process left as it was found, Ctrl-C that saves first."""

import errno
import os
import random
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from t2i_course.core.files import CourseError, not_written

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows, which has msvcrt in its place


_held = {}  # run folder -> open lock file, thread, how often it was taken


def _forget_locks():  # a forked child has the locks of its parent, and would keep them when the parent dies
    for f, *_ in _held.values():
        os.close(f)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _try_lock(f: int) -> bool:  # a lock of the system: it goes when the process goes, however it ends
    try:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(f, msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True  # some network folders know no locks: then there is nobody to ask


def _open_lock(path: Path) -> int:  # the locked file; None when another holds it
    while True:
        f = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _try_lock(f):
            os.close(f)
            return None
        try:
            if os.path.samestat(os.fstat(f), path.stat()):
                return f
        except OSError:
            pass
        os.close(f)  # it was taken away between opening and locking: once more


@contextmanager
def one_writer(
    run,  # an existing folder
):
    "Inside, nobody else writes into the run folder; a second process, or thread, is refused with a sentence"
    run, me = Path(run).resolve(), threading.get_ident()
    path, (f, who, times) = run / ".lock", _held.get(run, (None, None, 0))
    if f is None or who != me:
        try:
            f, times = _open_lock(path), 0
        except OSError as e:
            raise not_written(path, e) from e
        if f is None:
            raise CourseError(
                f"{run} is being written by another t2i, which is still running: "
                "wait until it has ended, stop it, or choose another --out"
            )
    _held[run] = f, me, times + 1
    try:
        yield
    finally:
        _held[run] = f, me, times
        if not times:
            del _held[run]
            try:  # Windows takes no open file away, others none that is not locked any more
                if fcntl:
                    path.unlink(missing_ok=True)
                os.close(f)
                if not fcntl:
                    path.unlink(missing_ok=True)
            except OSError:
                pass  # another has it open already


_making = threading.RLock()


@contextmanager
def undisturbed():
    "Random numbers are afterwards what they were: the process may be a notebook. One thread at a time"
    with _making:
        cuda = (
            torch.cuda.is_available() and "LOCAL_RANK" not in os.environ
        )  # a process of torchrun is nobody's notebook
        mps = torch.backends.mps.is_available()
        kept = torch.get_rng_state(), cuda and torch.cuda.get_rng_state(), mps and torch.mps.get_rng_state()
        numbers, words = np.random.get_state(), random.getstate()
        try:
            yield
        finally:
            torch.set_rng_state(kept[0])
            if cuda:
                torch.cuda.set_rng_state(kept[1])
            if mps:
                torch.mps.set_rng_state(kept[2])
            np.random.set_state(numbers)
            random.setstate(words)


@contextmanager
def same_threads():
    "The number of threads that torch uses is afterwards what it was"
    n = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != n:
            torch.set_num_threads(n)


class Stopped(Exception):
    "Ctrl-C or SIGTERM asked the run to stop"


@contextmanager
def asked_to_stop():
    "Yields a function that says whether Ctrl-C or SIGTERM came; the second Ctrl-C stops at once"
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # signals belong to the main thread, whoever runs there
        yield lambda: False
        return
    seen, keys = (
        [],
        (signal.SIGINT, getattr(signal, "SIGBREAK", signal.SIGINT)),
    )  # Ctrl-Break is a key of Windows

    def note(signum, frame):
        if signum in keys and signum in seen:
            raise KeyboardInterrupt  # a launcher may send SIGTERM twice
        seen.append(signum)

    old = {s: signal.signal(s, note) for s in {*keys, signal.SIGTERM}}
    try:
        yield lambda: bool(seen)
    finally:
        for s, h in old.items():
            signal.signal(s, signal.SIG_DFL if h is None else h)  # None: it was not set in Python
