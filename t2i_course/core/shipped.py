"""Models that come with the package: opened without training and without a network."""

import hashlib
import json
from importlib import resources
from pathlib import Path

from t2i_course.core.config import from_json
from t2i_course.core.ema import freeze
from t2i_course.core.files import CourseError, load_tensors
from t2i_course.core.guards import undisturbed
from t2i_course.core.register import recipe
from t2i_course.core.training import load_trained


def shipped_path(
    name: str,  # of a model, such as mnist_ddpm
) -> Path:
    "Where the package keeps its weights; a .json with the same name is the model's card"
    return Path(str(resources.files("t2i_course"))) / "weights" / f"{name}.safetensors"


def is_model(
    card: dict,  # of a file in weights/
) -> bool:
    "The card of a model says how it was trained; the other cards belong to judges"
    return "config" in card


def model_card(
    path,  # of the weights
) -> dict:
    "What the card beside the weights says; refused when the weights are not the ones that it describes"
    path = Path(path)
    try:
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        raw = path.read_bytes()
    except (OSError, ValueError) as e:
        raise CourseError(f"{path} or its card cannot be read ({e}). Install the package again.") from e
    if not is_model(card):
        raise CourseError(f"{path} holds a judge and no model: open it with load_judge")
    if hashlib.sha256(raw).hexdigest() != card.get("sha256"):
        raise CourseError(
            f"{path} is not the file that its card describes: it was changed or damaged. "
            f"Install the package again, or make the file anew: {card.get('command')}"
        )
    return card


def open_weights(
    path,  # a file written by `run.ship`
    device="cpu",
) -> tuple:  # tokenizer, model with the averaged weights, in float32; nothing of it learns any more
    "A model from its weights and its card"
    path, card = Path(path), model_card(path)
    config = from_json(recipe(card["config"]["recipe"]).Config, card["config"], path.with_suffix(".json"))
    with undisturbed():  # the first weights of a network are drawn
        tok, model = recipe(config.recipe).build(config)
    freeze(model)
    tensors = {k: v.float().to(device) for k, v in load_tensors(path)[0].items()}

    def own(prefix):
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        load_trained(model.net, own("net."))
    except RuntimeError as e:
        raise CourseError(f"{path} belongs to another network ({str(e).splitlines()[0]})") from e
    model.net.to(device).eval().requires_grad_(False)
    model.to(device)
    model.extra = own("extra.")
    return tok, model


def shipped(
    name: str,  # of a model
    device="cpu",
) -> tuple:  # tokenizer, model
    "A trained model that comes with the package"
    path = shipped_path(name)
    if not path.exists():
        cards = sorted(path.parent.glob("*.json"))
        have = [p.stem for p in cards if is_model(json.loads(p.read_text(encoding="utf-8")))]
        raise CourseError(f"no model '{name}' is shipped, only {', '.join(have) or 'none'}")
    return open_weights(path, device)
