"VQ-VAE-2: who depends on whom, bits, what a swap and a reader of codes find, exact resume."
import math

import pytest
import torch
import torch.nn.functional as F
from arms import made
from t2i_course.codec.vqvae import VQModel
from t2i_course.codec.vqvae2 import (CodeReader, Levels, VQVAE2, bits, build, measure, origin, recipe_for,
                                     said_where, swapped)
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for
from t2i_course.core.metrics import load_judge
from t2i_course.core.training import feed, train
from t2i_course.sweeps.codec import vqvae2 as sweep
from t2i_course.sweeps.codec.vqvae2 import arms, one_level


def small(**options): return VQVAE2(3, (8, 16), (16, 8), 6, **options)


def picture(n=4, side=32): return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


# --- The two levels ---

@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (1, 32, 48)])
def test_shapes_and_ranges(shape):
    codec = VQVAE2(shape[0], (8, 16), (16, 8), 6)
    x = torch.randn(2, *shape)
    codes, grids = codec.encode(x), codec.grid(shape)
    assert codes.top.shape[1:] == grids.top and codes.bottom.shape[1:] == grids.bottom
    assert all(b == 2 * a for a, b in zip(grids.top, grids.bottom, strict=True))
    assert codes.top.max() < 16 and codes.bottom.max() < 8 and codes.top.dtype == torch.int64
    assert codec.decode(codes).shape == x.shape == codec.decode(Levels(codes.top, None)).shape


def test_codes_and_forward_agree():
    codec, x = small().eval(), picture()
    with torch.no_grad(): y, q = codec(x)
    codes = codec.encode(x)
    assert torch.equal(q.top.ids, codes.top) and torch.equal(q.bottom.ids, codes.bottom)
    assert torch.allclose(codec.decode(codes), y, atol=1e-5)


def test_bottom_knows_top_and_not_the_other_way():
    codec, x = small(), picture(16)
    before = codec.encode(x)
    with torch.no_grad(): codec.bottom.codebook.add_(torch.randn_like(codec.bottom.codebook))
    assert torch.equal(codec.encode(x).top, before.top), "the top is fixed first"
    seen = []
    codec.to_bottom.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    codec.encode(x)
    with torch.no_grad(): codec.top.codebook.add_(torch.randn_like(codec.top.codebook))
    codec.encode(x)
    assert not torch.allclose(*seen), "what becomes bottom codes depends on the top codes"


def test_gradients_go_straight_through_both_levels():
    codec, x = small(), picture()
    codec.loss(x, Draws(0, torch.arange(4))).mean().backward()
    for name, part in (("encoder", codec.encoder), ("to_top", codec.to_top), ("to_bottom", codec.to_bottom), ("lift", codec.lift)):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0, name
    a, b = codec.top.codebook, codec.bottom.codebook
    assert a.grad is None and b.grad is None, "the codebooks follow by running means"


def test_loss_is_reconstruction_and_two_commitments():
    codec, x = small().eval(), picture()
    with torch.no_grad():
        y, q = codec(x)
        assert torch.allclose(codec.loss(x), (y - x).square().flatten(1).mean(1) + q.top.loss + q.bottom.loss)
        assert q.top.loss.min() > 0 and q.bottom.loss.min() > 0


def test_hidden_pictures_do_not_hear_their_fine_codes():
    codec, x, draws = small(hide=.5), picture(16), Draws(3, torch.arange(16))
    codec.eval()
    with torch.no_grad(): y, q = codec(x, draws)
    away = draws.uniform("hide") < .5
    assert 0 < away.sum() < 16
    with torch.no_grad(): alone, both = codec.paint(q.top.z_q, 0 * q.bottom.z_q), codec.paint(q.top.z_q, q.bottom.z_q)
    assert torch.allclose(y, torch.where(away[:, None, None, None], alone, both), atol=1e-5)
    assert torch.allclose(codec.decode(Levels(codec.encode(x).top, None)), alone, atol=1e-5)


# --- Bits, levels, swaps ---

def test_bits_and_the_single_grid_with_as_many():
    assert bits([(32, 32), (64, 64)], (512, 512)) == (1024 + 4096) * 9
    for name in ("painted", "digits"):
        data = load(name)
        config = recipe_for(data, "demo")
        two, one = arms()["two"](config), one_level(config)
        assert bits(two.grid(data.shape), two.n_codes) == bits([one.grid(data.shape)], (one.n_codes,))
        a, b = (sum(p.numel() for p in m.parameters()) for m in (two, one))
        assert abs(a - b) < .2 * a, "weights within a fifth"


def test_published_grids():
    "E018"
    assert 256 // 8 == 32 and 256 // 4 == 64 and [1024 // f for f in (32, 16, 8)] == [32, 64, 128]
    codec = VQVAE2(3, (8, 8), (4, 4), 4)
    assert codec.grid((3, 256, 256)) == ((32, 32), (64, 64))


def test_a_dvae_needs_no_nearest_code():
    "E017"
    lg = torch.randn(5, 8192, requires_grad=True)
    y = F.gumbel_softmax(lg, tau=1., dim=-1)
    assert y.requires_grad == lg.requires_grad and torch.allclose(y.sum(-1), torch.ones(5), atol=1e-4)
    assert torch.autograd.grad(y.square().sum(), lg)[0].abs().sum() > 0


def test_levels_are_cut_together():
    a = Levels(torch.arange(12).view(3, 2, 2), torch.arange(48).view(3, 4, 4))
    top, bottom = a[1:]
    assert top.shape == (2, 2, 2) and bottom.shape == (2, 4, 4) and a[0] is a.top and a[1] is a.bottom
    assert torch.equal(a[torch.tensor([2, 0])].bottom, a.bottom[[2, 0]])
    s = swapped(a, 2)
    assert torch.equal(s.top, a.top) and torch.equal(s.bottom[0], a.bottom[2]) and torch.equal(s.bottom[2], a.bottom[1])


def test_origin_finds_the_source():
    data, judge = load("painted"), load_judge("painted")
    b = data.batch("test", Draws(0, torch.arange(120)))
    own, other = origin(judge, b.x, b.attrs, 3), origin(judge, b.x.roll(-3, 0), b.attrs, 3)
    for k in data.attributes:
        assert own[k]["top"] > .9 and own[k]["bottom"] < .1, k
        assert other[k]["bottom"] > .9 and other[k]["top"] < .1, k


def test_reader_is_bayes_rule():
    "Against the posterior written out, on independent places; and chance on noise."
    g = torch.Generator().manual_seed(0)
    table = torch.rand(3, 4, 5, generator=g).softmax(2) ** 3
    table = table / table.sum(2, keepdim=True)
    y = torch.randint(3, (60_000,), generator=g)
    ids = torch.stack([torch.multinomial(table[y, p], 1, generator=g)[:, 0] for p in range(4)], 1).view(-1, 2, 2)
    reader = CodeReader(ids, y, 5)
    assert torch.allclose(reader.table.exp(), table, atol=.03)
    flat = ids[:500].flatten(1)
    want = sum(table[:, p, flat[:, p]].log() for p in range(4)).argmax(0)
    assert (reader.read(ids[:500]) == want).double().mean() > .95
    noise = torch.randint(5, (3000, 2, 2), generator=g)
    chance = (CodeReader(noise, y[:3000], 5).read(torch.randint(5, (3000, 2, 2), generator=g)) == y[:3000]).double().mean()
    assert abs(chance - 1 / 3) < .05


# --- Training ---

def run(images, stop=None, resume=None):
    data = load("digits")
    config = recipe_for(data, "smoke")
    torch.manual_seed(0)
    tok, model = build(config)
    state = state_for(model, config)
    if resume: state.load(*resume)
    losses = []
    for r in train(state, model.loss, feed(data, tok), images=images, batch=config.batch):
        losses.append(r.loss)
        if stop and r.images >= stop: break
    return state, losses


@pytest.fixture(scope="module")
def whole(): return run(1280)


def test_training_resumes_exactly_and_learns(whole):
    state, losses = whole
    half, _ = run(1280, stop=640)
    saved = {k: v.clone() for k, v in half.tensors().items()}, half.numbers()
    again, _ = run(1280, resume=saved)
    assert all(torch.equal(v, again.tensors()[k]) for k, v in state.tensors().items())
    assert any("codebook" in k for k in state.tensors())
    assert sum(losses[-5:]) < .6 * sum(losses[1:6])


def test_codes_tell_pictures_apart(whole):
    "A trained codec repeats its own picture better than the neighbour."
    x = load("digits").batch("test", Draws(0, torch.arange(64))).x
    codec = whole[0].net.eval()
    with torch.no_grad(): y = codec.decode(codec.encode(x))
    error = lambda a: (y - a).square().flatten(1).mean(1)
    assert (error(x) < error(x.roll(1, 0))).double().mean() > .75


def test_recipe_paints_and_measures():
    data = load("painted")
    config = recipe_for(data, "smoke")
    tok, model = build(config)
    model.net.train()
    x = model.painter(tok, config)(["a bold red seven on pink", "a digit"], 0)
    assert x.shape == (2, 3, 32, 32) and x.isfinite().all() and model.net.training
    assert model.options == {} and model.calls(config) == 1 and isinstance(model, VQModel)
    m = measure(model.codec, data, 16)
    assert set(m) >= {"mse", "mse_top", "bits", "perplexity", "dead"} and len(m["dead"]) == 2
    assert m["bits"] == 16 * math.log2(config.n_codes[0]) + 64 * math.log2(config.n_codes[1])
    assert "mse_top" not in measure(one_level(config), data, 16)
    w = said_where(model.codec, data, load_judge("painted"), 16, 100)
    assert set(w["read"]) == {"top", "bottom"} and set(w["swap"]) == set(data.attributes)


def test_experiments_speak_of_every_arm(monkeypatch):
    monkeypatch.setitem(sweep.SWEEP, "smoke", dict(images=64, n=12, read=60))
    keys = list(made(sweep))
    assert keys[0] == "setting" and [k for k in keys if k.startswith("arms")] == [f"arms.{a}.seed0" for a in ("two", "hidden", "one")]
    assert sum(k.startswith("where") for k in keys) == 2
