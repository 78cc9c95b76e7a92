"""Shards in the place of a data set: any sample by its number, in an order made of (seed, epoch) alone."""

import hashlib
import json
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load as from_bytes
from torch import Tensor

from t2i_course.core.conditioning import Cond
from t2i_course.core.data import Batch, Draws, Wrapped, check_split
from t2i_course.core.files import CourseError, fingerprint
from t2i_course.core.prepare import as_cond, device_of, read_json, restored
from t2i_course.core.tars import Tars


def is_shards(
    path,  # any path
) -> bool:  # is it a folder made by `prepare`?
    return (Path(path) / "index.json").is_file() or (Path(path) / "about.json").is_file()


# ---- one order for all ranks ----
@lru_cache(4)
def epoch_groups(
    lengths: tuple,  # samples of each shard
    seed: int,  # of the run
    epoch: int,  # which passage through the data
    window: int,  # shards in a group
) -> tuple:  # groups of shard numbers, and where in the epoch each group ends
    "The shards in a random order that belongs to (seed, epoch), a few at a time"
    order = Draws(seed, torch.arange(len(lengths))).bits(f"shards {epoch}", 1)[:, 0].argsort().tolist()
    groups = [tuple(order[i : i + window]) for i in range(0, len(order), window)]
    return groups, torch.tensor([sum(lengths[s] for s in g) for g in groups]).cumsum(0)


@lru_cache(8)
def mixed(
    lengths: tuple,  # samples of each shard
    seed: int,  # of the run
    epoch: int,  # which passage through the data
    group: tuple,  # shard numbers
) -> Tensor:  # the sample numbers of these shards, shuffled
    "Sorted by a hash of (seed, epoch, sample number): nobody's random generator is involved"
    starts = [0, *accumulate(lengths)]
    samples = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in group])
    return samples[Draws(seed, samples).bits(f"samples {epoch}", 1)[:, 0].argsort()]


def numbers(
    lengths,  # samples of each shard
    draws: Draws,  # seed, and the global indices of the images wanted
    window: int = 8,  # shards mixed with each other; 0: the order on disk
) -> Tensor:  # (b) int64, which sample on disk each of them is
    "Image i of the run is sample i % n of the order of epoch i // n: no state, so nothing to save or to lose"
    lengths, index = tuple(lengths), draws.index.cpu()
    n = sum(lengths)
    place = index % n
    if not window:
        return place
    out = torch.empty_like(place)
    for e in (index // n).unique().tolist():
        groups, ends = epoch_groups(lengths, draws.seed, e, window)
        which = torch.searchsorted(ends, place, right=True)
        for g in which[index // n == e].unique().tolist():
            here = (which == g) & (index // n == e)
            start = ends[g - 1] if g else 0
            out[here] = mixed(lengths, draws.seed, e, groups[g])[place[here] - start]
    return out


def opened(folder: Path, codec) -> tuple:
    "What the folder says of itself and its shards; one that is not done, or another codec, is refused"
    if not (folder / "index.json").exists():
        done = len(list(folder.glob("shard-*.json")))
        raise CourseError(
            f"{folder} has no index.json ({done} shards are done): it is not prepared to the end. "
            "Run the same t2i prepare command again, it goes on where it stopped."
        )
    index = read_json(folder / "index.json", "delete it and run t2i prepare again, the shards stay")
    if "about" not in index or "shardlist" not in index:
        raise CourseError(
            f"{folder} holds shards of another kind: make them again with t2i prepare, in another folder"
        )
    made_by = index["about"]["codec"]
    if made_by and (codec is None or fingerprint(codec.encoder) != made_by):
        raise CourseError(
            f"the latents in {folder} were made by {'another' if codec else 'a'} codec: open them with "
            f"the codec that "
            f"made them (its encoder's fingerprint is {made_by}), or prepare them again with yours"
        )
    return index["about"], index["shardlist"]


class Shards:
    "The same batch(split, draws) as any data set, so `train` reads them as it is"

    group = 1

    def __init__(
        self,
        folder,  # made by `prepare`
        codec=None,  # the one that made the latents: it draws and whitens
        window: int = 8,  # shards mixed with each other; 0: the order on disk
        check: bool = True,  # hash a shard when it is first opened; False: look at its size only
        load=None,  # load(name, size) -> data set: opens the one that was prepared, for its unseen pictures
    ):
        self.folder, self.codec, self.window, self.load = Path(folder), codec, window, load
        self.about, notes = opened(self.folder, codec)
        self.lengths = tuple(s["nsamples"] for s in notes)
        self.ends = list(accumulate(self.lengths))
        self.made_by, self._origin = self.about["codec"], None
        known = {
            k: v for k, v in self.about.items() if k != "origin"
        }  # wherever it was, and wherever this folder lies
        known = json.dumps([known, [s["sha256"] for s in notes]], sort_keys=True)
        self.fingerprint = hashlib.sha256(known.encode()).hexdigest()
        self.name, self.words, self.size = self.about["data"], tuple(self.about["words"]), self.about["size"]
        self.splits, shape = (self.about["split"],), tuple(self.about["shape"])
        self.attributes = {k: tuple(v) for k, v in self.about["attributes"].items()}
        self.source = f"{len(self):,} samples in {len(self.lengths)} shards of {self.about['source']}"
        self.shape = tuple(codec.grid(shape)) if self.made_by else shape
        # open at once: a window, and the one that the next batch may begin
        self.tars = Tars(self.folder, notes, 2 * max(1, window), check)

    def __len__(self):
        return self.ends[-1]

    def read(
        self,
        draws: Draws,  # seed and global indices
    ) -> tuple:  # tensors, captions, notes of these images
        "Samples by their number on disk, wherever they lie"
        found = []
        for n in numbers(self.lengths, draws, self.window).tolist():
            k = bisect_right(self.ends, n)
            found.append(self.tars[k][n - self.ends[k] + self.lengths[k]])
        return tuple(list(v) for v in zip(*found))

    def pictures(
        self, parts: list, draws: Draws
    ) -> Tensor:  # (b c h w); latents: a fresh draw from the posterior each time
        x = torch.stack([restored(p["z" if self.made_by else "x"]) for p in parts])
        if not self.made_by:
            return x
        noise, own = Draws(draws.seed, draws.index).normal("posterior", *self.shape), device_of(self.codec)
        with torch.no_grad():
            return self.codec.sample(x.to(own), noise.to(own)).cpu()

    def batch(
        self,
        split: str,  # the one that was prepared; of pictures also the others, from the data set itself
        draws: Draws,  # seed and global indices
    ) -> Batch:  # x (b c h w): pictures, or fresh whitened draws from the posterior
        "The data protocol of the course"
        if split not in self.splits and not self.made_by:
            return self.origin().batch(split, draws)
        check_split(self, split)
        parts, captions, notes = self.read(draws)
        attrs, named = (
            {k: torch.tensor([n[f][k] for n in notes]) for k in notes[0][f]} for f in ("attrs", "named")
        )
        more = {k[5:]: torch.stack([p[k] for p in parts]) for k in parts[0] if k.startswith("more.")}
        return Batch(self.pictures(parts, draws), captions, attrs, named, more)

    def told(self):  # data(draws) -> x0, cond
        "For `train` in place of feed(data, tok): pictures, and what the encoder once said to their captions"
        if not self.about["text"]:
            raise CourseError(
                f"{self.folder} holds no text embeddings: prepare it with text=, or train on feed(shards, "
                f"tok)"
            )
        fields = self.null().__dataclass_fields__

        def f(draws):
            parts, _, _ = self.read(draws)
            cond = as_cond({k: torch.stack([p[k] for p in parts]) for k in fields if k in parts[0]})
            return self.pictures(parts, draws), cond

        return f

    def null(self) -> Cond:  # (1)
        "What the text encoder said to the empty caption"
        return as_cond(from_bytes((self.folder / "null.safetensors").read_bytes()))

    def drawn(self, draws: Draws) -> Draws:  # of which random numbers of the origin these pictures were made
        return Draws(self.about["seed"], numbers(self.lengths, draws, self.window), draws.device)

    def origin(self):
        "The data set that was prepared"
        place = self.about["origin"]
        if self._origin is not None:
            return self._origin
        if self.load is None:
            raise CourseError(
                f"{self.folder} was opened for its own pictures alone; with load({str(self.folder)!r}) "
                f"the others come too"
            )
        try:
            self._origin = self.load(place, self.about["shape"][-1] if place != self.name else None)
        except CourseError as e:
            raise CourseError(
                f"{self.folder} was prepared from {place}, whose unseen pictures are wanted: {e}"
            ) from e
        return self._origin

    def demands(self, caption: str) -> dict:  # what a caption demands of a picture
        return self.origin().demands(caption)

    def whole(self) -> "Whole":  # to measure with
        return Whole(self)


class Whole(Wrapped):
    "The data set that shards were prepared from; what was trained on are the pictures of the shards"

    def __init__(self, shards: Shards):
        super().__init__(shards.origin())
        self.shards, self.source, self.fingerprint = shards, shards.source, shards.fingerprint

    def still(self):
        "Without the movements of training: the pictures themselves, which the shards do not hold"
        return self.data.still()

    def batch(self, split, draws):
        trained = split == "train" and split in self.shards.splits and not self.shards.made_by
        return (self.shards if trained else self.data).batch(split, draws)
