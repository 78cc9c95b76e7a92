"""The data of a run: opened, written to a file, prepared as shards; what to expect of so many pictures."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from t2i_course.core.data import Draws, split_words
from t2i_course.core.files import CourseError, between, make_folder, say, write_npz
from t2i_course.core.guards import one_writer
from t2i_course.core.runs import open_run
from t2i_course.core.sources import is_path, load
from t2i_course.run.sheets import to_bytes
from t2i_course.core.prepare import prepare, read_json
from t2i_course.core.shards import is_shards


def are_latents(
    data,  # name of a data set, or a folder
) -> bool:
    "Is it a folder of shards that hold latents in place of pictures?"
    if not is_path(data) or not is_shards(Path(data).expanduser()):
        return False
    return bool(read_json(Path(data).expanduser() / "about.json", "prepare it again").get("codec"))


def open_data(
    data,  # a data set, a folder of captioned images, or a folder made by t2i prepare
    size=None,  # side of a folder's pictures; default 32
    codec=None,  # the run of the codec that made the latents in a folder
):
    "Any data of the course; shards read like pictures"
    return load(data, size, codec_of(codec) if codec and are_latents(data) else None)


def codec_of(
    run,  # run folder
):
    "The codec of a finished run"
    codec = getattr(open_run(run).model, "codec", None)
    if not hasattr(codec, "encoder"):  # none, pixels as they are, or a palette
        raise CourseError(f"{run} is a run without a codec for latents: train one with t2i train vae")
    return codec


def say_size(ds):
    "How a folder's pictures were cut, where its own size was not theirs"
    if hasattr(ds, "crop"):
        say(ds.crop)


def run_data(
    out: Path,  # run folder
    config,  # its settings
    uses: dict,  # role -> the finished runs it stands on
) -> tuple:  # the data, and are they still the same?
    "The pictures of a run"
    data = config.data
    if is_path(data) and not Path(data).exists():
        raise CourseError(
            f"the pictures of {out} were in {data}, which is not there: if the folder was moved, write down "
            f"its new place with: t2i train --resume --out {out} --data FOLDER"
        )
    codec = uses["codec"].model.codec if "codec" in uses and are_latents(data) else None
    ds = load(data, config.size, codec)
    return ds, config.fingerprint in (None, ds.fingerprint)


# Below 20 pictures a caption a model meets single pictures, not a kind of picture (as in `pairs_of`: fewer
# say little). Copies come with passes: of 759 drawings with a caption each, flow matching gave back 2%
# after 32 (tests/drawings.py), so a hundred is where to begin to look for them. A word in one caption alone
# cannot be told from the rest of its picture.
FEW_PICTURES, MANY_PASSES = 20, 100


def expectation(
    texts,  # captions of the training pictures
    images=None,  # images that training will see; None where the clock is in seconds
    n=None,  # training pictures, where some have several captions
) -> str:  # '' where there are enough pictures
    "What to expect from so many pictures, in two sentences"
    words, n, different = (
        Counter(w for c in set(texts) for w in set(split_words(c))),
        n or len(texts),
        len(set(texts)),
    )
    if n / different >= FEW_PICTURES:
        return ""
    once, passes = sum(k == 1 for k in words.values()), images and images / n
    each = (
        "each caption names about one picture"
        if n / different < 2
        else f"each caption names about {n / different:.0f} pictures"
    )
    what = (
        f"{n:,} training pictures with {different:,} different captions and {len(words):,} words, "
        f"{once:,} of them in one caption "
        f"alone: {each}. "
    )
    if passes is None:
        what += f"Every {n:,} images are a pass through them. After about {MANY_PASSES} passes, expect "
    else:
        what += f"{images:,} images are {passes:{',.0f' if passes >= 10 else '.2g'}} passes through them. "
        what += "Expect " if passes >= MANY_PASSES else f"With more than {MANY_PASSES}, expect "
    return what + (
        "drawings of training captions to be copies of their pictures, and new captions to work only as "
        "far as "
        "their words came in several captions. t2i eval counts the copies."
    )


def expect(
    ds,  # the pictures
    images=None,  # that training will see, where it is known
):
    "Say before training what to expect from a folder of few pictures"
    texts = getattr(ds, "texts", None)
    line = expectation(texts["train"], images, len(ds.x["train"])) if texts else ""
    if line:
        say(line)


def write_data(
    name,  # of a data set, or a folder
    out,  # a .npz file
    split="train",  # of the data
    n=1000,  # pictures
    seed=0,  # of every random number
    size=None,  # side of a folder's pictures
):
    "Captioned pictures with their attributes, in one file"
    between(n, 1, 10_000_000, "--n", whole=True)
    between(seed, 0, 2**62, "--seed", whole=True)
    if Path(out).suffix.lower() != ".npz":
        raise CourseError(f"--out must end in .npz; got '{out}'")
    ds = load(name, size)
    say_size(ds)
    if split not in ds.splits:
        raise CourseError(f"{name} has the splits {', '.join(ds.splits)}; got '{split}'")
    make_folder(Path(out).parent)
    parts = [ds.batch(split, Draws(seed, i)) for i in torch.arange(n).split(1000)]
    arrays = dict(
        images=np.concatenate([to_bytes(b.x) for b in parts]),
        captions=np.array([c for b in parts for c in b.captions]),
    )
    for k, values in ds.attributes.items():
        arrays[k] = np.array(values)[torch.cat([b.attrs[k] for b in parts]).numpy()]
        arrays[f"named_{k}"] = torch.cat([b.named[k] for b in parts]).numpy()
    write_npz(out, **arrays)
    print(f"wrote {n} captioned picture{'s' * (n != 1)} ({name}, {split}) to {out}")


def prepare_data(
    data,  # name of a data set, or a folder
    out,  # folder of the shards
    images,  # how many
    size=None,  # side of a folder's pictures
    split="train",  # of the data
    shard_size=4096,  # images a shard
    codec=None,  # run of a codec: store its latents instead of pictures
    store="float32",  # float32, float16 or uint8
    seed=0,  # of the pictures
    quiet=False,  # no progress bar
):
    "Captioned pictures, or their latents, as shards that training reads by index"
    from tqdm import tqdm

    between(images, 1, 1e12, "--images", whole=True)
    between(shard_size, 1, 1e8, "--shard-size", whole=True)
    between(seed, 0, 2**62, "--seed", whole=True)
    own = codec_of(codec) if codec else None
    ds = open_data(data, size)
    say_size(ds)
    expect(ds)
    make_folder(out)
    with one_writer(out), tqdm(total=images, unit="img", disable=quiet, file=sys.stderr) as bar:
        prepare(
            ds,
            out,
            images,
            own,
            shard_size=shard_size,
            split=split,
            seed=seed,
            store=store,
            progress=lambda n: bar.update(n - bar.n),
        )
    there = out if is_path(out) else f"./{out}"
    print(
        f"{out}: {images:,} images in shards. "
        f"Train on them with: t2i train RECIPE --data {there}" + (f" --codec {codec}" if codec else "")
    )
