"""Every recipe trains on shards, draws, and is measured, as on the data set that they were prepared from."""
import pytest
import torch
from t2i_course.run.data import open_data
from t2i_course.run.measure import eval_run
from t2i_course.core.runs import open_run
from t2i_course.core.register import recipes
from t2i_course.run.sample import sample_run
from t2i_course.run.settings import settings
from t2i_course.run.train import train_run
from t2i_course.core.data import Draws
from uses import built
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load, origin
from t2i_course.core.metrics import SEED
from t2i_course.core.prepare import prepare
from t2i_course.core.shards import Shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("shards")
    prepare(load("digits"), where / "digits", 96, shard_size=40)
    prepare(load("painted"), where / "painted", 96, shard_size=40, seed=7)
    return where


@pytest.mark.parametrize("recipe", recipes())
def test_trains_on_shards_draws_and_is_measured(recipe, folder, tmp_path):
    run = train_run(recipe, str(folder / "digits"), scale="smoke", images=96, out=tmp_path / "run", precision="fp32", quiet=True)
    x, texts = sample_run(run, ["a handwritten seven", "a handwritten two"])
    assert x.shape == (2, 16, 16, 1) and len(texts) == 2
    row = eval_run(run, n=8, quiet=True)
    assert row["data"] == "digits" and row["fd"] > 0 and 0 <= row["obedience"]["all"] <= 1
    assert "96 samples in 3 shards" in row["source"]


@pytest.mark.parametrize("recipe", ["vae", "vqvae", "cm3leon"])
def test_painted_shards_too(recipe, folder, tmp_path):
    "A codec repeats unseen pictures that the caption demands; CM3Leon needs the recoloured twins of its pictures."
    run = train_run(recipe, str(folder / "painted"), scale="smoke", images=96, out=tmp_path / "run", precision="fp32", quiet=True)
    assert eval_run(run, n=16, quiet=True)["heldout"]["n"] == 8
    real = open_run(run).model
    if recipe != "cm3leon": return
    assert real.repaint is not None and set(real.memory.codes.flatten().tolist()) != {0}


def test_the_twin_of_a_picture_from_shards_shows_the_same_digit_in_another_ink(folder):
    from t2i_course.ar.cm3leon import Recoloured
    shards, draws = Shards(folder / "painted", window=3), Draws(3, torch.arange(20, 50))
    batch, twin = shards.batch("train", draws), Recoloured().batch("train", shards.drawn(draws))
    for k in ("digit", "paper", "weight", "lean"): assert torch.equal(batch.attrs[k], twin.attrs[k]), k
    assert (batch.attrs["ink"] != twin.attrs["ink"]).all()
    again = load("painted").batch("train", shards.drawn(draws))
    assert torch.equal(again.x, batch.x) and again.captions == batch.captions


def test_cm3leon_repaints_the_pictures_of_the_shards(folder, monkeypatch):
    "The source in the context and its answer are the same painted digit."
    from t2i_course.ar import cm3leon
    config = settings("cm3leon", str(folder / "painted"), "smoke", None, 64, 0, "fp32") | dict(tasks=[0., 1., 0.])
    tok, model = built(cm3leon, config)
    asked = []
    real = cm3leon.Recoloured.batch
    monkeypatch.setattr(cm3leon.Recoloured, "batch", lambda self, split, draws: asked.append(draws) or real(self, split, draws))
    draws = Draws(0, torch.arange(40, 48))
    batch = load(str(folder / "painted")).batch("train", draws)
    model.lesson(batch.x, tok(batch.captions), draws)
    assert torch.equal(load("painted").batch("train", asked[0]).x, batch.x)


def test_one_door(folder):
    "load and the command open the same thing; the unseen pictures are those of the origin, the trained ones those of the shards."
    path = str(folder / "digits")
    for data in (load(path), open_data(path)):
        assert isinstance(data, Shards) and len(data) == 96 and origin(data).name == "digits"
    assert origin(load("digits")).name == "digits"
    shards, digits, draws = load(path), load("digits"), Draws(SEED, torch.arange(12))
    whole = shards.whole()
    assert torch.equal(whole.batch("train", draws).x, shards.batch("train", draws).x)
    assert torch.equal(whole.batch("test", draws).x, digits.batch("test", draws).x) and whole.labels is not None


def test_shards_whose_origin_is_gone(tmp_path):
    from PIL import Image
    source = tmp_path / "mine"
    source.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(f"red number {i}")
    prepare(load(str(source)), tmp_path / "shards", 8, shard_size=4)
    run = train_run("adversarial", str(tmp_path / "shards"), scale="smoke", images=32, out=tmp_path / "run", precision="fp32", quiet=True)
    source.rename(tmp_path / "elsewhere")
    assert sample_run(run, ["red number 3"])[0].shape == (1, 32, 32, 3)
    with pytest.raises(CourseError, match="was prepared from .*mine"): eval_run(run, n=8)


def test_latents_are_for_recipes_that_draw(folder, tmp_path):
    "A codec of latents is no codec: it says so."
    small = dict(scale="smoke", images=32, precision="fp32", quiet=True)
    codec = train_run("vae", "digits", out=tmp_path / "codec", **small)
    prepare(load("digits"), tmp_path / "z", 32, open_run(codec).model.codec, shard_size=16)
    for recipe in ("vae", "vqvae", "vqvae2", "dvae", "cm3leon"):
        with pytest.raises(CourseError, match="learns from pictures and the shards in .* hold latents"):
            train_run(recipe, str(tmp_path / "z"), use=dict(codec=str(codec)), out=tmp_path / recipe, **small)
        assert not (tmp_path / recipe).exists()
    with pytest.raises(CourseError, match="by a codec"): load(str(tmp_path / "z"))
