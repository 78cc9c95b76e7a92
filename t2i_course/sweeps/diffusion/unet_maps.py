"Where words are heard, for the U-Net's chapter: two painted digits, in latents and in pixels."

from functools import cache, lru_cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from t2i_course.codec import vae
from t2i_course.core.data import INKS, NUMBERS, Draws, Wrapped, split_words
from t2i_course.core.files import CourseError
from t2i_course.core.experiments import best_precision, fit, setting
from t2i_course.core.metrics import judge_for, obedience, shuffled
from t2i_course.core.sources import load
from t2i_course.diffusion.preconditioning import fit_skip
from t2i_course.diffusion.unet import attention_maps, build, overlap, recipe_for, side_masks, word_overlap

SWEEP = dict(  # training pictures of network and codec, pictures looked at, drawings
    smoke=dict(images=64, codec_images=64, n_maps=4, n=8),
    demo=dict(images=60_000, codec_images=16_000, n_maps=200, n=500),
    full=dict(images=3_000_000, codec_images=500_000, n_maps=1_000, n=2_000),
)
LATENT = dict(  # what is changed for latents of 8 x 8 places: transformers on the fine grid, no closed form
    smoke=dict(widths=(16, 32), transformers=(1, 0), heads=(2, 2)),
    demo=dict(widths=(64, 96), transformers=(1, 0), heads=(4, 4)),
    full=dict(widths=(256, 512), transformers=(1, 0), heads=(4, 8), depth=2),
)
TIMES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)  # at which the maps are taken


class Latents(Wrapped):
    "The same captions; a picture is a fresh draw from what the codec says of it"

    def __init__(self, data, codec):
        super().__init__(data)
        self.codec, self.shape = codec, codec.grid(data.shape)

    @torch.no_grad()
    def batch(self, split, draws):
        b = self.data.batch(split, draws)
        noise = draws.normal("posterior", *self.shape)
        return b._replace(x=self.codec.sample(self.codec.encode(b.x), noise))


def fully_named(
    data,  # of two painted digits
    n: int,  # pictures
):  # Batch (n) and the numbers of its pictures
    "Test pictures whose captions name both digits and both inks"
    index = torch.arange(20 * n)
    b = data.batch("test", Draws(0, index))
    full = torch.stack([b.named[k] for k in b.named if k != "paper"]).all(0)
    keep = index[full][:n]
    if len(keep) < n:
        raise CourseError(f"only {len(keep)} of {len(index)} captions name all; {n} are wanted")
    return data.batch("test", Draws(0, keep)), keep


@torch.no_grad()
def noised(den, x, t, seed=0):  # pictures -> what the network sees of them, and their times
    x0, times = den.codec.sample(den.codec.encode(x)), torch.full((len(x),), t)
    c = den.coefs(times, x0)
    return c.alpha * x0 + c.sigma * Draws(seed, torch.arange(len(x))).normal("eps", *x0.shape[1:]), times


def heard(
    arm,  # a model of two painted digits
    b,  # as from `fully_named`
) -> dict:  # kind of map -> overlap at each of TIMES
    "Overlap of the maps of a digit's words with its strokes, with those of the other digit, and so on"
    masks, strangers = side_masks(b), shuffled(b.captions)
    out = dict(own=[], inks=[], digits=[], other_digit=[], other_caption=[])
    for t in TIMES:
        x_t, times = noised(arm.model, b.x, t)
        maps = attention_maps(arm.model, x_t, times, arm.tok(b.captions))
        for kind, among in dict(own=(*NUMBERS, *INKS), inks=tuple(INKS), digits=tuple(NUMBERS)).items():
            out[kind].append(word_overlap(maps, b.captions, masks, among=among).mean().item())
        out["other_digit"].append(word_overlap(maps, b.captions, masks, swap=True).mean().item())
        maps = attention_maps(arm.model, x_t, times, arm.tok(strangers))
        out["other_caption"].append(word_overlap(maps, strangers, masks).mean().item())
    return out


def best_possible(b) -> float:  # overlap of a perfect map, as coarse as the network's
    found = []
    for m in side_masks(b).values():
        coarse = F.adaptive_avg_pool2d(m[:, None].float(), 8)
        fine = F.interpolate(coarse, size=m.shape[1:], mode="bilinear", align_corners=False)
        found.append(overlap(fine[:, 0], m).mean().item())
    return sum(found) / len(found)


def picture(arm, b, index, n=6) -> list:  # captions, their words, and the map of each at each of TIMES
    "Something to look at"
    differ = (b.attrs["ink_left"] != b.attrs["ink_right"]) & (b.attrs["digit_left"] != b.attrs["digit_right"])
    found = []
    for i in (differ & b.named["paper"]).nonzero()[:n, 0].tolist():
        words = split_words(b.captions[i])
        keep, maps = [k for k, w in enumerate(words) if w not in ("a", "an", "of", "on")], []
        for t in TIMES:
            x_t, times = noised(arm.model, b.x[i : i + 1], t)
            each = attention_maps(arm.model, x_t, times, arm.tok(b.captions[i : i + 1]))[0]
            maps.append([[[round(u, 3) for u in row] for row in each[k + 1].tolist()] for k in keep])
        found.append(dict(index=index[i].item(), words=[words[k] for k in keep], maps=maps))
    return found


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "The same recipe on the latents of one codec, and on pixels around the closed form"
    s, two, precision = SWEEP[scale], load("painted2"), best_precision()
    judge, (looked, index) = judge_for(two), fully_named(two, s["n_maps"])
    wanted = two.batch("test", Draws(1, torch.arange(s["n"]))).captions

    @cache
    def codec():  # one for all seeds
        arm = vae.fit_whitened(two, vae.recipe_for(two, scale), s["codec_images"], 0, precision)
        return arm.model.codec.eval().requires_grad_(False)

    @cache
    def tables():  # of the closed form
        config = recipe_for(two, scale)
        tok, den = build(config)
        return fit_skip(den, two, tok, config.fit_images).skip.tables

    def latent(config):
        return build(config, SimpleNamespace(model=SimpleNamespace(codec=codec())))

    def closed(config):
        tok, den = build(config)
        den.skip.tables = tables()
        return tok, den

    def asked(arm):  # how a model is built, its config, its data
        if arm == "pixels":
            return closed, recipe_for(two, scale), two
        ds = Latents(two, codec())
        plain = dict(skip=False, open_words=[], patch=1)
        return latent, recipe_for(ds, scale) | plain | LATENT[scale], ds

    @lru_cache(1)
    def trained(arm, seed):
        make, config, ds = asked(arm)
        return fit(make, config, ds, s["images"], seed, precision)

    def listens(arm, seed):
        make, config, ds = asked(arm)
        torch.manual_seed(seed)
        tok, den = make(config)
        before, made = heard(SimpleNamespace(tok=tok, model=den), looked), trained(arm, seed)
        x = made.model.painter(made.tok, made.config)(wanted, seed)
        more = dict(untrained=before["own"], obedience=obedience(judge, x, two, wanted))
        return heard(made, looked) | more | made.about

    def repeated():  # what the judge reads off reconstructions
        x, own = two.batch("test", Draws(1, torch.arange(s["n"]))).x, codec()
        with torch.no_grad():
            y = own.decode(own.sample(own.encode(x)))
        return obedience(judge, y, two, wanted)

    yield "setting", partial(setting, s, seeds, two, judge, times=TIMES)
    yield "best_possible", partial(best_possible, looked)
    yield "codec", repeated
    for seed in seeds:
        yield f"latents.seed{seed}", partial(listens, "latents", seed)
        if seed == seeds[0]:
            yield "shown", lambda: picture(trained("latents", seeds[0]), looked, index)
        yield f"pixels.seed{seed}", partial(listens, "pixels", seed)
