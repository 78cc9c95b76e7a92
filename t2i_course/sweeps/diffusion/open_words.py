"The sweep of the chapter on open words: one Gaussian a caption against a mixture, short and long training."

from functools import cache, lru_cache, partial

import torch

from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import evaluate, judge_for, obeys
from t2i_course.core.sources import load
from t2i_course.diffusion.closed_form import CaptionGaussian
from t2i_course.diffusion.open_words import OpenWords
from t2i_course.diffusion.preconditioning import fit_skip
from t2i_course.flow.flow_matching import build, recipe_for

SWEEP = dict(  # training pictures, drawings, drawings of captions with and without ink
    smoke=dict(images=dict(short=128, long=192), n=16, by=8),
    demo=dict(images=dict(short=40_000, long=135_000), n=1_000, by=500),
    full=dict(images=dict(short=1_000_000, long=10_000_000), n=5_000, by=2_000),
)
ARMS = dict(short=("gaussian", "own_frame", "mixture"), long=("gaussian", "mixture"))


class OwnFrame(OpenWords):
    "The mixture's guess, but shown to the network in the colour frame of the caption as it is"

    @torch.no_grad()
    def __call__(self, x_t, t, cond):
        own, g = CaptionGaussian.__call__(self, x_t, t, cond), super().__call__(x_t, t, cond)
        unit = self.colour(cond.ids, self.mean(cond.ids))[0][:, -1:, None].sqrt()
        inputs = own.inputs.unflatten(1, (3, -1)).clone()  # the second picture is the guess: the mixture's
        inputs[:, 1] += (own.frame.mT @ (g.x0_hat - own.x0_hat).flatten(2) / unit).view_as(g.x0_hat)
        return g._replace(frame=own.frame, inputs=inputs.flatten(1, 2))


def with_and_without(
    data,  # captioned pictures with an ink
    n: int,  # captions of each kind
) -> dict:  # named, left_open: n captions of the test split
    "Captions that name the ink, and captions that do not"
    found = data.batch("test", Draws(0, torch.arange(10 * n))).captions
    kinds = dict(named=[], left_open=[])
    for c in found:
        kinds["named" if "ink" in data.demands(c) else "left_open"].append(c)
    return {k: v[:n] for k, v in kinds.items()}


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "The recipe of flow matching with one Gaussian a caption, and with a mixture where the ink is left open"
    s, data, precision = SWEEP[scale], load("painted"), best_precision()
    config, judge = recipe_for(data, scale), judge_for(data)
    captions = with_and_without(data, s["by"])

    @cache
    def tables():  # of the closed form; all arms share them
        tok, den = build(config)
        return fit_skip(den, data, tok, config.fit_images).skip.tables

    def started(arm, config):
        tok, den = build(config | dict(open_words=[]) if arm == "gaussian" else config)
        if arm == "own_frame":
            den.skip.__class__ = OwnFrame
        den.skip.tables = tables()
        return tok, den

    @lru_cache(1)
    def trained(length, arm, seed):
        return fit(partial(started, arm), config, data, s["images"][length], seed, precision)

    def row(length, arm, seed):
        made = trained(length, arm, seed)
        draw = made.model.painter(made.tok, config)
        row = evaluate(draw, data, judge, s["n"], seed) | made.about
        row["by"] = {k: obeys(judge.read(draw(c, seed + 7)), data, c) for k, c in captions.items()}
        return row | dict(recipe=arm, images=s["images"][length], nfe=made.model.calls(config))

    more = dict(steps=config.steps, guidance=config.guidance, guide_above=config.guide_above)
    yield "setting", partial(setting, s, seeds, data, judge, **more)
    for length, arms in ARMS.items():
        for seed in seeds:
            for arm in arms:
                yield f"{length}.{arm}.seed{seed}", partial(row, length, arm, seed)
