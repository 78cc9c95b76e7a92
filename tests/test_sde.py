"""The samplers with fresh noise against diffusers, step by step, and against distributions that are known.

`python tests/test_sde.py` prints the largest difference of each comparison."""
import math
from functools import partial

import pytest
import torch
from arms import made
from t2i_course.core.data import Draws
from t2i_course.diffusion.ddpm import VP, linear_betas, sample
from t2i_course.diffusion.samplers import dpmpp_2m, exact, rho_times
from t2i_course.diffusion.schedules import EDM, cosine_betas
from t2i_course.diffusion.sde import dpmpp_2m_sde, euler_ancestral, euler_maruyama
from t2i_course.flow.flow_matching import LinearPath
from t2i_course.sweeps.diffusion import sde as sweep
from walks import CENTRES, FREE, PROCESS, equals_diffusers, largest_error, normal, predict, printed, theirs_ddim, theirs_dpm, theirs_sigma

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("same_noise")]
LINE = LinearPath()

CASES = {
    "DDIM, eta .5": (partial(sample, eta=.5), partial(theirs_ddim, 10, eta=.5), FREE),
    "DDIM, eta 1": (partial(sample, eta=1.), partial(theirs_ddim, 10, eta=1.), FREE),
    "DDIM, eta .5, as euler_ancestral": (partial(euler_ancestral, eta=.5), partial(theirs_ddim, 10, eta=.5), FREE),
    "DDIM, eta 1, as euler_ancestral": (euler_ancestral, partial(theirs_ddim, 50, eta=1.), FREE),
    "Euler ancestral": (euler_ancestral, partial(theirs_sigma, "EulerAncestralDiscreteScheduler", 10), FREE),
    "Euler ancestral, against DDPM": (partial(sample, eta=1.), partial(theirs_sigma, "EulerAncestralDiscreteScheduler", 20), FREE),
    "DPM++ 2M SDE, 10 steps": (dpmpp_2m_sde, partial(theirs_dpm, 10, kind="sde-dpmsolver++"), FREE),
    "DPM++ 2M SDE, 20 steps": (dpmpp_2m_sde, partial(theirs_dpm, 20, kind="sde-dpmsolver++"), FREE),
    "first order SDE-DPM++, against DDPM": (partial(sample, eta=1.), partial(theirs_dpm, 10, kind="sde-dpmsolver++", solver_order=1), FREE),
}


test_equals_diffusers = equals_diffusers(CASES)


def test_the_comparison_can_fail():
    for ours, name in ((dpmpp_2m, "DPM++ 2M SDE, 10 steps"), (euler_maruyama, "Euler ancestral"), (partial(euler_ancestral, eta=.9), "DDIM, eta 1")):
        assert largest_error(ours, CASES[name][1], FREE) > 1e-3


def test_no_fresh_noise_at_eta_0():
    x, ts = normal(0), torch.linspace(1, 0, 6)
    for a, b in ((partial(euler_ancestral, eta=0.), sample), (partial(dpmpp_2m_sde, eta=0.), dpmpp_2m), (partial(euler_maruyama, eta=0.), sample)):
        for u, w in zip(a(predict, PROCESS, x, ts), b(predict, PROCESS, x, ts)): assert torch.allclose(u, w, atol=1e-4)
    first, second = (list(dpmpp_2m_sde(predict, PROCESS, x, ts, draws=Draws(s, torch.arange(2))))[-1] for s in (0, 1))
    assert not torch.allclose(first, second)


def test_the_two_dials():
    "For small steps k-diffusion's eta is the square of the ancestral one: the same size of fresh noise."
    class Loud:
        def normal(self, stream, *shape): return torch.ones(1, *shape, dtype=torch.float64)
    process, x, ts = EDM(), torch.zeros(1, 2, dtype=torch.float64), torch.tensor([.7, .699, 0.], dtype=torch.float64)
    still = lambda x, t: (x, 0 * x)
    size = lambda f: next(f(still, process, x, ts, draws=Loud(), clamp=FREE)).abs().max().item()
    assert abs(size(partial(dpmpp_2m_sde, eta=.25)) / size(partial(euler_ancestral, eta=.5)) - 1) < .02
    assert abs(size(partial(dpmpp_2m_sde, eta=1.)) / size(euler_ancestral) - 1) < 1e-5


PROCESSES = dict(vp=VP(linear_betas()), cosine=VP(cosine_betas()), edm=EDM(), line=LINE)
WALKS = [(name, f, n) for f, n in ((dpmpp_2m_sde, 50), (euler_ancestral, 200)) for name in PROCESSES]
WALKS += [(name, euler_maruyama, 300) for name in ("vp", "edm")]  # the others begin with an endless step


@pytest.mark.parametrize("name,sampler,steps", WALKS, ids=[f"{f.__name__} {name}" for name, f, _ in WALKS])
def test_every_process_draws_the_same_mixture(name, sampler, steps):
    "Share of each centre, and the spread around it, whatever the noise process."
    process = PROCESSES[name]
    c = process.coefs(torch.ones(1))
    draws = Draws(1, torch.arange(2000))
    x = draws.normal("start", 2).double() * (c.alpha**2 + c.sigma**2).sqrt().double()
    *_, out = sampler(exact(process, CENTRES), process, x, rho_times(process, steps), clamp=FREE, draws=draws)
    d, k = (out[:, None] - CENTRES).square().sum(2).sqrt().min(1)
    assert out.isfinite().all()
    assert (torch.bincount(k, minlength=3) / 2000 - 1 / 3).abs().max() < .05
    assert abs(d.square().mean().sqrt() / 2**.5 - .2) < .012


def test_the_fokker_planck_equation_of_the_page():
    "One band: drift and noise together move a Gaussian's variance as the noise level does, for every eta."
    s2, l = .3, .7
    for eta in (0., .6, 1., 2.):
        slope = l / (s2 + l * l) # eps_hat = slope y
        drift, noise = -2 * (1 + eta**2) * slope * (s2 + l * l), 2 * eta**2 * l # changes of the variance, going down
        assert math.isclose(drift + noise, -2 * l)


def test_sweep(runs_at_smoke):
    rows = made(sweep, **runs_at_smoke("sde"))
    assert {k.split(".")[0] for k in rows} == {"setting", "nfe", "eta"}
    assert {k.split(".")[2] for k in rows if k.startswith("eta")} == {"25", "50", "75"}


if __name__ == "__main__": printed(CASES)
