"""The command line: words that reach the commands, fields that are set, options that models declare."""
import inspect
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from t2i_course import cli
from t2i_course.core.files import CourseError
from t2i_course.core.register import PACKAGE, recipe, recipes, sweep, sweeps
from t2i_course.core.runs import open_run
from t2i_course.run.sample import options_of_all
from t2i_course.run.words import roles, spread
from tree import ROOT, chapters

SMALL = ("--data", "digits", "--scale", "smoke", "--images", "64", "--precision", "fp32", "--quiet")


def t2i(*args): return cli.main([str(a) for a in args])


def refused(capsys, *args):
    capsys.readouterr()
    code, err = t2i(*args), capsys.readouterr().err.strip()
    assert code == 2 and len([line for line in err.splitlines() if line.startswith("t2i: ")]) == 1, err
    return err.splitlines()[-1]


# --- several words behind an option ---

MANY, EVERY = {"--prompt", "--peers"}, {"--prompt", "--peers", "--out", "--quiet"}


@pytest.mark.parametrize("typed, read", [
    ("RUN --prompt a b --out x", "RUN --prompt a --prompt b --out x"),
    ("--prompt a --prompt b c RUN", "--prompt a --prompt b --prompt c --prompt RUN"),
    ("--prompt=a --out x", "--prompt=a --out x"), ("--out x --quiet", "--out x --quiet"), ("", "")])
def test_words_are_spread(typed, read): assert spread(typed.split(), MANY, EVERY) == read.split()


def test_none_behind_an_option():
    assert spread(["--peers", "--out", "x"], MANY, EVERY) == ["--peers", "", "--out", "x"] == spread(["--peers"], MANY, EVERY) + ["--out", "x"]
    for typed in (["--prompt"], ["--prompt", "--out", "x"]):
        with pytest.raises(CourseError, match="--prompt wants something"): spread(typed, MANY, EVERY)


@given(st.lists(st.text(min_size=1).filter(lambda s: not s.startswith("-")), min_size=1))
def test_no_word_is_lost(words):
    assert spread(["--prompt", *words, "--quiet"], MANY, EVERY) == [v for w in words for v in ("--prompt", w)] + ["--quiet"]


def test_roles():
    assert roles(["codec=a", "text=b/c=d"], None) == dict(codec="a", text="b/c=d") and roles([], "a") == dict(codec="a") and roles([], None) is None


# --- fields of the config ---

def test_fields_are_set_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "r"
    assert t2i("train", "ddpm", *SMALL, "--set", "lr=1e-4", "batch=16", "--set", "widths=8,16", "--out", out) == 0
    config = open_run(out).config
    assert (config.lr, config.batch, list(config.widths)) == (1e-4, 16, [8, 16])
    assert json.loads((out / "train.json").read_text())["steps"] == 4
    assert t2i("train", "--resume", "--out", out, "--set", "lr=0.0001") == 0
    assert "was started with lr = 0.0001, not 0.5" in refused(capsys, "train", "--resume", "--out", out, "--set", "lr=.5")
    assert "no field 'lrate'" in refused(capsys, "train", "ddpm", *SMALL, "--set", "lrate=1", "--out", tmp_path / "b")
    assert "follows from the command" in refused(capsys, "train", "ddpm", *SMALL, "--set", "seed=1", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_config_of_another_version_is_refused(tmp_path, capsys):
    out = tmp_path / "r"
    assert t2i("train", "ddpm", *SMALL, "--out", out) == 0
    path = out / "config.json"
    old = json.loads(path.read_text())
    for change, says in ((dict(sample_steps=50), "names sample_steps"), (dict(recipe="gan"), "there is no 'gan'")):
        path.write_text(json.dumps(old | change))
        assert says in refused(capsys, "sample", out, "--prompt", "x", "--out", tmp_path / "a.png")
    path.write_text(json.dumps({k: v for k, v in old.items() if k != "lr"}))
    assert "lacks lr" in refused(capsys, "sample", out, "--prompt", "x", "--out", tmp_path / "a.png")


def test_no_absolute_path_in_a_config(tmp_path):
    from PIL import Image
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 99, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a picture number {i}")
    out = tmp_path / "runs" / "r"
    small = [tmp_path if word == "digits" else word for word in SMALL]
    assert t2i("train", "ddpm", *small, "--out", out) == 0
    text = (out / "config.json").read_text(encoding="utf-8")
    assert json.loads(text)["data"] == "../.." and str(tmp_path) not in text and json.dumps(str(tmp_path))[1:-1] not in text
    assert Path(open_run(out).config.data) == tmp_path.resolve()


# --- options of models ---

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    assert t2i("train", "ddpm", *SMALL, "--out", out) == 0
    return out


def test_options_are_those_of_the_model(run, tmp_path, capsys):
    draw = ("sample", run, "--prompt", "a two", "--out", tmp_path / "a.png")
    assert t2i(*draw, "--steps=2", "--guidance", "1.5", "--temperature", 2) == 0
    assert "ddpm has no use for --temperature: left aside" in capsys.readouterr().err
    assert "there is no option --stebs" in refused(capsys, *draw, "--stebs", 3)
    assert "--steps wants a whole number; got '2.5'" in refused(capsys, *draw, "--steps", 2.5)
    assert "--guidance wants a number; got 'x'" in refused(capsys, *draw, "--guidance", "x")
    assert "--steps wants a number behind it" in refused(capsys, *draw, "--steps")
    assert "--steps must be a whole number from 1 to" in refused(capsys, *draw, "--steps", 0)


@pytest.mark.parametrize("name", ["--prompts", "--promt", "--run", "--texts", "--options", "--ext", "--out-"])
def test_a_misspelt_option_is_named(run, tmp_path, capsys, name):
    "Also one that is called as something inside the command, and before it is asked what to draw"
    said = refused(capsys, "sample", run, name, "a two", "--out", tmp_path / "a.png")
    assert f"there is no option {name}" in said and not list(tmp_path.iterdir())


def test_an_option_of_the_model_alone_is_known():
    "The number of steps that only this model declares, however many recipes there are"
    from t2i_course.run.sample import as_numbers
    assert as_numbers(dict(own="3", half="0.5"), dict(own=(1, 9, True, ""), half=(0, 1, False, ""))) == dict(own=3, half=.5)


def test_every_option_of_every_model_can_be_typed(capsys):
    assert {"steps", "guidance", "temperature", "truncation", "candidates"} <= set(options_of_all())
    assert t2i("sample", "--help") == 0
    shown = capsys.readouterr().out
    for name in options_of_all(): assert f"--{name.replace('_', '-')} N" in shown


def test_help_of_every_command(capsys):
    for name in ("demo", "train", "sample", "eval", "run", "data", "prepare", "bench", "report", "doctor"):
        assert t2i(name, "--help") == 0 and "Usage: t2i " + name in capsys.readouterr().out
    assert t2i("train", "--help") == 0 and "flow_matching" in capsys.readouterr().out
    assert t2i("run", "--help") == 0 and "report_card" in capsys.readouterr().out


def test_help_says_where_what_is_needed_goes_and_what_is_usual(capsys):
    import inspect
    from t2i_course.run.chapter import run_chapter
    def help_of(name):
        assert t2i(name, "--help") == 0
        return "".join(capsys.readouterr().out.split())  # a line may end anywhere
    assert "intoOUT-ROLE" in help_of("train") and "shardsoflatents" in help_of("train")
    assert "report_card120" in help_of("run") and sweep("report_card")[1].SECONDS == 120 and "ofmetricsafolder" in help_of("run")
    modules = [sweep(name)[1] for name in sweeps()]
    calls = [run_chapter, cli.run_command, *(mod.experiments for mod in modules if hasattr(mod, "experiments"))]
    seeds = [inspect.signature(call).parameters["seeds"].default for call in calls]
    many = {len(n) for n in seeds if isinstance(n, tuple)} # three of training, ten of noise on one model
    assert len(seeds) > 20 and many == {3, 10} and [n for n in seeds if not isinstance(n, tuple)] == [None, None]


def test_the_command_line_at_work_is_the_innermost():
    from t2i_course.run.stamp import command, typing
    assert command("f()") == "python: f()"
    with typing(["a", 1]):
        with pytest.raises(KeyError), typing(["b"]):
            assert command().endswith(" b")
            raise KeyError
        assert command().endswith(" a 1")
    assert command("f()") == "python: f()"


# --- the register ---

def test_a_recipe_is_a_module_with_three_names():
    assert len(recipes()) >= 15 and recipes()["adversarial"] == "t2i_course.gan.adversarial"
    for name in recipes(): assert inspect.isclass(recipe(name).Config) and callable(recipe(name).recipe_for) and callable(recipe(name).build)
    with pytest.raises(CourseError, match="there is no 'gan': choose adversarial"): recipe("gan")


def test_recipes_stand_in_the_order_of_the_parts():
    parts = {chapter.address: chapter.order[0] for chapter in chapters()}
    order = [parts[path.removeprefix("t2i_course.")] for path in recipes().values()]
    assert order == sorted(order)


def test_sweeps_are_found_by_their_address():
    "Each at the address of a chapter, and no two of one name"
    addresses = {chapter.address for chapter in chapters()}
    paths = [p for p in sorted((PACKAGE / "sweeps").glob("*/*.py")) if f"{PACKAGE.name}.sweeps.{p.parent.name}.{p.stem}" in sweeps().values()]
    assert len(paths) == len(sweeps()) == len({p.stem for p in paths}) > 20
    for p in paths: # guidance_trained stands beside guidance
        assert any(f"{p.parent.name}.{p.stem}_".startswith(f"{address}_") for address in addresses), p
    assert sweep("01_flow_matching") == sweep("flow_matching") and sweep("ddpm")[1].ROWS == ("digits", "painted")
    with pytest.raises(CourseError, match="there is no 'nothing'"): sweep("nothing")


PLUMBING = {"data", "metrics", "plots", "training", "ema", "conditioning", "experiments", "recipes"}  # words of everybody


def test_no_chapter_has_its_name_in_the_commands():
    "A new chapter touches nothing here; what is named is the usual recipe, that of the demo, and the way to share a model"
    names = {chapter.address.partition(".")[2] for chapter in chapters()} - PLUMBING
    for path in [ROOT / "t2i_course" / "cli.py", *(ROOT / "t2i_course" / "run").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert {word for word in names if f'"{word}"' in text} <= {"flow_matching", "fsdp"}, path.name


def test_the_command_is_light():
    import subprocess
    heavy = ("diffusers", "matplotlib.pyplot", "sklearn", "torchvision", "t2i_course.ar.dalle")
    code = f"import sys; import t2i_course.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"
