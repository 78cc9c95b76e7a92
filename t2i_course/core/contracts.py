"""What a recipe is made of, as types: data, codec, tokenizer, process, model, and the module itself."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from t2i_course.core.config import Config, from_json, of_data, set_fields, to_json
from t2i_course.core.files import CourseError

__all__ = ["Data", "Codec", "Identity", "Tokenizer", "Process", "Model", "Defaults", "Recipe"]
__all__ += ["Config", "from_json", "of_data", "set_fields", "to_json"]

# Batch, Draws, Cond and Coefs are named in comments only: the ground knows no chapter, not even of its types


@runtime_checkable
class Data(Protocol):
    "Captioned pictures; a batch is a function of (split, seed, index) alone"

    name: str  # as `core.sources.load` knows it, or the path of a folder
    shape: tuple  # (c, h, w) of a picture; with buckets, of the first one
    splits: tuple  # names of its splits
    attributes: dict  # name -> names of its values, what captions may demand
    words: tuple  # vocabulary of the captions
    size: int  # tokens of the longest caption, its start included
    source: str  # where the pictures come from, for reports
    fingerprint: str  # another one when the pictures change
    group: int  # this many consecutive indices have one shape; a batch is a multiple or a part of it

    def batch(self, split: str, draws):  # Draws -> Batch
        "The captioned pictures with these indices"
        ...

    def demands(self, caption: str) -> dict:
        "Attribute -> index of the value that a caption demands"
        ...


@runtime_checkable
class Codec(Protocol):
    "Pictures to what a model learns, and back; one meaning of each verb for pixels, latents and codes"

    limit: float  # numbers of x0 lie (nearly all) in [-limit, limit]; where a sampler may clamp

    def grid(self, shape: tuple) -> tuple:
        "Shape of x0 for pictures of this shape (c, h, w); codes on several grids: a shape of each"
        ...

    def encode(self, x: Tensor) -> Tensor:
        "Pictures (b c h w) to z: deterministic, kept on disk. Codes are int64 (b h w), or a tuple of such"
        ...

    def sample(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        "z to x0, what a model learns: a whitened draw of the posterior; no noise: its mean. Codes stay codes"
        ...

    def decode(self, x0: Tensor) -> Tensor:
        "x0 to pictures (b c h w) in about [-1, 1]"
        ...


class Identity(nn.Module):
    "The codec of models that learn pixels"

    limit = 1.0

    def grid(self, shape: tuple) -> tuple:
        return tuple(shape)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def sample(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        return z

    def decode(self, x0: Tensor) -> Tensor:
        return x0


@runtime_checkable
class Tokenizer(Protocol):
    "Captions to tokens"

    max_len: int  # tokens a caption

    def __len__(self) -> int:
        "Size of the vocabulary"
        ...

    def __call__(self, captions: list):  # -> Cond
        "One condition a caption, not encoded yet"
        ...

    def null(self):  # -> Cond
        "The condition (1) that says nothing"
        ...

    def notes(self, caption: str) -> list:
        "Sentences: what the model will not see of this caption"
        ...


@runtime_checkable
class Process(Protocol):
    "x_t = alpha x0 + sigma eps; t=0 is data, t=1 noise"

    def coefs(self, t: Tensor):  # -> Coefs
        "alpha, sigma and their derivatives at t (b), each (b)"
        ...


@runtime_checkable
class Model(Protocol):
    "What `build` returns beside the tokenizer. A plain object: `net` is what many processes wrap"

    net: (
        nn.Module
    )  # what is called, all of it; a loss goes through the forward of `model.net` as it is at that moment
    artist: nn.Module  # the part of net that draws
    trained: dict  # name -> parameter of net that learns; optimizer, average and checkpoint follow these
    parts: dict | None  # submodule of net -> settings of an optimizer of its own; None: one optimizer
    loss: object  # loss(x0, cond, draws) -> (b), or a list of Turns
    extra: dict  # name -> tensor that is not in net and is saved with it; may be set
    options: (
        dict  # field of the config that `t2i sample` may change -> (lowest, highest, whole number?, help)
    )
    measure: object  # measure(draw, data, n, seed) -> row; None: the evaluation protocol of the course

    def prepare(self, data: Data, tok: Tokenizer, config: Config) -> None:
        "Fit what has to be there before training; its time counts as training"
        ...

    def painter(self, tok: Tokenizer, config: Config) -> object:
        "draw(captions, seed=0, each=None) -> pictures (n c h w), on the CPU"
        ...

    def calls(self, config: Config) -> int:
        "Network calls for one picture, counted while one is drawn"
        ...

    def counted(self) -> list:
        "Modules that run once at every such call"
        ...

    def to(self, device) -> "Model":
        "Move what is not in net"
        ...


class default:
    "Like a property, but an object may have a value of its own in its place"

    def __init__(self, of):
        self.of = of

    def __get__(self, model, kind=None):
        return self if model is None else self.of(model)


class Defaults:
    "What most models have; a model inherits it and says `net`, `loss`, `painter` and `calls`"

    parts = None
    measure = None
    options: dict = {}

    @default
    def artist(self) -> nn.Module:
        return self.net

    @default
    def trained(self) -> dict:
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    @property
    def extra(self) -> dict:
        return {}

    @extra.setter
    def extra(self, tensors: dict):
        if tensors:
            raise CourseError(
                f"the run holds {', '.join(tensors)}, which this model has no place for: train again"
            )

    def prepare(self, data, tok, config):
        pass

    def counted(self) -> list:
        return [self.net]

    def to(self, device):
        return self


@runtime_checkable
class Recipe(Protocol):
    "A module that `t2i train` finds by its name. `uses_for(config)` says which finished runs it stands on"

    Config: type

    def recipe_for(self, data: Data, scale: str = "demo", seconds: float | None = None) -> Config:
        "The config of a new run"
        ...

    def build(self, config: Config, **uses) -> tuple:
        "Tokenizer and model; uses: role -> the finished run, opened and frozen"
        ...
