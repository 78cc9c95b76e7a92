"""Calls of the network for a picture are counted while one is drawn: guidance doubles them, inside its interval only; candidates multiply them."""
import inspect
import json
import pkgutil
from functools import partial
from importlib import import_module

import pytest
import t2i_course
import torch
from t2i_course.core.register import recipe as module_of, recipes
from t2i_course.run.settings import settings
from t2i_course.core.conditioning import count_calls
from t2i_course.core.data import Draws, results_path
from t2i_course.core.sources import load
from t2i_course.diffusion import ddpm, likelihood
from t2i_course.diffusion.schedules import cosine_betas
from uses import built

DRAWN = dict(guidance=1.), dict(guidance=3.), dict(candidates=3), dict(steps=7), dict(guide_below=.5)


def model_of(recipe, data="digits", scale="smoke", **change):
    config = settings(recipe, data, scale, None, 64, 0, "fp32", changes=change)
    torch.manual_seed(0)
    tok, model = built(module_of(recipe), config)
    if "fit_images" in config: config |= dict(fit_images=256)
    model.prepare(load(data), tok, config)
    return tok, model, config


def thrice(draw, _): return draw(["a handwritten seven", "a handwritten two", ""])


@pytest.mark.parametrize("recipe", recipes())
def test_what_is_said_is_what_is_called(recipe):
    "Three pictures, drawn from captions, make three times the calls of one."
    tok, model, config = model_of(recipe)
    for change in ({}, *(d for d in DRAWN if d.keys() <= config.keys())):
        c = config | change
        rows = count_calls(partial(thrice, model.painter(tok, c)), model.counted())
        assert rows == 3 * model.calls(c) > 0, change


def test_guidance_is_paid_inside_its_interval():
    "Counted here by a network that keeps count: 16 steps, of which 13 have t above .2; 24 steps, of which 16 lie in (.2, .85]."
    tok, den, config = model_of("flow_matching")
    net, seen = den.net, []
    class Counting(torch.nn.Module):
        def forward(self, x, t, cond):
            seen.append(len(x))
            return net(x, t, cond)
        def parameters(self, *a): return net.parameters(*a)
    den.net = Counting()
    def counted(**change):
        seen.clear()
        den.painter(tok, config | change)(["a handwritten two"], 0)
        return sum(seen)
    painted = dict(steps=16, guidance=2., guide_above=.2, guide_below=1.)
    digits = dict(steps=24, guidance=2.1, guide_above=.2, guide_below=.85)
    for change, calls in ((painted, 29), (digits, 40), (painted | dict(guidance=1.), 16), (painted | dict(guide_above=0.), 32)):
        assert counted(**change) == calls and den.calls(config | change) == calls


@pytest.mark.parametrize("recipe,codes", [("dalle", 16), ("parti", 16), ("cm3leon", 16), ("pixelcnn", 20)])
def test_a_call_for_each_code_twice_with_guidance_for_each_candidate(recipe, codes, monkeypatch):
    "Counted here by the codes that are drawn."
    tok, model, config = model_of(recipe)
    module, drawn = module_of(recipe), []
    if recipe == "parti": module = import_module("t2i_course.ar.dalle")
    real = module.pick
    monkeypatch.setattr(module, "pick", lambda logits, *a: drawn.append(len(logits)) or real(logits, *a))
    for w in (1., 2.):
        for n in (1, 3) if "candidates" in config else (1,):
            drawn.clear()
            change = dict(guidance=w) | (dict(candidates=n) if "candidates" in config else {})
            assert model.calls(config | change) == codes * n * (1 if w == 1 else 2)
            assert sum(drawn) == codes * n


def test_stages_of_a_stack_are_calls():
    tok, model, config = model_of("text_gan", stack=.5)
    assert count_calls(model.painter(tok, config), model.counted()) == model.calls(config) == 2


# ---- published numbers ----
def rows(value):
    if isinstance(value, dict):
        if {"nfe", "recipe"} <= value.keys() or {"nfe", "method"} <= value.keys(): yield value
        else:
            for v in value.values(): yield from rows(v)
    elif isinstance(value, list):
        for v in value: yield from rows(v)


@pytest.mark.parametrize("name,data", [("demo", "painted"), ("bench_painted", "painted"), ("flow_matching", "painted"), ("ddpm", "painted"),
                                       ("report_card", "painted"), ("bench_digits", "digits")])
def test_published_calls_are_those_of_the_recipe(name, data):
    "With the settings of the demo scale, which the rows were made with; 16 steps on MNIST are the recipe of a few seconds."
    path = results_path(name)
    known, found = {}, list(rows(json.loads(path.read_text())))
    assert found
    for row in found:
        recipe, quick = row.get("recipe", "flow_matching"), row.get("guidance") == 1.6
        if (recipe, quick) not in known:
            full = settings(recipe, data, "demo", 5 if quick else None, None, 0, "fp32")
            drawn = ("steps", "guidance", "guide_above", "guide_below", "candidates")
            tok, model, config = model_of(recipe, data, **{k: full[k] for k in drawn if k in full})
            known[recipe, quick] = model.calls(config)
        assert row["nfe"] == known[recipe, quick], (recipe, row.get("guidance"))


# ---- what the drawer asks of a denoiser ----
def test_every_denoiser_answers_as_the_first_does():
    "A predict without `boost` ends in a TypeError as soon as the painter asks."
    for m in pkgutil.walk_packages(t2i_course.__path__, "t2i_course."):
        if "__main__" not in m.name: import_module(m.name)
    def below(c): return [s for d in c.__subclasses__() for s in (d, *below(d))]
    found = below(ddpm.Denoiser)
    assert likelihood.LearnedVariance in found
    for c in found:
        assert inspect.signature(c.predict).parameters.keys() == inspect.signature(ddpm.Denoiser.predict).parameters.keys(), c


def test_learned_variance_paints():
    data = load("digits")
    config = ddpm.recipe_for(data, "smoke") | dict(steps=3)
    tok, den = likelihood.build_learned(config, cosine_betas())
    x = den.painter(tok, config)(["a handwritten two", ""], 0)
    assert x.shape == (2, 1, 16, 16) and x.isfinite().all() and den.calls(config) == 6
    batch = data.batch("train", Draws(0, torch.arange(4)))
    assert den.loss(batch.x, tok(batch.captions), Draws(0, torch.arange(4))).isfinite().all()
