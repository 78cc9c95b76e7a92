"""The solvers of the ODE against diffusers, step by step; orders of convergence against a case with a known answer.

`python tests/test_samplers.py` prints the largest difference of each comparison (of the largest value of the same step)."""
import math
from functools import cache, partial

import pytest
import torch
from arms import made
from t2i_course.diffusion import samplers
from t2i_course.diffusion.ddpm import VP, Coefs, linear_betas, sample, view
from t2i_course.diffusion.samplers import GRIDS, dpmpp_2m, exact, heun, leading, order, rho_times, solver_errors, steps_for
from t2i_course.diffusion.schedules import EDM, cosine_betas
from t2i_course.flow.flow_matching import LinearPath
from t2i_course.sweeps.diffusion import samplers as sweep
from walks import (CENTRES, FREE, PROCESS, TIMES, equals_diffusers, largest_error, normal, predict,
                   printed, scheduler, theirs_ddim, theirs_dpm, theirs_heun, theirs_sigma)

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("same_noise")]

CASES = {
    "DDIM": (sample, partial(theirs_ddim, 10), FREE),
    "DDIM, leading": (sample, partial(theirs_ddim, 10, spacing="leading"), FREE),
    "DDIM, clipped": (sample, partial(theirs_ddim, 10, clip=True), 1.),
    "Euler, against DDIM": (sample, partial(theirs_sigma, "EulerDiscreteScheduler", 10), FREE),
    "Heun": (heun, partial(theirs_heun, 10), FREE),
    "Heun, leading": (heun, partial(theirs_heun, 10, spacing="leading"), FREE),
    "Heun, clipped": (heun, partial(theirs_heun, 10, clip=True), 1.),
    "DPM++ 2M, 5 steps": (dpmpp_2m, partial(theirs_dpm, 5), FREE),
    "DPM++ 2M, 10 steps": (dpmpp_2m, partial(theirs_dpm, 10), FREE),
    "DPM++ 2M, 20 steps, linspace": (dpmpp_2m, partial(theirs_dpm, 20, spacing="linspace"), FREE),
    "first order DPM++, against DDIM": (sample, partial(theirs_dpm, 10, solver_order=1), FREE),
}


test_equals_diffusers = equals_diffusers(CASES)


def test_the_comparison_can_fail():
    "Neighbouring methods differ by far more than the bound."
    for ours, name in ((dpmpp_2m, "Heun"), (sample, "DPM++ 2M, 10 steps"), (heun, "DDIM")):
        assert largest_error(ours, CASES[name][1], FREE) > 1e-3


# ---- one picture of all processes ----
LINE = LinearPath()


def final(sampler, n, process=LINE, grid=rho_times, x=None, **more):
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) if x is None else x
    *_, x = sampler(exact(process, CENTRES), process, x, grid(process, n), clamp=FREE, **more)
    return x


def even(process, n): return torch.linspace(1, 0, n + 1, dtype=torch.float64)


@cache
def truth(grid): return final(heun, 800, grid=grid)


def log_snr_grid(process, n): return rho_times(process, n, math.inf)


def errors(sampler, ns, grid):
    want = truth(grid)
    return [(final(sampler, n, grid=grid) - want).square().sum(1).mean().sqrt().item() for n in ns]


@pytest.mark.parametrize("sampler,low,high,grid", [
    (sample, .75, 1.25, even), (heun, 1.7, 2.4, even), (sample, .75, 1.25, rho_times), (heun, 1.7, 2.4, rho_times),
    (dpmpp_2m, 1.6, 2.3, rho_times), (dpmpp_2m, 1.5, 2.3, log_snr_grid)],
    ids=["ddim even", "heun even", "ddim rho", "heun rho", "2m rho", "2m log-snr"])
def test_order_of_convergence(sampler, low, high, grid):
    ns = (30, 60, 120, 240)
    p = order(ns, errors(sampler, ns, grid))
    assert low < p < high, p


def test_more_steps_come_closer():
    for sampler in (sample, heun, dpmpp_2m):
        off = errors(sampler, (10, 40, 160), even)
        assert off[0] > 3 * off[1] > 9 * off[2], off


@pytest.mark.parametrize("process", [VP(linear_betas()), VP(cosine_betas()), EDM(), LINE], ids=["vp", "cosine", "edm", "line"])
@pytest.mark.parametrize("sampler", [heun, dpmpp_2m])
def test_every_process_draws_the_same_mixture(process, sampler):
    "Share of each centre, and the spread around it, whatever the noise process."
    c = process.coefs(torch.ones(1))
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * (c.alpha**2 + c.sigma**2).sqrt().double()
    out = final(sampler, 50, process, x=x)
    d, k = (out[:, None] - CENTRES).square().sum(2).sqrt().min(1)
    assert out.isfinite().all()
    assert (torch.bincount(k, minlength=3) / 2000 - 1 / 3).abs().max() < .05
    assert abs(d.square().mean().sqrt() / 2**.5 - .2) < .01


@pytest.mark.parametrize("process", [EDM(), LINE, VP(cosine_betas())], ids=["edm", "line", "cosine"])
def test_the_ode_does_not_depend_on_the_process(process):
    "The same point of x/alpha against sigma/alpha leads to the same picture: only the coordinates differ."
    ratio = torch.tensor([5., 3., 2., 1., .5, .2, .1, .05], dtype=torch.float64)
    ends = []
    for p in (VP(linear_betas()), process):
        ts = torch.cat([samplers.time_at(p, -2 * ratio.log()), torch.zeros(1, dtype=torch.float64)])
        c = p.coefs(ts[:1])
        y = torch.randn(50, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 5
        for s in (sample, heun, dpmpp_2m): ends.append(list(s(exact(p, CENTRES), p, y * c.alpha, ts, clamp=FREE))[-1])
    for a, b in zip(ends[:3], ends[3:]): assert torch.allclose(a, b, atol=1e-4), (a - b).abs().max()


def test_the_ends_of_the_line():
    "alpha = 0: the first step is DDIM's; sigma = 0: the last one is the predicted picture."
    x, ts = torch.randn(5, 2, dtype=torch.float64), torch.tensor([1., .7, .5, .2, 0.], dtype=torch.float64)
    p = exact(LINE, CENTRES)
    want = list(sample(p, LINE, x, ts, clamp=FREE))
    for s, other in ((heun, 1), (dpmpp_2m, 2)): # the step after an infinite one cannot extrapolate from it
        got = list(s(p, LINE, x, ts, clamp=FREE))
        for k in range(other): assert torch.allclose(got[k], want[k])
        assert not torch.allclose(got[other], want[other])
        assert torch.allclose(got[3], p(got[2], torch.full((5,), .2, dtype=torch.float64))[0])


def test_heun_in_guesses():
    "Equation 4 of the page: DDIM's point and a multiple of the change of the guess."
    process, x, ts = EDM(), 3 * torch.randn(20, 2, dtype=torch.float64), torch.tensor([.6, .5, 0.], dtype=torch.float64)
    p = exact(process, CENTRES)
    l, l_next = process.coefs(ts[:2]).sigma.double()
    ddim, got = next(sample(p, process, x, ts, clamp=FREE)), next(heun(p, process, x, ts, clamp=FREE))
    before, after = p(x, ts[:1].expand(20))[0], p(ddim, ts[1:2].expand(20))[0]
    assert torch.allclose(got, ddim + (l / l_next - 1) / 2 * (after - before), atol=1e-5)


def test_calls_of_the_network():
    count = []
    def counting(x, t):
        count.append(1)
        return exact(LINE, CENTRES)(x, t)
    x = torch.randn(3, 2, dtype=torch.float64)
    for s, n, want in ((sample, 10, 10), (heun, 10, 18), (dpmpp_2m, 10, 10), (heun, steps_for(heun, 15), 14)):
        count.clear()
        list(s(counting, LINE, x, even(LINE, n)))
        assert len(count) == want # one fewer for heun than 2n - 1: on this path the first step has no second look
    count.clear()
    list(heun(counting, EDM(), 80 * x, even(EDM(), 10)))
    assert len(count) == 19 == 2 * 10 - 1


def test_clamped_pictures_keep_their_point():
    "After clamping, picture and noise must still add up to x_t."
    x, t = 3 * normal(1), torch.full((2,), .4, dtype=torch.float64)
    c = Coefs(*(view(u, x) for u in PROCESS.coefs(t)))
    x0, noise = samplers.believed(predict, x, t, c, 1.)
    assert x0.abs().max() <= 1 < predict(x, t)[0].abs().max()
    assert torch.allclose(c.alpha * x0 + c.sigma * noise, x)


# ---- spacing ----
@pytest.mark.parametrize("process", [VP(linear_betas()), EDM(), LINE], ids=["vp", "edm", "line"])
@pytest.mark.parametrize("rho", [1., 7., math.inf])
def test_spacing(process, rho):
    ts = rho_times(process, 12, rho)
    assert len(ts) == 13 and ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all()
    c = process.coefs(ts[1:-1])
    ratio = (c.sigma / c.alpha).double()
    assert abs(ratio[-1] - .002) < 2e-5 or process.coefs(torch.tensor([.001])).sigma > .002
    even = ratio.log() if math.isinf(rho) else ratio**(1 / rho)
    inner = even[:-1] if isinstance(process, VP) else even # VP's first step has a sigma above .002
    assert torch.allclose(inner.diff(), inner.diff()[:1].expand(len(inner) - 1), rtol=2e-2)
    assert 0 < rho_times(process, 1, rho)[0] == 1


def test_spacing_equals_karras():
    from t2i_course.diffusion.schedules import edm_sigmas
    ts = rho_times(EDM(), 18)
    assert torch.allclose(EDM().coefs(ts).sigma.double(), edm_sigmas(18), rtol=1e-5)


def test_leading_is_diffusers_default():
    made = scheduler("DDIMScheduler", 10)
    assert torch.allclose(leading(None, 10), torch.cat([(made.timesteps + 1) / TIMES, torch.zeros(1)]))
    assert leading(None, 10)[0] == .901 and made.config.timestep_spacing == "leading"


def test_grids_go_to_the_data():
    for name, grid in GRIDS.items():
        ts = torch.as_tensor(grid(PROCESS, 10))
        assert len(ts) == 11 and ts[-1] == 0 and (ts.diff() < 0).all() and (ts[0] == 1) == (name != "leading")


# ---- measured ----
def test_solver_errors_fall():
    off = solver_errors(exact(LINE, CENTRES), LINE, torch.randn(50, 2, dtype=torch.float64), (9, 65), 150, even)
    assert set(off) == set(samplers.SAMPLERS) and all(e["65"] < .6 * e["9"] for e in off.values()), off


def test_sweep(runs_at_smoke):
    rows = made(sweep, **runs_at_smoke("samplers"))
    assert {k.split(".")[0] for k in rows} == {"setting", "rows", "nfe", "solver", "spacing"}
    assert rows["nfe.heun.5.seed0"]["calls"] == 5 and rows["nfe.heun.5.seed0"]["steps"] == 3
    assert rows["solver.uniform.ddim.seed0"].keys() == {"3", "5"} and not [k for k in rows if k.startswith("spacing.uniform")]


if __name__ == "__main__": printed(CASES)
