"""Which pictures a folder holds, and the captions that belong to them; `core.folders.Folder` reads them."""

import os
import posixpath
import re
from collections import defaultdict
from pathlib import Path

from t2i_course.core.captions import (
    FILE,
    captions_of,
    checked,
    composed,
    in_order,
    is_picture,
    json_row,
    lacking,
    raw,
    rows,
    shown,
    text_of,
    tidy,
    value_of,
)
from t2i_course.core.files import CourseError


METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


# folders that say nothing of what their pictures show
PLACES = {
    "train",
    "training",
    "test",
    "testing",
    "val",
    "valid",
    "validation",
    "dev",
    "data",
    "dataset",
    "image",
    "images",
    "img",
    "imgs",
    "photo",
    "photos",
    "picture",
    "pictures",
}


class Pile:
    "The captioned pictures of one folder, and what was left out of it"

    def __init__(self, root, prefix=""):
        self.root, self.prefix, self.notes, self.used = os.path.realpath(os.fsencode(root)), prefix, [], set()
        self.left = defaultdict(list)  # why -> names
        self.names = sorted(self.walk(), key=in_order)
        self.known, self.near, self.last = set(self.names), defaultdict(list), defaultdict(list)
        for n in self.names:
            self.near[composed(n).casefold()].append(n)
            self.last[composed(posixpath.basename(n)).casefold()].append(n)

    def at(self, name):
        return os.path.join(self.root, raw(name))

    def leave(self, why, name):
        self.left[why].append(shown(self.prefix) + name)

    def walk(self):
        "Every file; links are followed, no folder is read twice, hidden ones are left out"
        seen = set(
            map(os.fsencode, Path(os.fsdecode(self.root)).parents)
        )  # a link upwards would lead in a circle
        todo, links = [""], []
        while todo or links:
            folder = (
                todo.pop() if todo else links.pop(0)
            )  # links last: a folder has its own name where it has one
            real = os.path.realpath(self.at(folder))
            if real in seen:
                continue
            seen.add(real)
            try:
                inside = sorted(os.listdir(real))
            except OSError as e:
                self.leave("that could not be read", f"{shown(folder)} ({e.strerror})")
                continue
            for file in inside:
                name, path = file.decode("utf-8", "surrogateescape"), os.path.join(real, file)
                if name.startswith(".") or name == "__MACOSX":
                    continue  # left by editors, file managers, archives
                name = posixpath.join(folder, name)
                if os.path.isdir(path):
                    (links if os.path.islink(path) else todo).append(name)
                elif os.path.isfile(path):
                    yield name
                elif os.path.islink(path):
                    self.leave("that could not be read", f"{shown(name)} (a link that leads nowhere)")

    def here(self, name):
        "A name letter for letter, else with other accents, else in another case; None: none is meant"
        if name in self.known:
            return name
        near = self.near.get(composed(name).casefold(), ())
        same = [n for n in near if composed(n) == composed(name)] or near
        return same[0] if len(same) == 1 else None

    def inside(self, path):
        "The name of a file that is given by its whole path"
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        try:
            names = [os.path.relpath(p, os.fsdecode(self.root)).replace(os.sep, "/") for p in (path, real)]
        except ValueError:
            return None  # on another drive
        return next(filter(None, map(self.here, names)), None)

    def find(self, said, folder):
        "The file that a list in `folder` means; it may come from Windows, or name a place that is no more"
        for name in dict.fromkeys((said, said.replace("\\", "/"))):
            if re.match(r"/|\w:/", name):
                if os.path.isfile(self.at(name)):
                    return self.inside(name) or name
                tails = [name.split("/", i)[-1] for i in range(1, name.count("/") + 1)]
            else:
                tails = [name]
            for tail in tails:
                for place in folder, "":
                    path = posixpath.normpath(posixpath.join(place, tail))
                    if self.here(path):
                        return self.here(path)
                    if os.path.isfile(self.at(path)):
                        return path
            alone = self.last.get(
                composed(name).casefold(), ()
            )  # a bare name, and one picture of that name in the folders below
            if len(alone) == 1:
                return alone[0]

    def listed(self):
        "name -> captions, from every metadata file"
        found = {}
        for meta in (n for n in self.names if posixpath.basename(n).lower() in METADATA):
            self.used.add(meta)
            try:
                table = rows(meta, Path(os.fsdecode(self.at(meta))).read_bytes())
                lack = lacking(table)
            except CourseError as e:
                lack = str(e)
            except Exception as e:
                lack = f"cannot be read ({e})"  # csv and pyarrow have errors of their own
            if lack:
                self.notes.append(f"{shown(self.prefix + meta)} {lack}")
            for n, row in () if lack else table:
                try:
                    texts, name = captions_of(row), value_of(row, FILE)
                    file = self.find(name, posixpath.dirname(meta))
                except (LookupError, AttributeError, TypeError, ValueError):
                    self.leave("that could not be read", f"{shown(meta)} line {n}")
                    continue
                if file:
                    found.setdefault(file, []).extend(texts)
                else:
                    self.leave("that could not be read", f"{shown(name)} (listed, not there)")
        return found

    def beside(self, picture):
        "Captions from NAME.txt, whose lines are one caption, or from NAME.json"
        stem = posixpath.splitext(picture)[0]
        for file in filter(None, map(self.here, (f"{stem}.txt", f"{stem}.json"))):
            with open(self.at(file), "rb") as f:
                data = f.read()
            if file.lower().endswith(".json"):
                try:
                    texts = captions_of(json_row(text_of(data)))
                except (LookupError, AttributeError, TypeError, ValueError):
                    continue  # of another kind
            self.used.add(file)
            if file.lower().endswith(".txt"):
                texts = [checked(text_of(data))]
            if tidy(texts):
                return texts
        return []

    def captioned(self):
        "(picture, its captions); what has none is noted, unless there are no captions at all but classes"
        said, bare, both = self.listed(), [], []
        pictures = sorted({*filter(is_picture, self.names), *said}, key=in_order)
        for p in pictures:
            try:
                listed, beside = tidy(said.get(p, ())), tidy(self.beside(p))
            except (ValueError, OSError) as e:
                why = "not UTF-8" if isinstance(e, ValueError) else e.strerror
                self.leave("that could not be read", f"{shown(posixpath.splitext(p)[0])}.txt ({why})")
                said[p] = tidy(said.get(p, ()))
            else:
                said[p] = listed or beside
                if listed and beside and listed != beside:
                    both.append(p)
                if not said[p]:
                    bare.append(p)
        if both:
            self.notes.append(
                f"{len(both)} picture{'s have' if len(both) > 1 else ' has'} one caption in the list and "
                f"another in a file beside: "
                "the list counts"
            )
        if not self.used:
            said |= self.classes(bare)
        for p in bare:
            if not said[p]:
                self.leave("without a caption", shown(p))

        def stem(name):
            return composed(posixpath.splitext(name)[0]).casefold()

        stems, texts = set(map(stem, pictures)), [n for n in self.names if n.lower().endswith(".txt")]
        alone = [n for n in texts if stem(n) not in stems]
        if len(alone) < len(
            texts
        ):  # where captions lie beside pictures, one that lies alone has lost its picture
            for n in alone:
                self.leave("without a picture", shown(n))
        return [(p, said[p]) for p in pictures if said.get(p)]

    def classes(self, pictures):
        "name -> caption: the folder that a picture lies in, where there are at least two such folders"
        said = {
            p: [c.replace("_", " ") for c in p.split("/")[:-1] if c.lower() not in PLACES][-1:]
            for p in pictures
        }
        names = sorted({c for texts in said.values() for c in texts})
        if len(names) < 2:
            return {}
        self.notes.append(
            f"no captions: the folders' names are taken for them ({shown(', '.join(names[:5]))}"
            f"{', ...' if len(names) > 5 else ''})"
        )
        return {p: tidy(texts) for p, texts in said.items()}
