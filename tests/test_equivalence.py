"""Our schedules, steps and networks against diffusers, torch and formulas, to 1e-5.

diffusers counts time steps from 0: its step i is the chain after i+1 steps, our t = (i+1)/T.
Its `leading` grid ends at step 0 and then jumps to the data; its `trailing` grid is our linspace(1, 0, n+1).
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2i_course.core.conditioning import Block, Cond, TextEncoder, WordTokenizer
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.diffusion import ddpm
from t2i_course.diffusion.ddpm import VP, Coefs, Denoiser, ResBlock, UNet, guided, linear_betas, sample, solve, step
from t2i_course.flow.flow_matching import LinearPath

TIMES = 1000
EQUAL = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def schedulers():
    import diffusers.schedulers
    return diffusers.schedulers


def settings(**more):
    "diffusers with everything switched off that DDPM's and DDIM's formulas do not have."
    return dict(num_train_timesteps=TIMES, beta_schedule="linear", clip_sample=False) | more


def same(ours, theirs, where=None):
    "Equal to 1e-5 of the largest value."
    off = (ours - theirs).abs().max()
    assert off <= 1e-5 * max(1, theirs.abs().max()), (where, off)


def exact(scheduler):
    "The tables in float64: in diffusers' float32 the first steps' 1 - abar has three digits left."
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.betas = linear_betas(TIMES)
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        scheduler.one = torch.tensor(1., dtype=torch.float64)
        if hasattr(scheduler, "final_alpha_cumprod"): scheduler.final_alpha_cumprod = scheduler.one
    return scheduler


def fixed(x, t):
    "A network that was never trained, the same every time; t in steps of the chain."
    s = t / TIMES
    return .6 * torch.tanh(x.roll(1, -1)) + .3 * x * math.cos(3 * s) + .2 * math.sin(5 * s)


def start(seed=0):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def at(process, i, x):
    "Coefficients of the chain after i steps."
    return Coefs(*(ddpm.view(v, x) for v in process.coefs(torch.full((len(x),), i / TIMES, dtype=torch.float64))))


def to_pair(name, process, i, x, out):
    c = at(process, i, x)
    return solve(c, *getattr(ddpm, name)(c), x, out)


@pytest.fixture
def told(monkeypatch):
    "The noise diffusers draws, one tensor a step, so that ours can be the same."
    drawn = []
    def randn(shape, generator=None, device=None, dtype=None, **_):
        drawn.append(torch.randn(tuple(shape), generator=torch.Generator().manual_seed(100 + len(drawn)), dtype=dtype))
        return drawn[-1]
    import diffusers.schedulers.scheduling_ddim as a
    import diffusers.schedulers.scheduling_ddpm as b
    for module in (a, b): monkeypatch.setattr(module, "randn_tensor", randn)
    return drawn


# ---- schedules ----
def test_betas_and_alpha_bars(schedulers):
    theirs = schedulers.DDPMScheduler(**settings(beta_start=1e-4, beta_end=.02))
    assert torch.allclose(linear_betas(TIMES).float(), theirs.betas, atol=1e-7, rtol=0)
    ours = VP(linear_betas(TIMES)).abar(torch.arange(1, TIMES + 1)).float()
    assert torch.allclose(ours, theirs.alphas_cumprod, **EQUAL)
    assert torch.allclose(ours[-100:], theirs.alphas_cumprod[-100:], atol=0, rtol=1e-3), "the small ones too"


@pytest.mark.parametrize("n", [50, 250, 1000, 4000])
def test_rescaled_betas_keep_the_end_of_the_chain(n):
    betas = linear_betas(n)
    assert len(betas) == n and 0 < betas.min() and betas.max() < 1
    assert torch.isclose(betas.sum(), linear_betas(1000).sum()), "the same amount of noise in all"
    assert VP(betas).abar(torch.tensor(n)) < 1e-4


def test_process_of_any_betas(schedulers):
    theirs = schedulers.DDPMScheduler(**settings(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012))
    c = VP(theirs.betas).coefs(torch.arange(1, TIMES + 1, dtype=torch.float64) / TIMES)
    assert torch.allclose(c.alpha**2, theirs.alphas_cumprod.to(c.alpha), **EQUAL)
    assert torch.allclose(c.alpha**2 + c.sigma**2, torch.ones_like(c.alpha), **EQUAL)


@pytest.mark.parametrize("process", [VP(linear_betas(TIMES)), LinearPath()], ids=["vp", "linear path"])
def test_derivatives_are_derivatives(process):
    t = (torch.arange(20, dtype=torch.float64) * 49 + 20.5) / TIMES # between the nodes of the table
    h = 1e-4
    a, b = process.coefs(t - h), process.coefs(t + h)
    c = process.coefs(t)
    assert torch.allclose(c.dalpha.double(), (b.alpha - a.alpha).double() / (2 * h), atol=3e-3)
    assert torch.allclose(c.dsigma.double(), (b.sigma - a.sigma).double() / (2 * h), atol=3e-3)


def test_noising_equals_add_noise(schedulers):
    theirs, process = schedulers.DDPMScheduler(**settings()), VP(linear_betas(TIMES))
    x0, noise = start(0), start(1)
    for i in (0, 1, 10, 499, 998, 999):
        c = at(process, i + 1, x0)
        same(c.alpha * x0 + c.sigma * noise, theirs.add_noise(x0, noise, torch.tensor([i, i])))


# ---- targets ----
@pytest.mark.parametrize("name,theirs_name", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_targets_and_their_inverses(schedulers, name, theirs_name):
    process, x0, noise = VP(linear_betas(TIMES)), start(0), start(1)
    theirs = schedulers.DDIMScheduler(**settings(prediction_type=theirs_name))
    if name == "v":
        c = at(process, 400, x0)
        p, q = ddpm.v(c)
        want = schedulers.DDPMScheduler(**settings()).get_velocity(x0, noise, torch.tensor([399, 399]))
        same(p * x0 + q * noise, want)
    for i in (100, 400, 900):
        c = at(process, i, x0)
        x_t = c.alpha * x0 + c.sigma * noise
        p, q = getattr(ddpm, name)(c)
        back = to_pair(name, process, i, x_t, p * x0 + q * noise)
        assert torch.allclose(back[0], x0, atol=2e-4) and torch.allclose(back[1], noise, atol=2e-4)
        theirs.set_timesteps(10)
        x0_hat = theirs.step(fixed(x_t, i), i - 1, x_t).pred_original_sample
        same(to_pair(name, process, i, x_t, fixed(x_t, i))[0], x0_hat)


def test_flow_velocity_and_its_inverse():
    x0, noise, path = start(0), start(1), LinearPath()
    for t in (0., .3, 1.):
        c = Coefs(*(ddpm.view(u, x0) for u in path.coefs(torch.full((2,), t))))
        p, q = ddpm.velocity(c)
        assert torch.allclose(p * x0 + q * noise, noise - x0)
        back = solve(c, p, q, c.alpha * x0 + c.sigma * noise, noise - x0)
        assert torch.allclose(back[0], x0, **EQUAL) and torch.allclose(back[1], noise, **EQUAL)


# ---- one step ----
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("n", [TIMES, 50])
@pytest.mark.parametrize("name,theirs_name", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_ddpm_step(schedulers, told, variance, n, name, theirs_name):
    theirs = exact(schedulers.DDPMScheduler(**settings(variance_type=variance, prediction_type=theirs_name)))
    process = VP(linear_betas(TIMES))
    theirs.set_timesteps(n)
    x = start()
    for k in (0, n // 2, n - 2, n - 1):
        i = theirs.timesteps[k].item()
        told.clear()
        out = fixed(x, i + 1)
        want = theirs.step(out, i, x).prev_sample
        before = max(i + 1 - TIMES // n, 0)
        pair = to_pair(name, process, i + 1, x, out)
        noise = told[0] if told else 0.
        got = step(at(process, i + 1, x), at(process, before, x), *pair, noise, eta=1., large=variance == "fixed_large")
        same(got, want, i)


@pytest.mark.parametrize("eta", [0., .5, 1.])
def test_ddim_step(schedulers, told, eta):
    theirs, process = exact(schedulers.DDIMScheduler(**settings())), VP(linear_betas(TIMES))
    theirs.set_timesteps(20)
    x = start()
    for i in (950, 500, 50, 0):
        told.clear()
        want = theirs.step(fixed(x, i + 1), i, x, eta=eta).prev_sample
        pair = to_pair("eps", process, i + 1, x, fixed(x, i + 1))
        got = step(at(process, i + 1, x), at(process, max(i + 1 - 50, 0), x), *pair, told[0] if told else 0., eta)
        same(got, want, i)


# ---- whole trajectories, through `sample` ----
class Told:
    "Draws that hand out the noise diffusers used."
    def __init__(self, drawn): self.drawn, self.k = drawn, 0
    def normal(self, stream, *shape):
        self.k += 1
        return self.drawn[self.k - 1] if self.k <= len(self.drawn) else torch.zeros(2, *shape)


def trajectory(process, ts, x, drawn=(), clamp=9e9, **more):
    predict = lambda x, t: to_pair("eps", process, t[0].item() * TIMES, x, fixed(x, t[0].item() * TIMES))
    return list(sample(predict, process, x, ts, draws=Told(drawn), clamp=clamp, **more))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", ["ddim", "ddpm small", "ddpm large"])
@pytest.mark.parametrize("clip", [False, True])
def test_trajectory(schedulers, told, spacing, kind, clip):
    more = settings(timestep_spacing=spacing, clip_sample=clip)
    if kind == "ddim": theirs = schedulers.DDIMScheduler(**more)
    else: theirs = schedulers.DDPMScheduler(**more, variance_type="fixed_" + kind.split()[1])
    exact(theirs).set_timesteps(10)
    x, wanted = start(), []
    for i in theirs.timesteps:
        out = fixed(x, i.item() + 1)
        # a clipped prediction has another noise: `sample` and DDPM solve for it again, DDIM with a switch
        x = theirs.step(out, i, x, **(dict(use_clipped_model_output=clip) if kind == "ddim" else {})).prev_sample
        wanted.append(x)
    ts = torch.cat([(theirs.timesteps + 1) / TIMES, torch.zeros(1)])
    ours = dict(clamp=1. if clip else 9e9, eta=0. if kind == "ddim" else 1., large=kind == "ddpm large")
    got = trajectory(VP(linear_betas(TIMES)), ts, start(), told, **ours)
    if kind == "ddpm large" and spacing == "trailing":
        # here diffusers adds noise to the finished picture: it leaves it out at step 0, which this grid never visits
        wanted[-1] = wanted[-1] - told[9] * (1 - theirs.alphas_cumprod[theirs.timesteps[-1]]).sqrt()
    for k, (a, b) in enumerate(zip(got, wanted)):
        same(a, b, k)
    if spacing == "trailing": assert torch.allclose(ts, torch.linspace(1, 0, 11)), "the grid of `times`"


def test_flow_euler_trajectory(schedulers):
    "x_s = x_t + (s - t) velocity is, on the straight line, our step: to the predicted picture, and noise again."
    theirs = schedulers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES, shift=1.)
    theirs.set_timesteps(sigmas=torch.linspace(1, .1, 10).tolist())
    path, x = LinearPath(), start()
    got = sample(lambda x, t: solve_velocity(path, x, t), path, start(), theirs.sigmas, clamp=9e9)
    for i, s, ours in zip(theirs.timesteps, theirs.sigmas, got):
        x = theirs.step(fixed(x, s.item() * TIMES), i, x).prev_sample
        same(ours, x, s)
    assert theirs.sigmas[-1] == 0


def solve_velocity(path, x, t):
    c = Coefs(*(ddpm.view(u, x) for u in path.coefs(t)))
    return solve(c, *ddpm.velocity(c), x, fixed(x, t[0].item() * TIMES))


@pytest.mark.parametrize("shift", [1., 3.])
def test_flow_euler_step_at_shifted_times(schedulers, shift):
    theirs = schedulers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES, shift=shift)
    theirs.set_timesteps(8)
    path, x = LinearPath(), start()
    for i, t, s in zip(theirs.timesteps, theirs.sigmas[:-1], theirs.sigmas[1:]):
        now, after = (Coefs(*(ddpm.view(v, start()) for v in path.coefs(torch.full((2,), u.item())))) for u in (t, s))
        ours = step(now, after, *solve_velocity(path, x, torch.full((2,), t.item())))
        x = theirs.step(fixed(x, t.item() * TIMES), i, x).prev_sample
        same(ours, x, s)


# ---- guidance ----
class Reader(nn.Module):
    "A network that reads the condition."
    def forward(self, x, t, cond):
        return fixed(x, TIMES * t[0].item()) * (1 + cond.pooled.mean(1).view(-1, 1, 1, 1))


def conditions(n, value):
    tokens = torch.ones(n, 3, dtype=torch.long)
    return Cond(torch.full((n, 3, 4), value), torch.full((n, 4), value), tokens.bool(), tokens)


@pytest.mark.parametrize("w", [0., 1., 1.5, 7.5])
def test_guidance_is_the_papers_with_w_one_larger(w):
    den = Denoiser(Reader(), VP(linear_betas(TIMES)), null=conditions(1, 0.))
    x, t, cond = start(), torch.full((2,), .6), conditions(2, .5)
    got, want_c, want_u = guided(den, cond, w)(x, t), den.predict(x, t, cond), den.predict(x, t, conditions(2, 0.))
    for g, c, u in zip(got, want_c, want_u):
        assert torch.allclose(g, (1 + (w - 1)) * c - (w - 1) * u, atol=1e-5 * max(1, g.abs().max().item()))
    if w == 1:
        for g, c in zip(got, want_c): assert torch.equal(g, c)
    if w == 0:
        for g, u in zip(got, want_u): assert torch.allclose(g, u, **EQUAL)


def test_guidance_only_above_a_time():
    den = Denoiser(Reader(), VP(linear_betas(TIMES)), null=conditions(1, 0.))
    x, cond = start(), conditions(2, .5)
    predict = guided(den, cond, 3., above=.5)
    low, high = torch.full((2,), .5), torch.full((2,), .51)
    assert torch.equal(predict(x, low)[0], den.predict(x, low, cond)[0])
    assert not torch.allclose(predict(x, high)[0], den.predict(x, high, cond)[0])


# ---- networks ----
def conv(i, o, k): return i * o * k * k + o
def linear(i, o): return i * o + o
def res_block(i, o, d): return conv(i, o, 3) + linear(d, 2 * o) + conv(o, o, 3) + (conv(i, o, 1) if i != o else 0)
def count(net): return sum(p.numel() for p in net.parameters())


def unet_formula(channels, d_cond, widths, depths, d_emb, skip=False):
    a, b = widths
    inputs = channels * (3 if skip else 1)
    return (linear(32, d_emb) + linear(d_emb, d_emb) + linear(d_cond, d_emb)
            + conv(4 * inputs, a, 3) + depths[0] * res_block(a, a, d_emb)
            + conv(a, b, 3) + depths[1] * res_block(b, b, d_emb) + conv(b, 4 * a, 1)
            + res_block(2 * a, a, d_emb) + (depths[0] - 1) * res_block(a, a, d_emb) + conv(a, 4 * channels, 3))


def encoder_formula(n_tokens, max_len, dim, n_layers):
    block = 2 * 2 * dim + linear(dim, 3 * dim) + linear(dim, dim) + linear(dim, 4 * dim) + linear(4 * dim, dim)
    return n_tokens * dim + max_len * dim + n_layers * block + 2 * dim


@pytest.mark.parametrize("scale", ["smoke", "demo", "full"])
@pytest.mark.parametrize("channels,skip", [(1, False), (3, False), (3, True)])
def test_parameter_count_is_exact(scale, channels, skip):
    own = dict(shape=[channels, 16, 16], words="a handwritten seven".split(), max_len=12)
    config = ddpm.recipe_for(load("digits"), scale) | own
    with torch.device("meta"): tok, net = ddpm.text_unet(config, skip)
    sizes = config.dim, config.widths, config.depths, config.d_emb
    assert count(net.net) == unet_formula(channels, *sizes, skip)
    assert count(net.encoder) == encoder_formula(len(tok), config.max_len, config.dim, config.n_layers)


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    block, x = Block(16, 4), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
    heads = lambda z: z.view(2, 5, 4, 4).transpose(1, 2)
    scores = heads(q) @ heads(k).mT / math.sqrt(4)
    weights = scores.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
    seen = x + block.out((weights @ heads(v)).transpose(1, 2).reshape(2, 5, 16))
    want = seen + block.mlp(block.norm2(seen))
    assert torch.allclose(block(x, mask), want, atol=1e-6)


def test_encoder_does_not_look_at_padding():
    torch.manual_seed(0)
    words = "a handwritten seven".split()
    short, long = WordTokenizer(words, 4), WordTokenizer(words, 9)
    encoder = TextEncoder(len(words) + 3, 9, 16, 2)
    a, b = (encoder(tok(["a seven"])) for tok in (short, long))
    assert torch.allclose(a.pooled, b.pooled, atol=1e-6) and torch.allclose(a.seq[:, :3], b.seq[:, :3], atol=1e-6)


def test_encoder_equals_torch():
    "One block is torch's pre-norm encoder layer with the same weights."
    torch.manual_seed(0)
    ours = Block(16, 4)
    theirs = nn.TransformerEncoderLayer(16, 4, 64, 0., F.gelu, batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": ours.qkv, "self_attn.out_proj.": ours.out, "linear1.": ours.mlp[0],
             "linear2.": ours.mlp[2], "norm1.": ours.norm1, "norm2.": ours.norm2}
    theirs.load_state_dict({f"{name}{k}": v for name, part in names.items() for k, v in part.state_dict().items()})
    x, mask = torch.randn(2, 6, 16), torch.arange(6) < torch.tensor([[6], [4]])
    a, b = ours(x, mask), theirs(x, src_key_padding_mask=~mask)
    assert torch.allclose(a[mask], b[mask], atol=1e-5)


def test_a_new_unet_says_nothing_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    block, x = ResBlock(8, 8, 16), torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 16)), x)
    net = UNet(1, 4, (8, 16), (1, 1), 16)
    assert not net(torch.randn(2, 1, 8, 8), torch.rand(2), conditions(2, 1.)).any()


@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_loss_is_the_mean_squared_error_of_the_target(name):
    process = VP(linear_betas(TIMES))
    times = lambda draws: torch.full((len(draws),), .3)
    den = Denoiser(Reader(), process, getattr(ddpm, name), times=times, null=conditions(1, 0.), p_drop=0.)
    x0, draws = start(), Draws(0, torch.arange(2))
    noise, c = draws.normal("eps", 3, 8, 8), at(process, 300, x0)
    x_t = c.alpha * x0 + c.sigma * noise
    target = dict(eps=noise, x0=x0, v=c.alpha * noise - c.sigma * x0)[name]
    out = Reader()(x_t, torch.full((2,), .3), conditions(2, .5))
    want = F.mse_loss(out, target, reduction="none").flatten(1).mean(1)
    assert torch.allclose(den.loss(x0, conditions(2, .5), draws), want, **EQUAL)
