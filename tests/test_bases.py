"Runs that sweeps stand on, and models that the package ships."
import json
from types import SimpleNamespace

import pytest
import torch
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.metrics import load_judge
from t2i_course.core.register import sweep
from t2i_course.core.shipped import is_model, model_card, open_weights, shipped, shipped_path
from t2i_course.diffusion.ddpm import drawer
from t2i_course.diffusion.samplers import dpmpp_2m, uniform
from t2i_course.run import bases
from t2i_course.run.bases import names_shipped, trained, versions_of, wanted_runs
from t2i_course.run.chapter import run_chapter
from t2i_course.run.ship import MOST, WORST, asked_for, halves, rounding, ship, shipped_from
from t2i_course.run.stamp import stamp

SMALL = dict(recipe="ddpm", data="digits", images=64, changes=dict(target="v"))


@pytest.fixture(autouse=True)
def smoke(monkeypatch): monkeypatch.setenv("T2I_SCALE", "smoke")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("base") / "run", "smoke", **SMALL)


# ---- runs ----
def test_a_run_is_trained_once_and_kept(run, monkeypatch):
    before = (run.run / "model.safetensors").read_bytes()
    assert run.config.target == "v" and run.config.images == 64
    monkeypatch.setattr(bases, "train_run", lambda **k: pytest.fail("trained again"))
    (run.run / "checkpoint.safetensors").unlink()  # the model is enough
    again = trained(run.run, "smoke", **SMALL)
    assert (again.run / "model.safetensors").read_bytes() == before


def test_other_settings_are_refused_beyond_smoke_scale(run, monkeypatch):
    monkeypatch.setattr(bases, "cleared", lambda *a: pytest.fail("a long run is not taken away"))
    with pytest.raises(CourseError, match="started with"): trained(run.run, "demo", **SMALL)
    monkeypatch.setattr(bases, "complete", lambda *a: True)
    folder = run.run.parent / "demo"
    folder.mkdir()
    for p in run.run.iterdir(): (folder / p.name).write_bytes(p.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(scale="demo")))
    with pytest.raises(CourseError, match="--images"): trained(folder, "demo", **SMALL | dict(images=65))
    with pytest.raises(CourseError, match="target"): trained(folder, "demo", **SMALL | dict(changes=dict(target="eps")))


def test_at_smoke_scale_other_settings_are_trained_anew(tmp_path):
    first = trained(tmp_path / "r", "smoke", **SMALL)
    second = trained(tmp_path / "r", "smoke", **SMALL | dict(changes=dict(target="eps")))
    assert (first.config.target, second.config.target) == ("v", "eps")


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    from t2i_course.core import guards, runs
    real = runs.follow
    def follow(state, records, run, config, extra=None, every=20., *more):
        for r in real(state, records, run, config, extra, 0., *more):
            yield r
            if r.step > 1: raise guards.Stopped("enough")
    with monkeypatch.context() as m:
        m.setattr("t2i_course.run.fit.follow", follow)
        with pytest.raises(guards.Stopped, match="--resume"): trained(tmp_path / "r", "smoke", **SMALL | dict(images=160))
    assert not (tmp_path / "r" / "model.safetensors").exists()
    stopped = trained(tmp_path / "r", "smoke", **SMALL | dict(images=160))
    whole = trained(tmp_path / "whole", "smoke", **SMALL | dict(images=160))
    a, b = (r.model.net.state_dict() for r in (stopped, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_sweeps_share_a_run(runs_at_smoke):
    assert wanted_runs("sde")["mnist"][0] == wanted_runs("inversion")["mnist"][0] == wanted_runs("samplers")["mnist"][0] == "samplers"
    assert names_shipped("samplers") == dict(mnist="mnist_ddpm") and names_shipped("sde") == {}
    one, two = (runs_at_smoke(k)["mnist"] for k in ("samplers", "sde"))
    assert one.run == two.run and one.run.name == "samplers-mnist-smoke" and one.config.data == "digits"
    assert versions_of(dict(a=one)) == versions_of(dict(a=two))


def test_a_run_that_nobody_owns_is_refused(monkeypatch):
    monkeypatch.setattr(bases, "sweep", lambda name: (name, SimpleNamespace(RUNS=dict(mnist="ddpm"))) if name == "x" else sweep(name))
    with pytest.raises(CourseError, match="which has none"): wanted_runs("x")


def test_run_chapter_hands_the_runs_over(tmp_path, monkeypatch, capsys):
    class Sweep:
        RUNS = dict(base=dict(SMALL, ship="toy"))
        @staticmethod
        def experiments(scale, seeds, base):
            yield "arm", lambda: dict(loss=float(base.model.net.training), params=sum(p.numel() for p in base.model.net.parameters()))
    Sweep.__name__ = "t2i_course.sweeps.diffusion.samplers"
    monkeypatch.chdir(tmp_path)
    for where in ("t2i_course.run.chapter.sweep", "t2i_course.run.bases.sweep"): monkeypatch.setattr(where, lambda chapter: ("samplers", Sweep))
    monkeypatch.setattr("t2i_course.run.chapter.ship", lambda *a: pytest.fail("nothing is shipped at smoke scale"))
    run_chapter("samplers", (0,), out=tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["arm"]["params"] > 1000 and found["runs"]["base"] and (tmp_path / "runs" / "samplers-base-smoke" / "model.safetensors").exists()
    run_chapter("samplers", (0,), out=tmp_path / "x.json")
    assert "1 of 1 arm: kept" in capsys.readouterr().err


# ---- shipping ----
def test_a_run_ships_and_opens(run, tmp_path):
    card = ship(run, "toy", stamp("samplers", [0]), tmp_path)
    tok, model = open_weights(tmp_path / "toy.safetensors")
    assert card == model_card(tmp_path / "toy.safetensors") and is_model(card) and card["images"] == 64
    assert {"recipe", "data", "seed"} <= card["config"].keys() and card["data_license"] and card["command"] and card["hardware"]
    x, t = torch.randn(4, *run.config.shape), torch.full((4,), .5)
    with torch.no_grad(): a, b = (m.predict(x, t, k(["a handwritten two"] * 4))[0] for m, k in ((run.model, run.tok), (model, tok)))
    assert 0 < (a - b).abs().max() < .01
    assert not any(p.requires_grad for p in model.net.parameters())


def test_harmful_rounding_and_large_files_are_refused(run, tmp_path, monkeypatch):
    off = rounding(run, halves(run))
    assert 0 < off["answers"] < WORST and 0 < off["pictures"] < .02, off
    with monkeypatch.context() as m:
        m.setattr("t2i_course.run.ship.WORST", 0.)
        with pytest.raises(CourseError, match="float16"): ship(run, "toy", {}, tmp_path)
    with monkeypatch.context() as m:
        m.setattr("t2i_course.run.ship.MOST", 1000)
        with pytest.raises(CourseError, match="bytes"): ship(run, "toy", stamp("samplers", [0]), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_damaged_weights_are_refused(run, tmp_path):
    ship(run, "toy", stamp("samplers", [0]), tmp_path)
    path = tmp_path / "toy.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"0000")
    with pytest.raises(CourseError, match="changed or damaged"): open_weights(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(CourseError, match="cannot be read"): open_weights(path)
    with pytest.raises(CourseError, match="only mnist_ddpm"): shipped("nothing")
    with pytest.raises(CourseError, match="judge"): shipped("mnist")


def test_it_is_known_from_which_run_a_model_comes(run, tmp_path, monkeypatch):
    monkeypatch.setattr("t2i_course.run.ship.shipped_path", lambda name: tmp_path / f"{name}.safetensors")
    assert not shipped_from(run, "toy")
    ship(run, "toy", stamp("samplers", [0]))
    assert shipped_from(run, "toy")


def test_the_shipped_model():
    "Small enough, described, and able to draw what it is asked for, without MNIST and without training."
    card, path = model_card(shipped_path("mnist_ddpm")), shipped_path("mnist_ddpm")
    assert path.stat().st_size <= MOST and card["parameters"] == 636_100 and "CC BY-SA" in card["data_license"]
    assert card["config"]["data"] == "mnist" and card["config"]["target"] == "v" and card["float16"]["answers"] < WORST
    assert wanted_runs("samplers")["mnist"][1]["images"] == card["config"]["images"]
    tok, den = shipped("mnist_ddpm")
    words = "zero one two three four five six seven eight nine".split()
    x = drawer(den, tok, (1, 28, 28), uniform(None, 8), sampler=dpmpp_2m)([f"a handwritten {w}" for w in words] * 2, seed=0)
    read = load_judge("mnist").read(x)["digit"]
    assert (read == torch.arange(20) % 10).float().mean() > .7
    assert Draws(0, torch.arange(2)).normal("start", 1, 28, 28).shape[1:] == tuple(card["config"]["shape"])


def test_a_shipped_model_is_a_run_again(tmp_path):
    given = dict(recipe="ddpm", data="mnist", images=1_000_000, changes=dict(target="v"), seed=0)
    assert asked_for("mnist_ddpm", **given) and not asked_for("mnist_ddpm", **given | dict(images=10))
    assert not asked_for("mnist_ddpm", **given | dict(changes=dict(target="eps"))) and not asked_for("none", **given)
    again = trained(tmp_path / "run", "demo", **given, ship="mnist_ddpm")
    net = shipped("mnist_ddpm")[1].net.state_dict()
    assert all(torch.equal(v, net[k]) for k, v in again.model.net.state_dict().items())
    assert shipped_from(again, "mnist_ddpm")
