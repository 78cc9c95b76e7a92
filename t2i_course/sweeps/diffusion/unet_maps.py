"The sweep of the chapter on the U-Net: its parts changed one at a time, and what its words listen to."

from functools import lru_cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from t2i_course.core.data import Draws, split_words
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import judge_for, shuffled
from t2i_course.core.sources import load
from t2i_course.diffusion.preconditioning import fit_skip
from t2i_course.diffusion.unet import attention_maps, build, overlap, recipe_for, side_masks, word_overlap

SWEEP = (
    dict(  # training pictures, drawings; for the maps: training pictures of two digits, pictures looked at
        smoke=dict(images=64, n=16, images_two=64, n_maps=4),
        demo=dict(images=30_000, n=1_000, images_two=60_000, n_maps=200),
        full=dict(images=1_000_000, n=5_000, images_two=3_000_000, n_maps=1_000),
    )
)
ARMS = dict(  # what is changed in the recipe
    base={},
    no_self_attention=dict(look=False),
    scale_shift=dict(scale_shift=True),
    gelu=dict(gated=False),
)
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5)  # at which the maps are taken


def fully_named(
    data,  # of two painted digits
    n: int,  # pictures
):  # Batch (n) and the numbers of its pictures
    "Test pictures whose captions name both digits and both inks"
    index = torch.arange(20 * n)
    b = data.batch("test", Draws(0, index))
    full = torch.stack([b.named[k] for k in b.named if k != "paper"]).all(0)
    keep = index[full][:n]
    return data.batch("test", Draws(0, keep)), keep


def noised(den, x, t, seed=0):  # pictures and their times
    times = torch.full((len(x),), t)
    c = den.coefs(times, x)
    return c.alpha * x + c.sigma * Draws(seed, torch.arange(len(x))).normal("eps", *x.shape[1:]), times


def heard(
    arm,  # a trained model of two painted digits
    b,  # as from `fully_named`
) -> dict:  # kind of map -> overlap at each of TIMES
    "Overlap of the maps of a digit's words with its strokes, with those of the other digit, and so on"
    masks, den = side_masks(b), arm.model
    tok, strangers = arm.tok, shuffled(b.captions)
    out = dict(own=[], other_digit=[], other_caption=[])
    for t in TIMES:
        x_t, times = noised(den, b.x, t)
        maps = attention_maps(den, x_t, times, tok(b.captions))
        out["own"].append(word_overlap(maps, b.captions, masks).mean().item())
        out["other_digit"].append(word_overlap(maps, b.captions, masks, swap=True).mean().item())
        maps = attention_maps(den, x_t, times, tok(strangers))
        out["other_caption"].append(word_overlap(maps, strangers, masks).mean().item())
    return out


def best_possible(b) -> float:  # overlap of a perfect map, as coarse as the network's
    found = []
    for m in side_masks(b).values():
        coarse = F.adaptive_avg_pool2d(m[:, None].float(), 8)
        fine = F.interpolate(coarse, size=m.shape[1:], mode="bilinear", align_corners=False)
        found.append(overlap(fine[:, 0], m).mean().item())
    return sum(found) / len(found)


def picture(arm, b, index) -> dict:  # one caption, its words, and the map of each
    "Something to look at"
    inks = b.attrs["ink_left"] != b.attrs["ink_right"]
    digits = b.attrs["digit_left"] != b.attrs["digit_right"]
    i = (inks & digits & b.named["paper"]).nonzero()[0, 0].item()
    x_t, times = noised(arm.model, b.x[i : i + 1], 0.2)
    maps = attention_maps(arm.model, x_t, times, arm.tok(b.captions[i : i + 1]))[0]
    words = split_words(b.captions[i])
    keep = [k for k, w in enumerate(words) if w not in ("a", "an", "of", "on")]
    rows = [[[round(u, 4) for u in row] for row in maps[k + 1].tolist()] for k in keep]
    return dict(index=index[i].item(), caption=b.captions[i], words=[words[k] for k in keep], maps=rows)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "The recipe on one painted digit with its parts changed, and on two for the maps of their words"
    s, data, two, precision = SWEEP[scale], load("painted"), load("painted2"), best_precision()
    judge = judge_for(data)
    looked, index = fully_named(two, s["n_maps"])

    @lru_cache(2)
    def tables(ds):  # of the closed form; all arms on these pictures share them
        config = recipe_for(ds, scale)
        tok, den = build(config)
        return fit_skip(den, ds, tok, config.fit_images).skip.tables

    def started(ds, config):
        tok, den = build(config)
        den.skip.tables = tables(ds)
        return tok, den

    def row(arm, seed):
        config = recipe_for(data, scale) | ARMS[arm]
        made = fit(partial(started, data), config, data, s["images"], seed, precision)
        return made.row(data, judge, s["n"], seed, recipe=arm)

    @lru_cache(1)
    def of_two(seed):
        return fit(partial(started, two), recipe_for(two, scale), two, s["images_two"], seed, precision)

    def maps(seed):
        torch.manual_seed(seed)
        tok, den = started(two, recipe_for(two, scale))
        fresh = heard(SimpleNamespace(tok=tok, model=den), looked)
        return heard(of_two(seed), looked) | dict(untrained=fresh["own"])

    yield "setting", partial(setting, s, seeds, data, judge, times=TIMES)
    yield "best_possible", partial(best_possible, looked)
    for seed in seeds:
        yield f"maps.seed{seed}", partial(maps, seed)
        if seed == seeds[0]:
            yield "shown", lambda: picture(of_two(seeds[0]), looked, index)
        for arm in ARMS:
            yield f"arms.{arm}.seed{seed}", partial(row, arm, seed)
