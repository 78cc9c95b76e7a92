"""Samples in tar files, as webdataset has them: NAME.safetensors, NAME.txt and NAME.json are one."""

import hashlib
import io
import json
import tarfile
from collections import OrderedDict
from pathlib import Path

from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from t2i_course.core.files import CourseError


def packed(
    samples,  # (name, tensors, caption, note), note of JSON values
) -> bytes:  # a tar file
    "The same bytes whoever makes it and when"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for name, tensors, caption, note in samples:
            parts = dict(json=json.dumps(note).encode(), safetensors=to_bytes(tensors), txt=caption.encode())
            for ending, raw in parts.items():
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size, info.mode, info.uname, info.gname = len(raw), 0o444, "t2i", "t2i"
                tar.addfile(info, io.BytesIO(raw))
    return out.getvalue()


def sound(
    path: Path,  # a shard
    note: dict,  # what is known of it: filesize, sha256; None when it is not done
) -> bool:
    "Is it there, and is it the one that was written?"
    if not note or not path.exists() or path.stat().st_size != note["filesize"]:
        return False
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() == note["sha256"]


class Tar:
    "One tar file, open, with the place of every member"

    def __init__(
        self,
        path: Path,
        n: int,  # samples that it has to hold
    ):
        self.file = open(path, "rb")  # noqa: SIM115  it stays open while it is read
        try:
            with tarfile.open(fileobj=self.file, mode="r:") as tar:
                members = [(*m.name.rsplit(".", 1), m.offset_data, m.size) for m in tar if m.isfile()]
        except (tarfile.TarError, ValueError) as e:
            self.file.close()
            raise ValueError(f"not a readable tar file: {e}") from e
        self.samples = {}
        for name, ending, at, size in members:
            self.samples.setdefault(name, {})[ending] = at, size
        if len(self.samples) != n:
            self.file.close()
            raise ValueError(f"it holds {len(self.samples)} samples, {n} were written")
        self.names = list(self.samples)

    def __getitem__(self, i: int) -> tuple:  # tensors, caption, note of sample number i
        def read(ending):
            at, size = self.samples[self.names[i]][ending]
            self.file.seek(at)
            return self.file.read(size)

        return from_bytes(read("safetensors")), read("txt").decode(), json.loads(read("json"))

    def close(self):
        self.file.close()


class Tars:
    "Many tar files, of which a few are open at a time"

    def __init__(
        self,
        folder: Path,
        notes: list,  # of each shard: url, nsamples, filesize, sha256
        most: int,  # open at once
        check: bool,  # hash a shard when it is first opened; False: look at its size only
    ):
        self.folder, self.notes, self.most, self.check = folder, notes, most, check
        self.open, self.seen = OrderedDict(), set()

    def __getitem__(self, k: int) -> Tar:
        "Shard number k; raises CourseError when it is damaged"
        if k in self.open:
            self.open.move_to_end(k)
            return self.open[k]
        path, why = self.folder / self.notes[k]["url"], None
        try:
            size, wanted = path.stat().st_size, self.notes[k]["filesize"]
            if size != wanted:
                why = f"it has {size:,} bytes, {wanted:,} were written"
            elif self.check and k not in self.seen and not sound(path, self.notes[k]):
                why = "its bytes are not those that were written"
            else:
                self.open[k] = Tar(path, self.notes[k]["nsamples"])
        except OSError as e:
            why = e.strerror
        except ValueError as e:
            why = str(e)
        if why:
            raise CourseError(
                f"{path} is damaged ({why}). Run the same t2i prepare command again: it makes this shard "
                f"anew and "
                "leaves the others alone."
            )
        self.seen.add(k)
        while len(self.open) > self.most:
            self.open.popitem(last=False)[1].close()
        return self.open[k]

    def __getstate__(self):  # a process that loads data opens files of its own
        return self.__dict__ | dict(open=OrderedDict())
