"""A finished run becomes a model of the package: weights in float16, a card that says how they were made."""

import hashlib
import json
from copy import deepcopy
from pathlib import Path

import torch

from t2i_course.core.config import from_json, to_json
from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError, load_tensors, make_folder, save_tensors, say, write_json
from t2i_course.core.register import recipe
from t2i_course.core.runfiles import config_hash, model_hash, read_config
from t2i_course.core.shipped import model_card, shipped_path

MOST = 1_500_000  # bytes of the weights
WORST = 0.02  # of the size of an answer: the largest error that rounding may make
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
    n=16,  # pictures
) -> dict:  # largest errors: of an answer, as a share of their root mean square; of a pixel of a picture
    "How far answers and pictures of the rounded network lie from those of the trained one"
    model, exact = run.model, run.model.net
    words, draws = run.config.words, Draws(0, torch.arange(n))
    captions = [words[-1 - i % len(words)] for i in range(n)]
    pictures, cond = run.draw(captions), run.tok(captions)
    rounded = deepcopy(exact)
    own = {k.removeprefix("net."): v.float() for k, v in tensors.items() if k.startswith("net.")}
    rounded.load_state_dict(own, strict=False)
    off, size = 0.0, []
    for t in (0.05, 0.5, 0.95):
        times = torch.full((n,), t)
        c = model.coefs(times, pictures)
        x = c.alpha * pictures + c.sigma * draws.normal(f"x at {t}", *pictures.shape[1:])
        want, got = (f(x, times, cond).float() for f in (exact, rounded))
        off, size = max(off, (got - want).abs().max().item()), [*size, want.square().mean()]
    model.net = rounded
    try:
        again = run.draw(captions)
    finally:
        model.net = exact
    size = torch.stack(size).mean().sqrt().item()
    return dict(answers=off / size, pictures=(again - pictures).abs().max().item())


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
    if off["answers"] > WORST:
        raise CourseError(
            f"{run.run} cannot be shipped in float16: rounding changes an answer by {off['answers']:.1%}"
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
    say(f"{path}: {len(raw):,} bytes; rounding to float16 changes an answer by {off['answers']:.2%} at most")
    return card


def shipped_from(
    run,  # a Finished
    name: str,  # of a model
) -> bool:
    "Does the package's model hold the numbers of this run?"
    path = shipped_path(name)
    if not path.exists():
        return False
    try:
        kept, own = load_tensors(path)[0], halves(run)
    except (CourseError, OSError, ValueError):
        return False
    return kept.keys() == own.keys() and all(torch.equal(v, own[k]) for k, v in kept.items())


def unpack(
    name: str,  # of a model
    out: Path,  # a run folder, which is made
):
    "The run that the package's model was made from, as far as float16 has kept it"
    card, tensors = model_card(shipped_path(name)), load_tensors(shipped_path(name))[0]
    config = from_json(recipe(card["config"]["recipe"]).Config, card["config"], shipped_path(name))
    make_folder(out)
    write_json(out / "config.json", to_json(config))
    config = read_config(out)
    numbers = dict(images=card["images"], seconds=card["train_seconds"], params=card["parameters"])
    write_json(out / "train.json", numbers | dict(date=card["trained_on"], unpacked_from=name))
    wide = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    save_tensors(out / "model.safetensors", wide, config=config_hash(config))


def asked_for(
    name: str,  # of a model
    **given,  # recipe, data, images, seed, and changes: field -> value
) -> bool:
    "Was the package's model made with these settings?"
    if not shipped_path(name).exists():
        return False
    config = model_card(shipped_path(name))["config"]
    wanted = {k: v for k, v in given.items() if k != "changes"} | (given.get("changes") or {})
    return all(config.get(k) == v for k, v in wanted.items())
