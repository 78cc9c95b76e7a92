"""Contracts of every recipe: it trains, stops, resumes to the same bytes, draws from captions, is measured, says what it has no use for."""
import json
import random

import numpy as np
import pytest
import torch
from t2i_course import cli
from t2i_course.run.measure import eval_run
from t2i_course.core.runs import open_run
from t2i_course.core.register import recipe as module_of, recipes
from t2i_course.run.sample import sample_run
from t2i_course.run.settings import settings
from t2i_course.core import runs as core_runs
from t2i_course.run.train import train_run
from t2i_course.core.config import to_json
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.files import load_tensors
from t2i_course.core.guards import Stopped
from uses import built

every_recipe = pytest.mark.parametrize("recipe", recipes())
IMAGES = 256
PROMPTS = ["a handwritten seven", "a handwritten two", ""]


def train(recipe, out, **kw):
    return train_run(recipe, "digits", scale="smoke", images=IMAGES, out=out, precision="fp32", quiet=True, **kw)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "recipe -> its run folder, trained once"
    made, where = {}, tmp_path_factory.mktemp("runs")
    def get(recipe):
        if recipe not in made: made[recipe] = train(recipe, where / recipe)
        return made[recipe]
    return get


def tensors(run): return load_tensors(run / "model.safetensors")[0]


@every_recipe
def test_module_says_what_it_is(recipe):
    module = module_of(recipe)
    assert module.__doc__.strip() and hasattr(module, "build")
    config = settings(recipe, "painted2", "smoke", None, 64, 0, "fp32")
    assert config["recipe"] == recipe and config["shape"] == [3, 32, 32]
    json.dumps(to_json(config))


@every_recipe
@pytest.mark.parametrize("data", ["painted", "painted2"])
def test_losses_are_one_a_sample_on_both_rungs(recipe, data):
    "Every turn gives finite losses, one a sample, that depend on the weights of its part."
    config, ds = settings(recipe, data, "smoke", None, 64, 0, "fp32"), load(data)
    torch.manual_seed(0)
    tok, model = built(module_of(recipe), config)
    model.prepare(ds, tok, config)
    batch, draws = ds.batch("train", Draws(0, torch.arange(8))), Draws(0, torch.arange(8))
    turns = [("", model.loss)] if callable(model.loss) else [(t.part, t.loss) for t in model.loss]
    model.net.train()
    for part, loss in turns:
        losses = loss(batch.x, tok(batch.captions), draws)
        assert losses.shape == (8,) and losses.isfinite().all()
        params = list(model.net.get_submodule(part).parameters())
        grads = torch.autograd.grad(losses.sum(), params, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads), part


@every_recipe
def test_interrupted_and_resumed_is_the_same_run(recipe, runs, tmp_path, monkeypatch):
    "Stopped after the third step and once more near the end: the same bytes."
    straight, out = runs(recipe), tmp_path / "r"
    real, left = core_runs.follow, [3, 2]
    def follow(state, records, run, config, extra=None, every=20., *more):
        for i, record in enumerate(real(state, records, run, config, extra, 0.), 1):
            yield record
            if left and i == left[0] + 1:
                left.pop(0)
                raise Stopped("enough")
    monkeypatch.setattr("t2i_course.run.fit.follow", follow)
    for resume in (False, True):
        with pytest.raises(Stopped): train(recipe, out, resume=resume)
    train(recipe, out, resume=True)
    a, b = tensors(straight), tensors(out)
    assert a.keys() == b.keys()
    for name in a: assert torch.equal(a[name], b[name]), name


@every_recipe
def test_draws_what_it_is_asked_for(recipe, runs, capsys):
    "Pictures of the right size, the same for the same seed and place, others for another seed."
    run = runs(recipe)
    x, texts = sample_run(run, PROMPTS, per_caption=2, seed=1)
    again, _ = sample_run(run, PROMPTS, per_caption=2, seed=1)
    other, _ = sample_run(run, PROMPTS, per_caption=2, seed=2)
    assert x.shape == (6, 16, 16, 1) and x.dtype == np.uint8 and len(texts) == 6
    assert np.array_equal(x, again) and not np.array_equal(x, other)


@every_recipe
def test_says_which_options_it_has_no_use_for(recipe, runs, capsys):
    model = open_run(runs(recipe))
    given = dict(steps=2, guidance=1.5, temperature=.8, truncation=.7, candidates=2)
    sample_run(model, PROMPTS[:1], quiet=True, **given)
    said = capsys.readouterr().err
    for option in given: assert (f"--{option}" in said) == (option not in model.model.options), option
    assert model.model.calls(model.config) >= 1


@every_recipe
def test_fills_the_measured_row(recipe, runs):
    row = eval_run(runs(recipe), n=16, quiet=True)
    assert row["recipe"] == recipe and row["fd"] > 0 and 0 <= row["obedience"]["all"] <= 1
    assert 0 < row["params"] <= row["params_trained"] and row["nfe"] >= 1


def state_of_the_process():
    "What a notebook would notice: random numbers and the number of threads"
    kind, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (kind, words.tolist(), *rest), random.getstate(), torch.get_num_threads()


@every_recipe
def test_leaves_the_process_as_it_was(recipe, runs, tmp_path):
    for seeded in (torch.manual_seed, np.random.seed, random.seed): seeded(5)
    before = state_of_the_process()
    train_run(recipe, "digits", scale="smoke", images=64, out=tmp_path / "r", quiet=True)
    assert state_of_the_process() == before, "training"
    sample_run(runs(recipe), PROMPTS)
    assert state_of_the_process() == before, "drawing"
    eval_run(runs(recipe), n=16, quiet=True)
    assert state_of_the_process() == before, "measuring"


@pytest.mark.parametrize("recipe", [name for name in recipes() if "guidance" in settings(name, "digits", "smoke", None, 64, 0, "fp32")])
def test_guidance_0_is_the_empty_caption(recipe, runs):
    "In the painter itself, and to the byte by the command; guidance 1 is not"
    model = open_run(runs(recipe))
    assert "guidance" in model.model.options
    with torch.no_grad():
        for weight in model.model.net.parameters(): weight.add_(.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    captions = ["a handwritten seven", "a handwritten two"] * 4
    draw = lambda captions, w: model.model.painter(model.tok, model.config | dict(guidance=w))(captions, 3)
    nothing, empty, one = draw(captions, 0.), draw([""] * 8, model.config["guidance"]), draw(captions, 1.)
    assert (nothing - empty).abs().max() < 1e-4 < (one - empty).abs().max()
    assert torch.equal(model.draw(captions, 3, guidance=0), model.draw([""] * 8, 3))


def test_list_of_recipes_has_one_line_each(capsys):
    assert cli.main(["train", "--list"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == list(recipes()) and all(len(line.split()) > 4 for line in out)
