"Zero terminal SNR: equality with diffusers, the perfect denoiser against brute force, offset noise, the brightness measure."
import math

import pytest
import torch
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.data import PAPERS, Draws
from t2i_course.core.ema import EMA
from t2i_course.core.metrics import load_judge
from t2i_course.core.training import State, feed, train
from t2i_course.diffusion import ddpm
from t2i_course.diffusion.ddpm import VP, Coefs, Denoiser, linear_betas, sample, solve
from t2i_course.diffusion.schedules import EDM, cosine_betas, scaled_linear_betas
from t2i_course.diffusion.terminal_snr import (
    Flat, OffsetDraws, OnSphere, Papers, brightness, build, leading, make_loss, measure, moved,
    offset_loss, offset_start, rescale_zero_terminal_snr, settings, silent, snr_weight, trailing)
from t2i_course.sweeps.diffusion.terminal_snr import arms, walks

CHAIN, ZERO = VP(scaled_linear_betas()), VP(rescale_zero_terminal_snr(scaled_linear_betas()))


def column(coefs):
    "Coefficients of a batch, ready to be multiplied with (b 1)."
    return Coefs(*(u[:, None] for u in coefs))


def gray(process, side, ts, offset=0., sampler=sample, levels=(-1., 0., 1.), n=200):
    draws = Draws(8, torch.arange(n))
    flat = Flat(process, levels, offset)
    *_, x = sampler(flat.predict, process, draws.normal("start", 3, side, side), ts, draws=draws)
    return (brightness(x).abs() < .5).double().mean().item()


# --- The schedule and the steps ---

@pytest.mark.parametrize("betas", [scaled_linear_betas(), linear_betas(), linear_betas(200), cosine_betas()],
                         ids=["scaled", "linear", "linear200", "cosine"])
def test_rescaling_is_that_of_diffusers(betas):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as of_diffusers
    theirs = of_diffusers(betas)
    ours = rescale_zero_terminal_snr(betas)
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)
    root, old = torch.cumprod(1 - ours, 0).sqrt(), torch.cumprod(1 - betas, 0).sqrt()
    assert ours[-1] == 1 and root[-1] == 0 and abs(root[0] - old[0]) < 1e-12
    assert (ours[:-1] > betas[:-1] - 1e-12).all() and (ours >= 0).all()


@pytest.mark.parametrize("n", [7, 10, 25, 30, 50, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_times_are_those_of_diffusers(spacing, n):
    from diffusers import DDIMScheduler as DDIM
    offset = 0 if n == 1000 else 1
    theirs = DDIM(num_train_timesteps=1000, timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(n)
    ours = trailing(n) if spacing == "trailing" else leading(n, offset=offset)
    assert len(ours) == n + 1 and ours[-1] == 0
    assert ((1000 * ours[:-1]).round().long() == theirs.timesteps + 1).all()
    assert (ours[0] == 1) == (spacing == "trailing" or n == 1000)


@pytest.mark.parametrize("spacing, offset", [("trailing", 0), ("leading", 1)])
def test_drawing_from_the_end_is_that_of_diffusers(spacing, offset):
    "DDIM with v on the rescaled chain, every step."
    from diffusers import DDIMScheduler as DDIM
    theirs = DDIM(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
                  prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(25)
    ts = trailing(25) if spacing == "trailing" else leading(25)
    flat, x = Flat(ZERO, (-.9, .1, .7)), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = x
    for k, t, ours in zip(theirs.timesteps, ts, sample(flat.predict, ZERO, x, ts), strict=False):
        x0_hat, eps_hat = flat.predict(y, t.expand(4))
        a = theirs.alphas_cumprod[k]
        y = theirs.step(a.sqrt() * eps_hat - (1 - a).sqrt() * x0_hat, k, y).prev_sample
        assert torch.allclose(ours, y, atol=1e-4), k
    assert torch.allclose(ours, y, atol=1e-5)


def test_only_v_survives_the_end():
    "E031: at SNR 0 the noise says nothing about the picture, v everything."
    x0, noise = torch.randn(2, 3, 5)
    c = column(ZERO.coefs(torch.ones(3)))
    x_t = c.alpha * x0 + c.sigma * noise
    assert torch.equal(x_t, noise)
    assert not solve(c, *ddpm.eps(c), x_t, noise)[0].isfinite().any()
    assert torch.allclose(solve(c, *ddpm.v(c), x_t, c.alpha * noise - c.sigma * x0)[0], x0)


# --- The perfect denoiser ---

@pytest.mark.parametrize("offset", [0., .3])
@pytest.mark.parametrize("t", [.3, .8, 1.])
def test_flat_is_bayes_rule(offset, t):
    "All 12 numbers with their full covariance against the mean alone."
    levels = torch.tensor([-1., .2, .9])
    flat, x_t = Flat(CHAIN, levels.tolist(), offset), .3 * torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    c = CHAIN.coefs(torch.tensor([t]))
    shift = torch.block_diag(*[torch.ones(4, 4)] * 3)
    normal = torch.distributions.MultivariateNormal(torch.zeros(12), c.sigma**2 * (torch.eye(12) + offset**2 * shift))
    p = torch.stack([normal.log_prob(x_t.flatten(1) - c.alpha * level) for level in levels], 1).softmax(1)
    x0_hat, eps_hat = flat.predict(x_t, torch.full((6,), t))
    assert torch.allclose(x0_hat[:, 0, 0, 0], p @ levels, atol=1e-4) and x0_hat.flatten(1).std(1).max() < 1e-6
    assert torch.allclose(c.alpha * x0_hat + c.sigma * eps_hat, x_t, atol=1e-5)


def test_leak_grows_with_the_picture_and_the_rescaled_chain_has_none():
    old = [gray(CHAIN, side, trailing(50)) for side in (4, 12, 32)]
    assert old[0] < .45 and old[0] + .1 < old[1] < old[2] - .1 and old[2] > .85
    assert gray(ZERO, 24, trailing(200)) < .45


def test_a_leading_start_spoils_the_rescaled_chain():
    "Two dark papers, whose average is not gray."
    black = {}
    for name, ts in dict(trailing=trailing(10), leading=leading(10)).items():
        draws = Draws(8, torch.arange(200))
        *_, x = sample(Flat(ZERO, (-1., -.4)).predict, ZERO, draws.normal("start", 3, 32, 32), ts)
        black[name] = (brightness(x) < -.7).double().mean().item()
    assert abs(black["trailing"] - .5) < .12 and black["leading"] < .15


def test_offset_noise_needs_its_own_start():
    plain, matched = (gray(CHAIN, 32, trailing(25), .1, s) for s in (sample, offset_start(sample, .1)))
    assert plain > .85 and matched < .55


# --- Offset noise ---

def test_offset_noise_shifts_whole_channels():
    draws = Draws(3, torch.arange(400))
    white, shifted = draws.normal("eps", 3, 8, 8), OffsetDraws(draws, .5).normal("eps", 3, 8, 8)
    shift = shifted - white
    assert shift.flatten(2).std(2).max() < 1e-6, "one number a channel"
    assert abs(shift[:, :, 0, 0].std() - .5) < .03
    assert torch.corrcoef(shift[:, :, 0, 0].T).sub(torch.eye(3)).abs().max() < .2, "the channels are independent"
    assert torch.equal(OffsetDraws(draws, 0.).normal("eps", 3, 8, 8), white)
    assert torch.equal(OffsetDraws(draws, .5).uniform("t"), draws.uniform("t"))


def test_offset_loss_is_the_loss_on_shifted_noise():
    class Zero(torch.nn.Module):
        in_channels = 3

        def forward(self, x_t, t, cond): return torch.zeros_like(x_t)

    tok = WordTokenizer(Papers().words)
    den = Denoiser(Zero(), CHAIN, ddpm.eps, null=tok.null())
    draws, x0, cond = Draws(0, torch.arange(300)), torch.zeros(300, 3, 8, 8), tok(["a"] * 300)
    plain, offset = den.loss(x0, cond, draws), offset_loss(den.loss, .7)(x0, cond, draws)
    assert torch.allclose(offset, OffsetDraws(draws, .7).normal("eps", 3, 8, 8).square().flatten(1).mean(1))
    assert abs(plain.mean() - 1) < .02 and abs(offset.mean() - 1 - .49) < .1


def test_the_start_is_that_of_training():
    "Means of x_T in training with offset noise (of a gray picture) and of the matched start."
    caught, draws = {}, Draws(5, torch.arange(2000))

    def sampler(predict, process, x, ts, draws=None): caught["x"] = x; yield x

    list(offset_start(sampler, .2)(None, CHAIN, draws.normal("start", 3, 8, 8), torch.linspace(1, 0, 3), draws=draws))
    trained = OffsetDraws(Draws(6, torch.arange(2000)), .2).normal("eps", 3, 8, 8)
    want = (1 / 192 + .04 / 3)**.5
    assert abs(brightness(trained).std() - want) < .05 * want and abs(brightness(caught["x"]).std() - want) < .05 * want


# --- Schedules, weights ---

def test_on_the_sphere_nothing_but_the_size_changes():
    edm, t = OnSphere(EDM()), torch.tensor([.3, .6, .95])
    c, d = edm.coefs(t), EDM().coefs(t)
    assert torch.allclose(c.alpha**2 + c.sigma**2, torch.ones(3)) and torch.allclose(c.alpha / c.sigma, d.alpha / d.sigma)
    h = 1e-3
    up, down = edm.coefs(t + h), edm.coefs(t - h)
    assert torch.allclose((up.alpha - down.alpha) / (2 * h), c.dalpha, atol=1e-2, rtol=1e-2)
    assert torch.allclose((up.sigma - down.sigma) / (2 * h), c.dsigma, atol=1e-2, rtol=1e-2)
    assert torch.allclose(edm.time(edm.process.coefs(t).sigma), t)


@pytest.mark.parametrize("target, plus", [(ddpm.eps, 0.), (ddpm.v, 1.)], ids=["eps", "v"])
def test_weight_turns_the_error_of_x0_into_that_of_the_target(target, plus):
    t = torch.tensor([.2, .5, .9, .99])
    c = column(CHAIN.coefs(t))
    x0, noise, wrong = torch.randn(3, 4, 6)
    x_t = c.alpha * x0 + c.sigma * noise
    p, q = target(c)
    guess = p * wrong + q * (x_t - c.alpha * wrong) / c.sigma
    error = (guess - (p * x0 + q * noise)).square().mean(1)
    assert torch.allclose(error, snr_weight(CHAIN, plus, 1e9)(t) * (wrong - x0).square().mean(1), rtol=1e-3)
    assert snr_weight(CHAIN, plus)(torch.zeros(1)) == 5
    assert abs(snr_weight(ZERO, plus)(torch.ones(1)) - plus) < 1e-12


# --- Pictures and their brightness ---

def test_papers_and_captions():
    data = Papers()
    b = data.batch("train", Draws(0, torch.arange(600)))
    assert set(b.attrs["paper"].tolist()) == {0, 1, 2} and list(PAPERS)[:3] == ["black", "white", "gray"]
    assert (b.attrs["weight"] == 1).all() and (b.attrs["lean"] == 1).all()
    corner = b.x[:, :, 0, 0].mean(1)
    assert torch.allclose(corner, torch.tensor([-1., 1., 0.])[b.attrs["paper"]], atol=.1)
    for caption, quiet, i in zip(b.captions, silent(b.captions), range(600)):
        demanded = data.demands(caption)
        assert all(b.attrs[k][i] == v for k, v in demanded.items())
        assert data.demands(quiet) == {k: v for k, v in demanded.items() if k != "paper"}


def test_moved_is_the_earth_movers_distance():
    from scipy import stats
    a, b = torch.randn(2, 50)
    assert abs(moved(a, b) - stats.wasserstein_distance(a.numpy(), b.numpy())) < 1e-6
    assert moved(a, a[torch.randperm(50)]) == 0 and abs(moved(a, a + .3) - .3) < 1e-6


def test_measure_knows_real_from_gray():
    data, judge = Papers(), load_judge("painted")
    ends = dict(black=-1., white=1.)

    def real(captions, seed):
        x = data.batch("test", Draws(300, torch.arange(len(captions)))).x
        if "on" not in captions[0].split(): return x
        level = ends[captions[0].split()[-1]]
        return torch.full_like(x, level)

    n = 120
    right, wrong = measure(real, data, judge, n), measure(lambda captions, seed: torch.zeros(len(captions), 3, 32, 32), data, judge, n)
    assert abs(right["spread"] - 1) < 1e-6 and right["distance"] < 1e-6 and right["range"] > 1
    assert abs(sum(right["papers"].values()) - 1) < 1e-6 and all(right["papers"][p] > .2 for p in ("black", "white", "gray"))
    assert wrong["spread"] == 0 and wrong["range"] == 0 and abs(wrong["distance"] - wrong["distance_gray"]) < 1e-6
    assert wrong["papers"]["gray"] == 1
    assert 0 < right["distance_real"] < .3 * right["distance_gray"]


# --- Training ---

def test_an_arm_learns_and_a_shuffled_one_does_not():
    data = Papers()
    config, last = settings(data, 960, "smoke"), {}

    def unrelated(den):
        def loss(x0, cond, draws):
            x_t, t = Draws(9, draws.index).normal("unrelated", *x0.shape[1:]), den.times(draws)
            nothing = den.null.map(lambda u: u.expand(len(x0), *u.shape[1:]))
            return (den.net(x_t, t, nothing) - x0).square().flatten(1).mean(1)
        return loss
    for shuffled in (False, True):
        torch.manual_seed(0)
        tok, den = build(config, ZERO)
        one = unrelated(den) if shuffled else make_loss(den)
        state = State(den.net, config["lr"], EMA(den.net, config["half_life"]))
        losses = [r.loss for r in train(state, one, feed(data, tok), images=960, batch=16)]
        assert all(math.isfinite(u) for u in losses)
        last[shuffled] = sum(losses[-15:]) / 15 / (sum(losses[:5]) / 5)
    assert last[False] < .5 < last[True], last


def test_every_arm_can_be_drawn_from():
    data = Papers()
    config = settings(data, 64, "smoke")
    for name, change in arms().items():
        tok, den = build(config, change["process"], change.get("times", ddpm.uniform_times))
        b = data.batch("train", Draws(0, torch.arange(16)))
        loss = make_loss(den, change.get("plus", 1.), change.get("offset", 0.))(b.x, tok(b.captions), Draws(0, torch.arange(16)))
        assert loss.isfinite().all()
        ways = walks(name, den.process, 4, 2, change.get("offset", 0.))
        assert next(iter(ways)) == "trailing"
        for ts, sampler in ways.values():
            assert ts[-1] == 0 and len(ts) in (5, 3)
            x = ddpm.drawer(den, tok, data.shape, ts, sampler=sampler)(["a bold red seven", "a digit on black"])
            assert x.shape == (2, 3, 32, 32) and x.isfinite().all()
