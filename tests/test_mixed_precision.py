"Mixed precision: rounding and bits against torch, loss scale against GradScaler, masters, simulated against real autocast, warm-up."
import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from t2i_course.core.data import Draws, glyph_split, glyphs
from t2i_course.core.sources import load
from t2i_course.core.training import State, train
from t2i_course.scale.mixed_precision import (FORMATS, OPS, DynamicScale, Masters, Rounded, SmallTransformer, bits, diverged, fresh,
                                              go_on, limits, lost_updates, matmul_error, op_dtypes, precision_table, recipe_here,
                                              round_to, rounded, simulated, snap, underflow, warmups)
from t2i_course.transformer.dit import unseen_loss
from torch import nn

OWN = {name: f for name, f in FORMATS.items() if f.dtype is not None}
BF16, FP16 = FORMATS["bf16"], FORMATS["fp16"]
each_format = pytest.mark.parametrize("f", OWN.values(), ids=OWN)


def to(x, f, **kw):
    return round_to(x, f.mantissa, f.exponent, f.largest, **kw)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 4))


# --- Formats ---

@each_format
def test_rounding_is_torchs(f):
    torch.manual_seed(0)
    x = torch.randn(20_000) * 10 ** (torch.rand(20_000) * 76 - 40)
    edges = torch.tensor([0., -0., 1., 65504., 65519.99, 65520., 2.98e-8, 3e-8, 6e-8, 448., 464., 480., 57344., 61439., 61440.])
    x = torch.cat([x, edges, -edges])
    assert torch.equal(to(x, f), x.to(f.dtype).float())
    assert torch.equal(rounded(x, f), x.to(f.dtype).float())


@pytest.mark.parametrize("dtype, f", [(torch.float16, FP16), (torch.bfloat16, BF16)])
def test_every_16_bit_number_stays_and_every_middle_goes_to_even(dtype, f):
    x = torch.arange(2 ** 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    x = x[x.isfinite()]
    assert torch.equal(to(x, f), x)
    middle = (x[1:].double() + x[:-1].double()) / 2
    assert torch.equal(to(middle, f).to(dtype), middle.to(dtype))


def test_tf32_keeps_ten_bits_and_the_range_of_fp32():
    f = FORMATS["tf32"]
    x = torch.tensor([1 + 2. ** -10, 1 + 2. ** -11, 1 + 3 * 2. ** -11, 3e38, 1e-38])
    assert to(x, f)[:3].tolist() == [1 + 2. ** -10, 1., 1 + 2. ** -9]
    assert ((to(x, f) / x - 1).abs() < 2. ** -11).all()


def test_infinity_and_nan_stay():
    x = torch.tensor([math.inf, -math.inf, math.nan])
    for f in FORMATS.values():
        y = to(x, f)
        assert y[0] == math.inf and y[1] == -math.inf and y[2].isnan()


@pytest.mark.parametrize("value", [1.3, -1.3, 1000.7, 3e-7])
def test_stochastic_rounding_is_right_on_average(value):
    torch.manual_seed(0)
    x = torch.full((40_000,), value)
    y = to(x, FP16, u=torch.rand(40_000))
    below, above = y.unique().tolist()
    assert below < value < above
    step = above - below
    assert abs(y.double().mean() - x[0].double()) < .02 * step
    assert to(torch.tensor([below]), FP16, u=torch.tensor([.999])).item() == below, "what fits stays"


@each_format
def test_limits_are_torchs(f):
    info, lim = torch.finfo(f.dtype), limits(f)
    assert (lim["eps"], lim["largest"], lim["normal"]) == (info.eps, info.max, info.smallest_normal)
    least = torch.tensor([lim["subnormal"]], dtype=torch.float64)
    assert to(least, f) == least and to(least * .49, f) == 0


@pytest.mark.parametrize("name, as_int", [("fp32", torch.int32), ("bf16", torch.int16), ("fp16", torch.int16), ("e5m2", torch.uint8),
                                          ("e4m3", torch.uint8)])
def test_bits_are_those_in_memory(name, as_int):
    f = FORMATS[name]
    n = 1 + f.exponent + f.mantissa
    for value in (0., -0., 1., .1, -3.25, 300., 1e-6, 6e-8, 1e-40, 449., *([1e6, -math.inf] if name != "e4m3" else [])):
        memory = torch.tensor([value]).to(f.dtype).view(as_int).item() % 2 ** n
        assert "".join(bits(value, f)) == f"{memory:0{n}b}", value


def test_the_error_of_a_product_follows_the_mantissa():
    table = precision_table()
    assert table["tf32"]["matmul"] == pytest.approx(table["fp16"]["matmul"], rel=.01)
    assert 7 < table["bf16"]["matmul"] / table["fp16"]["matmul"] < 9
    assert table["fp32"]["matmul"] < 1e-6 and table["fp16"]["bits"] == 16 and table["tf32"]["bits"] == 19
    assert matmul_error(BF16, n=64, seed=1) != matmul_error(BF16, n=64, seed=2)


# --- What vanishes ---

def test_lost_updates_counts_those_below_half_a_step():
    w = [torch.tensor([1., 1., 1., 1.5]), torch.tensor([-1.])]
    half = 2. ** -8
    d = [torch.tensor([.9 * half, 1.1 * half, 0., .9 * half]), torch.tensor([-1.1 * half])]
    assert lost_updates(w, d, BF16) == pytest.approx(2 / 4)
    assert lost_updates(w, d, FORMATS["fp32"]) == 0


def test_underflow_of_known_gradients():
    g = torch.tensor([0., 1e-9, 1e-6, 1e-3, 1.])
    assert underflow(g, 1.) == dict(zero=.25, subnormal=.25, infinite=0)
    assert underflow(g, 2. ** 8) == dict(zero=0, subnormal=.25, infinite=0)
    assert underflow(g, 2. ** 17) == dict(zero=0, subnormal=0, infinite=.25)
    assert underflow(g, 1., BF16)["zero"] == 0


# --- Loss scale ---

@pytest.mark.parametrize("seed", range(4))
def test_scale_is_that_of_grad_scaler(seed):
    rand = random.Random(seed)
    settings = dict(growth=rand.choice([2., 4.]), backoff=rand.choice([.5, .25]), interval=rand.choice([1, 2, 5]))
    ours = DynamicScale(2. ** 12, **settings)
    theirs = torch.amp.GradScaler("cpu", init_scale=2. ** 12, growth_factor=settings["growth"], backoff_factor=settings["backoff"],
                                  growth_interval=settings["interval"])
    p = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([p], 1.)
    for _ in range(60):
        good = rand.random() < .8
        opt.zero_grad()
        theirs.scale(p.sum()).backward()
        if not good: p.grad[1] = rand.choice([math.inf, math.nan])
        theirs.step(opt)
        theirs.update()
        assert ours.update(good) == theirs.get_scale()


def test_defaults_are_those_of_grad_scaler():
    theirs, ours = torch.amp.GradScaler("cpu"), DynamicScale()
    assert (ours.scale, ours.growth, ours.backoff, ours.interval) == (
        theirs.get_scale(), theirs.get_growth_factor(), theirs.get_backoff_factor(), theirs.get_growth_interval())


# --- Master weights ---

def test_masters_are_float32_and_the_copy_is_not():
    pair = Masters(small(), torch.bfloat16)
    pair.low(torch.randn(3, 16)).float().square().mean().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in pair.low.parameters())
    assert pair.fetch()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in pair.net.parameters())
    assert all(p.grad is None for p in pair.low.parameters()), "or they would add up"


def test_small_steps_reach_the_copy_only_through_the_masters():
    net = small()
    pair = Masters(net, torch.bfloat16)
    with torch.no_grad():
        for p in (*pair.net.parameters(), *pair.low.parameters()): p.fill_(1.)
    bare = pair.low[0].weight.detach().clone()
    for _ in range(100):
        with torch.no_grad():
            for p in pair.net.parameters(): p.add_(1e-3)
            bare.add_(1e-3)
        pair.publish()
    assert bare.eq(1).all()
    assert pair.low[0].weight.float().sub(1.1).abs().max() < 2. ** -8


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, .03), (torch.float16, .004)])
def test_scaled_gradients_come_back_unscaled(dtype, tolerance):
    torch.manual_seed(1)
    x, y = torch.randn(8, 16), torch.randn(8, 4)
    plain, net = small(), small()
    F.mse_loss(plain(x), y).backward()
    pair = Masters(net, dtype)
    (F.mse_loss(pair.low(x).float(), y) * 1024).backward()
    assert pair.fetch(1024.)
    for a, b in zip(net.parameters(), plain.parameters()):
        assert (a.grad - b.grad).norm() < tolerance * b.grad.norm()


def test_fetch_reports_an_overflow():
    pair = Masters(small(), torch.float16)
    (pair.low(torch.randn(8, 16)).float().sum() * 2. ** 30).backward()
    assert not pair.fetch(2. ** 30)


def test_snap_keeps_weights_on_the_grid():
    net = small()
    before = [p.detach().clone() for p in net.parameters()]
    snap(net, BF16)
    assert all(torch.equal(p, b.bfloat16().float()) for p, b in zip(net.parameters(), before))
    twice = copy.deepcopy(net)
    snap(twice, BF16, stochastic=True)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twice.parameters())), "what is on the grid stays"


def test_a_small_learning_rate_moves_masters_and_not_bf16_weights():
    data = load("digits")
    tok, den = fresh(recipe_here(data, "smoke") | dict(skip=False), data)
    for p in den.net.parameters():
        if not p.any(): nn.init.normal_(p, std=.02)  # layers that begin at 0 would stop the gradients of the others
    snap(den.net, BF16)
    start, stays = copy.deepcopy(den.net.state_dict()), {}
    for how in ("masters", "bf16", "stochastic"):
        den.net.load_state_dict(start)
        go_on(den, tok, data, how, lr=1e-6, images=96)
        big = torch.cat([start[k][start[k].abs() > .01] for k in start])
        now = torch.cat([v[start[k].abs() > .01] for k, v in den.net.state_dict().items()])
        stays[how] = (now == big).double().mean().item()
    assert stays["bf16"] > .95 and stays["masters"] < .2 and .5 < stays["stochastic"] < .99 * stays["bf16"] + .01
    assert math.isfinite(unseen_loss(den, tok, data, 32))


# --- Autocast, real and simulated ---

def grads(net, x, y):
    net.zero_grad()
    F.mse_loss(net(x).float(), y).backward()
    return torch.cat([p.grad.flatten().clone() for p in net.parameters()])


@pytest.mark.parametrize("f", [BF16, FP16], ids=["bf16", "fp16"])
def test_simulation_is_near_autocast(f):
    torch.manual_seed(1)
    net, x, y = small(), torch.randn(64, 16), torch.randn(64, 4)
    plain = grads(net, x, y)
    with torch.autocast("cpu", f.dtype): real = grads(net, x, y)
    with Rounded(f): mine = grads(net, x, y)
    assert (mine - real).norm() < .1 * (real - plain).norm()
    assert (real - plain).norm() > 1e-5
    assert torch.equal(grads(net, x, y), plain), "outside everything is as before"


def test_simulating_float32_changes_nothing():
    torch.manual_seed(1)
    net, x, y = small(), torch.randn(64, 16), torch.randn(64, 4)
    plain = grads(net, x, y)
    with Rounded(FORMATS["fp32"]): assert torch.equal(grads(net, x, y), plain)


def test_simulated_gradients_underflow_and_the_scale_saves_them():
    torch.manual_seed(1)
    net, x, y = small(), torch.randn(64, 16), torch.randn(64, 4)
    tiny = lambda scale: (F.mse_loss(net(x), y) * 1e-7 * scale).backward()
    shares = []
    for scale in (1., 2. ** 16):
        net.zero_grad()
        with Rounded(FP16): tiny(scale)
        shares.append((net[0].weight.grad == 0).double().mean().item())
    assert shares[0] > .5 and shares[1] < .01


def test_simulated_fp16_trains_with_grad_scaler():
    net = small()
    target = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

    class Given:
        "What `train` moves to the device in place of a condition."
        def to(self, device): return self

    def data(draws): return draws.normal("x", 16), Given()
    def loss(x0, cond, draws): return (net(x0) - x0 @ target / 4).square().mean(1)
    state = State(net, lr=1e-2, precision="fp16")
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2. ** 40)
    before, run = copy.deepcopy(net.state_dict()), train(state, simulated(loss, FP16), data, images=64 * 120, batch=64)
    losses = [next(run).loss]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "an overflow: the step is skipped"
    losses += [r.loss for r in run]
    assert state.scaler.get_scale() < 2. ** 40 and sum(losses[-5:]) < .3 * sum(losses[:5])


def test_types_read_off_fake_tensors_are_the_real_ones():
    x, w = torch.randn(8, 8), torch.randn(8, 8)
    for dtype in (torch.bfloat16, torch.float16):
        read = op_dtypes("cpu", dtype)
        with torch.autocast("cpu", dtype): real = {k: f(F.linear(x, w), w).dtype for k, f in OPS.items()}
        assert read == real
    assert not torch.is_autocast_enabled("cpu"), "switched off again"


def test_cuda_keeps_norms_and_softmax_in_float32():
    try: rules = op_dtypes("cuda")
    except (AssertionError, RuntimeError): pytest.skip("this build of torch does not know CUDA")
    assert rules["linear"] == rules["conv2d"] == torch.bfloat16
    assert {rules[k] for k in ("softmax", "layer_norm", "group_norm", "mse_loss")} == {torch.float32}
    assert not torch.is_autocast_enabled("cuda")


# --- Warm-up ---

def test_stacked_runs_equal_single_ones():
    lrs, steps, seeds = (1e-3, 1e-2), (0, 3), (0, 5)
    losses, _ = warmups(lrs, steps, seeds, total=5, batch=4)
    assert losses.shape == (5, 2, 2, 2)
    glyph = 2 * glyphs()[0][glyph_split()["train"]] - 1
    for i, j, k in ((0, 0, 0), (1, 1, 1), (1, 0, 1)):
        torch.manual_seed(seeds[k])
        net = SmallTransformer()
        opt = torch.optim.Adam(net.parameters())
        for n in range(5):
            draws = Draws(seeds[k], torch.arange(4 * n, 4 * n + 4))
            x0 = glyph[draws.choice("glyph", len(glyph))]
            x0 = F.unfold(x0[:, None], 2, stride=2).mT
            t, noise = draws.uniform("t"), draws.normal("eps", 16, 4)
            loss = F.mse_loss(net(x0 + t[:, None, None] * (noise - x0), t), noise - x0)
            assert loss.item() == pytest.approx(losses[n, i, j, k].item(), rel=2e-3)
            opt.param_groups[0]["lr"] = lrs[i] * min(1, (n + 1) / max(1, steps[j]))
            opt.zero_grad()
            loss.backward()
            opt.step()


def test_diverged_knows_high_and_undefined_losses():
    losses = torch.ones(100, 3)
    losses[:, 1] = .3
    losses[-1, 2] = math.nan
    assert diverged(losses, 1.).tolist() == [True, False, True]
