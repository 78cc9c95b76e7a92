"The sweeps of the chapters: an arm is made when it is asked for, once, by one code; and no two arms are the same."
import json
import re
from functools import partial

import pytest
import torch
from t2i_course.run.arms import make_arms, put, code_version, kept_arms, measured_numbers, twin, value_at
from t2i_course.ar import dalle
from t2i_course.cli import main
from t2i_course.core.register import sweep as sweep_of, sweeps
from t2i_course.run.chapter import run_chapter
from t2i_course.codec import dvae, vae, vqvae
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.diffusion import samplers
from t2i_course.gan import adversarial, biggan, text_gan
from t2i_course.sweeps.codec import dvae as dvae_sweep, vae as vae_sweep, vqvae as vqvae_sweep
from t2i_course.sweeps.gan import (adversarial as adversarial_sweep, biggan as biggan_sweep, stylegan2 as stylegan2_sweep,
                                   text_gan as text_gan_sweep)
from t2i_course.sweeps.ar import dalle as dalle_sweep
from t2i_course.sweeps.diffusion import samplers as samplers_sweep
from tree import ROOT
from uses import uses_of


def chapter(name):
    "The module with a chapter's sweep."
    return sweep_of(name)[1]


SWEEPS = [name for name in sweeps() if hasattr(chapter(name), "experiments")]
RESULTS = sorted((ROOT / "results").glob("*.json"))
STAMP = ("chapter", "command", "date", "hardware", "bf16_units", "runs", "versions", "seeds", "scale", "code", "seconds", "row",
         "prompts", "pictures", "floors_again")
NOT_YET = {"dalle": {f"arms.{a}.{s}" for a in ("early", "early_counted") for s in (0, 1)}}  # to be measured, see the DALL-E chapter


@pytest.fixture
def listed(monkeypatch):
    "list(experiments(...)) where whoever calls a network, starts a process or looks for MNIST is stopped."
    def stop(*args, **kwargs): raise AssertionError("computed before it was asked for")

    def take(name, scale, seeds):
        module = chapter(name)
        def near(data):
            if data == "mnist": raise CourseError("not on this machine")
            return load(data)
        for n, instead in dict(load=near, has_bf16=lambda *a: False).items():
            if hasattr(module, n): monkeypatch.setattr(module, n, instead)
        monkeypatch.setattr(torch.nn.Module, "__call__", stop)
        monkeypatch.setattr("subprocess.run", stop)
        return list(module.experiments(scale, seeds, **dict.fromkeys(getattr(module, "RUNS", ()))))
    return take


# --- what a chapter offers ---

@pytest.mark.parametrize("name", SWEEPS)
def test_nothing_is_computed_before_it_is_asked_for(name, listed):
    pairs = listed(name, "smoke", (0, 1))
    keys = [key for key, _ in pairs]
    assert pairs and all(isinstance(key, str) and callable(make) for key, make in pairs)
    assert len(set(keys)) == len(keys)
    words = [key.split(".") for key in keys]
    inside = {tuple(w[:i]) for w in words for i in range(1, len(w))}
    assert not inside & set(map(tuple, words)), "a value would be written into another one"


@pytest.mark.parametrize("name", SWEEPS)
def test_results_are_those_of_the_code(name, listed):
    "Every number in results/ has a maker in the code, and the other way round."
    kept = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    if "earlier" in kept:  # numbers of the sweep as it was, under their own stamp, until the present one has been run
        assert kept["earlier"]["note"] and kept.keys() <= {*STAMP, "earlier"}
        return
    keys = {key for key, _ in listed(name, kept["scale"], kept["seeds"])} - NOT_YET.get(name, set())
    mnist = {key for key in value_keys(kept, "control.mnist") | value_keys(kept, "ways.mnist")}
    mnist |= {key for arm in kept.get("curve", {}).get("mnist", ()) for key in value_keys(kept, f"curve.mnist.{arm}")}
    mnist |= {"setting.mnist"} & {f"setting.{k}" for k in kept.get("setting", ())}
    found = {key: value_at(kept, key) for key in keys}
    assert all(value is not None for value in found.values()), [k for k, v in found.items() if v is None]
    left = dict(kept)
    again = {}
    for key, value in found.items(): put(again, key, value)
    for key in mnist: put(again, key, value_at(kept, key))
    for k in STAMP: left.pop(k, None)
    assert left == {k: again[k] for k in again if k in left} and again.keys() <= kept.keys()


def value_keys(d, key):
    value = value_at(d, key)
    return {f"{key}.{a}.{s}" for a, by in (value or {}).items() for s in by}


def test_each_key_is_made_from_its_own_arm(monkeypatch):
    "Asked for in the opposite order, when all loops are over."
    monkeypatch.setattr(biggan_sweep, "fresh", lambda config, seed: (None, None))
    monkeypatch.setattr(biggan_sweep, "watched", lambda config, data, images, looks, judge, n, seed, precision: (config.batch, seed))
    pairs = [(k, m) for k, m in biggan_sweep.experiments("smoke", (3, 4)) if k.startswith("batch")]
    assert {k: m() for k, m in reversed(pairs)} == {f"batch.{b}.seed{s}": (b, s) for b in biggan_sweep.BATCHES for s in (3, 4)}


def arms_of(monkeypatch, module, **instead):
    for name, value in instead.items(): monkeypatch.setattr(module, name, value)
    return [(k, m) for k, m in module.experiments("smoke", (3, 4))]


def test_late_binding_everywhere(monkeypatch):
    "What a key says is what is trained: the changes of the arm, and its seed."
    def trained(build, config, data, images, seed, precision, change=None):
        seen.append((data.name, {k: config[k] for k in config.keys() if config[k] != base[k]}, seed, change))
        raise StopIteration
    def whitened(data, config, *args): trained(None, config, data, *args)
    for module, data, first in ((vqvae_sweep, "digits", "beta."), (vae_sweep, "painted", "losses."),
                                (dvae_sweep, "digits", "arms.")):
        base, seen = module.recipe_for(load(data), "smoke"), []
        instead = dict(fit_whitened=whitened, train_judge=None) if module is vae_sweep else dict(fit=trained)
        pairs = arms_of(monkeypatch, module, **instead)
        pairs = [(k, m) for k, m in pairs if k.startswith(first)]
        for _, make in reversed(pairs):
            with pytest.raises(StopIteration): make()
        assert len(seen) == len(pairs) == len({repr(s) for s in seen}), "two keys train the same arm"
        assert [s[2] for s in reversed(seen)] == [int(re.search(r"\d+$", k).group()) for k, _ in pairs]
        if module is vqvae_sweep: assert [round(100 * s[1].get("beta", base.beta)) for s in reversed(seen)] == [
            int(k.split(".")[1]) for k, _ in pairs]


# --- a restart ---

class Counted:
    "A sweep of three arms that counts how often each is made."
    def __init__(self, values=None): self.calls, self.values = [], values or {}

    def pairs(self):
        for k in ("setting", "arms.a.seed0", "arms.b.seed0"): yield k, partial(self.make, k)

    def make(self, key):
        self.calls.append(key)
        value = self.values.get(key, dict(loss=len(key) / 7 + hash(key) % 1000 / 3.17, n=400))
        if isinstance(value, BaseException): raise value
        return value


HEAD = dict(chapter="x", command="t2i run x", date="2026-01-01", hardware="here", versions=dict(torch="2"), seeds=[0], scale="smoke", code="1")


def test_finished_arms_are_kept_and_skipped(tmp_path, capsys):
    path, first, second = tmp_path / "x.json", Counted(), Counted()
    make_arms(first.pairs(), HEAD, path)
    assert first.calls == ["setting", "arms.a.seed0", "arms.b.seed0"] and "2 of 3 arms.a.seed0" in capsys.readouterr().err
    before = path.read_bytes()
    make_arms(second.pairs(), HEAD | dict(date="2027-01-01", command="t2i run 10_x"), path)
    assert second.calls == [] and path.read_bytes() == before and capsys.readouterr().err.count("kept") == 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupt_leaves_what_is_finished(tmp_path, stop):
    path, first, second = tmp_path / "x.json", Counted({"arms.b.seed0": stop}), Counted()
    with pytest.raises(type(stop)): make_arms(first.pairs(), HEAD, path)
    assert "a" in json.loads(path.read_text())["arms"] and "b" not in json.loads(path.read_text())["arms"]
    make_arms(second.pairs(), HEAD, path)
    assert second.calls == ["arms.b.seed0"] and set(json.loads(path.read_text())["arms"]) == {"a", "b"}


@pytest.mark.parametrize("change", [dict(code="2"), dict(scale="demo"), dict(seeds=[0, 1]), dict(hardware="there"), dict(versions=dict(torch="3"))])
def test_a_file_never_mixes_two_codes_scales_or_machines(tmp_path, change, capsys):
    path, again = tmp_path / "x.json", Counted({"arms.b.seed0": KeyboardInterrupt()})
    make_arms(Counted().pairs(), HEAD, path)
    whole = path.read_bytes()
    with pytest.raises(KeyboardInterrupt): make_arms(Counted({"setting": KeyboardInterrupt()}).pairs(), HEAD | change, path)
    assert path.read_bytes() == whole, "nothing is lost before something is made"
    with pytest.raises(KeyboardInterrupt): make_arms(again.pairs(), HEAD | change, path)
    found = json.loads(path.read_text())
    assert again.calls[0] == "setting" and "b" not in found["arms"] and {k: found[k] for k in change} == change
    assert "every arm is made" in capsys.readouterr().err


def test_an_old_file_without_code_is_made_anew(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({k: v for k, v in HEAD.items() if k != "code"} | dict(setting=dict(n=1))))
    assert kept_arms(path, HEAD, ["setting"]) == {} and kept_arms(tmp_path / "none.json", HEAD, ["setting"]) == {}
    path.write_text("{")
    with pytest.raises(CourseError, match="delete it"): kept_arms(path, HEAD, ["setting"])


def test_the_version_of_a_chapter_is_that_of_its_code_and_of_what_it_imports(tmp_path, monkeypatch):
    package = tmp_path / "lib"
    for folder in ("", "core", "part"):
        (package / folder).mkdir()
        (package / folder / "__init__.py").write_text("")
    (package / "core" / "base.py").write_text("x = 1\n")
    (package / "part" / "far.py").write_text("def f(): from lib.core.base import x; return x\n")
    (package / "part" / "own.py").write_text("from .far import f # a comment\nfrom json import loads\n")
    (package / "part" / "other.py").write_text("y = 2\n")
    (package / "weights").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = [code_version("lib.part.own")]

    def changed(name, text):
        (package / name).write_text(text)
        seen.append(code_version("lib.part.own"))
        return seen[-1] != seen[-2]
    assert not changed("part/own.py", "from .far import f\n\n# another comment\nfrom json import loads\n")
    assert not changed("part/other.py", "y = 3\n"), "not imported"
    assert changed("core/base.py", "x = 2\n"), "imported by what is imported, inside a function"
    assert changed("part/own.py", "from .far import f\nlr = 1\n")
    assert changed("weights/judge.json", "{}")


def test_run_chapter_goes_on(tmp_path, monkeypatch, capsys):
    "The command itself: a chapter of the course, interrupted and taken up again; then its code changes."
    path, calls = tmp_path / "recipes.json", []

    class Sweep:
        @staticmethod
        def experiments(scale, seeds):
            for k in "ab": yield f"arm.{k}", lambda k=k: calls.append(k) or stop.get(k, dict(loss=ord(k) / 7))()
    stop = dict(a=lambda: dict(loss=.123456789), b=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    Sweep.__name__ = "t2i_course.sweeps.scale.recipes"
    monkeypatch.setattr("t2i_course.run.chapter.sweep", lambda chapter: ("recipes", Sweep))
    run = ["run", "04_recipes", "--seeds", "1", "--out", str(path)]
    assert main(run) == 130 and calls == ["a"] + ["b"] and set(json.loads(path.read_text())["arm"]) == {"a"}
    stop["b"] = lambda: dict(loss=.2345678912)
    assert main(run) == 0 and calls == ["a", "b", "b"] and "1 of 2 arm.a: kept" in capsys.readouterr().err
    assert main(run) == 0 and calls == ["a", "b", "b"]
    assert main(run[:3] + ["2"] + run[4:]) == 0 and calls[3:] == ["a", "b"], "other seeds"
    monkeypatch.setattr("t2i_course.run.chapter.code_version", lambda *m: "another")
    run_chapter("recipes", (0, 1), out=path)
    assert calls[5:] == ["a", "b"] and json.loads(path.read_text())["code"] == "another"


# --- no two arms are the same ---

def test_identical_arms_are_refused(tmp_path, capsys):
    path, head, same = tmp_path / "x.json", HEAD | dict(scale="demo"), dict(loss=1.2345678901, images=100, train_seconds=3.25)
    twins = Counted({"arms.a.seed0": same, "arms.b.seed0": same | dict(images=10, train_seconds=7.125)})
    with pytest.raises(CourseError, match="arms.b.seed0 and arms.a.seed0"): make_arms(twins.pairs(), head, path)
    assert set(json.loads(path.read_text())["arms"]) == {"a"}
    make_arms(twins.pairs(), head, path, equal=("arms",))
    make_arms(twins.pairs(), HEAD, path)
    assert "in so short a run" in capsys.readouterr().err, "at smoke scale it is said"


def test_what_counts_as_the_same():
    one = dict(fd=3.14159265, obedience=dict(all=.25), seconds_per_1000=2.5)
    assert twin("arms.a.0", one, {"arms.b.0": one | dict(seconds_per_1000=9.87654321)}) == "arms.b.0"
    assert twin("arms.a.0", one, {"arms.a.1": one}) == "arms.a.1", "the seed had no effect"
    assert not twin("arms.a.0", one, {"arms.b.0": one | dict(fd=3.14159266)})
    assert not twin("arms.a.0", one, {"arms.b.0": one | dict(more=2.71828182)})
    assert not twin("arms.a.0", one, {"row.b.0": one, "arms.b.1": one}), "the same arm in another comparison"
    for value in (.25, 1 / 3, 17, True, 0., 1e-3, float("nan"), float("inf"), "text", None, [1, 2]):
        assert not measured_numbers(value) and not twin("a.a", dict(v=value), {"a.b": dict(v=value)}), "counts and settings"
    assert not twin("a.a", dict(fd_floor=1.23456789), {"a.b": dict(fd_floor=1.23456789)})
    curve = [dict(w=w, fd=fd) for w, fd in ((1., 1.23456789), (2., 2.34567891), (3., 1.23456789))]
    assert twin("curve.a", curve, {}) == "curve.a, entry 0" and not twin("curve.a", curve[:2], {})


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_no_two_arms_in_the_results_are_the_same(path, listed):
    kept, done = json.loads(path.read_text(encoding="utf-8")), {}
    name = path.stem
    pairs = listed(name, kept["scale"], kept["seeds"]) if name in SWEEPS else [(k, None) for k in kept]
    agree = getattr(chapter(name), "MAY_AGREE", ()) if name in SWEEPS else ()
    rows = [f"row.{k}" for k in kept.get("row", {})] if isinstance(kept.get("row"), dict) else []
    for key in dict.fromkeys([k for k, _ in pairs] + [r for r in rows if value_at(kept, r)]):
        value = value_at(kept, key)
        if value is None: continue
        other = twin(key, value, done, agree)
        assert not other, f"{key} and {other}"
        done[key] = value


def test_what_may_agree_is_a_short_list():
    "Differences between runs that ought to be equal, and nothing else."
    assert {n: chapter(n).MAY_AGREE for n in SWEEPS if hasattr(chapter(n), "MAY_AGREE")} == {"fsdp": ("apart",)}


@pytest.mark.parametrize("scale", ["smoke", "demo", "full"])
def test_points_of_a_sweep_are_different_ones(scale):
    "Two numbers of calls can be the same number of Heun steps; at psi 1 it does not matter where w would be pulled."
    for sampler in samplers.SAMPLERS.values():
        steps = [samplers.steps_for(sampler, n) for n in samplers_sweep.SWEEP[scale]["nfe"]]
        assert len(set(steps)) == len(steps), steps
    assert set(stylegan2_sweep.SWEEP[scale]["psi"]) - {1.}


def test_the_early_arms_are_early(monkeypatch):
    "They get their share of the pictures, and come out otherwise than the arms that are trained to the end."
    images, arm = {}, dalle_sweep.fit_arm

    def watched(codec, data, config, n, seed):
        images[config.counts, n] = True
        return arm(codec, data, config, n, seed)
    monkeypatch.setattr(dalle_sweep, "fit_arm", watched)
    monkeypatch.setitem(dalle_sweep.SWEEP, "smoke", dalle_sweep.SWEEP["smoke"] | dict(images=64, arm=320))
    makers = dict(dalle_sweep.experiments("smoke", (0,)))
    found = {k: makers[f"arms.{k}.0"]() for k in ("dense", "early", "counted", "early_counted")}
    assert set(images) == {(False, 320), (False, 32), (True, 320), (True, 32)}
    for late, early in (("dense", "early"), ("counted", "early_counted")):
        assert found[early]["image"] != found[late]["image"] and found[early]["text"] > found[late]["text"]


# --- what an arm changes is something that its model looks at ---

def watched(config):
    "The config, and the names of its fields that were looked at."
    seen, fields = set(), set(config.keys())

    class Seen(type(config)):
        def __getattribute__(self, k):
            if k in fields: seen.add(k)
            return object.__getattribute__(self, k)
        def __or__(self, other): raise TypeError("a copy would not be watched")
    config.__class__ = Seen
    seen.clear()
    return config, seen


CHANGES = [(m, d, k, c) for m, d, by in (
    (vae, "painted", vae_sweep.ARMS), (vqvae, "painted", vqvae_sweep.GRIDS), (vqvae, "digits", vqvae_sweep.BOOKS),
    (vqvae, "digits", vqvae_sweep.THROUGH), (dvae, "digits", dvae_sweep.ARMS),
    (dvae, "painted", {k: dict(kind=k) for k in dvae.KINDS}), (text_gan, "painted", text_gan_sweep.ARMS),
    (biggan, "digits", biggan_sweep.ARMS), (adversarial, "digits", adversarial.KINDS),
    (adversarial, "digits", adversarial_sweep.PENALTIES),
    (dalle, "painted", {k: c for k, (_, c) in dalle_sweep.ARMS.items()})) for k, c in by.items()]


@pytest.mark.parametrize("module,data,arm,change", CHANGES, ids=[f"{m.__name__.split('.')[-1]}-{k}" for m, _, k, _ in CHANGES])
def test_what_an_arm_changes_is_looked_at(module, data, arm, change):
    config = module.recipe_for(load(data), "smoke")
    assert change.keys() <= config.keys(), "a name that the recipe does not know"
    uses = uses_of(module, config)
    config, seen = watched(config | change)
    _, model = module.build(config, **uses)
    from t2i_course.core.ema import state_for
    state_for(model, config)
    assert change.keys() <= seen, change.keys() - seen
