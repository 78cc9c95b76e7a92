"""The settings of a run: made for a new one, compared with what is given for one that goes on."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch

from t2i_course.core.data import scale as current_scale
from t2i_course.core.files import CourseError, make_folder, say, write_json
from t2i_course.core.guards import one_writer, undisturbed
from t2i_course.core.runs import codec_place, model_hash, read_config, seen_from
from t2i_course.core.sources import is_path
from t2i_course.core.training import has_bf16, pick_device
from t2i_course.run.data import open_data, say_size
from t2i_course.run.places import place
from t2i_course.run.register import module
from t2i_course.run.stamp import hardware, versions


# the clock when neither --images nor --seconds is given
IMAGES = dict(smoke=2_048, demo=100_000, full=100_000_000)


@undisturbed()  # opening a codec makes its first weights
def settings(
    recipe, data, scale, seconds, images, seed, precision, changes=None, codec=None, size=None, ds=None
) -> dict:
    "The config of a new run: everything needed to make the same model again"
    mod = module(recipe)
    if codec and getattr(mod, "PICTURES", False):
        raise CourseError(
            f"{recipe} learns from pictures and the shards in {data} hold latents: give it the data set "
            f"itself, or take a "
            "recipe that draws latents, such as ddpm, dit or flow_matching"
        )
    ds = ds or open_data(data, codec, size)
    say_size(ds)
    if hasattr(mod, "recipe_for"):
        config = mod.recipe_for(ds, scale, None if images else seconds)
    else:
        config = mod.recipe(ds.shape[0], ds.words, ds.size, scale)
    if (
        config.get("skip") and ds.shape[1] * ds.shape[2] > 64 * 64
    ):  # its fit grows with the third power of the number of pixels
        say(
            f"pictures of {ds.shape[2]} x {ds.shape[1]} are too large for the closed-form head start: "
            f"training begins without it"
        )
        config["skip"] = False
    if images is None and seconds is None:
        images = IMAGES[scale]
    if precision == "auto":
        precision = "bf16" if has_bf16(pick_device()) else "fp32"
    if codec:
        config |= dict(
            codec=str(Path(codec).resolve()), codec_model=model_hash(codec), clamp=4.0
        )  # whitened latents: variance 1, not [-1,1]
    return (
        config
        | (changes or {})
        | dict(
            data=place(data),
            size=ds.shape[1] if hasattr(ds, "crop") else None,
            fingerprint=ds.fingerprint,
            source=ds.source,
            shape=list(ds.shape),
            scale=scale,
            images=images,
            seconds=seconds,
            seed=seed,
            precision=precision,
            threads=torch.get_num_threads(),
            versions=versions(),
            hardware=hardware(),
            bf16_units=has_bf16(pick_device()),
        )
    )


@contextmanager
def run_folder(out: Path, resume: bool, given: dict):
    "The settings of a run and its pictures, if they are open; inside, nobody else writes there"

    def holds():
        return (out / "config.json").exists()

    taken = CourseError(f"{out} already holds a run: go on with it by --resume, or choose another --out")
    if holds():
        if not resume:
            raise taken
        config, ds = None, None
    else:
        if resume:
            say(f"{out} holds no run yet: starting from the beginning")
        new = given | {k: given[k] if given[k] is not None else v for k, v in USUAL.items()}
        module(new["recipe"])  # before pictures are read
        ds = open_data(new["data"], new["codec"], new["size"])
        config = settings(**new | dict(scale=new["scale"] or current_scale()), ds=ds)
        if config.get("codec"):
            config["codec"] = seen_from(out, config["codec"])
        make_folder(out)
    with one_writer(out):
        if config is None:
            config = same_run(out, given)
        elif holds():  # another process was faster
            if not resume:
                raise taken
            config, ds = same_run(out, given), None
        else:
            write_json(out / "config.json", config)
        yield config, ds


USUAL = dict(
    recipe="flow_matching", data="painted", seed=0, precision="auto"
)  # of a new run, where nothing is said


def same_run(
    out: Path,  # a run folder
    given: dict,  # option -> value, None where it was not given
) -> dict:  # its settings
    "What is given at --resume has to be what the run was started with; only the places of folders may change"
    config = read_config(out)
    if given["recipe"] not in (None, config["recipe"]):
        raise CourseError(
            f"{out} is a run of {config['recipe']}, not of {given['recipe']}: resume with "
            f"{config['recipe']}, "
            "or train into another folder"
        )

    def refuse(name, old):
        raise CourseError(
            f"{out} was started with {old}; resume without --{name}, or train into another folder"
        )

    for name, value in given.items():
        if value is None or name in ("recipe", "data", "codec") or (name, value) == ("precision", "auto"):
            continue
        if name == "changes":
            for k, v in json.loads(json.dumps(value)).items():
                if config.get(k) == v:
                    continue
                raise CourseError(
                    f"{out} was started with {k} = {config.get(k)}, not {v}: train into another folder"
                )
        elif name in ("images", "seconds") and value != config[name]:
            refuse(name, " ".join(f"--{k} {config[k]}" for k in ("images", "seconds") if config[k]))
        elif name in config and value != config[name]:
            refuse(name, f"--{name} {config[name]}" if config[name] is not None else f"no --{name}")
    moved = {k: v for k, v in dict(codec=moved_codec(out, config, given["codec"], refuse)).items() if v}
    moved |= {k: v for k, v in dict(data=moved_data(out, config | moved, given["data"], refuse)).items() if v}
    if moved:
        config |= moved
        write_json(out / "config.json", config)
        say(f"{out / 'config.json'}: new place of {', '.join(moved)} written down")
    return config


def moved_data(out: Path, config: dict, data, refuse) -> str:
    "The new place of a folder, where it holds the same pictures; None when it has not moved"
    old = config["data"]
    if data is None or place(data) == old:
        return None
    if not is_path(old) or not is_path(data):
        refuse("data", f"--data {old}")
    if not config.get("fingerprint"):
        raise CourseError(
            f"{out} does not say which pictures it was started with, because an earlier version made it: "
            f"put the folder back to {old}"
        )
    if open_data(data, codec_place(out, config), config.get("size")).fingerprint != config["fingerprint"]:
        raise CourseError(
            f"{out} was started with other pictures or captions than those in {data}: name the folder "
            f"that holds them, "
            "or train into another folder"
        )
    return place(data)


def moved_codec(out: Path, config: dict, codec, refuse) -> str:
    "The new place of the codec's run, where it holds the same codec; None when it has not moved"
    old = codec_place(out, config)
    if codec is None or old == Path(codec).resolve():
        return None
    if old is None:
        refuse("codec", "no --codec")
    if config.get("codec_model") != model_hash(codec):
        refuse("codec", f"--codec {old}")
    return seen_from(out, codec)
