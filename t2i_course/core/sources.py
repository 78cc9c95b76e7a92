"""`load`: the only door to data. The sets of the course by their names, folders of pictures, shards."""

import os
from pathlib import Path

from t2i_course.core.data import Digits, Painted, PaintedTwo
from t2i_course.core.downloads import Vision
from t2i_course.core.files import CourseError, say_once
from t2i_course.core.folders import Folder
from t2i_course.core.shards import Shards, is_shards


DATA = ("digits", "painted", "painted2", "mnist", "fashion", "cifar10")


SIDES = range(16, 513, 8)  # of a folder's pictures: networks halve them, twice or three times


def is_path(
    name,  # of data
) -> bool:
    "A folder is written ./NAME or with its whole path, or ends as a tar file does; a bare word is a data set"
    return (
        not isinstance(name, str)
        or name in (".", "..")
        or any(s in name for s in ("/", os.sep))
        or name.lower().endswith((".tar", ".tar.gz", ".tgz"))
    )


def load(
    name,  # one of DATA, or the path of a folder: captioned images, or made by t2i prepare
    size: int = None,  # side of a folder's pictures; default 32
    codec=None,  # of shards of latents: the codec that made them
):  # a Data of core.contracts: name, shape, splits, words, batch(split, draws), demands, ...
    "Any data set of the course by its name, or pictures of your own"
    if size is not None and size not in SIDES:
        raise CourseError(f"--size must be a multiple of 8 from {SIDES[0]} to {SIDES[-1]}; got {size}")
    if is_path(name):
        return on_disk(name, size, codec)
    no_codec(name, codec)
    here = f"the folder of that name is ./{name}" if Path(name).is_dir() else ""
    if name not in DATA:
        raise CourseError(
            f"there is no data set '{name}': choose {', '.join(DATA)}, or give a folder of images with "
            f"captions" + (f" ({here})" if here else ", such as ./pictures")
        )
    if size:
        raise CourseError(f"--size is for a folder of pictures; those of {name} have a size of their own")
    if here:
        say_once(f"'{name}' is the data set of the course; {here} ({Path(name).resolve()})")
    own = dict(digits=Digits, painted=Painted, painted2=PaintedTwo)
    if name in own:
        return own[name]()
    return Vision(name)


def origin(
    data,  # as from `load`
):  # the data set with the unseen pictures: that from which shards were prepared; all other data themselves
    return data.origin() if hasattr(data, "origin") else data


def no_codec(name, codec):
    if codec is not None:
        raise CourseError(f"--codec is for shards of latents; {name} is not a folder made by t2i prepare")


def on_disk(path, size=None, codec=None):
    "What a folder holds: captioned images, or shards made by t2i prepare"
    folder = Path(path).expanduser()
    if not is_shards(folder):
        no_codec(path, codec)
        return Folder(folder, size or 32)
    if size:
        raise CourseError(
            f"{path} holds shards of pictures, which have their size: give --size to t2i prepare"
        )
    return Shards(folder, codec, load=load)
