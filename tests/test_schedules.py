"Noise schedules against diffusers, official formulas and each other; the course's claims about them."
import math

import pytest
import torch
from arms import made
from t2i_course.core.data import Draws
from t2i_course.diffusion.ddpm import VP, linear_betas, uniform_times
from t2i_course.diffusion.schedules import (
    EDM, betas_from_abar, cosine_betas, density, edm_sigmas, edm_times, log_normal, log_snr, scaled_linear_betas,
    schedules, sigmoid_abar, sigmoid_betas, time_at, walk)
from t2i_course.flow.flow_matching import LinearPath
from t2i_course.sweeps.diffusion import schedules as sweep

EVERY = schedules() | {"line": LinearPath()}


@pytest.fixture(scope="module")
def diffusers():
    import diffusers.schedulers
    return diffusers.schedulers


# --- Tables ---

@pytest.mark.parametrize("n", [100, 1000, 4000])
def test_cosine_is_openais(n):
    "Written with a loop over single numbers, as a paper would define it."
    def f(t): return math.cos((t + .008) / 1.008 * math.pi / 2) ** 2
    want = [min(1 - f((i + 1) / n) / f(i / n), .999) for i in range(n)]
    assert torch.allclose(cosine_betas(n), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, ours, ends", [
    ("linear", linear_betas(), (1e-4, .02)),
    ("scaled_linear", scaled_linear_betas(), (.00085, .012)),
    ("squaredcos_cap_v2", cosine_betas(), (1e-4, .02)),
    ("sigmoid", sigmoid_betas(), (1e-4, .02)),
])
def test_betas_equal_diffusers(diffusers, name, ours, ends):
    theirs = diffusers.DDPMScheduler(1000, *ends, beta_schedule=name)
    assert (ours - theirs.betas).abs().max() < 1e-6
    assert torch.allclose(ours.float(), theirs.betas, rtol=2e-5)
    ours_abar = VP(ours).abar(torch.arange(1, 1001))
    assert (ours_abar - theirs.alphas_cumprod).abs().max() < 1e-5


@pytest.mark.parametrize("n", [2, 18, 50])
def test_edm_sigmas_equal_diffusers(diffusers, n):
    scheduler = diffusers.EDMEulerScheduler(sigma_min=.002, sigma_max=80., rho=7.)
    scheduler.set_timesteps(n)
    assert torch.allclose(edm_sigmas(n).float(), scheduler.sigmas, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [5, 30])
def test_karras_steps_of_a_chain_equal_diffusers(diffusers, n):
    "diffusers takes the ends from the chain itself: its last and its first step."
    scheduler = diffusers.EulerDiscreteScheduler(1000, .00085, .012, beta_schedule="scaled_linear",
                                                 use_karras_sigmas=True)
    scheduler.set_timesteps(n)
    chain = VP(scaled_linear_betas())
    high, low = (scheduler.sigmas[i].double().item() for i in (0, -2))
    first, last = ((-log_snr(chain, torch.tensor([i / 1000])) / 2).exp().item() for i in (1, 1000))
    assert abs(low / first - 1) < 1e-3 and abs(high / last - 1) < 1e-5  # float32 leaves 1 - abar three digits at step 1
    ours = edm_sigmas(n, sigma_min=low, sigma_max=high)
    assert torch.allclose(ours.float(), scheduler.sigmas, rtol=1e-5, atol=0)
    ts = edm_times(n, chain, sigma_min=low, sigma_max=high)
    assert torch.allclose((-log_snr(chain, ts[:-1]) / 2).exp(), ours[:-1], rtol=1e-4)
    ours_steps = ts[:-1] * 1000 - 1  # diffusers counts from 0 and interpolates log sigma: equal at the steps
    assert (ours_steps - scheduler.timesteps.double()).abs().max() < .2


def test_edm_sigmas_end_at_zero_and_survive_one_step():
    assert edm_sigmas(1).tolist() == [80., 0.]
    for n in (2, 7, 40):
        sigmas = edm_sigmas(n)
        assert sigmas.dtype == torch.float64 and len(sigmas) == n + 1 and sigmas[-1] == 0
        assert abs(sigmas[0] - 80) < 1e-9 and abs(sigmas[-2] - .002) < 1e-12 and (sigmas.diff() < 0).all()
    assert (edm_sigmas(9, rho=1.)[:-1].diff() + (80 - .002) / 8).abs().max() < 1e-9


@pytest.mark.parametrize("tau, start, end", [(1., -3., 3.), (.3, 0., 3.), (.9, -3., 3.)])
def test_sigmoid_abar_is_chens(tau, start, end):
    def s(x): return 1 / (1 + math.exp(-x / tau))
    for t in (0., .2, .5, .99):
        want = (s(end) - s(start + t * (end - start))) / (s(end) - s(start))
        got = sigmoid_abar(torch.tensor([t], dtype=torch.float64), start, end, tau).item()
        assert abs(got - want) < 1e-9
    assert sigmoid_abar(torch.ones(1)).item() == 1e-9


def test_betas_from_abar_is_the_inverse_of_cumprod():
    for betas in (linear_betas(), cosine_betas(), sigmoid_betas(300)):
        assert torch.allclose(betas_from_abar(torch.cumprod(1 - betas, 0)), betas, rtol=1e-9, atol=1e-12)


# --- What the listings get wrong ---

def test_errata():
    x = torch.linspace(0, 1000, 1001, dtype=torch.float64)
    a = torch.cos((x / 1000 + .008) / 1.008 * math.pi / 2) ** 2
    raw = 1 - a[1:] / a[:-1]
    assert ((raw.clip(1e-4, .9999) - cosine_betas()).abs() > 1e-9).sum() == 14       # E024
    assert abs(cosine_betas()[0] - 4.128e-5) < 1e-7
    assert abs(VP(cosine_betas()).abar(torch.tensor(1000)) - 2.43e-9) < 1e-11
    assert sigmoid_betas().max() < .02 and sigmoid_betas().min() > 1e-4                  # E025
    assert scaled_linear_betas()[500] < torch.linspace(.00085, .012, 1000)[500]       # E026
    assert abs(VP(scaled_linear_betas()).coefs(torch.ones(1)).alpha.item() - .068265) < 1e-5  # E023


# --- Log-SNR and its inverse ---

@pytest.mark.parametrize("name", EVERY)
def test_log_snr_falls_and_time_at_inverts_it(name):
    process, t = EVERY[name], torch.linspace(.02, .98, 25, dtype=torch.float64)
    l = log_snr(process, t)
    assert (l.diff() < 0).all() and l.dtype == torch.float64
    assert (time_at(process, l) - t).abs().max() < 1e-5
    out_of_range = time_at(process, torch.tensor([200., -200.], dtype=torch.float64))
    assert out_of_range[0] < .01 and out_of_range[1] > .99


@pytest.mark.parametrize("name", EVERY)
def test_density_is_that_of_uniform_times(name):
    "Counted: how many of 20,000 uniform times fall into each bin of log-SNR."
    process = EVERY[name]
    t = uniform_times(Draws(0, torch.arange(20_000)))
    edges = torch.arange(-6, 6.5, 1., dtype=torch.float64)
    counted = torch.histogram(log_snr(process, t), edges)[0] / len(t)
    centre = edges[:-1] + .5
    assert (density(process, centre, h=.5) - counted).abs().max() < .003


def test_density_of_the_line_and_of_cosine_in_closed_form():
    l = torch.linspace(-7, 7, 29, dtype=torch.float64)
    t = torch.sigmoid(-l / 2)
    assert torch.allclose(density(LinearPath(), l), t * (1 - t) / 2, atol=1e-4)
    assert torch.allclose(density(VP(cosine_betas(s=0.)), l), 1 / (2 * math.pi * (l / 2).cosh()), atol=1e-3)


# --- EDM ---

def test_edm_coefs_and_their_derivatives():
    process, t, h = EDM(), torch.tensor([.3, .6, .9], dtype=torch.float64), 1e-4
    c = process.coefs(t)
    assert (c.alpha == 1).all() and (c.dalpha == 0).all()
    assert torch.allclose(process.time(c.sigma.double()), t, atol=1e-6)
    slope = 80 * ((t + h) ** 7 - (t - h) ** 7) / (2 * h)
    assert torch.allclose(c.dsigma.double(), slope, rtol=1e-5)
    ends = process.coefs(torch.tensor([0., 1.]))
    assert ends.sigma.tolist() == [0., 80.] and all(u.dtype == torch.float32 for u in ends)


def test_edm_steps_are_equal_on_its_own_clock():
    ts = edm_times(18, EDM())
    assert ts[0] == 1 and ts[-1] == 0 and torch.allclose(ts[:-1].diff(), (ts[1] - ts[0]).expand(17))


@pytest.mark.parametrize("name", ["EDM", "linear", "cosine", "line"])
def test_log_normal_has_edms_moments(name):
    process = EVERY[name]
    t = log_normal(process)(Draws(3, torch.arange(4000)))
    log_sigma = -log_snr(process, t) / 2
    assert t.dtype == torch.float32 and 0 < t.min() and t.max() < 1
    assert abs(log_sigma.mean() + 1.2) < .02 and abs(log_sigma.std() - 1.2) < .02
    again = log_normal(process)(Draws(3, torch.arange(4000)[70:80]))
    assert torch.equal(again, t[70:80])


# --- Drawing on another's steps, and the sweeps ---

def test_walk_has_the_log_snrs_of_the_other_schedule():
    linear, cosine = EVERY["linear"], EVERY["cosine"]
    ts = walk(linear, cosine, 10)
    assert len(ts) == 11 and ts[-1] == 0 and (ts.diff() < 0).all()
    own = log_snr(cosine, torch.linspace(1, 0, 11)[1:-1])
    assert torch.allclose(log_snr(linear, ts[1:-1]), own, atol=1e-3)
    ratio = (-log_snr(linear, walk(linear, EVERY["EDM"], 10)[:-1]) / 2).exp()
    assert torch.allclose(ratio, edm_sigmas(10)[:-1].clamp(min=ratio[-1].item()), rtol=1e-3) and ratio[-1] < .0021
    assert torch.equal(walk(linear, linear, 4, .8), torch.linspace(.8, 0, 5, dtype=torch.float64))


def test_experiments_yield_complete_rows(runs_at_smoke):
    found = made(sweep, **runs_at_smoke("schedules"))
    assert found["setting"]["target"] == "v" and len(found["setting"]["levels"]) == len(found["error.cosine.seed0"]) == 15
    row = found["trained.cosine.seed0"]
    assert row["nfe"] == 4 and row["images"] == 320
    assert {"recipe", "params", "train_seconds", "fd", "fd_floor", "kid", "recall", "obedience"} <= set(row)
    assert found["later.linear.80.seed0"]["nfe"] == 3 and found["start.80.seed0"]["steps"] == 3
    assert {k for k in found if k.startswith("steps.")} == {f"steps.{b}.3.seed0" for b in ("linear", "cosine", "EDM")}