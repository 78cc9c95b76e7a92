"""The demo: two clocks, what it says of them, and how many drawings it measures with."""
import json

import pytest
import torch

from t2i_course.core.data import HELD_OUT
from t2i_course.run.demo import PROMPTS, clock_text, judged, demo as make
from t2i_course.run.text import margin, row_text
from t2i_course.core.conditioning import drawn_from


def test_it_says_which_clock_ended_the_training():
    assert clock_text(dict(images=40_000, seconds=33.), 40_000, 150).endswith("all that were planned.")
    said = clock_text(dict(images=24_000, seconds=150.4), 40_000, 150)
    assert "24,000 pictures in 150 s, 160 a second" in said and "time limit of 150 s" in said and "40,000" in said


def test_the_last_four_prompts_are_held_out_pairs_and_no_others():
    "The title of the sheet says so."
    held = [any({digit, ink} <= set(prompt.split()) for digit, ink in HELD_OUT) for prompt in PROMPTS]
    assert held == [False] * 8 + [True] * 4


@pytest.mark.parametrize("each, n", [(.005, 1000), (.04, 500), (.06, 300), (1., 200)])
def test_a_slow_machine_measures_with_fewer_drawings(each, n):
    assert judged(each, 1000) == n


def test_a_test_run_measures_as_it_is_told(): assert judged(9., 64) == 64


def test_the_margin_is_wilsons():
    "R's binom package: 92 of 100 has the 95% interval 0.8500 to 0.9589."
    assert margin(.92, 100) == pytest.approx((.9589 - .8500) / 2, abs=1e-4)
    assert 0 < margin(1., 100) < .02 < margin(1., 60) # not empty where all succeed


def test_drawing_tells_how_far_it_is():
    told = []
    draw = drawn_from(lambda cond, draws: draws.normal("x", 1, 2, 2), lambda captions: torch.zeros(len(captions)), batch=4)
    x = draw(["a"] * 10, 0, told.append)
    assert told == [4, 4, 2] and len(x) == 10


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")/"run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T2I_SCALE", "smoke")
        row = make(out=out, images=256)
    return out, row


def test_demo_leaves_pictures_numbers_and_model(demo):
    out, row = demo
    assert {"samples.png", "metrics.json", "model.safetensors", "train.json"} <= {p.name for p in out.iterdir()}
    assert json.loads((out/"metrics.json").read_text(encoding="utf-8"))["images"] == row["images"] == 256
    assert row["obedience"]["n"] <= row["n"] == 64


def test_its_margin_is_printed(demo):
    o = demo[1]["obedience"]
    assert f"{100*o['all']:.1f}% +- {100*margin(o['all'], o['n']):.1f} ({o['n']} captions)" in row_text(demo[1])
