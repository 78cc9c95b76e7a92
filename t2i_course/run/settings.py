"""The settings of a run: made for a new one, compared with what is given for one that goes on."""

import inspect
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from t2i_course.core.config import set_fields
from t2i_course.core.data import scale as current_scale
from t2i_course.core.files import CourseError, between, make_folder, say
from t2i_course.core.guards import one_writer, undisturbed
from t2i_course.core.register import recipe as module_of
from t2i_course.core.runfiles import model_hash, seen_from, whole, write_config
from t2i_course.core.sources import is_path
from t2i_course.core.training import has_bf16, pick_device
from t2i_course.run.data import are_latents, open_data, say_size
from t2i_course.run.same import PLAN, same_run
from t2i_course.run.stamp import hardware, versions

# the clock when neither --images nor --seconds is given
IMAGES = dict(smoke=2_048, demo=100_000, full=100_000_000)
# of a new run, where nothing is said
USUAL = dict(recipe="flow_matching", data="painted", seed=0, precision="auto")


@undisturbed()  # opening a used run makes its first weights
def settings(
    recipe,  # name of a recipe
    data,  # name of a data set, or a folder
    scale,  # smoke, demo or full
    seconds,  # the clock, or its limit
    images,  # the clock
    seed,  # of every random number
    precision,  # auto, fp32, bf16 or fp16
    changes=None,  # field -> value, in place of the recipe's own
    items=(),  # the same as text, as after --set
    use=None,  # role -> a finished run that this one stands on
    size=None,  # side of a folder's pictures
    ds=None,  # the data, if they are open already
    out=None,  # the run folder, from which the runs it stands on are seen
):  # a Config
    "The config of a new run: everything needed to make the same model again"
    mod, use = module_of(recipe), use or {}
    check_roles(recipe, mod, data, use)
    ds = ds or open_data(data, size, use.get("codec"))
    if len(ds.shape) != 3:
        raise CourseError(
            f"the shards in {data} hold the codes of {use['codec']}, whole numbers: prepare latents with the "
            "codec of t2i train vae, or take a recipe that has its own codes, on the data set itself"
        )
    if images is None and seconds is None:
        images = IMAGES[scale]
    if precision == "auto":
        precision = "bf16" if has_bf16(pick_device()) else "fp32"
    config = mod.recipe_for(ds, scale, None if images else seconds) | dict(
        data=whole(data) if is_path(data) else data,
        size=ds.shape[1] if hasattr(ds, "crop") else None,
        fingerprint=ds.fingerprint,
        source=ds.source,
        scale=scale,
        images=images,
        seconds=seconds,
        seed=seed,
        precision=precision,
        threads=torch.get_num_threads(),
        versions=versions(),
        hardware=hardware(),
        bf16_units=has_bf16(pick_device()),
        uses={role: dict(run=seen_from(out or ".", run), model=model_hash(run)) for role, run in use.items()},
    )
    return set_fields(config | (changes or {}), items) if items else config | (changes or {})


def check_roles(
    recipe: str,  # its name
    mod,  # its module
    data,  # name of a data set, or a folder
    use: dict,  # role -> run
):
    "Refuse runs that the recipe has no use for, and latents where it learns from pictures"
    own = inspect.signature(mod.build).parameters
    taken = [k for k, p in own.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)][1:]
    free = any(p.kind is p.VAR_KEYWORD for p in own.values())
    for role in use:
        if role not in taken and not free and not (role == "codec" and are_latents(data)):
            have = f"it has a use for {', '.join(taken)}" if taken else "it stands on no other run"
            raise CourseError(f"{recipe} has no use for a {role}: {have}")
    if not are_latents(data):
        if "codec" in use and not hasattr(mod, "uses_for"):
            raise CourseError(
                f"--use codec is for shards of latents; {data} is not a folder that t2i prepare --codec made"
            )
    elif getattr(mod, "PICTURES", False) or "codec" not in taken and not free:
        raise CourseError(
            f"{recipe} learns from pictures and the shards in {data} hold latents: give it the data set "
            "itself, or take a recipe that draws latents, such as ddpm, dit or flow_matching"
        )


class Need(NamedTuple):
    "A run that has to be there before another one can begin"

    role: str  # what it is to the other one
    recipe: str  # that trains it
    changes: dict  # field -> value
    share: float  # of the clock that both of them have


def needs(
    config,  # of a new run
) -> list:  # Needs that no finished run fills yet
    "What a run stands on and was not given"
    wanted = getattr(module_of(config.recipe), "uses_for", lambda config: {})(config)
    found = [Need(role, *what) for role, what in wanted.items() if role not in config.uses]
    for need in found:
        between(need.share, 0.01, 0.99, f"the share of the clock that the {need.role} takes (--set share)")
    if sum(need.share for need in found) > 0.99:
        names = ", ".join(need.role for need in found)
        raise CourseError(f"the shares of {names} leave nothing of the clock to {config.recipe}: lower them")
    return found


def part_of(
    config,  # of the run whose clock is shared
    share: float,
) -> dict:  # images and seconds
    "A share of the clock"
    return dict(
        images=config.images and max(1, round(share * config.images)),
        seconds=config.seconds and share * config.seconds,
    )


def clock(
    config,  # settings of a run
) -> tuple:  # images, seconds
    "What is left of the clock, after the runs that were trained for this one"
    parts = [part_of(config, used["share"]) for used in config.uses.values() if used.get("share")]
    images = config.images and max(1, config.images - sum(p["images"] for p in parts))
    return images, config.seconds and config.seconds - sum(p["seconds"] for p in parts)


def given_for(
    need: Need,
    config,  # of the run that has the need
    given: dict,  # option -> value, as it was given for that run
) -> dict:  # the same for the run that is needed
    "The options of a needed run: those of the run that needs it, with a share of its clock"
    return (
        given | dict(recipe=need.recipe, changes=need.changes, items=(), use={}) | part_of(config, need.share)
    )


@contextmanager
def run_folder(
    out: Path,  # run folder
    resume: bool,  # may it hold a run?
    given: dict,  # option -> value, None where it was not given
    config=None,  # settings of a new run, as from `draft`, if they are made already
    ds=None,  # its pictures, if they are open
):
    "The settings of a run and its pictures, if they are open; inside, nobody else writes there"
    taken = CourseError(f"{out} already holds a run: go on with it by --resume, or choose another --out")
    if holds_run(out):
        if not resume:
            raise taken
        config, ds = None, None
    else:
        if config is None:
            config, ds = draft(out, given, ds)
        make_folder(out)
    with one_writer(out):
        if config is None:
            config = same_run(out, given)
        elif holds_run(out):  # another process was faster
            if not resume:
                raise taken
            config, ds = same_run(out, given), None
        else:
            write_config(out, config)
            (out / PLAN).unlink(missing_ok=True)
        yield config, ds


def holds_run(out: Path) -> bool:
    return (out / "config.json").exists()


def draft(
    out: Path,  # run folder
    given: dict,  # option -> value, None where it was not given
    ds=None,  # its pictures, if they are open already
) -> tuple:  # settings, pictures
    "The settings of a new run; what is not given is as usual"
    new = given | {k: given[k] if given[k] is not None else v for k, v in USUAL.items()}
    module_of(new["recipe"])  # before pictures are read
    shares = new.pop("shares", {})
    check_roles(new["recipe"], module_of(new["recipe"]), new["data"], new["use"] or {})
    if ds is None:
        ds = open_data(new["data"], new["size"], (new["use"] or {}).get("codec"))
        say_size(ds)
    config = settings(**new | dict(scale=new["scale"] or current_scale(), ds=ds, out=out))
    uses = {k: v | dict(share=shares[k]) if k in shares else v for k, v in config.uses.items()}
    return config | dict(uses=uses), ds


def say_needs(out: Path, need: Need, config):
    if (out / "model.safetensors").exists():
        return say(f"{config.recipe} stands on a {need.role}: {out} is there already")
    part = part_of(config, need.share)
    much = f"{part['images']:,} images" if part["images"] else f"{part['seconds']:.0f} seconds"
    say(f"{config.recipe} stands on a {need.role}: {need.recipe} is trained first, {much}, into {out}")
