"""diffusers' schedulers, walked step by step beside ours.

diffusers counts time steps from 0: its step i is the chain after i+1 steps, our t = (i+1)/T. Its `euler`, `heun` and
`dpmpp` schedulers that work in sigma see x/alpha where we see x; their float32 tables are replaced by float64 ones.
"""
import math

import pytest
import torch
from t2i_course.diffusion import ddpm
from t2i_course.diffusion.ddpm import VP, linear_betas

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


def largest_error(ours, theirs, clamp=None):
    "Over all steps: the largest difference, in units of the largest value of that step (at least 1)."
    times, steps = theirs()
    more = {} if clamp is None else dict(clamp=clamp)
    off, k = 0., 0
    for k, (a, b) in enumerate(zip(ours(predict, PROCESS, normal(0), times, draws=Told(), **more), steps, strict=True), 1):
        off = max(off, ((a - b).abs().max() / b.abs().max().clamp_min(1)).item())
    assert k == len(times) - 1
    return off


def equals_diffusers(cases):
    "A test of {name: what `largest_error` takes}: every step of the two walks agrees."
    @pytest.mark.parametrize("name", cases)
    def test(name, record_property):
        off = largest_error(*cases[name])
        record_property("largest error", off)
        assert off < 1e-5, off
    return test


def printed(cases):
    "The largest difference of each comparison, for `python tests/test_....py`."
    import diffusers
    print("diffusers", diffusers.__version__)
    tell(setattr)
    for name, case in cases.items(): print(f"{name:40} {largest_error(*case):.1e}")


# ---- a case with a known answer ----
CENTRES = torch.tensor([[1., 0.], [-.5, .8], [-.5, -.8]], dtype=torch.float64)
