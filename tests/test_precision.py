"Which numbers a run computes in follows from what the processor has units for, and is written down."
import json

import pytest
import torch
from t2i_course.cli import main
from t2i_course.run.doctor import doctor
from t2i_course.core.runs import open_run
from t2i_course.run.settings import settings
from t2i_course.run.stamp import stamp
from t2i_course.run.train import train_run
from t2i_course.core.sources import load
from t2i_course.scale import mixed_precision as mp


def played(monkeypatch, units):
    "A processor with or without bfloat16 units."
    places = [f"t2i_course.{name}" for name in ("run.settings", "run.stamp", "run.doctor", "run.fit", "core.runs")]
    for place in [*places, "t2i_course.scale.mixed_precision"]: monkeypatch.setattr(f"{place}.has_bf16", lambda device="cpu": units, raising=False)
    for place in places: monkeypatch.setattr(f"{place}.pick_device", lambda: "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of a machine with bfloat16 units."
    out = tmp_path_factory.mktemp("bf16") / "run"
    return train_run("flow_matching", "digits", "smoke", images=64, out=out, precision="bf16", quiet=True)


@pytest.mark.parametrize("units", [True, False])
def test_auto_follows_the_units_and_is_recorded(monkeypatch, units):
    played(monkeypatch, units)
    for _ in range(3):  # no race: the same every time
        config = settings("flow_matching", "digits", "smoke", None, 64, 0, "auto")
        assert config["precision"] == ("bf16" if units else "fp32") and config["bf16_units"] is units
    assert stamp("x", (0,))["bf16_units"] is units


def test_emulation_is_announced(monkeypatch, tmp_path, capsys):
    played(monkeypatch, False)
    for precision, said in (("bf16", True), ("fp32", False)):
        main(["train", "flow_matching", "--data", "digits", "--scale", "smoke", "--images", "8", "--quiet",
              "--precision", precision, "--out", str(tmp_path / precision)])
        assert ("it is emulated, many times more slowly than fp32" in capsys.readouterr().err) == said
        assert json.loads((tmp_path / precision / "config.json").read_text())["precision"] == precision


@pytest.mark.parametrize("units", [True, False])
def test_a_bf16_run_is_drawn_in_float32_where_there_are_no_units(monkeypatch, run, units):
    model, seen = open_run(run), []
    played(monkeypatch, units)
    model.model.net.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    model.draw(["one"], steps=1)
    assert seen and set(seen) == {units}


def test_doctor_tells(monkeypatch, capsys):
    for units, word in ((True, "bf16"), (False, "fp32")):
        played(monkeypatch, units)
        doctor()
        assert f"runs train with {word}" in capsys.readouterr().out


@pytest.mark.parametrize("units", [True, False])
def test_low_precision_is_simulated_where_it_would_be_emulated(monkeypatch, units):
    "On from the same weights: autocast where there are units; float32 with rounded products where there are none."
    played(monkeypatch, units)
    data = load("digits")
    config = mp.recipe_here(data, "smoke") | dict(skip=False, batch=32)
    tok, den = mp.fresh(config, data)
    seen = []
    den.net.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    before = [p.clone() for p in den.net.parameters()]
    mp.go_on(den, tok, data, "masters", images=64)
    assert set(seen) == {units} and any(not torch.equal(a, b) for a, b in zip(before, den.net.parameters()))
