"The running average of the weights: closed form, warm-up, borrowing, and diffusers' EMAModel."
import math

import pytest
import torch
from t2i_course.core.ema import EMA
from torch import nn


def net_of(value=0.):
    net = nn.Linear(3, 2)
    for p in net.parameters(): p.data.fill_(value)
    return net


def walk(steps, seed=0):
    "A path of weights, one state dict a step."
    torch.manual_seed(seed)
    return [{"weight": torch.randn(2, 3), "bias": torch.randn(2)} for _ in range(steps)]


def follow(ema, net, path, n=64):
    for k, state in enumerate(path, 1):
        net.load_state_dict(state)
        ema.update(net, n, n * k)
    return ema


def test_equals_the_weighted_sum():
    net, path = net_of(1.), walk(20)
    ema = follow(EMA(net, half_life=256, ramp=math.inf), net, path)
    d = .5 ** (64 / 256)
    want = sum((1 - d) * d ** (20 - k) * w["weight"] for k, w in enumerate(path, 1)) + d ** 20
    assert torch.allclose(ema.shadow["weight"], want, atol=1e-6)


def test_with_warm_up_equals_the_sum_with_changing_decay():
    net, path = net_of(1.), walk(40)
    ema, want = EMA(net, half_life=100, ramp=.05), torch.ones(2)
    follow(ema, net, path)
    for k, w in enumerate(path, 1):
        d = .5 ** (64 / min(100, .05 * 64 * k))
        want = d * want + (1 - d) * w["bias"]
    assert torch.allclose(ema.shadow["bias"], want, atol=1e-6)


@pytest.mark.parametrize("n", [16, 64, 256])
def test_half_life_is_in_images(n):
    "After H images an old weight counts half, whatever the batch."
    net = net_of(1.)
    ema = EMA(net, half_life=1024, ramp=math.inf)
    net.weight.data.fill_(0.)
    for k in range(1, 1024 // n + 1): ema.update(net, n, n * k)
    assert torch.allclose(ema.shadow["weight"], torch.tensor(.5), atol=1e-5)


def test_one_large_step_equals_its_pieces():
    net = net_of(1.)
    whole, pieces = EMA(net, 500, math.inf), EMA(net, 500, math.inf)
    net.weight.data.fill_(3.)
    whole.update(net, 256, 256)
    for k in range(4): pieces.update(net, 64, 64 * (k + 1))
    assert torch.allclose(whole.shadow["weight"], pieces.shadow["weight"], atol=1e-6)


def test_ramp_forgets_the_random_start():
    ema = EMA(net_of(), half_life=1e6, ramp=.05)
    assert ema.decay(64, 64) < 1e-5
    assert ema.decay(64, 64_000) == pytest.approx(.5 ** (64 / 3200))
    assert ema.decay(64, 10 ** 9) == pytest.approx(.5 ** (64 / 1e6))
    decays = [ema.decay(64, 64 * k) for k in range(1, 1000)]
    assert decays == sorted(decays)


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_equals_diffusers(steps):
    "A constant decay: diffusers copies at its first step and averages from the second on."
    from diffusers.training_utils import EMAModel
    decay, net, path = .97, net_of(), walk(steps)
    theirs = EMAModel(net.parameters(), decay=decay, min_decay=decay)
    ours = None
    for k, state in enumerate(path, 1):
        net.load_state_dict(state)
        theirs.step(net.parameters())
        if k == 1: ours = EMA(net, half_life=64 * math.log(.5) / math.log(decay), ramp=math.inf)
        else: ours.update(net, 64, 64 * k)
    for mine, their in zip([ours.shadow["weight"], ours.shadow["bias"]], theirs.shadow_params):
        assert torch.allclose(mine, their, atol=1e-6)


def test_swap_equals_diffusers_store_copy_restore():
    from diffusers.training_utils import EMAModel
    net = net_of(1.)
    theirs, ours = EMAModel(net.parameters()), EMA(net, 100)
    net.weight.data.fill_(5.)
    with ours.applied(net): mine = net.weight.clone()
    theirs.store(net.parameters())
    theirs.copy_to(net.parameters())
    assert torch.equal(mine, net.weight)
    theirs.restore(net.parameters())
    assert torch.equal(net.weight, torch.full((2, 3), 5.))


def test_applied_gives_the_bytes_back():
    net = net_of(1.)
    ema = EMA(net, 100)
    nn.init.normal_(net.weight)
    own, shadow = net.weight.detach().clone(), ema.shadow["weight"].clone()
    with ema.applied(net) as inside:
        assert inside is net and torch.equal(net.weight, shadow)
        net.weight.data.add_(1.)
    assert torch.equal(net.weight, own) and torch.equal(ema.shadow["weight"], shadow)


def test_applied_gives_the_bytes_back_after_an_error():
    net = net_of(1.)
    ema = EMA(net, 100)
    net.weight.data.fill_(7.)
    with pytest.raises(KeyError), ema.applied(net): raise KeyError
    assert torch.equal(net.weight, torch.full((2, 3), 7.))


def test_the_network_is_not_touched():
    net = net_of(1.)
    ema, before = EMA(net, 100), net.weight.detach().clone()
    ema.update(net, 64, 64)
    assert torch.equal(net.weight, before) and net.weight.data_ptr() != ema.shadow["weight"].data_ptr()


def test_buffers_come_along():
    "Running statistics are averaged, counters copied."
    net = nn.BatchNorm1d(4)
    ema = EMA(net, half_life=64, ramp=math.inf)
    net.train()
    net(torch.randn(32, 4) + 3)
    ema.update(net, 64, 64)
    assert ema.shadow["num_batches_tracked"] == 1
    assert torch.allclose(ema.shadow["running_mean"], net.running_mean / 2)
    with ema.applied(net): assert net.num_batches_tracked == 1


def test_load():
    net = net_of(1.)
    ema, saved = EMA(net, 100), {"weight": torch.full((2, 3), 2.), "bias": torch.zeros(2)}
    ema.load(saved)
    ema.update(net, 64, 64)
    assert torch.equal(saved["weight"], torch.full((2, 3), 2.))
    with pytest.raises(KeyError): ema.load({"weight": saved["weight"]})
