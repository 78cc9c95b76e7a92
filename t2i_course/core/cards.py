"""Weights with a card: a JSON file beside them says what they are, how they were made, and their hash."""

import hashlib
import json
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from t2i_course.core.files import CourseError, not_written, write_json, write_whole

REMEDY = "Install the package again, or remake the judges: t2i run metrics"


def weights_path(
    name: str,  # painted, painted2, digits or mnist
) -> Path:
    "Where the package keeps the judge of a data set"
    return Path(str(resources.files("t2i_course"))) / "weights" / f"{name}.safetensors"


def save_with_card(
    path,  # .safetensors; a .json with the same name is the card
    tensors: dict,  # name -> tensor; numbers with a point are rounded to 16 bits, others stay away
    card: dict,  # what to say of them
) -> dict:  # the card as written, with the hash of the file
    "Weights as float16, and a card with their hash"
    path = Path(path)
    raw = to_bytes({k: v.cpu().half().contiguous() for k, v in tensors.items() if v.is_floating_point()})
    card = dict(sha256=hashlib.sha256(raw).hexdigest()) | card
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise not_written(path, e) from e
    write_whole(path, lambda p: p.write_bytes(raw))
    write_json(path.with_suffix(".json"), card)
    return card


def read_card(
    path,  # .safetensors
) -> dict:  # what the .json beside it says
    "A missing or damaged card is an error with advice"
    p = Path(path).with_suffix(".json")
    try:
        return json.loads(p.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CourseError(f"{p} is missing or damaged ({e}). {REMEDY}") from e


def read_with_card(
    path,  # .safetensors
    make,  # make(card) -> a module
):  # the module in float32, with the weights of the file
    "Read weights; refuse them when the file is not the one its card describes"
    path, card = Path(path), read_card(path)
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise CourseError(f"{path} cannot be read ({e.strerror or e}). {REMEDY}") from e
    if hashlib.sha256(raw).hexdigest() != card.get("sha256"):
        raise CourseError(f"{path} is not the file its card describes: it was changed or damaged. {REMEDY}")
    try:
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn
            module = make(card)
        module.load_state_dict({k: v.float() for k, v in from_bytes(raw).items()}, strict=False)
    except (KeyError, RuntimeError, SafetensorError) as e:
        raise CourseError(f"{path} does not hold what its card says ({e}). {REMEDY}") from e
    return module
