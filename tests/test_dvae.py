"The dVAE chapter: Gumbel-max and its relaxation, the KL, who gets a gradient, round codes, exact resume."
import math

import pytest
import torch
import torch.nn.functional as F

from t2i_course.codec import dvae
from t2i_course.codec.dvae import DVAE, UnitQuantizer, ViTVQ, annealed, gumbel, kl_to_uniform, relaxed
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


def small(**own):
    torch.manual_seed(0)
    return DVAE(1, (8, 16), 16, 4, **own)


# --- Choosing softly ---

def test_largest_of_logits_and_noise_is_a_draw_from_the_softmax():
    logits, n = torch.tensor([2., 0., -1., 1.]), 100_000
    p = logits.softmax(0)
    often = (logits+gumbel(torch.rand(n, 4))).argmax(1).bincount(minlength=4)/n
    assert ((often-p)/(p*(1-p)/n).sqrt()).abs().max() < 5
    assert gumbel(torch.tensor([0., 1.])).isfinite().all()


def test_gumbel_noise_has_the_moments_of_its_distribution():
    g = gumbel(torch.rand(200_000))
    assert g.mean().item() == pytest.approx(.57722, abs=.02) and g.var().item() == pytest.approx(math.pi**2/6, rel=.03)


@pytest.mark.parametrize("tau", [2., .5, .1])
def test_relaxed_agrees_with_torch(tau):
    logits = torch.randn(6, 9)
    torch.manual_seed(3)
    want = F.gumbel_softmax(logits, tau, dim=1)
    torch.manual_seed(3)
    noise = -torch.empty_like(logits).exponential_().log()  # as torch makes it
    got = relaxed(logits, noise, tau)
    assert torch.allclose(got, want, atol=1e-6) and torch.allclose(got.sum(1), torch.ones(6))
    assert torch.equal(got.argmax(1), (logits+noise).argmax(1))


def test_colder_choices_are_nearer_to_one_code():
    logits, noise = torch.randn(500, 16), gumbel(torch.rand(500, 16))
    largest = [relaxed(logits, noise, tau).amax(1).mean().item() for tau in (4., 1., .25, 1/16)]
    assert largest == sorted(largest) and largest[0] < .3 and largest[-1] > .9


def test_kl_to_uniform():
    logits = torch.randn(3, 10, 2, 2)
    p = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    uniform = torch.distributions.Categorical(logits=torch.zeros(3, 2, 2, 10))
    assert torch.allclose(kl_to_uniform(logits), torch.distributions.kl_divergence(p, uniform), atol=1e-5)
    assert kl_to_uniform(torch.zeros(1, 7)).abs().max() < 1e-6


def test_temperature_falls_and_stays():
    taus = [annealed(i, 1000) for i in range(0, 1400, 100)]
    assert taus == sorted(taus, reverse=True) and taus[0] == 1 and taus[10:] == [1/16]*4
    assert annealed(500, 1000) == pytest.approx((1+1/16)/2)


def test_erratum_17():
    logits = torch.randn(5, 8192, requires_grad=True)
    y = F.gumbel_softmax(logits, tau=1., dim=-1)
    assert y.requires_grad == logits.requires_grad and torch.allclose(y.sum(-1), torch.ones(5), atol=1e-4)
    assert not [k for k, _ in DVAE().named_buffers()]  # no running means, nothing to restart


# --- The dVAE ---

def heard(net, loss):
    net.zero_grad()
    loss.backward()
    return {k for k, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_gradient_reaches_the_encoder_through_the_soft_choice_only():
    net, x = small(), torch.randn(4, 1, 16, 16)
    soft = heard(net, net.soft(x, draws_of(4), 1.)[0].square().mean())
    hard = heard(net, net(x)[0].square().mean())
    assert any(k.startswith("encoder") for k in soft) and "codebook" in soft and "codebook" in hard
    assert not any(k.startswith("encoder") for k in hard) and any(k.startswith("decoder") for k in hard)


def test_loss_is_error_plus_weighted_kl():
    at = lambda f: Draws(0, torch.arange(4), progress=f)
    net, x, draws = small(beta=.5, anneal=.5), torch.randn(4, 1, 16, 16), at(.2)
    y, logits = net.soft(x, draws, annealed(.2, .5))
    want = (y-x).square().mean((1, 2, 3))+.5*kl_to_uniform(logits).mean((1, 2))
    assert torch.allclose(net.loss(x, draws), want) and net.loss(x, draws).shape == (4,)
    assert not torch.allclose(net.loss(x, at(.9)), net.loss(x, draws)), "colder"


def test_cold_mixture_is_the_drawn_code():
    net, x, draws = small().eval(), torch.randn(4, 1, 16, 16), draws_of(4)
    with torch.no_grad():
        y, logits = net.soft(x, draws, 1e-4)
        drawn = net.decode((logits+net.noise(draws, (4, 4))).argmax(1))
        hot = net.soft(x, draws, 1.)[0]
    assert (y-drawn).abs().mean() < 1e-2 < (hot-drawn).abs().mean()


def test_grid_codes_and_back():
    net, x = small(), torch.randn(2, 1, 16, 16)
    ids = net.encode(x)
    y, same = net(x)
    assert net.grid((1, 16, 16)) == (4, 4) == tuple(ids.shape[1:]) and ids.dtype == torch.int64 and torch.equal(ids, same)
    assert torch.equal(net.encoder(x).argmax(1), ids) and y.shape == x.shape
    one_hot = F.one_hot(ids, 16).permute(0, 3, 1, 2).float()
    assert torch.allclose(net.decoder(net.mix(one_hot)), y, atol=1e-5)


# --- Round codes ---

def test_nearest_unit_code_has_the_largest_cosine():
    vq, z = UnitQuantizer(32, 6, start="normal"), torch.randn(3, 6, 4, 4)*7
    cosine = F.cosine_similarity(z.permute(0, 2, 3, 1).reshape(-1, 1, 6), vq.codebook[None], dim=2)
    q = vq(z)
    assert torch.equal(q.ids.flatten(), cosine.argmax(1)) and torch.equal(vq(z*.01).ids, q.ids)


@pytest.mark.parametrize("options", [dict(), dict(start="normal"), dict(restart=.5)])
def test_codes_keep_their_length(options):
    vq = UnitQuantizer(16, 4, **options)
    for i in range(5):
        vq(torch.randn(8, 4, 2, 2)*3+1, draws_of(8, 8*i))
        assert torch.allclose(vq.codebook.norm(dim=1), torch.full((16,), 2.), atol=1e-5)


def test_transformer_codec_sees_all_patches_and_knows_their_places():
    net, x = ViTVQ((1, 16, 16), width=16, n_layers=1), torch.randn(1, 1, 16, 16)
    other = x.clone()
    other[0, 0, 0, 0] += 1
    assert ((net.encoder(other)-net.encoder(x)).abs().amax(1) > 0).all()
    z = net.encoder(torch.ones(1, 1, 16, 16))  # equal patches, told apart by place
    assert (z[..., 0, 0]-z[..., 2, 1]).abs().max() > 1e-5
    y, q = net(x)
    assert y.shape == x.shape and net.grid((1, 16, 16)) == tuple(q.ids.shape[1:])


# --- The recipe ---

@pytest.mark.parametrize("kind", dvae.KINDS)
def test_training_resumes_exactly(kind):
    data = load("digits")
    config = dvae.recipe_for(data, "smoke")|dict(kind=kind, anneal=.8)
    tok, _ = dvae.build(config)

    def go(state, steps):
        codec = state.net
        for r in train(state, lambda x0, cond, draws: codec.loss(x0, draws), feed(data, tok), images=8*16, batch=16):
            if r.step == steps:
                break
        return state

    def fresh():
        torch.manual_seed(0)
        net = dvae.make_codec(config)
        return State(net, lr=4e-3, ema=EMA(net, 100))
    whole, part = go(fresh(), 8), go(fresh(), 3)
    kept, numbers = {k: v.clone() for k, v in part.tensors().items()}, part.numbers()
    torch.randn(7)
    again = fresh()
    with torch.no_grad():
        for p in again.net.parameters():
            p.zero_()
    again = go(again.load(kept, numbers), 8)
    a, b = whole.tensors(), again.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learns_and_codes_carry_the_picture():
    data, x = load("digits"), load("digits").batch("test", draws_of(64, seed=3)).x
    model = fit(dvae.build, dvae.recipe_for(data, "smoke"), data, 2000).model
    model.codec.eval()
    seen = dvae.inspect(model.codec, x)
    with torch.no_grad():
        wrong = (model.codec(x)[0].roll(1, 0)-x).square().mean().item()
    assert seen["error"] < .5*x.var().item() and seen["error"] < .7*wrong and seen["perplexity"] > 5


@pytest.mark.parametrize("name", ["digits", "painted"])
@pytest.mark.parametrize("kind", dvae.KINDS)
def test_recipe_builds_and_repeats(name, kind):
    data = load(name)
    config = dvae.recipe_for(data, "smoke")|dict(kind=kind)
    assert {"recipe", "lr", "half_life", "batch", "words", "max_len", "shape", "data"} <= config.keys()
    tok, model = dvae.build(config)
    y = model.painter(tok, config)(data.batch("test", draws_of(3)).captions, 0)
    assert y.shape == (3, *data.shape) and y.isfinite().all() and model.options == {} and model.calls(config) == 1
    assert all(p.is_contiguous() for p in model.net.parameters())


def test_facts_of_dall_e():
    "E045, rows 2.4.1b and 2.4.1c"
    assert 256+(256//8)**2 == 1280 and math.log2(8192) == 13
    assert dvae.recipe_for(load("digits")).last == 1/16 and dvae.SIZES["full"]["n_codes"] == 8192
