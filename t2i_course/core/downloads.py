"""MNIST, FashionMNIST and CIFAR-10 through torchvision, kept under T2I_DATA."""

import http.client
import os
import shutil
import socket
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from t2i_course.core.data import NUMBERS, Labelled
from t2i_course.core.files import CourseError, say


@lru_cache
def _resolved(value):
    return Path(value).expanduser().resolve()


def data_root():
    "The folder of downloaded data: T2I_DATA, or ~/.cache/t2i_course; a relative path is resolved once"
    return _resolved(os.environ.get("T2I_DATA") or "~/.cache/t2i_course")


CLOTHES = (
    "a t-shirt",
    "trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)


THINGS = (
    "an airplane",
    "an automobile",
    "a bird",
    "a cat",
    "a deer",
    "a dog",
    "a frog",
    "a horse",
    "a ship",
    "a truck",
)


# name -> torchvision's class, its folder, shape, name of the label, captions, caption without the label
SETS = dict(
    mnist=(
        "MNIST",
        "MNIST",
        (1, 28, 28),
        "digit",
        tuple(f"a handwritten {w}" for w in NUMBERS),
        "a handwritten digit",
    ),
    fashion=("FashionMNIST", "FashionMNIST", (1, 28, 28), "label", CLOTHES, "a piece of clothing"),
    cifar10=("CIFAR10", "cifar-10-batches-py", (3, 32, 32), "label", THINGS, "a thing"),
)


def _bare(caption):  # 'an ankle boot' -> 'ankle boot'
    return caption.removeprefix("a ").removeprefix("an ").removeprefix("handwritten ")


def _writable(root):
    "Make the folder and try it; a T2I_DATA that does not exist is more likely a typing error than a wish"
    try:
        if os.environ.get("T2I_DATA") and not root.exists():
            raise CourseError(
                f'T2I_DATA is {root}, which does not exist: make that folder (mkdir -p "{root}"), '
                "or unset T2I_DATA to use ~/.cache/t2i_course"
            )
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".download-", dir=root)
    except OSError as e:
        raise CourseError(
            f"cannot write to {root} ({e.strerror}): set T2I_DATA to a folder you may write to"
        ) from e


def _download(make, root, folder):
    "Into a scratch folder first, so that a broken download leaves nothing behind"
    tmp, wait = _writable(root), socket.getdefaulttimeout()
    say(f"downloading {folder} to {root} (once)")
    try:
        socket.setdefaulttimeout(15)
        make(tmp, download=True)
        if (root / folder).exists():
            (root / folder).rename(Path(tmp) / "damaged")
        (Path(tmp) / folder).rename(root / folder)
    except (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException) as e:
        reason = str(getattr(e, "reason", e)).strip().split("\n")[0].rstrip(":") or type(e).__name__
        raise CourseError(
            f"{folder} is not in {root} and could not be downloaded ({reason}): check the network, "
            f"or copy the folder {folder} from another machine into {root}, "
            "or use --data digits or painted, which need no download"
        ) from e
    finally:
        socket.setdefaulttimeout(wait)
        shutil.rmtree(tmp, ignore_errors=True)


class Vision(Labelled):
    "MNIST, FashionMNIST or CIFAR-10 through torchvision, from `data_root()`"

    def __init__(self, name):
        if name not in SETS:
            raise CourseError(f"torchvision data are {', '.join(SETS)}; got '{name}'")
        try:
            import torchvision.datasets as tv
        except (ImportError, RuntimeError) as e:
            raise CourseError(
                f"{name} needs torchvision, which does not import ({e}): pip install torchvision"
            ) from e
        cls, folder, shape, self.attribute, self.sayings, self.anything = SETS[name]
        self.names, root = tuple(map(_bare, self.sayings)), data_root()

        def make(at, download=False):
            return [getattr(tv, cls)(str(at), train=t, download=download) for t in (True, False)]

        try:
            try:
                pair = make(root)
            except RuntimeError as e:
                if "Dataset not found" not in str(e):
                    raise
                _download(make, root, folder)
                pair = make(root)
            self.x, labels = {}, {}
            for split, d in zip(("train", "test"), pair):
                x = torch.as_tensor(np.asarray(d.data))
                self.x[split] = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
                labels[split] = torch.as_tensor(d.targets)
                if tuple(self.x[split].shape[1:]) != shape or len(x) != len(labels[split]) or not len(x):
                    raise ValueError("unexpected sizes")
        except CourseError:
            raise
        except PermissionError as e:
            raise CourseError(
                f"{e.filename or root / folder} cannot be read: change its permissions, "
                "or set T2I_DATA to another folder"
            ) from e
        except Exception as e:  # whatever a cut or foreign file makes torchvision's readers raise
            raise CourseError(
                f"{root / folder} is damaged ({type(e).__name__}: {e}): "
                f"delete that folder and load {name} again"
            ) from e
        where = "T2I_DATA" if os.environ.get("T2I_DATA") else "~/.cache/t2i_course"
        super().__init__(name, shape, labels, f"{name}, {len(labels['train']):,} training images in {where}")

    def pictures(self, split, i, draws):
        return self.x[split][i] / 127.5 - 1
