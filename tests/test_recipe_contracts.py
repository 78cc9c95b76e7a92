"""The face of every recipe: its config, its tokenizer, its model and its codec are what `core.contracts` says."""
import inspect
import json
import re
from dataclasses import fields

import pytest
import torch
from t2i_course.core.conditioning import count_calls
from t2i_course.core.contracts import (Codec, Config, Data, Identity, Model, Process, Recipe, Tokenizer, from_json,
                                       set_fields, to_json)
from t2i_course.core.config import COMMAND, kinds
from t2i_course.core.data import Draws
from t2i_course.core.ema import state_for
from t2i_course.core.files import CourseError
from t2i_course.core.register import recipe, recipes
from t2i_course.core.sources import load
from t2i_course.core.training import Turn, frozen
from torch import nn
from uses import built, uses_of

NAMES = list(recipes())
every_recipe = pytest.mark.parametrize("name", NAMES)
CAPTIONS = ["a handwritten seven", "a handwritten two", "a handwritten zero"]


@pytest.fixture(scope="module", params=NAMES)
def made(request):
    "module, config, data, tokenizer and model of a recipe, prepared as the command does it"
    module, data = recipe(request.param), load("digits")
    config = module.recipe_for(data, "smoke") | dict(images=64)
    tok, model = built(module, config)
    model.net.eval()
    model.prepare(data, tok, config)
    return module, config, data, tok, model


# --- The config ---

@every_recipe
def test_a_recipe_has_the_three_names_and_is_called_as_its_module(name):
    module = recipe(name)
    assert isinstance(module, Recipe) and issubclass(module.Config, Config) and module.Config is not Config
    assert module.__name__.rpartition(".")[2] == name
    config = module.recipe_for(load("digits"), "smoke")
    assert type(config) is module.Config and config.recipe == name and config.data == "digits"
    assert (config.shape, config.max_len) == ([1, 16, 16], load("digits").size)


@every_recipe
@pytest.mark.parametrize("scale", ["smoke", "demo", "full"])
@pytest.mark.parametrize("data", ["digits", "painted2"])
def test_the_config_survives_json(name, scale, data):
    "The same config, the same bytes, at every scale"
    module = recipe(name)
    config = module.recipe_for(load(data), scale)
    text = json.dumps(to_json(config), allow_nan=False)
    again = from_json(module.Config, json.loads(text), "config.json")
    assert again == config and json.dumps(to_json(again)) == text


def text_of(value):
    "As somebody would type it"
    if value is None or isinstance(value, bool): return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value)


def another(value, kind):
    "A different value of the same kind: what is ignored would not come back"
    if kind is bool: return not value
    if kind is str: return value + "2"
    if kind in (list, tuple): return kind([*value, value[0] if value else "red"])
    return 3.5 if value is None or kind is float else value + 1 if isinstance(value, int) else 2 * value


@every_recipe
def test_every_field_can_be_set_from_the_command_line(name):
    "Typed, each field gets its own value back, and another one of its kind; a value of another kind is refused"
    config = recipe(name).recipe_for(load("digits"), "smoke")
    own = [k for k in kinds(type(config)) if k not in COMMAND]
    assert len(own) > 5 and {"lr", "batch", "half_life"} <= set(own)
    for field in own:
        assert set_fields(config, [f"{field}={text_of(getattr(config, field))}"]) == config, field
        kind = kinds(type(config))[field]
        new = another(getattr(config, field), kind)
        changed = set_fields(config, [f"{field}={text_of(new)}"])
        assert new != getattr(config, field) and getattr(changed, field) == new, field
        assert changed == config | {field: new} and type(getattr(changed, field)) is type(new), field
        if kind in (int, float, bool, dict):
            with pytest.raises(CourseError, match=field): set_fields(config, [f"{field}=many"])
    for field in COMMAND:
        with pytest.raises(CourseError, match="follows from the command"): set_fields(config, [f"{field}=1"])


@every_recipe
def test_unknown_and_missing_fields_are_refused(name):
    module = recipe(name)
    values = to_json(module.recipe_for(load("digits"), "smoke"))
    with pytest.raises(CourseError, match="names lrate.*the fields are"): from_json(module.Config, values | dict(lrate=1), "config.json")
    del values["lr"]
    with pytest.raises(CourseError, match="lacks lr"): from_json(module.Config, values, "config.json")


@every_recipe
def test_every_field_has_a_comment(name):
    for cls in recipe(name).Config.__mro__:
        if not issubclass(cls, Config): continue
        source = inspect.getsource(cls)
        for field in set(vars(cls).get("__annotations__", {})) - (set() if cls is Config else set(kinds(Config))):
            line = re.search(rf"^\s+{field}\s*:.*$", source, re.M)
            assert line and "#" in line[0], f"{cls.__module__}.{cls.__name__}.{field} says nothing of itself"


# --- The model ---

def test_tokenizer_and_model_meet_their_types(made):
    _, config, data, tok, model = made
    assert isinstance(data, Data) and isinstance(tok, Tokenizer) and isinstance(model, Model)
    if hasattr(model, "process"): assert isinstance(model.process, Process)
    cond = tok(CAPTIONS)
    assert len(cond) == 3 and cond.ids.shape[1] == tok.max_len == config.max_len and len(tok.null()) == 1
    assert model.measure is None or callable(model.measure)


def test_what_is_trained_is_a_part_of_the_net(made):
    model = made[-1]
    own = dict(model.net.named_parameters())
    assert model.trained and all(own[k] is p and p.requires_grad for k, p in model.trained.items())
    assert {k for k in own if k not in model.trained} == {k for k in frozen(model.net) if k in own}
    inside = {id(p) for p in model.net.parameters()}
    drawing = [p for p in model.artist.parameters() if p.requires_grad]
    assert drawing and all(id(p) in inside for p in drawing)
    state = state_for(model, made[1])
    assert not any(k.partition(".")[2] in state.frozen for k in state.tensors() if k.startswith(("net.", "ema.")))
    for part in model.parts or {}: assert isinstance(model.net.get_submodule(part), nn.Module)


def test_losses_are_one_function_or_turns(made):
    model = made[-1]
    turns = [Turn("loss", model.loss)] if callable(model.loss) else model.loss
    assert turns and all(isinstance(t, Turn) and callable(t.loss) for t in turns)
    assert all(t.part in (model.parts or {"": {}}) for t in turns)


def test_options_are_fields_of_the_config_in_their_range(made):
    _, config, _, _, model = made
    for name, (low, high, whole, text) in model.options.items():
        value = getattr(config, name)
        assert low <= value <= high and text.strip() and name not in COMMAND
        assert whole == (kinds(type(config))[name] is int), name


def test_a_painter_draws_pictures_of_the_data(made):
    "As many as captions, of the shape of the data, on the CPU; the same for the same seed"
    _, config, data, tok, model = made
    draw, done = model.painter(tok, config), []
    x = draw(CAPTIONS, 3, done.append)
    assert x.shape == (3, *data.shape) and x.device.type == "cpu" and x.dtype == torch.float32 and sum(done) == 3
    assert torch.equal(x, draw(CAPTIONS, 3)) and x.isfinite().all()
    assert not model.net.training


def test_calls_are_what_is_counted(made):
    "Counted while three other pictures are drawn"
    _, config, _, tok, model = made
    draw = model.painter(tok, config)
    rows = count_calls(lambda _: draw(CAPTIONS), model.counted())
    assert rows and rows == 3 * model.calls(config)


def test_options_change_what_is_drawn(made):
    "Each of them reaches the painter"
    _, config, _, tok, model = made
    with torch.no_grad():
        for p in model.net.parameters(): p.add_(.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    for name, (low, high, whole, _) in model.options.items():
        value = getattr(config, name)
        other = (value - 1 if value - 1 >= low and value > 1 else value + 1) if whole else (value + .7 if value + .7 <= high else value - .7)
        same, changed = (model.painter(tok, config | {name: v})(CAPTIONS * 3, 1) for v in (value, other))
        assert not torch.equal(same, changed), name


def test_extra_comes_back(made):
    "Saved with the run and set on a fresh model, it draws the same"
    module, config, data, tok, model = made
    extra = {k: v.clone() for k, v in model.extra.items()}
    assert all(isinstance(v, torch.Tensor) for v in extra.values())
    uses = uses_of(module, config)  # the same finished runs as before
    torch.manual_seed(5)
    other_tok, other = module.build(config, **uses)
    other.net.load_state_dict(model.net.state_dict())
    other.net.eval()
    other.extra = extra
    assert other.extra.keys() == extra.keys() and all(torch.equal(other.extra[k], v) for k, v in extra.items())
    assert torch.equal(other.painter(other_tok, config)(CAPTIONS, 2), model.painter(tok, config)(CAPTIONS, 2))
    if not extra:
        with pytest.raises(CourseError, match="strange"): other.extra = dict(strange=torch.ones(1))


# --- Runs that stand on others ---

@every_recipe
def test_what_a_recipe_stands_on_are_parameters_of_build(name):
    module = recipe(name)
    asked = module.uses_for(module.recipe_for(load("digits"), "smoke")) if hasattr(module, "uses_for") else {}
    roles = inspect.signature(module.build).parameters
    for role, (other, changes, share) in asked.items():
        assert role in roles and other in NAMES and 0 < share < 1
        recipe(other).recipe_for(load("digits"), "smoke") | changes  # fields that it has
    assert sum(share for *_, share in asked.values()) < 1


@pytest.mark.parametrize("name", ["ddpm", "unet", "dit", "flow_matching"])
def test_a_denoiser_of_latents_paints_pictures(name):
    "Nothing outside asks for a codec: the model decodes, and its sampler has room for numbers beyond 1"
    module, data = recipe(name), load("digits")
    vae = recipe("vae")
    needs = type("needs", (), dict(uses_for=staticmethod(lambda config: dict(codec=("vae", {}, .5)))))
    codec = uses_of(needs, vae.recipe_for(data, "smoke"))["codec"]
    grid = codec.model.codec.grid(data.shape)
    class Latent:  # as shards of latents are read
        shape = grid
        def __getattr__(self, key): return getattr(data, key)
    config = module.recipe_for(Latent(), "smoke") | ({"skip": False} if "skip" in kinds(module.Config) else {})
    tok, model = module.build(config, codec=codec)
    assert isinstance(model.codec, Codec) and model.codec.limit > 1
    assert model.painter(tok, config)(CAPTIONS, 0).shape == (3, *data.shape)
    assert all("codec" not in k for k in model.trained)
    plain_tok, plain = module.build(module.recipe_for(data, "smoke"))
    assert isinstance(plain.codec, Identity)


# --- Codecs ---

@pytest.mark.parametrize("name", [n for n in NAMES if recipes()[n].split(".")[1] == "codec"])
def test_a_codec_has_one_meaning_of_each_verb(name):
    "z is deterministic and kept on disk, x0 has the shape of the grid, decode gives pictures"
    module, data = recipe(name), load("digits")
    tok, model = built(module, module.recipe_for(data, "smoke"))
    codec, x = model.codec.eval(), data.batch("test", Draws(0, torch.arange(4))).x
    assert isinstance(codec, Codec) and codec.limit > 0
    def grids(z): return list(z) if isinstance(z, tuple) else [z]  # codes may lie on several
    with torch.no_grad():
        z = codec.encode(x)
        assert all(torch.equal(a, b) and len(a) == 4 for a, b in zip(grids(z), grids(codec.encode(x))))
        x0, shape = codec.sample(z), codec.grid(data.shape)
        assert [tuple(v.shape[1:]) for v in grids(x0)] == [tuple(g) for g in (shape if isinstance(z, tuple) else [shape])]
        assert all(torch.equal(a, b) for a, b in zip(grids(x0), grids(codec.sample(z))))
        y = codec.decode(x0)
        assert y.shape == x.shape and y.dtype == torch.float32
        if grids(z)[0].dtype == torch.int64: assert all(torch.equal(a, b) for a, b in zip(grids(x0), grids(z)))  # codes stay codes
        else: assert not torch.equal(x0, codec.sample(z, torch.ones(x0.shape)))


@every_recipe
def test_a_config_field_is_asked_for(name):
    "A field that nothing reads would be a promise that is not kept"
    module = recipe(name)
    package = "\n".join(inspect.getsource(m) for m in modules_of(module))
    known = {f.name for f in fields(Config)}
    for field in kinds(module.Config):
        if field not in known: assert re.search(rf"\b{field}\b", package.split("class Config", 1)[1]), field


def modules_of(module):
    "The chapter's module, those of the package that it takes names from, and those its Config grew from"
    import sys
    found = {module.__name__: module}
    for value in [*vars(module).values(), *module.Config.__mro__]:
        where = getattr(value, "__module__", "") or ""
        if where.startswith("t2i_course.") and where in sys.modules: found[where] = sys.modules[where]
    return found.values()
