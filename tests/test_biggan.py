"BigGAN: spectral norm against torch, conditional norms, truncation, the orthogonal penalty, published sizes, exact resume."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from t2i_course.core.conditioning import raw_cond
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for
from t2i_course.core.training import feed, train
from t2i_course.gan.adversarial import hinge_d, hinge_g
from t2i_course.gan.biggan import (Attention, BigDiscriminator, BigGenerator, ConditionalBN, OneHot, SNConv2d, SNLinear,
                                   UpBlock, build, fresh, off_diagonal, power_step, published, recipe_for, standing,
                                   truncated, within_classes)
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

torch.set_num_threads(1)
CAPTIONS = ["a handwritten seven", "a handwritten two", "a handwritten zero", "a handwritten one"]


def small(data="digits", **changes):
    "A recipe of the smallest size, and what it builds"
    config = recipe_for(load(data), "smoke") | dict(ch=8, ch_disc=8, batch=8) | changes
    return config, *fresh(config, 0)


# --- Spectral norm ---

@pytest.mark.parametrize("ours, plain, x", [
    (lambda: SNLinear(20, 30), lambda: nn.Linear(20, 30), (5, 20)),
    (lambda: SNConv2d(6, 9), lambda: nn.Conv2d(6, 9, 3, padding=1), (2, 6, 8, 8)),
    (lambda: SNConv2d(6, 9, 1, bias=False), lambda: nn.Conv2d(6, 9, 1, bias=False), (2, 6, 8, 8))],
    ids=["linear", "3x3", "1x1"])
def test_spectral_norm_is_that_of_torch(ours, plain, x):
    "Outputs and gradients, over steps of an optimizer, and in eval mode."
    torch.manual_seed(0)
    ours, plain, x = ours(), plain(), torch.randn(x)
    plain.load_state_dict({k: w for k, w in ours.state_dict().items() if "spectral" not in k})
    theirs = spectral_norm(plain)
    theirs.parametrizations.weight[0]._v.copy_(ours.spectral.v)
    opts = [torch.optim.SGD(m.parameters(), .002) for m in (ours, theirs)]
    for _ in range(4):
        out = [m(x) for m in (ours, theirs)]
        assert torch.allclose(*out, atol=1e-5)
        for y, opt in zip(out, opts):
            opt.zero_grad()
            y.square().mean().backward()
        assert torch.allclose(ours.weight.grad, theirs.parametrizations.weight.original.grad, atol=1e-6)
        for opt in opts: opt.step()
    ours.eval(), theirs.eval()
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)


def test_power_method_finds_the_largest_singular_value():
    torch.manual_seed(1)
    w, v = torch.randn(7, 12), torch.randn(12)
    for _ in range(300): u, v = power_step(w, v)
    assert abs(u @ w @ v - torch.linalg.matrix_norm(w, 2)) < 1e-3


def test_the_vector_is_state_and_eval_leaves_it_alone():
    layer, x = SNLinear(8, 5), torch.randn(3, 8)
    with torch.no_grad(): layer.weight.add_(torch.randn(5, 8))
    before = layer.spectral.v.clone()
    layer.eval()
    layer(x)
    assert torch.equal(layer.spectral.v, before) and "spectral.v" in layer.state_dict()
    layer.train()
    layer(x)
    assert not torch.equal(layer.spectral.v, before)


def test_gradient_is_blind_to_the_size_of_the_weight():
    "W and 2W are one layer, so the slope along W is 0; it would not be with sigma taken as a constant."
    torch.manual_seed(0)
    layer = SNLinear(8, 5, bias=False)
    with torch.no_grad(): layer.weight.add_(torch.randn(5, 8))
    for _ in range(200): layer(torch.zeros(1, 8))
    g, = torch.autograd.grad(layer(torch.randn(4, 8)).square().sum(), layer.weight)
    assert (g * layer.weight).sum().abs() < 1e-4 < g.norm()


# --- Norms, attention, networks ---

def test_conditional_norm_is_equation_1():
    torch.manual_seed(0)
    norm, h, y = ConditionalBN(3, 6), torch.randn(4, 3, 8, 8) * 5 + 2, torch.randn(4, 6)
    out = norm(h, y)
    a, b = (m.weight / torch.linalg.matrix_norm(m.weight, 2) for m in (norm.gain, norm.bias))
    mean, std = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True).add(1e-5).sqrt()
    want = (1 + y @ a.T)[:, :, None, None] * (h - mean) / std + (y @ b.T)[:, :, None, None]
    assert torch.allclose(out, want, atol=1e-3)
    assert not torch.allclose(out, norm(h, y.flip(0)), atol=.1)


def test_attention_starts_as_identity_and_is_softmax_of_products():
    torch.manual_seed(0)
    block, h = Attention(16).eval(), torch.randn(2, 16, 8, 8)
    assert torch.equal(block(h), h)
    block.gamma.data.fill_(1.)
    q, k, v = block.theta(h), F.max_pool2d(block.phi(h), 2), F.max_pool2d(block.g(h), 2)
    q, k, v = (t.flatten(2).mT[:, None] for t in (q, k, v))
    seen = F.scaled_dot_product_attention(q, k, v, scale=1.)[:, 0].mT.reshape(2, 8, 8, 8)
    assert torch.allclose(block(h), h + block.o(seen), atol=1e-5)


def test_side_path_may_come_before_the_enlargement():
    block, x = UpBlock(6, 4, 5).eval(), torch.randn(2, 6, 4, 4)
    late = block.side(F.interpolate(x, scale_factor=2))
    assert torch.allclose(F.interpolate(block.side(x), scale_factor=2), late, atol=1e-6)


def test_each_chunk_of_noise_has_its_place():
    "Noise of a block does not reach the grid before it; every chunk reaches the picture."
    config, tok, model = small()
    gen, cond = model.artist.eval(), tok(CAPTIONS[:2])
    z = torch.randn(2, config["z_dim"])
    for i in range(3):
        other = z.clone()
        other[:, i*gen.chunk:(i+1)*gen.chunk] += 1
        seen = []
        hooks = [m.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
                 for m in (gen.first, gen.blocks[0])]
        assert not torch.allclose(gen(z, cond), gen(other, cond), atol=1e-4)
        for hook in hooks: hook.remove()
        first, block = (torch.allclose(seen[k], seen[k+2]) for k in (0, 1))
        assert (first, block) == (i > 0, i > 1)


def test_discriminator_is_projection():
    config, tok, model = small()
    disc, x, cond = model.net["disc"].eval(), torch.randn(4, 1, 16, 16), tok(CAPTIONS)
    h = disc.features(x)
    v = disc.match(disc.encoder(cond).pooled)
    assert torch.allclose(disc(x, cond), h @ disc.real.weight[0] / disc.real.weight.norm() + disc.real.bias + (v * h).sum(1),
                          atol=1e-4)


def test_sizes_are_those_of_the_published_model():
    with torch.device("meta"): counts = [sum(p.numel() for p in m.parameters()) for m in published()]
    assert counts == [70_433_988, 87_982_370]


def test_one_hot_and_a_linear_layer_are_an_embedding():
    cond = raw_cond(torch.tensor([[3], [0]]), torch.ones(2, 1, dtype=torch.bool))
    layer = nn.Linear(5, 7, bias=False)
    assert torch.equal(layer(OneHot(5)(cond).pooled), layer.weight.T[[3, 0]])


# --- Truncation and the penalty ---

@pytest.mark.parametrize("threshold", [.3, 1., 2., 10.])
def test_truncated_noise_is_noise_drawn_again(threshold):
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    got = truncated(z, threshold).sort().values
    want = z[z.abs() < threshold].sort().values
    assert got.abs().max() <= threshold and (got.diff() >= 0).all()
    for q in (.05, .25, .5, .75, .95):
        assert abs(got[int(q*len(got))] - want[int(q*len(want))]) < .03
    if threshold == 10.: assert torch.allclose(truncated(z, 10.), z, atol=1e-4)


def test_truncation_at_zero_and_at_the_tail():
    assert (truncated(torch.tensor([-5.9, 0., 5.9]), 0.) == 0).all()
    assert truncated(torch.tensor([-5.9, 5.9]), 10.).isfinite().all()


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 3, 3, 3), (40, 2, 3, 3)])
def test_penalty_is_equation_3(shape):
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    m = w.flatten(1) @ w.flatten(1).T
    want = (m * (1 - torch.eye(len(m)))).square().sum()
    assert torch.allclose(off_diagonal(w), want)


def test_penalty_leaves_lengths_free():
    "ERRATA E013: three times the identity is not orthogonal in the strict sense, and is not punished."
    w = 3 * torch.eye(4)
    assert off_diagonal(w) == 0 and (w.T @ w - torch.eye(4)).square().sum() > 0


def test_generator_pays_for_its_angles_and_not_for_embeddings():
    config, tok, model = small(ortho=1e-4)
    x, cond, draws = torch.zeros(4, 1, 16, 16), tok(CAPTIONS), Draws(0, torch.arange(4))
    model.net.eval()
    plain = copy.copy(model)
    plain.ortho = 0.
    gap = model.gen_loss(x, cond, draws) - plain.gen_loss(x, cond, draws)
    own = [m.weight for m in model.artist.modules() if isinstance(m, (SNLinear, SNConv2d))]
    assert torch.allclose(gap, 1e-4 * sum(map(off_diagonal, own)).expand(4), rtol=1e-2, atol=1e-5)
    assert not any(w is model.artist.shared.weight for w in own)


# --- Training, drawing ---

def test_turns_hinge_and_two_steps_of_the_discriminator():
    config, tok, model = small()
    disc, gen = model.loss
    assert (disc.part, gen.part, gen.every) == ("disc", "gen", 2)
    assert (model.d_loss, model.g_loss) == (hinge_d, hinge_g)
    state, data = state_for(model, config), load("digits")
    turns = [sorted(r.turns) for r in train(state, model.loss, feed(data, tok), images=32, batch=8)]
    assert turns == [["disc", "gen"], ["disc"], ["disc", "gen"], ["disc"]]


def run_to(stops, config, data):
    "Train and interrupt at each stop; all but the run's own files is lost in between"
    kept = None
    for stop in stops:
        tok, model = fresh(config, 0)
        state = state_for(model, config)
        if kept: state.load(*kept)
        for r in train(state, model.loss, feed(data, tok), images=40, batch=8, seed=3):
            if r.images >= stop: break
        kept = {k: v.clone() for k, v in state.tensors().items()}, state.numbers()
    return kept[0]


def test_interrupted_run_goes_on_exactly():
    "Weights, averages, batch-norm statistics, power vectors and optimizers: equal to the last bit."
    config, _, _ = small()
    data = load("digits")
    whole, broken = run_to([40], config, data), run_to([8, 24, 40], config, data)
    assert whole.keys() == broken.keys()
    assert any("spectral.v" in k for k in whole) and any("running_mean" in k for k in whole)
    assert all(torch.equal(whole[k], broken[k]) for k in whole)


def test_batch_of_company_matters_in_training_mode_only():
    config, tok, model = small()
    z = torch.randn(8, config["z_dim"])
    conds = [tok(CAPTIONS[:1] + [c]*7) for c in CAPTIONS[1:3]]
    for training in (True, False):
        gen = copy.deepcopy(model.artist).train(training)
        a, b = (gen(z, c)[0] for c in conds)
        assert torch.allclose(a, b, atol=1e-4) != training


def test_standing_statistics_are_plain_averages():
    config, tok, model = small()
    gen, seen = model.artist, []
    hook = gen.blocks[0].norm1.norm.register_forward_hook(lambda m, a, out: seen.append(a[0].mean((0, 2, 3))))
    pairs = [(torch.randn(8, config["z_dim"]), tok(CAPTIONS*2)) for _ in range(3)]
    gen.eval()
    standing(gen, pairs)
    hook.remove()
    stat = gen.blocks[0].norm1.norm
    assert torch.allclose(stat.running_mean, torch.stack(seen).mean(0), atol=1e-5)
    assert stat.momentum == .1 and not gen.training


def test_painter_draws_with_its_threshold_and_puts_the_mode_back():
    config, tok, model = small()
    draw = lambda t: model.painter(tok, config | dict(truncation=t))(CAPTIONS, 0)
    assert draw(2.).shape == (4, 1, 16, 16) and draw(2.).abs().max() <= 1 and model.artist.training
    assert torch.equal(draw(2.), draw(2.)) and not torch.equal(draw(2.), draw(.5))
    same = model.painter(tok, config | dict(truncation=0.))(CAPTIONS[:1]*2, 0)
    assert torch.allclose(same[0], same[1], atol=1e-5)
    assert list(model.options) == ["truncation"]


@pytest.mark.parametrize("data", ["digits", "painted", "painted2"])
@pytest.mark.parametrize("concat", [False, True])
def test_recipe_fits_every_data_set(data, concat):
    config, tok, model = small(data, concat=concat)
    c, h, w = config["shape"]
    cond = tok(load(data).batch("train", Draws(0, torch.arange(4))).captions)
    x = model.artist(torch.randn(4, config["z_dim"]), cond)
    assert x.shape == (4, c, h, w) and model.net["disc"](x, cond).shape == (4,)
    for shape in ((1, 32, 32), (3, 48, 64)):
        tok, other = build(config | dict(shape=shape))
        x = other.artist(torch.randn(2, config["z_dim"]), cond[:2])
        assert x.shape == (2, *shape) and other.net["disc"](x, cond[:2]).isfinite().all()


def test_large_networks_are_the_same_classes():
    with torch.device("meta"): gen, disc = published()
    assert isinstance(gen, BigGenerator) and isinstance(disc, BigDiscriminator)
    assert gen.bottom == (4, 4) and gen.chunk == 20 and math.prod(gen.bottom)*16*96 == gen.first.out_features
    assert list(gen.attention) == ["3"] and list(disc.attention) == ["0"]


def test_variety_is_the_variance_within_classes():
    f = torch.tensor([[0.], [2.], [10.], [14.]])
    assert within_classes(f, torch.tensor([0, 0, 1, 1])) == pytest.approx((2+8)/2)


