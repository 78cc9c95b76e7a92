"""The types that recipes are made of: a config survives JSON and the command line, and refuses what it does not know."""
import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.contracts import (Codec, Config, Data, Defaults, Identity, Model, Process, Tokenizer, from_json, of_data,
                                       set_fields, to_json)
from t2i_course.core.sources import load
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.diffusion.ddpm import VP, linear_betas


@dataclass(kw_only=True)
class Own(Config):
    "A recipe's own fields, one of each kind"
    recipe: str = "own"
    widths: tuple = (32, 96)  # a tuple that JSON makes a list of
    places: list = (1,)
    hold: bool = False
    limit: float | None = None
    steps: int = 50
    kind: str = "linear"
    table: tuple[int, ...] | None = None


NEEDED = dict(data="digits", shape=[1, 16, 16], words=["a", "seven"], max_len=4, lr=4e-3, half_life=500_000, batch=32)
numbers = st.floats(allow_nan=False, allow_infinity=False)
rows = st.lists(st.integers(-5, 5) | st.lists(numbers, max_size=2), max_size=4)
configs = st.builds(Own, **{k: st.just(v) for k, v in NEEDED.items() if k not in ("lr", "words", "half_life")}, lr=numbers,
                    half_life=numbers | st.integers(0, 10**9), words=st.lists(st.text(max_size=5), max_size=4), widths=rows | rows.map(tuple),
                    places=rows, hold=st.booleans(), limit=st.none() | numbers, steps=st.integers(), kind=st.text(),
                    table=st.none() | st.lists(st.integers()).map(tuple), uses=st.dictionaries(st.text(), st.dictionaries(st.text(), st.text())))


@given(configs)
def test_config_survives_json(config):
    "Saved, read and saved again: an equal config, the same bytes"
    text = json.dumps(to_json(config))
    again = from_json(Own, json.loads(text), "config.json")
    assert again == config and json.dumps(to_json(again)) == text


@given(configs)
def test_changed_copy_leaves_the_config_alone(config):
    before = to_json(config)
    other = config | dict(steps=config.steps + 1)
    assert to_json(config) == before and other.steps == config.steps + 1 and type(other) is Own
    assert {k: v for k, v in to_json(other).items() if k != "steps"} == {k: v for k, v in before.items() if k != "steps"}


@given(configs)
def test_every_field_can_be_set_from_the_command_line(config):
    "What `--set` is given as text comes back as the same value, in the same type"
    free = dict(lr=repr(config.lr), half_life=repr(config.half_life), steps=str(config.steps), hold=str(config.hold),
                limit=str(config.limit), kind=config.kind.strip(), widths=json.dumps(config.widths),
                table=json.dumps(config.table), max_len=str(config.max_len))
    again = set_fields(config | dict(kind=config.kind.strip()), [f"{k}={v}" for k, v in free.items()])
    assert again == config | dict(kind=config.kind.strip())


def test_set_reads_what_people_type():
    config = set_fields(Own(**NEEDED), ["lr=1e-4", "batch=128", "widths=64, 128", "hold=yes", "limit=none", "steps=1e2", "kind=cosine"])
    assert (config.lr, config.batch, config.widths, config.hold, config.limit, config.steps, config.kind) == \
        (1e-4, 128, (64, 128), True, None, 100, "cosine")
    assert set_fields(config, ["limit=2"]).limit == 2. and type(set_fields(config, ["limit=2"]).limit) is float


@pytest.mark.parametrize("item, says", [("lr", "FIELD=VALUE"), ("lrate=1", "no field 'lrate'"), ("batch=many", "batch must be a whole number"),
                                        ("batch=1.5", "whole number"), ("lr=fast", "lr must be a number"), ("lr=nan", "lr must be a number"),
                                        ("hold=perhaps", "hold must be true or false"), ("shape=1,8,8", "follows from the command")])
def test_set_refuses_with_a_sentence(item, says):
    with pytest.raises(CourseError, match=says): set_fields(Own(**NEEDED), [item])


def test_set_names_the_fields_there_are():
    with pytest.raises(CourseError) as e: set_fields(Own(**NEEDED), ["width=3"])
    assert all(k in str(e.value) for k in ("lr", "batch", "widths", "steps")) and "fingerprint" not in str(e.value)


def test_unknown_and_missing_fields_are_refused():
    values = to_json(Own(**NEEDED))
    with pytest.raises(CourseError, match="runs/a/config.json names sample_steps.*the fields are.*steps"):
        from_json(Own, values | dict(sample_steps=50), "runs/a/config.json")
    with pytest.raises(CourseError, match="lacks lr, batch"):
        from_json(Own, {k: v for k, v in values.items() if k not in ("lr", "batch")}, "config.json")
    with pytest.raises(CourseError, match="config.json: batch must be a whole number; got 'x'"):
        from_json(Own, values | dict(batch="x"), "config.json")
    with pytest.raises(CourseError, match="guidence"): Own(**NEEDED) | dict(guidence=2.)


@pytest.mark.parametrize("name, value", [("lr", math.inf), ("lr", True), ("batch", 2.5), ("hold", 1), ("kind", None), ("widths", 3), ("uses", [])])
def test_a_value_of_another_kind_is_refused(name, value):
    with pytest.raises(CourseError, match=f"{name} must be"): Own(**NEEDED) | {name: value}


def test_a_config_is_made_from_its_data():
    data = load("digits")
    config = Own(**of_data(data), lr=1e-3, half_life=100, batch=8)
    assert config.shape == [1, 16, 16] and config.max_len == data.size and config.words == list(data.words)
    assert config["lr"] == config.lr and config.get("boost", 3) == 3 and dict(config) == {k: getattr(config, k) for k in to_json(config)}


def test_identity_is_a_codec():
    codec, x = Identity(), torch.randn(2, 3, 4, 4)
    assert isinstance(codec, Codec) and codec.grid((3, 4, 4)) == (3, 4, 4) and not list(codec.parameters())
    assert torch.equal(codec.decode(codec.sample(codec.encode(x))), x)
    assert torch.equal(codec.sample(x, torch.ones_like(x)), x)


def test_what_is_there_meets_its_type():
    assert isinstance(WordTokenizer(["a"]), Tokenizer) and isinstance(VP(linear_betas(100)), Process)
    assert not isinstance(object(), Tokenizer) and not isinstance(WordTokenizer(["a"]), Process)


def test_defaults_make_a_model_of_a_net_a_loss_a_painter_and_its_calls():
    class Small(Defaults):
        def __init__(self): self.net, self.loss = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), lambda x0, cond, draws: x0
        def painter(self, tok, config): return None
        def calls(self, config): return 1
    model = Small()
    assert isinstance(model, Model) and not isinstance(Defaults(), Model)
    model.net[0].requires_grad_(False)
    assert list(model.trained) == ["1.weight", "1.bias"] and model.artist is model.net
    model.artist = model.net[1]  # a model may have a value of its own
    assert model.artist is model.net[1] and Small().artist is not model.artist
    model.extra = {}
    with pytest.raises(CourseError, match="counts"): model.extra = dict(counts=torch.ones(1))


def data_sets(folder):
    from PIL import Image
    from t2i_course.ar.cm3leon import Recoloured
    from t2i_course.core.data import Wrapped
    from t2i_course.diffusion.terminal_snr import Papers
    from t2i_course.gan.adversarial import Stacked
    from t2i_course.gan.stylegan2 import Large, Tinted
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red number {i}")
    own = [Stacked(), Tinted(), Large(), Recoloured(), Papers()]
    return [*map(load, ("digits", "painted", "painted2", str(folder))), Wrapped(load("painted")), *own]


def test_all_data_of_the_course_meet_their_type(tmp_path):
    "Whatever `train` and the evaluation ask of a data set, all have"
    for data in data_sets(tmp_path):
        assert isinstance(data, Data), type(data)
        batch = data.batch(data.splits[0], Draws(0, torch.arange(2)))
        assert batch.x.shape == (2, *data.shape) and len(batch.captions) == 2 and batch.more == {} and data.group == 1
        assert isinstance(data.demands(batch.captions[0]), dict) and isinstance(data.fingerprint, str)
