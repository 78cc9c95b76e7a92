"""Errors with advice, lines for the user, and the one way to write a file: whole, or not at all."""

import errno
import hashlib
import json
import math
import os
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save


class CourseError(ValueError):
    "Something the user can mend; the message says how"


def not_written(
    path,  # what was to be written
    e: Exception,  # why it was not
) -> CourseError:
    "Only a full disk is called full; any other cause is told as what it is"
    why = (
        getattr(e, "strerror", None)
        or f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no reason given'}"
    )
    advice = {
        errno.ENOSPC: "Free some space or choose another folder.",
        errno.ENAMETOOLONG: "Choose a shorter name.",
    }
    advice[getattr(errno, "EDQUOT", errno.ENOSPC)] = advice[errno.ENOSPC]
    usual = (
        "Check the folder and its permissions, or choose another folder." if isinstance(e, OSError) else ""
    )
    return CourseError(
        f"could not write {path} ({why}). {advice.get(getattr(e, 'errno', None), usual)}".strip()
    )


def say(
    text="",  # what the user should know
    everyone=False,  # under torchrun: every process says it, not the first alone
):
    "A line on standard error; a letter that the terminal has no code for is written as a number"
    if int(os.environ.get("RANK", 0)) and not everyone:
        return
    code = getattr(sys.stderr, "encoding", None) or "utf-8"
    print(str(text).encode(code, "backslashreplace").decode(code), file=sys.stderr, flush=True)


@lru_cache(1000)
def say_once(text):
    "The same line is said once a process"
    say(text)


def between(
    value,  # a number, or None where nothing was given
    low,  # the least it may be
    high,  # the most
    name: str,  # what the user calls it
    whole=False,  # of whole numbers
):
    "A number in its range, or a sentence that says the range"
    if value is None:
        return None
    if isinstance(value, float) and math.isnan(value) or not low <= value <= high:
        kind = "a whole number " if whole else ""
        raise CourseError(f"{name} must be {kind}from {low:g} to {high:g}; got {value:g}")
    return value


def make_folder(
    out,  # where to
) -> Path:
    "Make a folder and try to write there"
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".try").touch()
        (out / ".try").unlink()
    except OSError as e:
        raise CourseError(f"{out} cannot be written ({e.strerror}). Choose another --out.") from e
    return out


def write_whole(
    path,  # where to
    write,  # write(temporary path)
):
    "Write beside the target, flush, put in place: a full disk or a power cut leaves the old file whole"
    path = Path(path)
    # cut, because a name may be as long as the file system allows; the thread, because two may write here
    tmp = path.with_name(f".{path.name[:40]}.{os.getpid()}-{threading.get_ident() % 10**6}.part")
    try:
        write(tmp)
        with open(tmp, "r+b") as f:
            os.fsync(f.fileno())  # Windows flushes only what is open for writing
        put_in_place(tmp, path)
    except CourseError:
        raise
    except Exception as e:
        raise CourseError(f"{not_written(path, e)} What was saved before is untouched.") from e
    finally:
        try:
            tmp.unlink(missing_ok=True)
        except OSError:
            pass  # what went wrong before is what has to be told


def put_in_place(
    tmp,  # a whole file
    path,  # its place
):
    "Replace; on Windows it is tried again for some seconds, because whoever reads the old file holds it"
    for wait in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 0):
        try:
            return os.replace(tmp, path)
        except PermissionError:
            if os.name != "nt" or not wait:
                raise
            time.sleep(wait)


def write_json(
    path,  # where to
    value,  # anything that JSON can hold
):
    "JSON for people, written whole"
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda p: p.write_bytes(text.encode()))  # the same bytes in every locale and system


def write_npz(
    path,  # a .npz file
    **arrays,  # name -> array
):
    "Arrays in one compressed file, written whole"

    def write(p):
        with open(p, "wb") as f:
            np.savez_compressed(f, **arrays)

    write_whole(path, write)


def digest(
    tensors: dict,  # name -> tensor
    note: str,  # the JSON saved with them
) -> str:  # sha256
    "Hash of every name, shape, type and byte, and of the note"
    h = hashlib.sha256(note.encode())
    for k in sorted(tensors):
        v = tensors[k].detach().cpu().contiguous()
        h.update(f"{k} {tuple(v.shape)} {v.dtype}".encode())
        h.update(v.view(-1).view(torch.uint8).numpy().tobytes() if v.numel() else b"")
    return h.hexdigest()


def fingerprint(
    module,  # with weights
) -> str:  # 12 hexadecimal digits
    "Which network it is: a hash of its weights and their names"
    h = hashlib.sha256()
    for k, v in sorted(module.state_dict().items()):
        if v.is_floating_point():
            h.update(k.encode() + v.cpu().numpy().tobytes())
    return h.hexdigest()[:12]


def save_tensors(
    path,  # a .safetensors file
    tensors: dict,  # name -> tensor
    **note,  # JSON values kept in the file's header
):
    "Tensors, a note and their hash in one safetensors file, written whole"
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    sha256 = digest(tensors, json.dumps(note, sort_keys=True))
    # one entry alone: safetensors writes several in random order, and the same run would end in other bytes
    header = dict(note=json.dumps(note | dict(sha256=sha256), sort_keys=True))
    # safetensors' own writer leaves its files to their owner alone, and a scratch file when it is killed
    write_whole(path, lambda p: p.write_bytes(save(tensors, metadata=header)))


def load_tensors(
    path,  # a file made by `save_tensors`
) -> tuple:  # tensors, note
    "Read and check the hash; raises CourseError when the file is cut short or changed"
    path = Path(path)
    if not path.is_file():
        raise CourseError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as f:
            # copies: the file stays open while one of its tensors lives, and Windows replaces no open file
            tensors, header = {k: f.get_tensor(k).clone() for k in f.keys()}, f.metadata() or {}
        note = json.loads(header.get("note", "{}"))
    except Exception as e:
        raise CourseError(
            f"{path} cannot be read ({e}): it is damaged or cut short. Delete it, or take it from a backup."
        ) from e
    sha256 = note.pop("sha256", None)
    if sha256 != digest(tensors, json.dumps(note, sort_keys=True)):
        raise CourseError(
            f"{path} is not as it was saved (its hash differs): it was changed "
            "or damaged. Delete it, or take it from a backup."
        )
    return tensors, note
