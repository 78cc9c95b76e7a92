"""The config of a run: one dataclass a recipe, saved as JSON and set from the command line."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from functools import cache
from typing import get_args, get_origin, get_type_hints

from t2i_course.core.files import CourseError


@dataclass(kw_only=True)
class Config:
    "What every run says. A recipe's own class inherits it and adds its fields; every value is one of JSON"

    recipe: str  # name of the module
    data: str  # name of the data set, or the path of a folder as seen from the run
    shape: list  # (c, h, w) of a picture
    words: list  # vocabulary of the captions
    max_len: int  # tokens a caption
    lr: float  # peak learning rate
    half_life: float  # of the average of the weights, in images
    batch: int  # images an optimizer step
    clip: float = 1.0  # largest norm of a gradient
    betas: tuple = (0.9, 0.95)  # of AdamW
    weight_decay: float = 0.01  # of AdamW
    # from here on: said by the command
    scale: str = "demo"  # smoke, demo or full
    images: int | None = None  # the clock
    seconds: float | None = None  # the clock, or its limit
    seed: int = 0  # of every random number
    precision: str = "fp32"  # fp32, bf16 or fp16
    threads: int = 1  # of the processor
    size: int | None = None  # side of a folder's pictures
    fingerprint: str | None = None  # of the data
    source: str | None = None  # of the data
    versions: dict = field(default_factory=dict)  # of Python, torch and this package
    hardware: str | None = None  # where it began
    bf16_units: bool = False  # had it units for bfloat16?
    uses: dict = field(default_factory=dict)  # role -> {run: path as seen from the run, model: its hash}

    def __post_init__(self):
        for name, kind in kinds(type(self)).items():
            setattr(self, name, fitted(getattr(self, name), kind, name))

    def __or__(self, changes: dict) -> "Config":
        "A changed copy"
        known(type(self), changes, "the change")
        return dataclasses.replace(self, **changes)

    # read like the flat dict of its JSON, which is how a config was written before it had a class
    def __getitem__(self, name: str):
        if name not in kinds(type(self)):
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in kinds(type(self))

    def get(self, name: str, default=None):
        return getattr(self, name) if name in self else default

    def keys(self):
        return kinds(type(self)).keys()


# said by other options of the command, or by its data: not for `--set`
COMMAND = "recipe data shape words scale images seconds seed precision threads size".split()
COMMAND += "fingerprint source versions hardware bf16_units uses".split()


def of_data(
    data,  # captioned pictures
) -> dict:  # the fields of a Config that follow from it
    return dict(data=data.name, shape=list(data.shape), words=list(data.words), max_len=data.size)


@cache
def kinds(
    cls: type,  # a dataclass
) -> dict:  # field -> its type
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def known(cls: type, names, where: str, why: str = ""):
    "Refuse fields that a config does not have"
    own = kinds(cls)
    strange = [k for k in names if k not in own]
    if strange:
        have = ", ".join(own)
        raise CourseError(
            f"{where} names {', '.join(map(str, strange))}, which is not a field; {why}the fields are {have}"
        )


def fitted(
    value,  # of a field
    kind,  # its type
    name: str,  # its name, for the message
):  # the value in the type of the field: whole numbers stand for fractions, lists for tuples
    "A value of another kind is refused with a sentence"
    options = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None and len(options) > 1:
        return None
    kind = next(k for k in options if k is not type(None))
    kind = get_origin(kind) or kind
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):
        return float(value)
    if kind is int and number and math.isfinite(value) and value == int(value):
        return int(value)
    if kind in (list, tuple) and isinstance(value, (list, tuple)):
        return rows(value, kind)
    if kind is dict and isinstance(value, dict):
        return {str(k): rows(v, list) for k, v in value.items()}
    if kind in (bool, str) and isinstance(value, kind):
        return value
    what = dict(int="a whole number", float="a number", bool="true or false", str="a text", list="a list")
    what |= dict(tuple="a list", dict="a table")
    raise CourseError(f"{name} must be {what.get(kind.__name__, kind.__name__)}; got {value!r}")


def rows(value, kind: type):  # lists and tuples, at every depth, of one kind: JSON knows only one
    if isinstance(value, dict):
        return {str(k): rows(v, kind) for k, v in value.items()}
    return kind(rows(v, kind) for v in value) if isinstance(value, (list, tuple)) else value


def to_json(
    config: Config,
) -> dict:  # flat, as it is saved
    "The config as JSON values"
    return {name: rows(getattr(config, name), list) for name in kinds(type(config))}


def from_json(
    cls: type,  # the Config of a recipe
    values: dict,  # as from `to_json`
    where,  # the file, for the message
) -> Config:
    "Unknown and missing fields are refused with a sentence"
    known(cls, values, where, "it was made by another version or changed by hand: train again; ")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise CourseError(f"{where} lacks {', '.join(missing)}: it was made by another version; train again")
    try:
        return cls(**values)
    except CourseError as e:
        raise CourseError(f"{where}: {e}") from e


def parsed(
    text: str,  # as typed
    kind,  # type of the field
    name: str,  # of the field
):  # the value
    "Numbers, true or false, none, texts; lists as 32,64 or in JSON"
    options = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if len(options) > 1 and text.lower() in ("none", "null"):
        return None
    kind = next(k for k in options if k is not type(None))
    kind = get_origin(kind) or kind
    if kind is str:
        return text
    words = dict(true=True, yes=True, on=True, false=False, no=False, off=False)
    if kind is bool:
        return fitted(words.get(text.lower(), text), kind, name)
    if kind in (list, tuple) and not text.startswith("["):
        text = f"[{text}]"
    try:  # .5 is a number, though not in JSON
        value = float(text) if kind in (int, float) else json.loads(text)
    except ValueError:
        value = text
        if kind in (list, tuple):  # words without quotes
            value = [w.strip() for w in text[1:-1].split(",")]
    return fitted(value, kind, name)


def set_fields(
    config: Config,
    items: list,  # 'lr=1e-4', 'widths=32,64', as after `--set`
) -> Config:
    "A changed copy; each value is read as the type of its field says"
    own, changes = kinds(type(config)), {}
    free = [k for k in own if k not in COMMAND]
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals:
            raise CourseError(f"--set wants FIELD=VALUE, such as lr=1e-4; got {item!r}")
        if name in COMMAND:
            raise CourseError(f"{name} follows from the command and its data; --set is for {', '.join(free)}")
        if name not in free:
            raise CourseError(f"{config.recipe} has no field {name!r}; --set is for {', '.join(free)}")
        changes[name] = parsed(text.strip(), own[name], name)
    return config | changes
