"""A finished run becomes a model of the package: weights in float16, and a card that says how they were made."""

import hashlib
import json
from copy import deepcopy
from pathlib import Path

import torch

from t2i_course.core.config import to_json
from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError, load_tensors, make_folder, save_tensors, say, write_json
from t2i_course.core.runfiles import model_hash
from t2i_course.core.shipped import shipped_path

MOST = 1_500_000  # bytes of the weights
WORST = 0.02  # of an answer's size: the largest error that rounding may make anywhere
LICENSES = dict(
    mnist="MNIST: Y. LeCun and C. Cortes, CC BY-SA 3.0",
    digits="Optical Recognition of Handwritten Digits: E. Alpaydin and C. Kaynak, CC BY 4.0",
)


def halves(
    run,  # a Finished
) -> dict:  # name -> tensor
    "What the run has learned and fitted, as the file holds it"
    tensors, _ = load_tensors(run.run / "model.safetensors")
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


@torch.no_grad()
def rounding(
    run,  # a Finished
    tensors: dict,  # as from `halves`
    n=64,  # inputs at each of three times
) -> dict:  # errors as shares of the answer's root mean square
    "How far the answers of the rounded network lie from those of the trained one"
    net = run.model.net
    rounded = deepcopy(net)
    own = {k.removeprefix("net."): v.float() for k, v in tensors.items() if k.startswith("net.")}
    rounded.load_state_dict(own, strict=False)
    words, draws = run.config.words, Draws(0, torch.arange(n))
    cond = run.tok([words[i % len(words)] for i in range(n)])
    off, size = [], []
    for t in (0.05, 0.5, 0.95):
        x = draws.normal(f"x at {t}", *run.config.shape)
        want, got = (f(x, torch.full((n,), t), cond).float() for f in (net, rounded))
        off.append(got - want)
        size.append(want)
    off, size = torch.cat(off), torch.cat(size).square().mean().sqrt()
    return dict(largest=(off.abs().max() / size).item(), rms=(off.square().mean().sqrt() / size).item())


def ship(
    run,  # a Finished
    name: str,  # of the model
    made: dict,  # stamp of the command that ships it
    folder=None,  # default the package's own
) -> dict:  # the card
    "Write the weights and the card of a model; refused where rounding does harm or the file is too large"
    path = Path(folder or shipped_path(name).parent) / f"{name}.safetensors"
    make_folder(path.parent)
    tensors, numbers = halves(run), json.loads((run.run / "train.json").read_text(encoding="utf-8"))
    off = rounding(run, tensors)
    if off["largest"] > WORST:
        raise CourseError(
            f"{run.run} cannot be shipped in float16: rounding changes an answer by {off['largest']:.1%}"
        )
    save_tensors(path, tensors)
    raw = path.read_bytes()
    if len(raw) > MOST:
        path.unlink()
        raise CourseError(f"{name} would take {len(raw):,} bytes; at most {MOST:,} are shipped")
    config = {k: v for k, v in to_json(run.config).items() if k not in ("threads", "uses")}
    card = dict(
        sha256=hashlib.sha256(raw).hexdigest(),
        run=model_hash(run.run),
        parameters=parameters(run.model.net),
        images=numbers["images"],
        train_seconds=round(numbers["seconds"]),
        trained_on=numbers["date"],
        data_license=LICENSES.get(run.config.data, f"see {run.config.data}"),
        float16=off,
        config=config,
        **{k: v for k, v in made.items() if k not in ("seeds", "scale", "code")},
    )
    write_json(path.with_suffix(".json"), card)
    say(f"{path}: {len(raw):,} bytes; rounding to float16 changes an answer by {off['largest']:.2%} at most")
    return card


def shipped_from(
    run,  # a Finished
    name: str,  # of a model
) -> bool:
    "Is this the run that the package's model was made from?"
    path = shipped_path(name)
    if not path.exists():
        return False
    try:
        load_tensors(path)
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (CourseError, OSError, ValueError):
        return False
    return card.get("run") == model_hash(run.run)
