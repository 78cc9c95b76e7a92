"Gaussians from words: pooled fits against unpooled ones, the ladder of skips, and what its sweep measures."
import math

import pytest
import torch
from arms import made
from t2i_course.core.conditioning import WordTokenizer, raw_cond
from t2i_course.core.data import Draws, Painted
from t2i_course.diffusion.closed_form import CaptionGaussian, Pooled, fit_mean, fit_space, ridge, word_groups
from t2i_course.diffusion.ddpm import VP, Coefs, linear_betas, recipe_for, view
from t2i_course.diffusion.preconditioning import fit_skip, make_arm
from t2i_course.flow import flow_matching
from t2i_course.sweeps.diffusion import closed_form as sweep

RUNGS = ("plain", "scalar", "one", "mean", "caption")


@pytest.fixture(scope="module")
def world():
    "Small captioned pictures (3x8x8), their tokenizer and tokens."
    data = Painted()
    tok = WordTokenizer(data.words)
    draws = Draws(0, torch.arange(1500))
    batch = data.batch("train", draws)
    pictures = torch.nn.functional.avg_pool2d(batch.x, 4) + .05 * draws.normal("grain", 3, 8, 8)
    cond = tok(batch.captions).drop(draws.uniform("drop") >= .1, tok.null())
    return data, tok, pictures, cond.ids


# --- Fitting ---

def test_pooled_ridge_is_the_same_regression():
    "Rows that repeat, once each and once with their number: the same weights."
    generator = torch.Generator().manual_seed(0)
    a, n = torch.randn(5, 3, generator=generator), torch.tensor([1., 4., 2., 7., 3.])
    which = torch.arange(5).repeat_interleave(n.long())
    y = torch.randn(len(which), 2, generator=generator)
    means = torch.zeros(5, 2).index_add_(0, which, y) / n[:, None]
    assert torch.allclose(ridge(a, means, n=n), ridge(a[which], y), atol=1e-5)
    assert not torch.allclose(ridge(a, means), ridge(a[which], y), atol=1e-2)


def test_mean_is_recovered():
    "Pictures that are colour x shape of their words: two terms describe them, one does not."
    generator = torch.Generator().manual_seed(1)
    f = (torch.rand(200, 6, generator=generator) < .5).float()
    f[:, 0] = 1
    A, B = torch.randn(2, 6, 3, generator=generator), torch.randn(2, 6, 16, generator=generator)
    draw = lambda A, B: torch.einsum("nf,kfc,ng,kgp->ncp", f, A, f, B)
    x = draw(A, B)
    fit = lambda terms: draw(*fit_mean(x, f, f, n_terms=terms, lam=1e-4, rounds=40))
    left = lambda terms: (fit(terms) - x).square().mean() / x.square().mean()
    assert left(2) < .01 < .1 < left(1)


def test_space_keeps_each_groups_variance():
    generator = torch.Generator().manual_seed(0)
    z, g = torch.randn(4000, 8, generator=generator), torch.arange(4000) % 2
    z[g == 1, 0] *= 3
    found = fit_space(z, g, 2, rank=8, shrink=1.)
    cov = [found["U"] @ found["Q"][i] @ found["L"][i].diag() @ found["Q"][i].T @ found["U"].T for i in range(2)]
    assert abs(cov[0][0, 0] - 1) < .1 and abs(cov[1][0, 0] - 9) < .7


def test_order_of_the_pictures_does_not_matter(world):
    "The pooling may not mix captions up."
    _, tok, x, ids = world
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cond, t = tok(["a bold red seven on white", ""]), torch.tensor([.3, .6])
    x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    guesses = [CaptionGaussian(VP(linear_betas()), len(tok), rank=64).fit(x[i], ids[i])(x_t, t, cond)
               for i in (torch.arange(len(x)), order)]
    assert torch.allclose(guesses[0].x0_hat, guesses[1].x0_hat, atol=5e-3)
    assert torch.allclose(guesses[0].c_out, guesses[1].c_out, atol=1e-3)


def test_mean_of_a_frequent_caption_is_its_average(world):
    "The empty caption stands alone: its mean is the average of its pictures, up to the two terms."
    _, tok, x, ids = world
    skip = CaptionGaussian(VP(linear_betas()), len(tok), rank=32).fit(x, ids)
    null = tok.null().ids
    own = (ids == null).all(1)
    assert own.sum() > 100
    off = lambda ids: (skip.mean(ids)[0] - x[own].flatten(2).mean(0)).square().mean().sqrt()
    assert off(null) < .1 < off(tok(["a bold red seven on white"]).ids)


def test_pairs_may_be_kept_to_words_of_the_groups(world):
    "What a held-out pair of ink and digit cannot miss: shapes that never saw such pairs."
    data, tok, x, ids = world
    groups = [[tok.index[word] for word in group] for group in word_groups(data)]
    strokes, inks = {i for group in groups for i in group}, {tok.index["red"], tok.index["purple"]}
    named = lambda **more: set(CaptionGaussian(VP(linear_betas()), len(tok), groups, rank=16, **more)
                               .fit(x, ids).tables["pairs"].flatten().tolist())
    assert inks & named() and named(pairs_in_groups=True) and named(pairs_in_groups=True) <= strokes


# --- The ladder ---

def test_each_rung_knows_more(world):
    "Errors of the guesses on training pictures fall from rung to rung; one Gaussian for all does not listen."
    data, tok, x, ids = world
    process = VP(linear_betas())
    config = flow_matching.recipe_for(data, "smoke") | dict(rank=40)
    rungs = {name: sweep.skip_of(name, config, tok) for name in RUNGS}
    assert rungs.pop("plain") is None
    assert isinstance(rungs["one"], sweep.OneForAll) and rungs["caption"].groups and not rungs["mean"].groups
    for skip in rungs.values(): skip.process = process
    cond = raw_cond(ids, ids != 0)
    t = torch.full((len(x),), .5)
    c = Coefs(*(view(u, x) for u in process.coefs(t)))
    x_t = c.alpha * x + c.sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rms = [(skip.fit(x, ids)(x_t, t, cond).x0_hat - x).square().mean().sqrt().item() for skip in rungs.values()]
    assert all(later < .97 * earlier for earlier, later in zip(rms[:2], rms[1:3])), rms
    assert rms[3] < rms[2], rms
    other = cond[torch.arange(len(x)).roll(1)]
    assert torch.equal(rungs["one"](x_t, t, cond).x0_hat, rungs["one"](x_t, t, other).x0_hat)
    assert not torch.equal(rungs["mean"](x_t, t, cond).x0_hat, rungs["mean"](x_t, t, other).x0_hat)


def test_fit_skip_fits_any_rung(world):
    data, tok = world[:2]
    config = recipe_for(data, "smoke")
    process = VP(linear_betas())
    small = flow_matching.recipe_for(data, "smoke") | dict(rank=16)
    for name in RUNGS:
        skip = sweep.skip_of(name, small, tok)
        if skip is not None: skip.process = process
        own_tok, den = make_arm(config, process, skip)
        assert fit_skip(den, data, own_tok, 300) is den
        x = data.batch("test", Draws(0, torch.arange(3)))
        losses = den.loss(x.x, own_tok(x.captions), Draws(0, torch.arange(3)))
        assert losses.shape == (3,) and losses.isfinite().all(), name


def test_word_groups_name_strokes_only():
    groups = word_groups(Painted())
    assert any("seven" in group for group in groups) and any("bold" in group for group in groups)
    assert not any("red" in group or "pink" in group for group in groups)


def test_pooled_pictures_keep_their_captions_and_shares(world):
    _, _, x, ids = world
    fold = torch.arange(len(x)) % 3
    p = Pooled(x, ids, fold)
    assert p.n.sum() == len(x) and torch.equal(p.ids[p.which], ids) and torch.equal(p.part[p.which], fold)
    k = int(p.n.argmax())
    assert torch.allclose(p.xs[k], x.flatten(2)[p.which == k].mean(0), atol=1e-5)


# --- The sweep ---

def test_an_untrained_arm_is_its_gaussian_and_the_points_of_one_training_are_its_own():
    "A point on the way does not depend on how far the training goes: the rate does not fall."
    data = sweep.load("digits")
    config = flow_matching.recipe_for(data, "smoke")

    def points(*images):
        torch.manual_seed(0)
        tok, den = flow_matching.build(config | dict(skip=False))
        return sweep.snapshots(den, tok, data, config, images, 0, "fp32")
    short, long = points(64), points(0, 64, 256)
    assert set(long) == {0, 64, 256}
    assert all(torch.equal(short[64][k], long[64][k]) for k in short[64])
    assert any(not torch.equal(long[64][k], long[256][k]) for k in long[64])
    assert sweep.held(0., 256) < .1 and sweep.held(1., 1e6) == 1


def test_experiments_yield_every_point():
    rows = made(sweep)
    for name, arms in sweep.POINTS["smoke"].items():
        for arm, points in arms.items():
            for images in points:
                row = rows[f"curve.{name}.{arm}.{images}.seed0"]
                assert math.isfinite(row["fd"]) and row["images"] == images, (name, arm, images)
    assert rows["curve.painted.caption.0.seed0"]["heldout"]["n"] > 0
    assert rows["setting.digits"]["points"]["plain"] == [64] and rows["setting.painted"]["guidance"] == 2


@pytest.mark.parametrize("scale", ["smoke", "demo", "full"])
def test_plain_and_skip_have_points_in_common(scale):
    "A plain arm has nothing to draw before training; every other is compared with it at equal images."
    for arms in sweep.POINTS[scale].values():
        assert 0 not in arms["plain"] and 0 in arms["caption"]
        assert set(arms["plain"]) & set(arms["caption"])
        assert all(list(points) == sorted(set(points)) for points in arms.values())
