"The variational bound and the learned variance: against the paper's formulas, diffusers, and data whose entropy is known."
import math

import pytest
import torch
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.diffusion import ddpm
from t2i_course.diffusion.ddpm import VP, Denoiser, linear_betas, sample
from t2i_course.diffusion.likelihood import (bits_per_dim, bits_with, bound_terms, build_learned, chain_variances, early_first,
                                             eight_bits, grey_nats, prior_nats, varied, vlb_weight, weighted)
from t2i_course.diffusion.schedules import cosine_betas

TIMES = 1000
PROCESS = VP(linear_betas(TIMES))


# ---- the bound ----
def test_bound_weights_equal_the_papers():
    "Ho et al. 2020, eq. 12, summed over the chain: beta^2 / (2 sigma^2 (1 - beta) (1 - abar))."
    process = VP(linear_betas(TIMES))
    i = torch.tensor([2, 3, 10, 500, 1000])
    beta, now, before = process.betas[i - 1], process.abar(i), process.abar(i - 1)
    posterior = (1 - before) / (1 - now) * beta
    want = TIMES * beta**2 / (2 * posterior * (1 - beta) * (1 - now))
    assert torch.allclose(vlb_weight(process, i.double() / TIMES).double(), want, rtol=1e-4)


@pytest.mark.parametrize("n", [200, 1000, 4000])
def test_a_whole_step_has_its_own_weight_in_any_precision(n):
    "step/n*n may come out a little above the step: it is not the next one's."
    process, i = VP(linear_betas(n)), torch.arange(1, n + 1)
    exact = vlb_weight(process, (i.double() - .5) / n)
    for kind in (torch.float32, torch.float64): assert torch.equal(vlb_weight(process, i.to(kind) / n), exact)


def test_bits_of_a_perfect_denoiser():
    "Data that are one known picture: the perfect model needs the prior's remainder and next to nothing else."
    process, x0 = VP(linear_betas(TIMES)), torch.full((2, 1, 4, 4), 0.)
    x0 = eight_bits(x0)
    class Knows(Denoiser):
        def predict(self, x_t, t, cond):
            c = self.coefs(t, x_t)
            return x0, (x_t - c.alpha * x0) / c.sigma
    bits = bits_per_dim(Knows(None, process), x0, None, Draws(0, torch.arange(2)), 8)
    # the decoder is a Gaussian of width 0.01
    inside = 2 * torch.distributions.Normal(0., 1.).cdf(torch.tensor(1 / 255 / .01)) - 1
    assert torch.allclose(bits.float(), -inside.log2().expand(2), atol=1e-3)

def test_grey_levels_are_whole_and_cost_what_their_mass_says():
    levels = torch.linspace(-1, 1, 256).view(1, 1, 1, 256)
    assert torch.allclose(eight_bits(levels), levels, atol=1e-6)
    assert (eight_bits(levels + .9 / 255) - levels).abs().max() < 1e-6 and eight_bits(torch.tensor([.1]))[0] != .1
    for mean, std in ((.3, .05), (-1., .01), (2., .5)):
        assert abs((-grey_nats(levels, torch.full_like(levels, mean), std)).exp().sum() - 1) < 1e-6


def test_prior_is_the_divergence_of_two_gaussians():
    process, x0 = VP(linear_betas(50)[:20]), torch.tensor([.5, -1.]).view(2, 1, 1, 1)
    a = process.abar(torch.tensor(20)).item()
    for got, x in zip(prior_nats(process, x0), (.5, -1.)):
        normal = torch.distributions.Normal
        want = torch.distributions.kl_divergence(normal(a**.5 * x, (1 - a)**.5), normal(0., 1.))
        assert abs(got - want) < 1e-6


class Gaussian(Denoiser):
    "The best network for independent normal pixels."
    def __init__(self, process, std): super().__init__(None, process); self.std = std
    def predict(self, x_t, t, cond, boost=1.):
        c = self.coefs(t, x_t)
        x0_hat = c.alpha * self.std**2 / (c.alpha**2 * self.std**2 + c.sigma**2) * x_t
        return x0_hat, (x_t - c.alpha * x0_hat) / c.sigma


@pytest.mark.parametrize("std", [.3, .1])
def test_bits_of_normal_pixels_are_their_entropy(std):
    "With 1,000 steps and the variance beta hardly anything is wasted; the posterior's wastes more."
    draws = Draws(0, torch.arange(40))
    x0 = draws.normal("x0", 1, 16, 16) * std
    entropy = math.log2(std * math.sqrt(2 * math.pi * math.e) / (2 / 255))
    posterior, beta = bits_with(Gaussian(PROCESS, std), x0, None, draws, [0., 1.], 200, clamp=9e9)
    assert abs(beta.mean() - entropy) < .06 < posterior.mean() - beta.mean()


def test_early_steps_are_visited_most():
    p = early_first(100)
    assert abs(p.sum() - 1) < 1e-12 and torch.allclose(p[0] / p, torch.arange(1, 101).double())


def test_weighted_is_the_loss_times_the_weight():
    tok, den, x0, cond = small_world()
    draws = Draws(0, torch.arange(6))
    assert torch.equal(weighted(den, lambda t: 2 * t)(x0, cond, draws), 2 * den.times(draws) * den.loss(x0, cond, draws))


# ---- learned variance ----
def small_world():
    data = load("digits")
    config = ddpm.recipe_for(data, "smoke") | dict(max_len=12)
    torch.manual_seed(0)
    tok, den = build_learned(config, cosine_betas(200))
    b = data.batch("test", Draws(0, torch.arange(6)))
    return tok, den, eight_bits(b.x), tok(b.captions)


def test_variances_equal_diffusers():
    from diffusers.schedulers import DDPMScheduler
    made = DDPMScheduler(num_train_timesteps=TIMES, beta_schedule="linear", variance_type="learned_range")
    made.betas = linear_betas(TIMES) # float64, as ours
    made.alphas = 1 - made.betas
    made.alphas_cumprod = made.alphas.cumprod(0)
    i = torch.tensor([2, 3, 50, 500, 1000])
    small, large = chain_variances(PROCESS, i)
    for share in (-1., -.2, .7, 1.):
        want = torch.stack([made._get_variance(int(k) - 1, torch.tensor(share)) for k in i])
        got = (share + 1) / 2 * large + (1 - share) / 2 * small
        assert torch.allclose(got, want.double(), atol=1e-5)


def test_bound_with_the_posterior_is_ddpms():
    "Steps 2..T: the error of eps, weighted as in the DDPM chapter; step 1 against the sum over all 256 grey levels."
    tok, den, x0, cond = small_world()
    process, T = den.process, 200
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    eps_hat = noise + .1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    for k in (2, 3, 50, 200):
        i = torch.full((6,), k)
        got = bound_terms(process, i, x0, noise, x0, eps_hat, 0.)
        want = vlb_weight(process, i.double() / T).double() / T * (eps_hat - noise).square().flatten(1).mean(1)
        assert torch.allclose(got * math.log(2), want, rtol=1e-4)
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64).view(-1, 1, 1, 1)
    one = torch.ones(256, dtype=torch.long)
    bits = bound_terms(process, one, levels, 0 * levels, torch.full_like(levels, .3), 0 * levels, .4)
    assert abs((-bits * math.log(2)).exp().sum() - 1) < 1e-6, "probabilities of all grey levels"


def test_best_variance_is_the_one_with_the_least_bound():
    "The optimum over the variance of a Gaussian: posterior + squared error of the mean; the gradient finds it."
    tok, den, x0, cond = small_world()
    i, noise = torch.full((6,), 20), torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    eps_hat = noise + .3
    shares = torch.linspace(-1, 3, 400)
    bits = torch.stack([bound_terms(den.process, i, x0, noise, x0, eps_hat, s.item())[0] for s in shares])
    small, large = (v[0] for v in chain_variances(den.process, i))
    k = den.process.betas[19] / ((1 - den.process.abar(torch.tensor(20))) * (1 - den.process.betas[19])).sqrt()
    best = (small.exp() + (k * .3)**2).log()
    assert abs(shares[bits.argmin()] - (best - small) / (large - small)) < .02


def test_bound_moves_the_variance_only():
    tok, den, x0, cond = small_world()
    for p in den.net.net.head.parameters(): torch.nn.init.normal_(p, std=.05)
    draws = Draws(0, torch.arange(6))
    def grads(hybrid):
        den.hybrid = hybrid
        return torch.autograd.grad(den.loss(x0, cond, draws).mean(), den.net.net.head.weight)[0]
    with_bound, without = grads(.001), grads(0.)
    half = len(without) // 2 # pixel_shuffle: the first channels' four sub-pixels first
    assert torch.allclose(with_bound[:half], without[:half], atol=1e-7) and without[half:].abs().max() == 0
    assert with_bound[half:].abs().max() > 0


def test_bits_of_shares():
    tok, den, x0, cond = small_world()
    draws = Draws(0, torch.arange(6))
    def near(x_t, t, cond): # a good network: nine tenths of the picture
        c = den.coefs(t, x_t)
        return .9 * x0, (x_t - .9 * c.alpha * x0) / c.sigma, torch.full_like(x_t, .5)
    den.predict_all = near
    posterior, middle, learned = bits_with(den, x0, cond, draws, [0., .5, None], 128)
    assert torch.allclose(middle, learned) and not torch.allclose(posterior, middle)
    want = bits_per_dim(den, x0, cond, draws, 199)
    # the decoder's variance differs: beta of step 1 there, the posterior's of step 2 here
    i = torch.ones(6, dtype=torch.long)
    noise = draws.normal("noise", *x0.shape[1:])
    c = den.coefs(i / 200, x0)
    x0_hat, eps_hat, _ = near(c.alpha * x0 + c.sigma * noise, i / 200, cond)
    first = [bound_terms(den.process, i, x0, noise, x0_hat, eps_hat, s).mean() for s in (0., 1.)]
    assert abs((posterior.mean() - first[0]) / (want.mean() - first[1]) - 1) < .1


def test_a_fixed_share_is_ddpms_sampler():
    tok, den, x0, cond = small_world()
    x, ts = torch.randn(6, 1, 16, 16), torch.linspace(1, 0, 9)
    p = lambda x, t: (*den.predict(x, t, cond), 0.)
    with torch.no_grad():
        for share, large in ((0., False), (1., True)):
            ours = varied(p, den.process, x, ts, draws=Draws(0, torch.arange(6)), share=share)
            want = sample(lambda x, t: p(x, t)[:2], den.process, x, ts, eta=1., large=large, draws=Draws(0, torch.arange(6)))
            for a, b in zip(ours, want, strict=True): assert torch.allclose(a, b, atol=1e-4)
