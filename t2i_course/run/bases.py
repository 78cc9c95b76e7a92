"""The runs that a sweep measures on: trained before its first arm, kept, shared between sweeps."""

from pathlib import Path

from t2i_course.core.downloads import SETS
from t2i_course.core.files import CourseError, say
from t2i_course.core.register import sweep
from t2i_course.core.runfiles import config_hash, model_hash, read_config
from t2i_course.core.runs import open_run
from t2i_course.run.fit import complete
from t2i_course.run.rows import cleared
from t2i_course.run.same import same_run
from t2i_course.run.settings import settings
from t2i_course.run.ship import asked_for, unpack
from t2i_course.run.train import train_run

SMOKE, NEAR = dict(images=192), "digits"  # at smoke scale a run is small, and its data need no download


def wanted_runs(
    chapter: str,  # name of a sweep
) -> dict:  # role -> (sweep that owns it, how it is trained)
    "What RUNS of a sweep says; a text is the name of the sweep that owns the run of this role"
    found = {}
    for role, how in getattr(sweep(chapter)[1], "RUNS", {}).items():
        if isinstance(how, str):
            owner = how
            how = getattr(sweep(owner)[1], "RUNS", {}).get(role)
            if not isinstance(how, dict):
                raise CourseError(f"the sweep {chapter} asks for the run {role} of {owner}, which has none")
            found[role] = owner, how
        else:
            found[role] = chapter, how
    return found


def trained(
    out: Path,  # run folder
    scale: str,  # smoke, demo or full
    recipe: str,
    data: str,
    images: int,
    changes=None,  # field -> value, in place of the recipe's own
    seed: int = 0,
    ship=None,  # name of the model that the package keeps of it
):  # a Finished
    "The run in a folder, or made from its shipped model; else trained, and to its end where it was stopped"
    given = dict(recipe=recipe, data=data, images=images, changes=changes or {}, seed=seed, scale=scale)
    if scale == "smoke":  # seconds: a run of other code is made anew
        cleared(out, settings(recipe, data, scale, None, images, seed, "auto", changes))
    if (out / "config.json").exists():
        same_run(out, given | dict(seconds=None, size=None, precision=None, items=(), use=None))
        if complete(out, read_config(out)):
            return open_run(out)
    elif ship and asked_for(ship, **given):
        say(f"{out} is made from the model that the package ships: {ship}")
        unpack(ship, out)
        return open_run(out)
    say(f"{out} is trained first: {recipe} on {data}, {images:,} images")
    train_run(**given, out=out, resume=True)
    return open_run(out)


def runs_of(
    chapter: str,  # name of a sweep
    scale: str,  # smoke, demo or full
    work="runs",  # where the folders lie
) -> dict:  # role -> Finished
    "What `experiments` of a sweep is given beside scale and seeds"
    found = {}
    for role, (owner, how) in wanted_runs(chapter).items():
        folder = f"{owner}-{role}"
        if scale == "smoke":
            how = {k: v for k, v in how.items() if k != "ship"}
            near = dict(data=NEAR) if how["data"] in SETS else {}
            how, folder = how | SMOKE | near, f"{folder}-smoke"
        found[role] = trained(Path(work) / folder, scale, **how)
    return found


def names_shipped(
    chapter: str,  # name of a sweep
) -> dict:  # role -> name of the model that the package keeps of its run
    "Only the sweep that owns a run ships it"
    owned = {role: how for role, (owner, how) in wanted_runs(chapter).items() if owner == chapter}
    return {role: how["ship"] for role, how in owned.items() if "ship" in how}


def versions_of(
    runs: dict,  # role -> Finished
) -> dict:  # role -> what it was trained with, and the hash of its weights
    "Arms that were measured on another run are not kept"
    return {role: f"{config_hash(run.config)} {model_hash(run.run)[:12]}" for role, run in runs.items()}
