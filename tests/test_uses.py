"""Runs that stand on runs: what is needed is trained first, what is given is taken, what is missing or changed is refused by name."""
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from t2i_course import cli
from t2i_course.core.files import CourseError
from t2i_course.core.register import recipe, recipes
from t2i_course.core.runs import open_run
from t2i_course.core.sources import load
from t2i_course.run.measure import costs, eval_run
from t2i_course.run.rows import cleared
from t2i_course.run.settings import check_roles, clock, needs, settings

SMALL = ("--data", "digits", "--scale", "smoke", "--precision", "fp32", "--quiet")
NEEDY = [name for name in recipes() if hasattr(recipe(name), "uses_for")]


def t2i(*args): return cli.main([str(a) for a in args])


def config_of(run): return json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))


def refused(capsys, *args):
    capsys.readouterr()
    code, err = t2i(*args), capsys.readouterr().err.strip()
    assert code == 2 and err.splitlines()[-1].startswith("t2i: "), err
    return err.splitlines()[-1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "DALL-E and the codec that was trained for it, on one clock of 100 images"
    out = tmp_path_factory.mktemp("pair") / "dalle"
    assert t2i("train", "dalle", *SMALL, "--images", 100, "--out", out) == 0
    return out


def test_some_recipes_stand_on_others(): assert {"dalle", "parti", "cm3leon", "pixelcnn"} <= set(NEEDY)


def test_what_is_needed_is_trained_first_on_its_share_of_the_clock(pair, capsys):
    "The run and the codec share the images; the row counts both"
    codec, config = pair.with_name("dalle-codec"), config_of(pair)
    used = config["uses"]["codec"]
    assert used["run"] == "../dalle-codec" and config["images"] == 100
    own, other = (json.loads((run / "train.json").read_text())["images"] for run in (pair, codec))
    assert own + other == 100 and other == round(100 * used["share"]) > 0
    assert costs(pair, open_run(pair).config)["images"] == 100
    row = eval_run(pair, n=8, quiet=True)
    assert row["images"] == 100 and row["params_trained"] > json.loads((pair / "train.json").read_text())["params_trained"]


def test_the_same_command_with_resume_changes_nothing(pair, tmp_path, capsys):
    assert t2i("train", "dalle", *SMALL, "--images", 100, "--resume", "--out", pair) == 0
    assert "trained to the end already" in capsys.readouterr().err
    (tmp_path / "dalle-codec").symlink_to(pair.with_name("dalle-codec"))
    assert t2i("train", "dalle", *SMALL, "--images", 100, "--resume", "--out", tmp_path / "dalle") == 0
    said = capsys.readouterr().err
    assert f"{tmp_path / 'dalle-codec'} is there already" in said and "is trained first" not in said
    assert "was started with --images 100" in refused(capsys, "train", "--images", 80, "--resume", "--out", pair)


def test_an_interrupted_pair_goes_on(pair, tmp_path):
    "Stopped after the codec: it is taken up as it is, and the pair is the same as without the stop"
    shutil.copytree(pair.with_name("dalle-codec"), tmp_path / "dalle-codec")
    assert t2i("train", "dalle", *SMALL, "--images", 100, "--resume", "--out", tmp_path / "dalle") == 0
    a, b = (open_run(run / "dalle" if run == tmp_path else run).model.net.state_dict() for run in (tmp_path, pair))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    "A pair whose codec takes several steps"
    out = tmp_path_factory.mktemp("longer") / "dalle"
    assert t2i("train", "dalle", *SMALL, "--images", 640, "--out", out) == 0
    return out


def stopped_in_the_codec(out, monkeypatch, capsys):
    "Asked to stop after the first step; the sentence that is printed"
    from t2i_course.run import fit
    real = fit.follow
    def follow(state, records, *args):
        for record in real(state, records, *args):
            yield record
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "follow", follow)
        assert t2i("train", "dalle", *SMALL, "--images", 640, "--out", out) == 130
    return capsys.readouterr().err.strip().splitlines()[-1]


def same_bytes(a, b):
    def files(run): return [(run.with_name(n) / "model.safetensors").read_bytes() for n in (run.name, f"{run.name}-codec")]
    return files(a) == files(b)


@pytest.mark.parametrize("again", [[], ["dalle", *SMALL, "--images", 640], ["dalle", "--precision", "auto"]])
def test_a_pair_stopped_in_the_middle_of_the_codec_goes_on(longer, again, tmp_path, monkeypatch, capsys):
    "By the command that is printed, and by the first one with --resume: the same bytes as without the stop"
    out = tmp_path / "dalle"
    assert stopped_in_the_codec(out, monkeypatch, capsys).endswith(f"t2i train --resume --out {out}")
    assert "seed" in refused(capsys, "train", "--seed", 3, "--resume", "--out", out)
    assert "images" in refused(capsys, "train", "dalle", "--images", 900, "--resume", "--out", out)
    capsys.readouterr()
    assert t2i("train", *again, "--resume", "--out", out, "--quiet") == 0 and "going on at" in capsys.readouterr().err
    assert same_bytes(out, longer) and not (out / "plan.json").exists()


def test_what_is_needed_and_there_already_is_not_taken_unasked(pair, tmp_path, capsys):
    "Without --resume it may be anybody's run: refused, and nothing is left behind; a damaged plan is named"
    shutil.copytree(pair.with_name("dalle-codec"), tmp_path / "dalle-codec")
    assert "already holds a run" in refused(capsys, "train", "dalle", *SMALL, "--images", 100, "--out", tmp_path / "dalle")
    assert not (tmp_path / "dalle").exists()
    (tmp_path / "dalle").mkdir()
    (tmp_path / "dalle" / "plan.json").write_text("{")
    assert "plan.json cannot be read" in refused(capsys, "train", "--resume", "--out", tmp_path / "dalle")


def test_a_codec_that_several_processes_began_goes_on_alone(longer, tmp_path, monkeypatch, capsys):
    "The form of a checkpoint is a matter of its folder, not of the folder of the run that needs it"
    from t2i_course.run import train
    from t2i_course.scale.fsdp import One
    out = tmp_path / "dalle"
    with monkeypatch.context() as patch:
        patch.setattr(train, "sharers", lambda *args: One())
        stopped_in_the_codec(out, monkeypatch, capsys)
    assert list((tmp_path / "dalle-codec").glob("checkpoint-*"))
    assert t2i("train", "--resume", "--out", out, "--quiet") == 0 and "going on at" in capsys.readouterr().err
    assert same_bytes(out, longer)


def test_a_finished_codec_is_complete_whoever_trained_it(longer, tmp_path):
    from t2i_course.run.fit import complete
    codec = tmp_path / "codec"
    shutil.copytree(longer.with_name("dalle-codec"), codec)
    config = open_run(codec).config
    (codec / "checkpoint.safetensors").unlink()
    assert complete(codec, config) and not complete(codec, config | dict(images=10_000))
    (codec / "model.safetensors").unlink()
    assert not complete(codec, config)


def test_pictures_are_read_once_for_a_run_and_what_it_needs(tmp_path, monkeypatch):
    from PIL import Image
    from t2i_course.core.folders import Folder
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"red number {i % 3}")
    read, real = [], Folder.__init__
    monkeypatch.setattr(Folder, "__init__", lambda self, *args: (read.append(args), real(self, *args))[1])
    assert t2i("train", "dalle", "--data", tmp_path, *SMALL[2:], "--size", 16, "--images", 32, "--out", tmp_path / "runs" / "a") == 0
    assert len(read) == 1


@pytest.mark.parametrize("share", ["1", "0", "-0.5", "1.5"])
def test_a_share_of_the_clock_leaves_some_to_both(share, tmp_path, capsys):
    "Refused before anything is written: a run that has no clock left would never end"
    said = refused(capsys, "train", "dalle", *SMALL, "--seconds", 2, "--set", f"share={share}", "--out", tmp_path / "a")
    assert "share of the clock that the codec takes" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NEEDY)
def test_a_finished_run_is_taken(name, tmp_path, capsys):
    "Given by --use, it is not trained again, and the whole clock is left for the run itself"
    module = recipe(name)
    config = settings(name, "digits", "smoke", None, 64, 0, "fp32")
    use = []
    for need in needs(config):
        sets = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in need.changes.items()]
        assert t2i("train", need.recipe, *SMALL, "--images", 64, "--out", tmp_path / need.role, *(["--set", *sets] if sets else [])) == 0
        use.append(f"{need.role}={tmp_path / need.role}")
    assert t2i("train", name, *SMALL, "--images", 64, "--use", *use, "--out", tmp_path / "run") == 0
    assert not list(tmp_path.glob("run-*")) and "is trained first" not in capsys.readouterr().err
    run = open_run(tmp_path / "run")
    assert clock(run.config)[0] == 64 and isinstance(run.config, module.Config)
    assert run.draw(["a handwritten seven"]).shape == (1, *load("digits").shape)
    assert not any(p.requires_grad for p in run.model.net.parameters())


def test_codec_is_the_short_form(pair, tmp_path):
    codec = pair.with_name("dalle-codec")
    assert t2i("train", "dalle", *SMALL, "--images", 32, "--codec", codec, "--out", tmp_path / "a") == 0
    assert t2i("train", "dalle", *SMALL, "--images", 32, "--use", f"codec={codec}", "--out", tmp_path / "b") == 0
    assert config_of(tmp_path / "a")["uses"] == config_of(tmp_path / "b")["uses"]


@pytest.mark.parametrize("use, says", [(["text=x"], "no use for a text: it has a use for codec"), (["codec"], "ROLE=RUN"),
                                       (["codec=nowhere"], "nowhere"), (["codec=a", "codec=b"], "two runs are given as the codec")])
def test_what_cannot_be_used_is_refused(tmp_path, capsys, use, says):
    assert says in refused(capsys, "train", "dalle", *SMALL, "--images", 32, "--use", *use, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_recipe_that_stands_alone_takes_none(tmp_path, capsys):
    assert "stands on no other run" in refused(capsys, "train", "adversarial", *SMALL, "--use", "codec=x", "--out", tmp_path / "a")
    with pytest.raises(CourseError, match="for shards of latents"): check_roles("ddpm", recipe("ddpm"), "digits", dict(codec="x"))


def test_a_missing_or_changed_run_is_refused_by_name(pair, tmp_path, capsys):
    for name in ("dalle", "dalle-codec"): shutil.copytree(pair.with_name(name), tmp_path / name)
    run, codec = tmp_path / "dalle", tmp_path / "dalle-codec"
    draw = ("sample", run, "--prompt", "a handwritten two", "--out", tmp_path / "a.png")
    assert t2i(*draw) == 0
    codec.rename(tmp_path / "away")
    said = refused(capsys, *draw)
    assert f"uses the codec of {codec}" in said and "--use codec=RUN" in said
    assert t2i("train", "--resume", "--out", run, "--use", f"codec={tmp_path / 'away'}") == 0  # its new place is written down
    assert config_of(run)["uses"]["codec"]["run"] == "../away" and t2i(*draw) == 0
    assert t2i("train", "vqvae", *SMALL, "--images", 32, "--seed", 3, "--out", codec) == 0
    assert "was started with --codec" in refused(capsys, "train", "--resume", "--out", run, "--codec", codec)
    shutil.rmtree(tmp_path / "away")
    shutil.copytree(codec, tmp_path / "away")
    assert "trained with another codec" in refused(capsys, *draw)


def test_a_run_beside_is_not_one_that_is_needed(pair, tmp_path):
    "What is gone on with is the run itself or one that it needs, not whatever has a name that begins so"
    from t2i_course.run.rows import begun
    wanted = settings("dalle", "digits", "smoke", None, 100, 0, "fp32")
    shutil.copytree(pair, tmp_path / "dalle-other")
    assert not begun(tmp_path / "dalle", wanted)
    shutil.copytree(pair.with_name("dalle-codec"), tmp_path / "dalle-codec")
    assert begun(tmp_path / "dalle", wanted)


def test_stale_used_runs_are_made_anew(pair, tmp_path):
    "A row's run is kept while it and what was trained for it are as wanted"
    for name in ("dalle", "dalle-codec"): shutil.copytree(pair.with_name(name), tmp_path / name)
    wanted = settings("dalle", "digits", "smoke", None, 100, 0, "fp32")
    assert not cleared(tmp_path / "dalle", wanted) and (tmp_path / "dalle" / "config.json").exists()
    path = tmp_path / "dalle-codec" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(seed=5)))
    assert cleared(tmp_path / "dalle", wanted) and not list(tmp_path.glob("*/config.json"))
