"Adversarial training: losses and penalties against hand calculation, the Dirac-GAN's exact numbers, lazy weights, exact resume."
import math

import pytest
import torch
import torch.nn.functional as F
from t2i_course.core.conditioning import cat
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for
from t2i_course.core.metrics import load_judge
from t2i_course.core.training import feed, train
from t2i_course.gan import adversarial as A
from t2i_course.gan.adversarial import (GAN, LOSSES, Points, Stacked, build, covered, dirac_eigenvalues,
                                        dirac_path, gradient_penalty, heap_counts, hinge_d, lazy_adam, logistic_d, modes_of,
                                        nonsaturating_g, point_gan, recipe_for, relativistic_d, relativistic_g, ring,
                                        ring_centres, saturating_g, squared_gradient)
from torch import nn


def small(name="digits", **change):
    config = recipe_for(load(name), "smoke") | dict(batch=8) | change
    torch.manual_seed(0)
    return config, *build(config)


# --- Losses ---

def test_losses_are_logs_of_probabilities():
    real, fake = torch.randn(2, 50, dtype=torch.float64)
    D = torch.sigmoid
    assert torch.allclose(logistic_d(real, fake), -D(real).log() - (1 - D(fake)).log())
    assert torch.allclose(saturating_g(fake), (1 - D(fake)).log())
    assert torch.allclose(nonsaturating_g(fake), -D(fake).log())
    assert torch.allclose(relativistic_d(real, fake), -D(real - fake).log())
    assert torch.allclose(relativistic_g(real, fake), -D(fake - real).log())
    assert hinge_d(torch.tensor([2.]), torch.tensor([-2.])) == 0 and hinge_d(torch.tensor([0.]), torch.tensor([0.])) == 2


def test_all_generator_losses_pull_the_logit_up():
    for _, g_loss in LOSSES.values():
        fake = torch.zeros(3, requires_grad=True)
        loss = g_loss(torch.zeros(3), fake) if g_loss is relativistic_g else g_loss(fake)
        assert loss.shape == (3,)
        assert (torch.autograd.grad(loss.sum(), fake)[0] < 0).all()


def test_minimax_gradient_vanishes_where_the_discriminator_wins():
    "ERRATA E006."
    fake = torch.tensor([-6.], requires_grad=True)
    a, b = (torch.autograd.grad(f(fake).sum(), fake)[0] for f in (nonsaturating_g, saturating_g))
    assert a.abs() > 100 * b.abs()


# --- Penalties ---

class Quadratic(nn.Module):
    "d(x) = s |x|^2 / 2: the gradient is s x."
    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.tensor(3., dtype=torch.float64))

    def forward(self, x, cond=None): return self.s * x.square().flatten(1).sum(1) / 2


def test_penalty_and_its_gradient_by_hand():
    "|s x|^2, whose derivative by s is 2 s |x|^2. ERRATA E009: without create_graph it would be none."
    x, disc = torch.randn(5, 2, 3, dtype=torch.float64), Quadratic()
    p = gradient_penalty(disc, x, None)
    size = x.square().flatten(1).sum(1)
    assert p.shape == (5,) and torch.allclose(p.double(), 9 * size, rtol=1e-6)
    assert torch.allclose(torch.autograd.grad(p.sum(), disc.s)[0], 6 * size.sum(), rtol=1e-6)
    x.requires_grad_()
    g, = torch.autograd.grad(disc(x).sum(), x)
    assert not g.requires_grad


@pytest.mark.parametrize("fake_too", [False, True])
def test_penalty_in_the_turn_of_the_discriminator_and_lazily_is_the_same(fake_too):
    "ERRATA E010: 16 steps of gamma/2 are one of 16 gamma/2."
    torch.manual_seed(0)
    gan = GAN(Points(2), Points(1), 2, gamma=10., every=16, fake_too=fake_too)
    (x0, cond), draws = ring(Draws(0, torch.arange(16))), Draws(0, torch.arange(16))
    disc, r1, _ = gan.loss
    assert (r1.every, r1.gain, r1.part) == (16, 16, "disc")
    plain, penalty = disc.loss(x0, cond, draws), r1.loss(x0, cond, draws)
    R1 = squared_gradient(gan.net["disc"](x0.requires_grad_()), x0)
    assert torch.allclose(penalty, 5 * R1, rtol=1e-5) != fake_too
    gan.every = 1
    assert [t.name for t in gan.loss] == ["disc", "gen"]
    assert torch.allclose(gan.loss[0].loss(x0.detach(), cond, draws), plain + penalty, rtol=1e-5)


def test_lazy_adam():
    a = lazy_adam(2e-3, (.5, .99), 16)
    c = 16 / 17
    assert math.isclose(a["lr"], 2e-3 * c) and math.isclose(a["betas"][1], .99**c) and math.isclose(a["betas"][0], .5**c)
    assert lazy_adam(2e-3, (0., .99), 1) == dict(lr=2e-3, betas=(0., .99), weight_decay=0.)
    gan = GAN(Points(2), Points(1), 2, gamma=1., every=4)
    assert gan.parts["gen"]["lr"] == 2e-3 and math.isclose(gan.parts["disc"]["lr"], 2e-3 * .8)
    assert GAN(Points(2), Points(1), 2, gamma=0., every=4).parts["disc"]["lr"] == 2e-3


# --- Toys ---

@pytest.mark.parametrize("gamma", [0., .3, 1., 3.])
def test_dirac_eigenvalues(gamma):
    root = complex(gamma**2 - 1)**.5 / 2
    found = sorted(dirac_eigenvalues(gamma).tolist(), key=lambda v: (v.imag, v.real))
    wanted = sorted([-gamma / 2 + root, -gamma / 2 - root], key=lambda v: (v.imag, v.real))
    assert all(abs(a - b) < 1e-6 for a, b in zip(found, wanted))


def test_dirac_paths_spiral_orbit_and_converge():
    far = lambda **how: dirac_path(400, .2, start=(1e-2, 1e-2), **how).norm(dim=1)
    assert math.isclose(far()[100] / far()[0], (1 + .01)**50, rel_tol=1e-3)
    orbit = far(alternating=True)
    assert orbit.max() < 1.2 * orbit[0] and orbit.min() > .8 * orbit[0]
    assert far(gamma=.5)[-1] < 1e-6 and far(gamma=.5, alternating=True)[-1] < 1e-6


def test_heaps_are_counted_exactly():
    c = ring_centres()
    x = torch.cat([c[:1].expand(5, 2), c[3:4].expand(2, 2) + .1, torch.zeros(9, 2)])
    assert heap_counts(x).tolist() == [5, 0, 0, 2, 0, 0, 0, 0]
    x, cond = ring(Draws(0, torch.arange(4000)))
    assert len(cond) == 4000 and covered(heap_counts(x), 4000) == 8
    assert heap_counts(x).sum() / 4000 == pytest.approx(1 - math.exp(-4.5), abs=.01)
    assert covered(torch.tensor([100, 12, 13, 0, 0, 0, 0, 0]), 1000) == 2


def test_a_small_gan_of_points_learns_and_one_without_discriminator_does_not():
    def spread(frozen):
        torch.manual_seed(0)
        gan = point_gan("relativistic", gamma=.1, fake_too=True, betas=(0., .99))
        turns = gan.loss[1:] if frozen else gan.loss
        for _ in train(state_for(gan, dict(lr=1e-3, half_life=1e3)), turns, ring, images=64 * 80, batch=64): pass
        x = A.points(gan)
        return (x.norm(dim=1) - 1).abs().mean()
    assert spread(False) < .35 < spread(True)


def test_stacked_digits_hold_three_digits():
    data, judge = Stacked(), load_judge("digits")
    b = data.batch("test", Draws(0, torch.arange(60)))
    assert b.x.shape == (60, 3, 16, 16) and not torch.equal(b.x[:, 0], b.x[:, 1])
    assert (modes_of(b.x, judge) == b.attrs["mode"]).double().mean() > .95
    assert len(b.attrs["mode"].unique()) > 50


# --- The recipe ---

@pytest.mark.parametrize("name", ["digits", "painted", "painted2"])
def test_shapes_and_turns(name):
    config, tok, gan = small(name)
    x, cond = feed(load(name), tok)(Draws(0, torch.arange(4)))
    drawn = gan.artist(gan.noise(Draws(0, torch.arange(4))), cond)
    assert drawn.shape == x.shape and gan.net["disc"](x, cond).shape == (4,)
    assert [t.part for t in gan.loss] == ["disc", "gen"] and gan.calls(config) == 1
    assert not set(map(id, gan.net["gen"].parameters())) & set(map(id, gan.net["disc"].parameters()))


def test_captions_and_noise_both_matter():
    config, tok, gan = small()
    for p in gan.net["gen"].parameters(): nn.init.normal_(p, std=.2)
    draw = gan.painter(tok, config)
    a, b = draw(["a handwritten three"] * 2 + ["a handwritten four"], 0), draw(["a handwritten three"], 1)
    assert (a[0] - a[1]).abs().max() > 1e-3 and (a[0] - b[0]).abs().max() > 1e-3
    assert torch.equal(draw(["a handwritten three"], 0)[0], draw(["a handwritten three", "a handwritten four"], 0)[0]) or \
        torch.allclose(draw(["a handwritten three"], 0)[0], a[0], atol=1e-4)
    same = gan.painter(tok, config | dict(truncation=0.))(["a handwritten three"] * 2, 3)
    assert (same[0] - same[1]).abs().max() < 1e-5
    assert gan.artist.training
    x, cond = feed(load("digits"), tok)(Draws(0, torch.arange(4)))
    nn.init.normal_(gan.net["disc"].match.weight)
    assert not torch.allclose(gan.net["disc"](x, cond), gan.net["disc"](x, cond[torch.tensor([1, 2, 3, 0])]))


def test_each_turn_moves_its_own_part():
    config, tok, gan = small(loss="logistic", fake_too=False, every=2)
    state = state_for(gan, config)
    before = {k: v.clone() for k, v in gan.net.state_dict().items()}
    data = feed(load("digits"), tok)
    names = [list(r.turns) for r in train(state, [gan.loss[0], gan.loss[1]], data, images=16, batch=8)]
    assert names == [["disc", "r1"], ["disc"]]
    moved = {k.split(".")[0] for k, v in gan.net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"disc"}
    for _ in train(state_for(gan, config), gan.loss[2:], data, images=24, batch=8): pass # the first step of the warm-up has rate 0
    moved = {k.split(".")[0] for k, v in gan.net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"disc", "gen"}


@pytest.mark.parametrize("change", [dict(), dict(loss="logistic", fake_too=False, every=3)], ids=["relativistic", "lazy"])
def test_resume_is_exact(change):
    def fresh(seed=0):
        config, tok, gan = small(**change)
        torch.manual_seed(seed)
        gan = build(config)[1]
        return state_for(gan, config), gan, feed(load("digits"), tok)

    def go(state, gan, data, stop=None):
        for r in train(state, gan.loss, data, images=60, batch=8):
            if r.step == stop: break
        return state

    straight = go(*fresh())
    half = go(*fresh(), stop=4)
    tensors, numbers = {k: v.clone() for k, v in half.tensors().items()}, half.numbers()
    state, gan, data = fresh(99)
    torch.randn(7)
    rest = go(state.load(tensors, numbers), gan, data)
    assert straight.tensors().keys() == rest.tensors().keys()
    assert all(torch.equal(v, rest.tensors()[k]) for k, v in straight.tensors().items())


def test_generator_gradient_dies_by_minimax_alone():
    config, tok, gan = small(loss="logistic", gamma=0., fake_too=False)
    out = A.ahead(gan, tok, load("digits"), 8, batch=32)
    ratio = [a / b for a, b in zip(out["nonsaturating"], out["saturating"])]
    assert .3 < ratio[0] < 3 and ratio[-1] > 5 * ratio[0]
    assert out["steps"] == list(range(9)) and all(p.requires_grad for p in gan.net.parameters())


def test_pairs_compare_pictures_of_one_caption():
    "The relativistic loss needs the real picture in the generator's turn, without a gradient."
    config, tok, gan = small()
    x, cond = feed(load("digits"), tok)(Draws(0, torch.arange(4)))
    draws = Draws(0, torch.arange(4))
    loss = gan.gen_loss(x, cond, draws)
    both = gan.net["disc"](torch.cat([x, gan.fakes(cond, draws)]), cat(cond, cond))
    assert torch.allclose(loss, F.softplus(both[:4] - both[4:]), atol=1e-4)
