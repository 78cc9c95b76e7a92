"""Where the pictures of a run lie, and what its folder is called."""

from pathlib import Path

from t2i_course.core.files import CourseError
from t2i_course.core.sources import is_path


def place(data) -> str:
    "What a config calls its data: the name of a data set, or the whole path of a folder"
    return str(Path(data).expanduser().resolve()) if is_path(data) else data


def missing_folder(out: Path, config: dict) -> CourseError:
    "A sentence, when the pictures of a run are not where they were; None when they are"
    if not is_path(config["data"]) or Path(config["data"]).exists():
        return None
    return CourseError(
        f"the pictures of {out} were in {config['data']}, which is not there: if the folder was moved, "
        f"write down its new "
        f"place with: t2i train --resume --out {out} --data FOLDER"
    )


def default_run(recipe, data, seed) -> str:
    "runs/RECIPE-DATA-SEED, without what a file name cannot hold"
    name = Path(place(data or "painted")).name
    name = "".join("_" if c in '<>:"|?*' else c for c in str(name))
    return f"runs/{recipe or 'flow_matching'}-{name}-{seed or 0}"
