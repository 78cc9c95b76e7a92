"""Write captioned pictures, or what a codec and a text encoder make of them, to shards, once for all."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from t2i_course.core.conditioning import Cond
from t2i_course.core.data import Draws, check_split
from t2i_course.core.files import CourseError, write_json, write_whole, fingerprint
from t2i_course.core.tars import packed, sound

STORES = ("float32", "float16", "uint8")


def stored(
    x: Tensor,  # (b ...) pictures or latents, float32; codes, int64
    how: str,  # one of STORES
) -> Tensor:
    "uint8 is for pictures that came from bytes: then nothing is lost. Codes stay as they are"
    if not x.is_floating_point():
        return x.contiguous()
    if how == "uint8":
        x = ((x + 1) * 127.5).round().clamp(0, 255)
    return x.to(getattr(torch, how)).contiguous()


def restored(
    x: Tensor,  # as from `stored`
) -> Tensor:  # float32, or codes
    if x.dtype == torch.uint8:
        return x / 127.5 - 1
    return x.float() if x.is_floating_point() else x


def told(
    cond: Cond,  # what a text encoder says
    store: str,  # one of STORES
) -> dict:  # its fields as they are stored; numbers and a picture only where there are some
    small = torch.float16 if store == "float16" else torch.float32
    found = {f.name: getattr(cond, f.name).detach().cpu() for f in fields(cond)}
    found = {
        k: v.to(small) if v.is_floating_point() else v
        for k, v in found.items()
        if v.numel() or k not in ("numbers", "image")
    }
    return {k: v.contiguous().clone() for k, v in found.items()}


def as_cond(
    found: dict,  # as from `told`
) -> Cond:
    "And back"
    return Cond(**{k: v.float() if v.is_floating_point() else v for k, v in found.items()})


def device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


@torch.no_grad()
def samples(
    data,  # captioned pictures
    split: str,  # one of its splits
    seed: int,  # of the pictures
    at: Tensor,  # (m) int64, which pictures
    store: str,  # one of STORES
    codec=None,  # has encode; None: the pictures themselves
    text=None,  # captions -> Cond with seq and pooled; None: the caption alone
    batch: int = 256,  # pictures at once
):  # yields (name, tensors, caption, note), a function of the picture's number alone
    for i in at.split(batch):
        b = data.batch(split, Draws(seed, i))
        z = b.x if codec is None else codec.encode(b.x.to(device_of(codec))).cpu()
        cond = None if text is None else text(b.captions)
        for k, (n, caption) in enumerate(zip(i.tolist(), b.captions)):
            tensors = {"x" if codec is None else "z": stored(z[k], store)}
            tensors |= {f"more.{name}": v[k].contiguous().clone() for name, v in b.more.items()}
            if cond is not None:
                tensors |= {name: v[0] for name, v in told(cond[k : k + 1], store).items()}
            note = {f: {a: v[k].item() for a, v in getattr(b, f).items()} for f in ("attrs", "named")}
            yield f"{n:09d}", tensors, caption, note | dict(index=n)


def read_json(path: Path, what: str):
    "A JSON file of a folder of shards, or a sentence that says what to do"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CourseError(f"{path} cannot be read ({getattr(e, 'strerror', None) or e}): {what}") from e


def note_of(path: Path) -> dict:  # what is known of a shard; None when it is not done
    try:
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def agree(out: Path, about: dict):
    "A folder holds the shards of one data set"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CourseError(f"{out} cannot be made ({e.strerror}). Choose another folder.") from e
    if not (out / "about.json").exists():
        return write_json(out / "about.json", about)
    old = read_json(out / "about.json", "delete the folder and prepare again")
    differ = [k for k in about if old.get(k) != about[k]]
    if differ:
        raise CourseError(
            f"{out} holds other shards ({', '.join(differ)} differ): choose another folder, or delete it"
        )


def about_of(data, split, seed, images, shard_size, store, codec, text) -> dict:
    "What a folder of shards says of itself"
    return dict(
        data=data.name,
        origin=str(getattr(data, "path", data.name)),
        source=data.source,
        split=split,
        seed=seed,
        images=images,
        shard_size=shard_size,
        store=store,
        shape=list(data.shape),
        words=list(data.words),
        size=data.size,
        attributes={k: list(v) for k, v in data.attributes.items()},
        codec=fingerprint(codec.encoder) if codec else None,
        text=bool(text),
    )


def put(path: Path, raw: bytes):
    "A shard and what is known of it: there whole or not at all"
    try:
        write_whole(path, lambda p: p.write_bytes(raw))
    except CourseError as e:
        raise CourseError(f"{e} The same t2i prepare command goes on where it stopped.") from e


def prepare(
    data,  # captioned pictures
    out,  # folder of the shards
    images: int,  # how many pictures
    codec=None,  # has encode, encoder and grid; None: the pictures themselves
    text=None,  # captions -> Cond with seq and pooled, from a frozen encoder; None: captions only
    shard_size: int = 4096,  # pictures a shard
    split: str = "train",  # of the data
    seed: int = 0,  # of the pictures
    store: str = "float32",  # float32, float16 or uint8
    batch: int = 256,  # pictures at once
    progress=None,  # called with the number of pictures done
    rank: int = 0,  # several processes may share the work: each makes every size-th shard
    size: int = 1,
) -> dict:  # the index; None while other ranks still have shards to make
    "Encode once, read ever after. Interrupted? Call it again: what is done stays as it is"
    if store not in STORES:
        raise CourseError(f"store may be {', '.join(STORES)}; it is '{store}'")
    if images < 1 or shard_size < 1:
        raise CourseError("prepare needs images and shard_size of at least 1")
    check_split(data, split)
    out, every = Path(out), torch.arange(images).split(shard_size)
    agree(out, about_of(data, split, seed, images, shard_size, store, codec, text))
    if size == 1:
        for part in out.glob(".*.part"):
            part.unlink(missing_ok=True)  # left by a killed process
    if text and rank == 0:
        put(out / "null.safetensors", to_bytes(told(text([""]), store)))
    was = codec.training if codec else False
    if codec:
        codec.eval()
    try:
        for k, at in list(enumerate(every))[rank::size]:
            path = out / f"shard-{k:06d}.tar"
            if not sound(path, note_of(path)):
                raw = packed(samples(data, split, seed, at, store, codec, text, batch))
                put(path, raw)
                known = dict(url=path.name, nsamples=len(at), filesize=len(raw))
                write_json(path.with_suffix(".json"), known | dict(sha256=hashlib.sha256(raw).hexdigest()))
            if progress:
                progress(int(at[-1]) + 1)
    finally:
        if codec:
            codec.train(was)
    return index_of(
        out, f"{data.name}-{split}", [note_of(out / f"shard-{k:06d}.tar") for k in range(len(every))]
    )


def index_of(out: Path, name: str, notes: list) -> dict:
    "Written when all shards are there"
    if not all(notes):
        return None
    about = read_json(out / "about.json", "delete the folder and prepare again")
    index = dict(__kind__="wids-shard-index-v1", wids_version=1, name=name, about=about, shardlist=notes)
    write_json(out / "index.json", index)
    return index
