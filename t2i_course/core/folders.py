"""A folder or tar file of captioned pictures of your own, as a data set."""

import hashlib
import json
import os
import posixpath
import tarfile
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from t2i_course.core.captions import composed, is_picture, raw, readable, shown
from t2i_course.core.data import Batch, check_split, in_epochs, split_words
from t2i_course.core.files import CourseError, say
from t2i_course.core.piles import Pile

TARS = (".tar", ".tar.gz", ".tgz")


TESTS = {"test", "val", "valid", "validation"}  # folders beside train


def eight_bit(im, white=None):
    """Gray of more than 8 bits. White is 65535 where a file says 16 bits; else 1 (floats), 255 or 65535, the
    first that no value exceeds"""
    v = np.asarray(im).astype(np.float64)
    white = white or next(
        (w for w in ((1, 255, 65535) if im.mode == "F" else (255, 65535)) if v.max() <= w), None
    )
    if white is None or not v.min() >= 0:
        raise CourseError("values outside 0..65535")
    from PIL import Image

    return Image.fromarray(np.rint(v * 255 / white).astype(np.uint8))


def picture(file, size):  # (3 size size) uint8
    "Turned as its camera says, on white where transparent, its central square, resized; the first of several"
    from PIL import Image, ImageOps

    with open(file, "rb") as f, Image.open(f) as im:
        deep = im.mode.startswith("I;16") or im.mode == "I" and im.format in ("PNG", "PPM")
        im = ImageOps.exif_transpose(im)
        if deep or im.mode in ("I", "F"):
            im = eight_bit(im, 65535 if deep else None)
        im = im.convert("RGBA")
    im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB")
    return torch.from_numpy(np.array(ImageOps.fit(im, (size, size), Image.Resampling.LANCZOS))).permute(
        2, 0, 1
    )


def unpacked(tar, to):
    "Every plain file of an archive, wherever it wants to be, into the folder `to`; why it ended early"
    to = os.path.realpath(os.fsencode(to))
    try:
        with tarfile.open(tar) as archive:
            for m in archive:
                file = archive.extractfile(m) if m.isfile() or m.islnk() else None
                path = os.path.realpath(os.path.join(to, raw(posixpath.normpath("/" + m.name).lstrip("/"))))
                if file is None or not path.startswith(os.path.join(to, b"")):
                    continue  # Windows has more ways out
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as f:
                    f.write(file.read())
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError) as e:
        return e


def piles(path):
    "The folder, or its tar files when it has no pictures of its own, each unpacked for as long as it is read"
    pile, tars = None if path.is_file() else Pile(path), [path.name]
    if pile:
        tars = [n for n in pile.names if n.lower().endswith(TARS)]
        if not tars or any(map(is_picture, pile.names)):
            if tars:
                pile.notes.append(
                    f"the tar files beside the pictures are left aside ({len(tars)}): name them one by one"
                )
            return (yield pile)
    for tar in tars:
        with tempfile.TemporaryDirectory(prefix="t2i-") as to:
            damage = unpacked(pile.at(tar) if pile else path, to)
            inside = Pile(to, f"{tar}/")
            if damage:
                inside.notes.append(
                    f"{shown(tar)} is damaged ({damage}): what lies before that place is used"
                )
            yield inside


class Folder:
    "A folder or tar file of images with captions: NAME.txt beside NAME.png, or metadata with file_name, text"

    attributes, group = {}, 1

    def __init__(self, path, size=32):
        self.path = Path(path).expanduser().resolve()
        if not self.path.is_dir() and not (self.path.is_file() and tarfile.is_tarfile(self.path)):
            raise CourseError(
                f"{shown(str(path))} is not a folder: give a folder of images with captions, or a .tar of "
                f"them"
            )
        try:
            str(self.path).encode()
        except ValueError as e:
            raise CourseError(f"the path {shown(str(self.path))} is not UTF-8: rename it") from e
        self.name, self.shape, self.splits = self.path.name, (3, size, size), ("train", "test")
        kept, notes, left = [], [], defaultdict(list)
        for pile in piles(self.path):
            for name, captions in pile.captioned():
                try:
                    kept.append((pile.prefix + name, picture(pile.at(name), size), captions))
                except Exception as e:  # a damaged image may raise anything
                    ending = posixpath.splitext(name)[1].lower()
                    why = (
                        e
                        if isinstance(e, CourseError)
                        else f"Pillow does not read {ending}"
                        if ending not in readable()
                        else ""
                    )
                    pile.leave("that could not be read", shown(name) + (f" ({why})" if why else ""))
            notes += pile.notes
            for why, names in pile.left.items():
                left[why] += names
        for text in notes:
            say(f"{self.name}: {text}")
        for why, names in left.items():
            say(
                f"{self.name}: skipped {len(names)} {why}: "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )
        if len(kept) < 2:
            raise CourseError(
                f"{path} has {len(kept) or 'no'} usable captioned image{'s' * (len(kept) != 1)}, and at "
                f"least 2 "
                f"are needed{''.join(f'; {n}' for n in notes)}: put NAME.txt with the caption beside each "
                'NAME.png or NAME.jpg, or write metadata.jsonl with "file_name" and "text"'
            )
        self.take(kept)

    def take(self, kept):
        "Divide (name, picture, captions) for good: by folders train and test, else by a hash of names"
        names = [composed(name) for name, *_ in kept]
        ranks = [int(hashlib.sha256(raw(name)).hexdigest()[:15], 16) for name in names]
        tops = [name.lower().split("/")[0] for name in names]
        test = {i for i, t in enumerate(tops) if t in TESTS} if "train" in tops else set()
        # else about every tenth, whatever else is in the folder
        test = test or {i for i, r in enumerate(ranks) if r % 10 == 0} or {ranks.index(min(ranks))}
        if len(test) == len(kept):
            test.discard(ranks.index(max(ranks)))
        part = {
            "train": [k for i, k in enumerate(kept) if i not in test],
            "test": [k for i, k in enumerate(kept) if i in test],
        }
        self.x = {s: torch.stack([x for _, x, _ in p]) for s, p in part.items()}
        self.texts = {s: [c for *_, cs in p for c in cs] for s, p in part.items()}
        self.which = {
            s: torch.tensor([k for k, (*_, cs) in enumerate(p) for _ in cs]) for s, p in part.items()
        }  # of x
        words = {s: list(map(split_words, texts)) for s, texts in self.texts.items()}
        self.words = tuple(sorted({w for ws in words["train"] for w in ws}))
        self.size = min(64, 1 + max(map(len, words["train"])))  # and a token for the start
        long = sum(len(ws) > 63 for s in words for ws in words[s])
        if long:
            say(
                f"{self.name}: {long} caption{'s are' if long > 1 else ' is'} longer than 63 words and "
                f"read up to there"
            )
        n, m, pairs = len(self.x["train"]), len(self.x["test"]), sum(map(len, self.texts.values()))
        more = f", {pairs:,} captions" if pairs > n + m else ""
        self.source = f"folder {self.name}, {n:,} training images, {m:,} for testing{more}"
        self.crop = (
            f"{self.name}: {n + m:,} pictures, the central square of each resized to {self.shape[1]} x "
            f"{self.shape[2]}; "
            "--size changes it"
        )
        h = hashlib.sha256()
        for name, (_, x, texts) in sorted(zip(names, kept), key=lambda k: k[0]):
            h.update(json.dumps([name, texts]).encode() + x.contiguous().numpy().tobytes())
        self.fingerprint = h.hexdigest()

    def batch(self, split, draws):
        "Captioned images; every pair of picture and caption once an epoch"
        check_split(self, split)
        i = in_epochs(len(self.texts[split]), draws)
        x = self.x[split][self.which[split][i]]
        return Batch(x / 127.5 - 1, [self.texts[split][k] for k in i.tolist()], {}, {})

    def captions(self, attrs, named):
        raise CourseError(
            f"the captions of {self.name} are in its files; they cannot be made from attributes"
        )

    def demands(self, caption):
        return {}
