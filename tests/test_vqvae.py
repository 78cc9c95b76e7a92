"The VQ-VAE chapter: nearest codes, who gets which gradient, running means, restarts, exact resume, two stages."
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2i_course.codec import vqvae
from t2i_course.codec.vqvae import OnCodes, VectorQuantizer, VQVAE, dead, nearest_code, perplexity
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import EMA
from t2i_course.core.experiments import fit
from t2i_course.core.training import State, feed, train


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draws_of(n, start=0, seed=0):
    return Draws(seed, torch.arange(start, start+n))


# --- Nearest codes ---

@pytest.mark.parametrize("n, k, d", [(500, 64, 8), (300, 512, 64), (7, 1, 3)])
def test_matrix_product_finds_the_code_that_cdist_finds(n, k, d):
    z, book = torch.randn(n, d), torch.randn(k, d)
    far = torch.cdist(z.double(), book.double())
    for ids in (nearest_code(z, book), nearest_code(z+3, book+3)):  # shifted: |z|^2 is large, the answer the same up to near ties
        assert (far.gather(1, ids[:, None])[:, 0]-far.amin(1)).max() < 1e-4
        assert (ids == far.argmin(1)).double().mean() > .995


def test_nearest_code_does_not_round_under_autocast():
    book = torch.tensor([[1.], [1.001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_code(torch.tensor([[1.0009]]), book).tolist() == [1]


def test_perplexity_and_dead_codes():
    assert perplexity(torch.zeros(5, 4, 4, dtype=torch.long), 16) == pytest.approx(1)
    assert perplexity(torch.arange(16).view(1, 4, 4), 16) == pytest.approx(16)
    p = torch.tensor([.5, .25, .25])
    assert perplexity(torch.tensor([0, 0, 1, 2]), 8) == pytest.approx((-(p*p.log()).sum()).exp().item())
    assert dead(torch.tensor([[0, 3], [3, 3]]), 8) == 6


def test_reshaping_keeps_places():
    "E014: the code of place (h, w) of picture b is that of the vector there."
    vq, z = VectorQuantizer(7, 5, start="normal"), torch.randn(2, 5, 3, 4)
    q = vq(z)
    for b, h, w in ((1, 2, 3), (0, 1, 2)):
        one = torch.cdist(z[b, :, h, w][None], vq.codebook).argmin()
        assert q.ids[b, h, w] == one
        assert torch.allclose(q.z_q[b, :, h, w], vq.codebook[one], atol=1e-6)
    assert torch.equal(vq.embed(q.ids), vq.codebook[q.ids].permute(0, 3, 1, 2))


# --- Gradients ---

def test_straight_through_copies_the_gradient():
    vq, z = VectorQuantizer(32, 6, start="normal"), torch.randn(3, 6, 4, 4, requires_grad=True)
    q = vq(z)
    q.z_q.retain_grad()
    nn.functional.conv2d(q.z_q, torch.randn(2, 6, 3, 3)).square().sum().backward()
    assert torch.equal(z.grad, q.z_q.grad) and z.grad.abs().min() > 0


@pytest.mark.parametrize("ema", [None, .9])
def test_who_receives_what(ema):
    vq, z = VectorQuantizer(32, 6, ema=ema, start="normal"), torch.randn(3, 6, 4, 4, requires_grad=True)
    q = vq(z)
    e, n = vq.embed(q.ids), z[0].numel()
    assert torch.allclose(torch.autograd.grad(q.loss.sum(), z, retain_graph=True)[0], 2*vq.beta*(z-e)/n, atol=1e-6)
    if ema is None:
        got = torch.autograd.grad(q.loss.sum(), vq.codebook, retain_graph=True)[0]
        want = torch.zeros_like(got)
        want.index_add_(0, q.ids.flatten(), (2*(e-z)/n).permute(0, 2, 3, 1).reshape(-1, 6))
        assert torch.allclose(got, want, atol=1e-6)
        assert torch.autograd.grad(q.z_q.sum(), vq.codebook, allow_unused=True)[0] is None  # reconstruction: not the codebook
    else:
        assert not list(vq.parameters()) and not vq.codebook.requires_grad


def test_blocked_quantiser_stops_the_decoder():
    for ema in (.9, None):
        q = vqvae.Blocked(32, 6, ema=ema, start="normal")(z := torch.randn(1, 6, 2, 2, requires_grad=True))
        reached = q.z_q.requires_grad and torch.autograd.grad(q.z_q.sum(), z, allow_unused=True)[0] is not None
        assert not reached


def test_agrees_with_diffusers():
    from diffusers.models.autoencoders.vae import VectorQuantizer as Theirs
    z = torch.randn(3, 8, 5, 4)
    own = VectorQuantizer(64, 8, beta=.25, ema=None, start="normal")
    for legacy in (False, True):
        theirs = Theirs(64, 8, .25, legacy=legacy, sane_index_shape=True)
        theirs.embedding.weight.data.copy_(own.codebook.data)
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        q, (z_q, loss, (_, _, ids)) = own(a), theirs(b)
        assert torch.equal(q.ids, ids) and torch.allclose(q.z_q, z_q, atol=1e-6)
        e = own.embed(ids)
        # with legacy=True beta is on the codebook term: the loss has the same value (both terms are equal), other gradients
        assert torch.allclose(q.loss.mean(), loss, atol=1e-6)
        scale = 1. if not legacy else 1/own.beta
        ours = torch.autograd.grad(q.loss.mean(), a)[0]
        assert torch.allclose(ours*scale, torch.autograd.grad(loss, b, retain_graph=True)[0], atol=1e-6)
        assert e.shape == z.shape


# --- The codebook ---

def test_running_means_end_at_the_means():
    vq = VectorQuantizer(3, 2, ema=.8, restart=0., start="normal")
    vq.codebook.copy_(torch.tensor([[5., 0.], [-5., 0.], [0., 50.]]))
    vq.total.copy_(vq.codebook)
    unused = vq.codebook[2].clone()
    z = torch.tensor([[4., 1.], [6., 1.], [-4., -2.], [-8., 0.]])[:, :, None, None]
    for i in range(200):
        q = vq(z, draws_of(4, 4*i))
    assert torch.allclose(vq.codebook[:2], torch.tensor([[5., 1.], [-6., -1.]]), atol=1e-4)
    assert torch.allclose(vq.mass, torch.tensor([1.5, 1.5, 0.]), atol=1e-4)
    assert torch.equal(vq.codebook[2], unused) or torch.allclose(vq.codebook[2], unused, rtol=1e-3)
    assert q.ids.flatten().tolist() == [0, 0, 1, 1]


def test_one_step_of_the_running_means():
    vq = VectorQuantizer(4, 3, ema=.75, restart=0., start="normal")
    z, book = torch.randn(5, 3, 2, 2), vq.codebook.clone()
    ids = vq(z, draws_of(5)).ids.flatten()
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3)
    count = torch.bincount(ids, minlength=4)*4/20
    sums = torch.stack([flat[ids == k].sum(0) for k in range(4)])*4/20
    mass = .75+.25*count
    assert torch.allclose(vq.mass, mass) and torch.allclose(vq.codebook, (.75*book+.25*sums)/mass[:, None], atol=1e-6)


@pytest.mark.parametrize("ema", [None, .9])
def test_codebook_moves_in_training_steps_only(ema):
    vq, z = VectorQuantizer(16, 4, ema=ema), torch.randn(8, 4, 2, 2)
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    vq(z)
    vq.eval()(z, draws_of(8))
    assert all(torch.equal(v, before[k]) for k, v in vq.state_dict().items())
    vq.train()(z, draws_of(8))
    assert not torch.equal(vq.codebook, before["codebook"]) and bool(vq.started)


def test_data_start_takes_vectors_of_the_batch():
    vq, z = VectorQuantizer(16, 4, ema=None), torch.randn(8, 4, 3, 3)
    vq(z, draws_of(8))
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
    assert (vq.codebook.detach()[:, None] == flat[None]).all(2).any(1).all()
    other = VectorQuantizer(16, 4, ema=None)
    other(z, draws_of(8, seed=1))
    assert not torch.equal(vq.codebook, other.codebook)


def test_restart_moves_dead_codes_and_no_others():
    vq = VectorQuantizer(8, 2, ema=None, restart=.03, start="normal")
    vq.mass.copy_(torch.tensor([1., .029, .031, 1., 0., 1., 2., 1.]))
    before, z = vq.codebook.detach().clone(), torch.randn(4, 2, 2, 2)+100
    vq(z, draws_of(4))
    moved = (vq.codebook-before).abs().amax(1) > 0
    assert moved.tolist() == [False, True, False, False, True, False, False, False]
    never = VectorQuantizer(8, 2, ema=None, restart=0., start="normal")
    never.mass.zero_()
    before = never.codebook.detach().clone()
    never(z, draws_of(4))
    assert torch.equal(never.codebook, before)


def test_starts_differ_as_erratum_15_says():
    scale = {start: VectorQuantizer(512, 64, start=start).codebook.std().item() for start in ("normal", "uniform")}
    assert .9 < scale["normal"] < 1.1 and scale["uniform"] == pytest.approx(1/512/3**.5, rel=.05)


# --- The codec ---

def small(**own):
    torch.manual_seed(0)
    return VQVAE(1, (8, 16), 16, 4, **own)


def test_grid_codes_and_back():
    for own, grid in ((dict(), (4, 4)), (dict(trim=1), (2, 2))):
        codec = small(**own).eval()
        x = torch.randn(2, 1, 16, 16)
        ids = codec.encode(x)
        assert codec.grid((1, 16, 16)) == grid == tuple(ids.shape[1:]) and ids.dtype == torch.int64
        y, q = codec(x)
        assert y.shape == x.shape and torch.allclose(codec.decode(ids), y, atol=1e-5)
        assert torch.equal(q.ids, ids) and codec.loss(x).shape == (2,)
        assert torch.allclose(codec.loss(x), (y-x).square().flatten(1).mean(1)+q.loss)


@pytest.mark.parametrize("own", [dict(ema=.95), dict(ema=None)])
def test_training_resumes_exactly(own):
    data = load("digits")
    tok = vqvae.WordTokenizer(data.words, data.size)

    def go(state, steps):
        loss = state.net.loss
        records = train(state, lambda x0, cond, draws: loss(x0, draws), feed(data, tok), images=10*16, batch=16)
        for r in records:
            if r.step == steps:
                break
        return state

    def fresh():
        net = small(restart=.5, **own)  # a high threshold: codes are restarted at most steps
        return State(net, lr=4e-3, ema=EMA(net, 100))
    whole = go(fresh(), 10)
    part = go(fresh(), 4)
    kept, numbers = {k: v.clone() for k, v in part.tensors().items()}, part.numbers()
    torch.randn(7)
    again = fresh()
    with torch.no_grad():
        for p in again.net.parameters():
            p.zero_()
    again = go(again.load(kept, numbers), 10)
    a, b = whole.tensors(), again.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any("mass" in k for k in a) and (own["ema"] is None) == (not any("total" in k for k in a))


def test_codec_learns_and_codes_carry_the_picture():
    data, config = load("digits"), vqvae.recipe_for(load("digits"), "smoke")
    x = data.batch("test", draws_of(64, seed=3)).x
    model = fit(vqvae.build, config, data, 1600).model
    seen = vqvae.inspect(model.codec, x)
    with torch.no_grad():
        wrong = (model.codec.decode(model.codec.encode(x)).roll(1, 0)-x).square().mean().item()
    assert seen["error"] < .6*x.var().item() < wrong and seen["perplexity"] > 8
    assert seen["bits"] == 16*math.log2(config.n_codes) and seen["tokens"] == 16


class Counted(nn.Module):
    "A prior that knows how often each code is used at each place"
    def __init__(self, n_codes, grid, null):
        super().__init__()
        self.logits, self.grid, self.null = nn.Parameter(torch.zeros(*grid, n_codes)), grid, null
        self.once = nn.Identity()

    def counted(self): return [self.once]

    def forward(self, ids, cond, draws):
        logits = self.logits.expand(len(ids), *self.logits.shape).permute(0, 3, 1, 2)
        return F.cross_entropy(logits, ids, reduction="none").flatten(1).mean(1)

    def sample(self, cond, draws, config):
        for _ in range(math.prod(self.grid)): self.once(cond.ids) # a call a code
        return self.logits.argmax(-1).expand(len(cond), *self.grid)


def test_a_prior_on_a_finished_codec():
    data = load("digits")
    tok = vqvae.WordTokenizer(data.words, data.size)
    codec = small()
    before = {k: v.clone() for k, v in codec.state_dict().items()}
    model = OnCodes(codec, Counted(16, (4, 4), tok.null()))
    state = State(model.net, lr=1e-1, ema=EMA(model.net, 50))
    losses = [r.loss for r in train(state, model.loss, feed(data, tok), images=10*16, batch=16)]
    assert all(torch.equal(v, before[k]) for k, v in codec.state_dict().items()) and not codec.training
    assert losses[-1] < losses[0] == pytest.approx(math.log(16), rel=1e-3)
    assert not any(k.startswith("codec") for k in state.tensors()) and set(model.trained) == {"logits"}
    x = model.painter(tok, None)(["a handwritten one"]*3, 0)
    assert x.shape == (3, 1, 16, 16) and model.calls(None) == 16
    assert model.net.training
    assert sum(p.numel() for p in model.artist.parameters()) == sum(p.numel() for m in (codec, model.prior) for p in m.parameters())


@pytest.mark.parametrize("palette", [False, True])
def test_recipe_of_either_codec(palette):
    data = load("painted")
    config = vqvae.recipe_for(data, "smoke") | dict(palette=palette)
    torch.manual_seed(0)
    tok, model = vqvae.build(config)
    x = data.batch("train", draws_of(5)).x
    ids = model.codec.encode(x)
    assert ids.shape[1:] == model.codec.grid(data.shape) == ((9, 8) if palette else (8, 8))
    assert model.codec.decode(ids).shape == x.shape and model.loss(x, None, draws_of(5)).shape == (5,)


# --- The recipe ---

@pytest.mark.parametrize("name", ["digits", "painted"])
def test_recipe_builds_and_repeats(name):
    data = load(name)
    config = vqvae.recipe_for(data, "smoke")
    assert {"recipe", "lr", "half_life", "batch", "words", "max_len", "shape", "data"} <= config.keys()
    a, b = (vqvae.build(config)[1].net.state_dict() for _ in range(2))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    tok, model = vqvae.build(config)
    y = model.painter(tok, config)(data.batch("test", draws_of(3)).captions, 0)
    assert y.shape == (3, *data.shape) and y.isfinite().all() and model.options == {} and model.calls(config) == 1


def test_means_and_sums_weigh_differently():
    "E016"
    ratio = [t.pow(2).sum()/t.pow(2).mean() for t in (torch.ones(2, 3, 32, 32), torch.ones(2, 64, 8, 8))]
    assert ratio[0] != ratio[1]
