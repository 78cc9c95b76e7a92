"What DDPM, DiT and flow matching share: a config with a comment on each field, a closed form that is fitted once, a codec."
import inspect
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from t2i_course.core.contracts import Identity, Model, Recipe, from_json, set_fields, to_json
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.diffusion import closed_form, ddpm, guidance
from t2i_course.flow import flow_matching
from t2i_course.transformer import dit

RECIPES = [ddpm, dit, flow_matching]
every_recipe = pytest.mark.parametrize("module", RECIPES, ids=lambda m: m.__name__.rpartition(".")[2])
SMALL = dict(rank=16, fit_images=256)


class Halved(nn.Module):
    "A codec whose latents are the pictures, four to one, and twice as large."
    limit = 4.

    def encode(self, x): return 2 * nn.functional.avg_pool2d(x, 2)
    def sample(self, z, noise=None): return z
    def decode(self, x0): return nn.functional.interpolate(x0 / 2, scale_factor=2)


class Latents:
    "Data of latents: the same captions."
    def __init__(self, data, codec):
        self.data, self.codec, self.shape = data, codec, (data.shape[0], data.shape[1] // 2, data.shape[2] // 2)

    def __getattr__(self, name): return getattr(self.data, name)

    def batch(self, split, draws):
        b = self.data.batch(split, draws)
        return b._replace(x=self.codec.encode(b.x)) if hasattr(b, "_replace") else SimpleNamespace(**vars(b) | dict(x=self.codec.encode(b.x)))


def small(module, data, **changes):
    config = module.recipe_for(data, "smoke")
    return config | {k: v for k, v in SMALL.items() if k in config} | changes


def ready(module, data, **uses):
    config = small(module, data)
    torch.manual_seed(0)
    tok, den = module.build(config, **uses)
    den.prepare(data, tok, config)
    return config, tok, den


# --- The config ---

@every_recipe
@pytest.mark.parametrize("scale", ["smoke", "demo", "full"])
def test_a_config_survives_its_file(module, scale):
    config = module.recipe_for(load("painted"), scale)
    values = json.loads(json.dumps(to_json(config)))
    assert from_json(module.Config, values, "a/config.json") == config and config.recipe == module.__name__.rpartition(".")[2]
    with pytest.raises(CourseError, match="sample_steps"): from_json(module.Config, values | dict(sample_steps=3), "a/config.json")
    del values["steps"]
    with pytest.raises(CourseError, match="lacks steps"): from_json(module.Config, values, "a/config.json")


@every_recipe
def test_every_field_is_set_from_the_command_line(module):
    config = module.recipe_for(load("painted"), "smoke")
    assert set_fields(config, ["lr=1e-4", "batch=128", "steps=7", "hold=true"]) == config | dict(lr=1e-4, batch=128, steps=7, hold=True)
    with pytest.raises(CourseError, match="no field 'step'"): set_fields(config, ["step=7"])
    with pytest.raises(CourseError, match="whole number"): set_fields(config, ["steps=7.5"])


@pytest.mark.parametrize("cls", [ddpm.DenoiserConfig, ddpm.UNetConfig, ddpm.Config, closed_form.SkipConfig, dit.Config, flow_matching.Config])
def test_every_field_has_a_comment(cls):
    lines = [line for line in inspect.getsource(cls).splitlines() if re.match(r"    \w+\s*:", line)]
    assert lines and all("# " in line for line in lines)


@every_recipe
def test_options_are_fields_of_the_config(module):
    config, tok, den = ready(module, load("digits"))
    for name, (low, high, whole, what) in den.options.items():
        assert low <= config[name] <= high and what and isinstance(config[name], int if whole else float)


# --- The model ---

@every_recipe
def test_is_a_recipe_and_a_model(module):
    _, tok, den = ready(module, load("digits"))
    assert isinstance(module, Recipe) and isinstance(den, Model) and isinstance(den.codec, Identity)
    assert den.trained.keys() == dict(den.net.named_parameters()).keys()


@every_recipe
def test_what_was_prepared_is_saved_and_given_back(module):
    data = load("digits")
    config, tok, den = ready(module, data)
    _, other = module.build(config)
    other.net.load_state_dict(den.net.state_dict())
    with torch.no_grad():
        for net in (den.net, other.net): net.net.head.bias.fill_(.1)
    other.extra = {k: v.clone() for k, v in den.extra.items()}
    draw = lambda d: d.painter(tok, config | dict(steps=2))(["a handwritten two"], 3)
    assert torch.equal(draw(den), draw(other)) and (len(den.extra) > 0) == (den.skip is not None)


def test_tables_without_a_place_are_refused():
    config = small(ddpm, load("digits"))
    with pytest.raises(CourseError, match="no place"): ddpm.build(config)[1].extra = dict(A=torch.zeros(1))


def test_an_unknown_target_is_refused():
    config = small(ddpm, load("digits"))
    for name in ddpm.TARGETS: assert ddpm.build(config | dict(target=name))[1].target is getattr(ddpm, name)
    with pytest.raises(CourseError, match="'velocity'; the network can be asked for eps, x0, v"):
        ddpm.build(config | dict(target="velocity"))


def test_a_plain_denoiser_is_one_that_drops_no_caption():
    data = load("digits")
    config, tok, den = ready(ddpm, data)
    torch.nn.init.normal_(den.net.net.head.weight)
    den.p_drop, draws = 0., Draws(0, torch.arange(4))
    plain, b = ddpm.PlainDenoiser(den.net, den.process), data.batch("train", draws)
    cond, t = tok(b.captions), torch.full((4,), .3)
    assert torch.equal(plain.loss(b.x, cond, draws), den.loss(b.x, cond, draws))
    assert all(map(torch.equal, plain.predict(b.x, t, cond), den.predict(b.x, t, cond)))


@pytest.mark.parametrize("side,skip", [(64, True), (65, False)])
def test_large_pictures_begin_without_a_closed_form(side, skip, capsys):
    data = SimpleNamespace(shape=(3, side, 64), attributes={}, words=())
    assert closed_form.closed_form(data)["skip"] is skip
    assert ("too large" in capsys.readouterr().err) is not skip


def test_the_closed_form_of_painted_models_knows_all_pairs():
    config = guidance.painted_config(load("painted"), "smoke") | SMALL
    _, den = guidance.painted_model(config, load("painted"), tables={})
    assert den.skip.among is None and not config.pairs_in_groups
    assert den.skip.groups and len(den.skip.groups) == len(config.groups)


# --- Latents ---

@every_recipe
def test_latents_are_clamped_at_their_limit_and_decoded_by_the_painter(module):
    codec = Halved()
    data = Latents(load("painted"), codec)
    config, tok, den = ready(module, data, codec=SimpleNamespace(model=SimpleNamespace(codec=codec)))
    assert config.shape == [3, 16, 16] and den.codec is codec and not any("codec" in name for name in den.net.state_dict())
    x = den.painter(tok, config | dict(steps=2))(["a red two", ""], 0)
    assert x.shape == (2, 3, 32, 32) and x.isfinite().all() and den.calls(config | dict(steps=2, guidance=1.)) == 2
    seen = []
    walk = lambda predict, process, x, ts, draws=None: iter([torch.full_like(x, 3.)])
    drawn = ddpm.drawer(den, tok, config.shape, [1., 0.], sampler=walk)(["a red two"])
    assert torch.equal(drawn, torch.full((1, 3, 32, 32), 1.5)), "twice as large, so halved again"
    den.predict = lambda x_t, t, cond, boost=1.: (torch.full_like(x_t, 9.), x_t) if seen.append(1) is None else None
    assert ddpm.drawer(den, tok, config.shape, [1., 0.], eta=0.)(["a red two"]).max() == 2 and seen, "4, the limit, halved"


@every_recipe
def test_latents_train(module):
    codec = Halved()
    data = Latents(load("painted"), codec)
    config, tok, den = ready(module, data, codec=SimpleNamespace(model=SimpleNamespace(codec=codec)))
    b = data.batch("train", Draws(0, torch.arange(4)))
    assert den.loss(b.x, tok(b.captions), Draws(0, torch.arange(4))).isfinite().all()
