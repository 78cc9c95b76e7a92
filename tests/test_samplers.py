"""Every sampler against diffusers, step by step; orders of convergence against a case with a known answer.

`python tests/test_samplers.py` prints the largest difference of each comparison (of the largest value of the same step).
diffusers counts time steps from 0: its step i is the chain after i+1 steps, our t = (i+1)/T. Its `euler`, `heun` and
`dpmpp` schedulers that work in sigma see x/alpha where we see x; their float32 tables are replaced by float64 ones.
"""
import math
from functools import cache, partial

import pytest
import torch
from t2i_course.core.data import Draws
from t2i_course.diffusion import ddpm, samplers
from t2i_course.diffusion.ddpm import VP, Coefs, linear_betas, sample, view
from t2i_course.diffusion.samplers import (ddim_invert, dpmpp_2m, dpmpp_2m_sde, euler_ancestral, exact, heun, leading, order,
                                           rho_times, steps_for)
from t2i_course.diffusion.schedules import EDM, cosine_betas
from t2i_course.flow.flow_matching import LinearPath

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TIMES, SHAPE = 1000, (2, 3, 8, 8)
PROCESS = VP(linear_betas(TIMES))
FREE = 9e9 # a clamp that clamps nothing


def normal(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(x, t):
    "Never trained, the same every time; t in steps of the chain, asked for the noise."
    s = float(t) / TIMES
    return .6 * torch.tanh(x.roll(1, -1)) + .3 * x * math.cos(3 * s) + .2 * math.sin(5 * s)


def at(i):
    return ddpm.Coefs(*(v.item() for v in PROCESS.coefs(torch.tensor([i / TIMES], dtype=torch.float64))))


def predict(x, t):
    c, out = at(t[0].item() * TIMES), network(x, round(t[0].item() * TIMES, 3))
    return (x - c.sigma * out) / c.alpha, out


class Told:
    "The same noise for both sides: the k-th tensor for the k-th step."
    def normal(self, stream, *shape): return normal(100 + int(stream.split()[1]))


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    tell(monkeypatch.setattr)


def tell(put):
    "diffusers' random numbers become those of `Told`."
    import diffusers.schedulers.scheduling_ddim as a
    import diffusers.schedulers.scheduling_ddpm as b
    import diffusers.schedulers.scheduling_dpmsolver_multistep as c
    import diffusers.schedulers.scheduling_euler_ancestral_discrete as d
    for module in (a, b, c, d):
        put(module, "randn_tensor", lambda *a, dtype=None, **k: normal(100 + tell.step).to(dtype or torch.float64))


def scheduler(name, n, **more):
    import diffusers.schedulers
    made = getattr(diffusers.schedulers, name)(num_train_timesteps=TIMES, beta_schedule="linear", **more)
    made.betas = linear_betas(TIMES)
    made.alphas = 1 - made.betas
    made.alphas_cumprod = made.alphas.cumprod(0)
    for key in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(made, key): setattr(made, key, torch.ones((), dtype=torch.float64))
    made.set_timesteps(n)
    if hasattr(made, "sigmas") and not hasattr(made, "final_alpha_cumprod"):
        abar = made.alphas_cumprod[made.timesteps.round().long()]
        made.sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])
    return made


def theirs_ddim(n, eta=0., clip=False, spacing="trailing", **_):
    made, x = scheduler("DDIMScheduler", n, clip_sample=clip, timestep_spacing=spacing), normal(0)
    times = [(i.item() + 1) / TIMES for i in made.timesteps] + [0.]
    def steps(x):
        for tell.step, i in enumerate(made.timesteps):
            x = made.step(network(x, i + 1), i, x, eta=eta, use_clipped_model_output=clip).prev_sample
            yield x
    return times, steps(x)


def theirs_sigma(name, n, spacing="trailing", **more):
    "Schedulers that see x/alpha."
    made = scheduler(name, n, timestep_spacing=spacing, **more)
    times = [(i.item() + 1) / TIMES for i in made.timesteps] + [0.]
    alphas = [at(1000 * t).alpha for t in times]
    def steps():
        x = normal(0) / alphas[0]
        for tell.step, i in enumerate(made.timesteps):
            out = network(made.scale_model_input(x, i).double(), i + 1)
            x = made.step(out, i, x).prev_sample
            yield x * alphas[tell.step + 1]
    return times, steps()


def theirs_heun(n, spacing="trailing", clip=False):
    made = scheduler("HeunDiscreteScheduler", n, timestep_spacing=spacing, clip_sample=clip)
    order_of = [made.timesteps[0], *made.timesteps[1::2]] # each later time comes twice
    times = [(i.item() + 1) / TIMES for i in order_of] + [0.]
    abar = made.alphas_cumprod[made.timesteps.round().long()]
    sigmas = ((1 - abar) / abar).sqrt()
    made.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]) # already in the order of the calls
    alphas = [at(1000 * t).alpha for t in times]
    def steps():
        x = normal(0) / alphas[0]
        for k, i in enumerate(made.timesteps):
            x = made.step(network(made.scale_model_input(x, i), i + 1), i, x).prev_sample
            if k % 2 == 1: yield x * alphas[(k + 1) // 2]
        yield x
    return times, steps()


def theirs_dpm(n, kind="dpmsolver++", spacing="trailing", **more):
    made = scheduler("DPMSolverMultistepScheduler", n, algorithm_type=kind, timestep_spacing=spacing, **more)
    times = [(i.item() + 1) / TIMES for i in made.timesteps] + [0.]
    def steps():
        x = normal(0)
        for tell.step, i in enumerate(made.timesteps):
            x = made.step(network(x, i + 1), i, x).prev_sample.double()
            yield x
    return times, steps()


def theirs_inverse(n, spacing):
    made = scheduler("DDIMInverseScheduler", n, clip_sample=False, timestep_spacing=spacing)
    times = [0.] + [(i.item() + 1) / TIMES for i in made.timesteps]
    def steps():
        x = normal(0)
        for i in made.timesteps:
            x = made.step(network(x, i + 1), i, x).prev_sample
            yield x
    return times, steps()


CASES = {
    "DDIM, eta 0": (partial(sample, eta=0.), partial(theirs_ddim, 10)),
    "DDIM, eta 0, leading": (partial(sample, eta=0.), partial(theirs_ddim, 10, spacing="leading")),
    "DDIM, eta 0, clipped": (partial(sample, eta=0.), partial(theirs_ddim, 10, clip=True)),
    "DDIM, eta .5": (partial(sample, eta=.5), partial(theirs_ddim, 10, eta=.5)),
    "DDIM, eta 1": (partial(sample, eta=1.), partial(theirs_ddim, 10, eta=1.)),
    "DDIM, eta .5, as euler_ancestral": (partial(euler_ancestral, eta=.5), partial(theirs_ddim, 10, eta=.5)),
    "DDIM, eta 1, as euler_ancestral": (euler_ancestral, partial(theirs_ddim, 50, eta=1.)),
    "DDIM inverse, leading": (ddim_invert, partial(theirs_inverse, 10, "leading")),
    "DDIM inverse, trailing": (ddim_invert, partial(theirs_inverse, 20, "trailing")),
    "Euler, against DDIM": (partial(sample, eta=0.), partial(theirs_sigma, "EulerDiscreteScheduler", 10)),
    "Euler ancestral": (euler_ancestral, partial(theirs_sigma, "EulerAncestralDiscreteScheduler", 10)),
    "Euler ancestral, against DDPM": (partial(sample, eta=1.), partial(theirs_sigma, "EulerAncestralDiscreteScheduler", 20)),
    "Heun": (heun, partial(theirs_heun, 10)),
    "Heun, leading": (heun, partial(theirs_heun, 10, spacing="leading")),
    "Heun, clipped": (heun, partial(theirs_heun, 10, clip=True)),
    "DPM++ 2M, 5 steps": (dpmpp_2m, partial(theirs_dpm, 5)),
    "DPM++ 2M, 10 steps": (dpmpp_2m, partial(theirs_dpm, 10)),
    "DPM++ 2M, 20 steps, linspace": (dpmpp_2m, partial(theirs_dpm, 20, spacing="linspace")),
    "DPM++ 2M SDE, 10 steps": (dpmpp_2m_sde, partial(theirs_dpm, 10, kind="sde-dpmsolver++")),
    "DPM++ 2M SDE, 20 steps": (dpmpp_2m_sde, partial(theirs_dpm, 20, kind="sde-dpmsolver++")),
    "first order SDE-DPM++, against DDPM": (partial(sample, eta=1.),
                                            partial(theirs_dpm, 10, kind="sde-dpmsolver++", solver_order=1)),
    "first order DPM++, against DDIM": (partial(sample, eta=0.), partial(theirs_dpm, 10, solver_order=1)),
}


def largest_error(name):
    "Over all steps: the largest difference, in units of the largest value of that step (at least 1)."
    ours, theirs = CASES[name]
    times, steps = theirs()
    more = {} if ours is ddim_invert else dict(clamp=1. if "clipped" in name else FREE)
    mine = ours(predict, PROCESS, normal(0), times, draws=Told(), **more)
    off, k = 0., 0
    for k, (a, b) in enumerate(zip(mine, steps, strict=True), 1):
        off = max(off, ((a - b).abs().max() / b.abs().max().clamp_min(1)).item())
    assert k == len(times) - 1
    return off


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name, record_property):
    off = largest_error(name)
    record_property("largest error", off)
    assert off < 1e-5, off


def test_the_comparison_can_fail():
    "Neighbouring methods differ by far more than the bound."
    for ours, name in ((dpmpp_2m, "Heun"), (partial(sample, eta=0.), "DPM++ 2M, 10 steps"), (dpmpp_2m, "DPM++ 2M SDE, 10 steps")):
        CASES["wrong"] = ours, CASES[name][1]
        assert largest_error("wrong") > 1e-3
        del CASES["wrong"]


# ---- one picture of all processes ----
CENTRES = torch.tensor([[1., 0.], [-.5, .8], [-.5, -.8]], dtype=torch.float64)
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
@pytest.mark.parametrize("sampler", [heun, dpmpp_2m, dpmpp_2m_sde, euler_ancestral])
def test_every_process_draws_the_same_mixture(process, sampler):
    "Share of each centre, and the spread around it, whatever the noise process."
    draws, c = Draws(1, torch.arange(2000)), process.coefs(torch.ones(1))
    x = draws.normal("start", 2).double() * (c.alpha**2 + c.sigma**2).sqrt().double()
    out = final(sampler, 200 if sampler is euler_ancestral else 50, process, x=x, draws=draws)
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
    fresh = list(euler_ancestral(p, LINE, x, ts, draws=Draws(0, torch.arange(5)), clamp=FREE))
    assert all(g.isfinite().all() for g in fresh)


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


def test_no_fresh_noise_at_eta_0():
    x, ts = normal(0), torch.linspace(1, 0, 6)
    for a, b in ((partial(euler_ancestral, eta=0.), sample), (partial(dpmpp_2m_sde, eta=0.), dpmpp_2m)):
        for u, w in zip(a(predict, PROCESS, x, ts), b(predict, PROCESS, x, ts)): assert torch.allclose(u, w, atol=1e-5)
    first, second = (list(dpmpp_2m_sde(predict, PROCESS, x, ts, draws=Draws(s, torch.arange(2))))[-1] for s in (0, 1))
    assert not torch.allclose(first, second)


# ---- inversion ----
@pytest.mark.parametrize("process", [LINE, EDM(), VP(linear_betas())], ids=["line", "edm", "vp"])
def test_inversion_comes_back(process):
    p = exact(process, CENTRES)
    x0 = CENTRES.repeat(20, 1) + .2 * torch.randn(60, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    def off(n, rounds):
        ts = rho_times(process, n)
        *_, noise = ddim_invert(p, process, x0, ts.flip(0), rounds=rounds)
        *_, back = sample(p, process, noise, ts, clamp=FREE)
        return (back - x0).norm(dim=1).median().item() # points between the centres are not sent back by any sampler
    once, often, fine = off(20, 1), off(20, 20), off(80, 1)
    assert often < .05 * once and fine < .5 * once, (once, often, fine)


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


if __name__ == "__main__":
    import diffusers
    print("diffusers", diffusers.__version__)
    tell(setattr)
    for name in CASES: print(f"{name:40} {largest_error(name):.1e}")
