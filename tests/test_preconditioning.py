"EDM's scalar skip against diffusers, pooled fits against unpooled ones, and the ladder of skips."
import math

import pytest
import torch
from arms import made
from t2i_course.core.conditioning import WordTokenizer, raw_cond
from t2i_course.core.data import Draws, Painted
from t2i_course.diffusion.ddpm import VP, Coefs, Denoiser, linear_betas, recipe_for, v, view
from t2i_course.diffusion.preconditioning import (CaptionGaussian, ScalarSkip, fit_mean, fit_skip,
                                                  fit_space, make_arm, ridge, wiener, word_groups)
from t2i_course.diffusion.schedules import EDM, edm_sigmas
from t2i_course.sweeps.diffusion import preconditioning as sweep
from t2i_course.sweeps.diffusion.preconditioning import OneForAll, ladder

SIGMAS = [.002, .05, .5, 3., 80.]


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


# --- The scalar form ---

@pytest.mark.parametrize("sigma_data", [.25, .5, 1.])
def test_scalar_skip_is_diffusers_edm(sigma_data):
    "Input, output and the noise level it is told, at five noise levels."
    from diffusers import EDMEulerScheduler
    scheduler = EDMEulerScheduler(sigma_data=sigma_data)
    edm, skip = EDM(), ScalarSkip(EDM(), sigma_data)
    generator = torch.Generator().manual_seed(0)
    for value in SIGMAS:
        sigma = torch.tensor([value], dtype=torch.float64)
        x = torch.randn(1, 3, 4, 4, generator=generator) * (value**2 + sigma_data**2)**.5
        out = torch.randn(1, 3, 4, 4, generator=generator)
        guess = skip(x, edm.time(sigma), None)
        assert torch.allclose(guess.inputs, scheduler.precondition_inputs(x, sigma).float(), atol=1e-5, rtol=1e-5)
        ours = guess.x0_hat + guess.c_out * torch.einsum("bij,bjhw->bihw", guess.frame, out)
        assert torch.allclose(ours, scheduler.precondition_outputs(x, out, sigma).float(), atol=1e-5, rtol=1e-5)
        told = scheduler.precondition_noise(sigma).item()
        assert abs(told - math.log(value) / 4) < 1e-6


def test_denoiser_predicts_what_edm_predicts():
    "The whole way: c_skip x + c_out F(c_in x), by hand, and the noise that goes with it."
    edm, sd = EDM(), .4
    net = lambda x, t, cond: .3 * x.roll(1, -1) + t.view(-1, 1, 1, 1)
    den = Denoiser(net, edm, skip=ScalarSkip(edm, sd))
    sigma = torch.tensor([.1, 2.], dtype=torch.float64)
    x, t = torch.randn(2, 1, 4, 4), edm.time(sigma)
    s = sigma.float().view(-1, 1, 1, 1)
    both = s**2 + sd**2
    want = sd**2 / both * x + s * sd / both.sqrt() * net(x / both.sqrt(), t.float(), None)
    x0_hat, eps_hat = den.predict(x, t.float(), None)
    assert torch.allclose(x0_hat, want, atol=1e-5)
    assert torch.allclose(x0_hat + s * eps_hat, x, atol=1e-5)


def test_loss_is_edms_weighted_loss():
    "Unit weight on the output is (sigma^2 + sd^2) / (sigma sd)^2 on the picture; twice the weight would fail here."
    edm, sd, n = EDM(), .7, 6
    net = lambda x, t, cond: .2 * x.tanh() + .1
    null = raw_cond(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    cond = null.map(lambda field: field.expand(n, *field.shape[1:]))
    den = Denoiser(net, edm, skip=ScalarSkip(edm, sd), null=null)
    draws, x0 = Draws(3, torch.arange(n)), torch.randn(n, 1, 4, 4)
    sigma = view(edm.coefs(den.times(draws)).sigma, x0)
    x_t = x0 + sigma * draws.normal("eps", 1, 4, 4)
    x0_hat, _ = den.predict(x_t, den.times(draws), cond)
    weight = (sigma**2 + sd**2) / (sigma * sd)**2
    want = (weight * (x0_hat - x0)**2).flatten(1).mean(1)
    assert torch.allclose(den.loss(x0, cond, draws), want, rtol=2e-3)


def test_v_prediction_is_the_scalar_skip_on_a_vp_process():
    process, t = VP(linear_betas()), torch.tensor([.05, .4, .9])
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    c = Coefs(*(view(u, x0) for u in process.coefs(t)))
    guess = ScalarSkip(process, 1.)(c.alpha * x0 + c.sigma * eps, t, None)
    p, q = v(c)
    assert torch.allclose((x0 - guess.x0_hat) / guess.c_out, -(p * x0 + q * eps), atol=1e-4)


@pytest.mark.parametrize("process", [EDM(), VP(linear_betas())], ids=["edm", "vp"])
def test_unit_variance_at_every_noise_level(world, process):
    "Painted digits, sigma_data measured on training pictures; twice as much leaves a quarter at the ends (E094)."
    data, x = world[0], world[2]
    x = data.batch("train", Draws(1, torch.arange(600))).x
    unseen = data.batch("test", Draws(2, torch.arange(600))).x
    noise = torch.randn(unseen.shape, generator=torch.Generator().manual_seed(0))
    right = ScalarSkip(process).fit(x)
    sd = right.tables["sigma_data"].item()
    assert abs(sd - x.square().mean().sqrt().item()) < 1e-6 and abs(sd - .5) > .1

    def variances(skip, t):
        time = torch.full((len(unseen),), float(t))
        c = Coefs(*(view(u, unseen) for u in process.coefs(time)))
        guess = skip(c.alpha * unseen + c.sigma * noise, time, None)
        return guess.inputs.square().mean().item(), ((unseen - guess.x0_hat) / guess.c_out).square().mean().item()

    for t in torch.linspace(.1, .99, 8):
        assert all(abs(value - 1) < .06 for value in variances(right, t)), t
    wrong = ScalarSkip(process, 2 * sd)
    assert abs(variances(wrong, .02 if isinstance(process, VP) else .2)[0] - .25) < .02
    assert abs(variances(wrong, .999)[1] - .25) < .02


def test_skip_amplifies_least():
    "c_out as a function of c_skip has its minimum at the wiener gain."
    c, var = Coefs(torch.tensor(.7), torch.tensor(.6), None, None), torch.tensor(.3)
    gain, error = wiener(c, var)
    c_out = lambda k: (1 - c.alpha * k)**2 * var + k**2 * c.sigma**2
    assert abs(c_out(gain) - error) < 1e-6
    assert c_out(gain) < c_out(gain + .01) and c_out(gain) < c_out(gain - .01)


def test_scalar_skip_is_the_conditional_mean_of_gaussian_data():
    "Regress x0 on x_t: the slope is c_skip, what is left has the size c_out."
    generator, sd, sigma = torch.Generator().manual_seed(0), .6, .8
    x0 = sd * torch.randn(1, 1, 400, 400, generator=generator)
    x_t = x0 + sigma * torch.randn(x0.shape, generator=generator)
    guess = ScalarSkip(EDM(), sd)(x_t, EDM().time(torch.tensor([sigma])), None)
    slope = (x0 * x_t).sum() / x_t.square().sum()
    assert abs(slope - (guess.x0_hat / x_t).median()) < 5e-3
    assert abs((x0 - guess.x0_hat).square().mean().sqrt() / guess.c_out.item() - 1) < .01


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
    rungs = ladder(process, tok, data, rank=40)
    assert rungs.pop("none") is None
    assert isinstance(rungs["one"], OneForAll) and rungs["caption"].groups and not rungs["mean"].groups
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
    for name, skip in ladder(process, tok, data, rank=16).items():
        own_tok, den = make_arm(config, process, skip)
        assert fit_skip(den, data, own_tok, 300) is den
        x = data.batch("test", Draws(0, torch.arange(3)))
        losses = den.loss(x.x, own_tok(x.captions), Draws(0, torch.arange(3)))
        assert losses.shape == (3,) and losses.isfinite().all(), name


def test_word_groups_name_strokes_only():
    groups = word_groups(Painted())
    assert any("seven" in group for group in groups) and any("bold" in group for group in groups)
    assert not any("red" in group or "pink" in group for group in groups)


# --- The sweeps ---

def test_experiments_yield_every_comparison():
    rows = made(sweep)
    setting = rows["setting"]
    assert setting["evaluations"] == 5 and setting["sigma_data"] > .6
    names = ["edm.ddpm", "edm.scalar", "edm.edm", "edm.shifted", "sigma_data.right", "sigma_data.double"]
    names += [f"ladder.{k}" for k in ("none", "scalar", "one", "mean", "caption")]
    for name in names + ["nfe.heun.3", "nfe.euler.3", "before.caption", "alone.all_pairs", "pairs.stroke_pairs"]:
        assert math.isfinite(rows[f"{name}.seed0"]["fd"]), name
    assert rows["edm.edm.seed0"]["nfe"] == 10 == rows["edm.ddpm.seed0"]["nfe"], "equal calls, guidance counts twice"
    assert rows["nfe.heun.3.seed0"]["nfe"] == 3 == rows["nfe.euler.3.seed0"]["nfe"]
    assert rows["alone.all_pairs.seed0"]["heldout"]["n"] > 0
    need = {"recipe", "params", "images", "train_seconds", "nfe", "fd", "fd_floor", "recall", "obedience"}
    assert need <= rows["edm.edm.seed0"].keys()
    assert len(edm_sigmas(3)) == 4 # three steps, 2*3-1 calls of Heun
