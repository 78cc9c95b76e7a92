"Masked-convolution priors: nobody sees the future, probabilities sum to 1, drawings follow them, exact resume."
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from arms import made
from t2i_course.ar import pixelcnn
from t2i_course.ar.pixelcnn import (Causal, Histogram, MaskedConv, PixelCNN, Plain, TwoLevelPrior, before, bits_per_code, codes_of,
                                    down, gate, guided, make_prior, mask, nll, pick, recipe_for, sample_grid,
                                    sees)
from t2i_course.codec.vqvae2 import Levels
from t2i_course.core.conditioning import WordBag, WordTokenizer
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for
from t2i_course.core.metrics import load_judge
from t2i_course.core.training import feed, train
from t2i_course.sweeps.ar import pixelcnn as sweep
from uses import built, uses_of


def shaken(net, std=.2):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g) * std)
    return net.eval()


def grids(k, rows, cols): return torch.cartesian_prod(*[torch.arange(k)] * (rows * cols)).view(-1, rows, cols)


NETS = dict(plain=Plain, gated=PixelCNN, attention=lambda *a, **k: PixelCNN(*a, attention=True, **k))


# --- Masks and what is seen ---

def test_masks_written_out():
    assert mask(3, "A").tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert mask(3, "B").tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert mask(5, "A").sum() == 12 and mask(5, "B").sum() == 13


def test_masked_weights_get_no_gradient():
    conv = MaskedConv(2, 3, 3, "A")
    conv(torch.randn(2, 2, 5, 5)).square().sum().backward()
    assert (conv.weight.grad[:, :, mask(3, "A") == 0] == 0).all() and (conv.weight.grad[:, :, 0] != 0).all()


def test_b_in_the_first_layer_sees_itself():
    assert sees(MaskedConv(2, 2, kind="B"), (2, 5, 5), (2, 2))[2, 2]
    assert not sees(MaskedConv(2, 2, kind="A"), (2, 5, 5), (2, 2))[2, 2]


@pytest.mark.parametrize("kind", list(NETS))
def test_no_place_sees_its_future(kind):
    net = shaken(NETS[kind](7, (6, 5), 4, width=8, depth=3))
    order = torch.arange(30).view(6, 5)
    for i in range(30):
        seen = sees(lambda e: net.run(e, torch.zeros(len(e), 4)), (8, 6, 5), divmod(i, 5), n=1)
        assert not (seen & (order >= i)).any(), i
        if i % 5 and kind != "plain": assert seen.flatten()[i - 1]


def test_blind_spot_and_its_cure():
    at, shape = (6, 5), (8, 11, 11)
    nets = {k: shaken(f(7, (11, 11), 4, width=8, depth=4)) for k, f in NETS.items()}
    see = {k: sees(lambda e, n=n: n.run(e, torch.zeros(len(e), 4)), shape, at) for k, n in nets.items()}
    assert not see["plain"][5, 7] and see["gated"][5, 7] and see["attention"][5, 7]
    assert see["gated"][5, 1:10].all() and see["gated"][6, 1:5].all()
    assert see["attention"].sum() == 6 * 11 + 5, "every earlier place"
    assert not see["plain"][5, 7:].any() and see["plain"][2:6, 1:6].any()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_view_of_a_masked_stack_is_the_formula(n):
    net = torch.nn.Sequential(MaskedConv(2, 2, kind="A"), *(MaskedConv(2, 2) for _ in range(n - 1)))
    assert sees(net, (2, 11, 11), (5, 5)).sum() == sum(n + k + 1 for k in range(n + 1)) - 1


def test_shifts_and_gate():
    x = torch.arange(1., 10.).view(1, 1, 3, 3)
    assert down(x)[0, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]] and before(x)[0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    y = torch.randn(2, 6, 3, 3)
    assert torch.allclose(gate(y), y[:, :3].tanh() * y[:, 3:].sigmoid())


def test_attention_is_that_of_a_masked_softmax():
    net, x = shaken(Causal(8, 2)), torch.randn(3, 8, 2, 3)
    s = x.flatten(2).transpose(1, 2)
    q, k, v = (u.view(3, 6, 2, 4).transpose(1, 2) for u in net.qkv(net.norm(s)).chunk(3, 2))
    a = (q @ k.transpose(2, 3) / 2).masked_fill(~torch.ones(6, 6).tril().bool(), -math.inf).softmax(3) @ v
    assert torch.allclose(net(x), x + net.out(a.transpose(1, 2).reshape(3, 6, 8)).transpose(1, 2).view_as(x), atol=1e-5)


def test_fine_codes_see_all_coarse_ones_and_the_caption():
    net = shaken(PixelCNN(7, (4, 4), 5, width=8, depth=2, above=3))
    ids, top, pooled = torch.zeros(1, 4, 4).long(), torch.zeros(1, 2, 2).long(), torch.zeros(1, 5)
    base = net(ids, pooled, top)
    other = top.clone()
    other[0, 1, 1] = 2
    far = (net(ids, pooled, other) - base).abs().sum(1)[0]
    assert far[3, 3] > 1e-6 and far[1, 1] > 1e-6, "a coarse code to the lower right"
    assert ((net(ids, pooled + 1, top) - base).abs().sum(1) > 1e-6).all()


@pytest.mark.parametrize("kind", list(NETS))
def test_first_rows_do_not_need_the_rest(kind):
    net = shaken(NETS[kind](7, (4, 4), 5, width=8, depth=2, above=3))
    ids, top = torch.randint(7, (2, 4, 4)), torch.randint(3, (2, 2, 2))
    assert torch.allclose(net(ids, torch.ones(2, 5), top)[:, :, :2], net(ids[:, :2], torch.ones(2, 5), top), atol=1e-5)


# --- Likelihood ---

@pytest.mark.parametrize("kind", list(NETS))
@pytest.mark.parametrize("k, rows, cols", [(3, 2, 2), (2, 2, 4)])
def test_probabilities_sum_to_one(kind, k, rows, cols):
    every = grids(k, rows, cols)
    net = shaken(NETS[kind](k, (rows, cols), 4, width=8, depth=2), .5).double()
    with torch.no_grad(): p = 2 ** -nll(net(every, torch.ones(len(every), 4).double()), every).double()
    assert abs(p.sum() - 1) < 1e-5 and p.std() * len(p) > .1, "and it is not the uniform distribution"


def test_a_network_that_peeks_does_not_sum_to_one():
    every = grids(3, 2, 2)
    net = shaken(torch.nn.Sequential(torch.nn.Conv2d(3, 9, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(9, 3, 1)), .5)
    with torch.no_grad(): p = 2 ** -nll(net(F.one_hot(every, 3).permute(0, 3, 1, 2).float()), every)
    assert abs(p.sum() - 1) > .01


def two_levels():
    tok = WordTokenizer(["left", "right"], 3)
    top, bottom = PixelCNN(2, (1, 2), 6, width=8, depth=2, attention=True), PixelCNN(2, (2, 4), 6, width=8, depth=2, above=2)
    return tok, shaken(TwoLevelPrior(WordBag(len(tok), 6), top, bottom, tok.null()), .5)


def test_two_levels_sum_to_one():
    tok, prior = two_levels()
    a, b = grids(2, 1, 2), grids(2, 2, 4)
    both = Levels(a.repeat_interleave(len(b), 0), b.repeat(len(a), 1, 1))
    with torch.no_grad(): q = prior.bits(both, tok(["left"]).map(lambda v: v.expand(len(both.top), *v.shape[1:])))
    assert abs((2 ** -(q.top + q.bottom).double()).sum() - 1) < 1e-4


def test_nll_is_the_product_written_out():
    net = shaken(PixelCNN(3, (2, 2), 4, width=8, depth=2), .5)
    ids = torch.tensor([[[2, 0], [1, 1]]])
    with torch.no_grad(): p = net(ids, torch.ones(1, 4)).softmax(1)
    want = -sum(p[0, ids[0, r, c], r, c].log2() for r in range(2) for c in range(2))
    assert abs(nll(p.log(), ids).item() - want) < 1e-4


def test_histogram_is_counting():
    ids = torch.randint(4, (5000, 2, 2), generator=torch.Generator().manual_seed(0))
    ids[:, 0, 0] = 3
    bits = Histogram(ids, 4).bits(ids).mean()
    assert abs(bits - 6) < .05


# --- Drawing ---

def test_pick_follows_the_softmax():
    logits = torch.tensor([[1., -1., .5, -3.]]).expand(40_000, -1)
    u = Draws(0, torch.arange(40_000)).uniform("u")
    for t in (1., .5):
        p = (logits[0] / t).softmax(0)
        found = pick(logits, u, t).bincount(minlength=4) / 40_000
        assert ((found - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt() + 1e-4).all()
    assert (pick(logits, u, 0) == 0).all()
    edge = pick(torch.tensor([[0., -math.inf, 0.]]).expand(3, -1), torch.tensor([0., .5, 1 - 2**-24]))
    assert edge.tolist() == [0, 2, 2], "never a code of probability 0"


def test_guidance_is_a_ratio_of_probabilities():
    c, u = torch.randn(2, 4, 5)
    p = guided(torch.cat([c, u]), 2.5).softmax(1)
    want = c.softmax(1) ** 2.5 / u.softmax(1) ** 1.5
    assert torch.allclose(p, want / want.sum(1, keepdim=True), atol=1e-5)
    assert torch.equal(guided(torch.cat([c, u]), 0.), u)


@pytest.mark.parametrize("kind", list(NETS))
def test_drawings_are_as_frequent_as_the_model_says(kind):
    every, n = grids(3, 2, 2), 8000
    net = shaken(NETS[kind](3, (2, 2), 4, width=8, depth=2), .3)
    with torch.no_grad(): p = 2 ** -nll(net(every, torch.ones(81, 4)), every)
    assert p.max() > 3 * p.min()
    *_, ids = sample_grid(net, torch.ones(n, 4), Draws(0, torch.arange(n)))
    found = (ids.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1).bincount(minlength=81) / n
    chi = (n * (found - p).square() / p).sum().item()
    assert 80 - 4 * 160**.5 < chi < 80 + 5 * 160**.5


def test_a_drawing_depends_on_its_own_numbers_alone():
    tok, prior = two_levels()
    config = SimpleNamespace(guidance=2., temperature=.9)
    many = prior.sample(tok(["left", "right", "left"]), Draws(3, torch.arange(3)), config)
    one = prior.sample(tok(["right"]), Draws(3, torch.tensor([1])), config)
    assert torch.equal(many.top[1:2], one.top) and torch.equal(many.bottom[1:2], one.bottom)


def test_known_codes_stay():
    net = shaken(PixelCNN(5, (3, 3), 4, width=8, depth=2))
    known = torch.full((6, 3, 3), -1)
    known[:, 0], known[:, 2, 2] = 4, 2
    steps = [g.clone() for g in sample_grid(net, torch.ones(6, 4), Draws(0, torch.arange(6)), known=known)]
    assert len(steps) == 9 and (steps[-1][:, 0] == 4).all() and (steps[-1][:, 2, 2] == 2).all()


def test_coarse_codes_can_be_given():
    tok, prior = two_levels()
    top = torch.tensor([[[1, 0]], [[0, 1]]])
    out = prior.sample(tok(["left", ""]), Draws(0, torch.arange(2)), SimpleNamespace(guidance=1., temperature=1.), top)
    assert torch.equal(out.top, top) and out.bottom.shape == (2, 2, 4)


# --- The recipe ---

@pytest.fixture(scope="module")
def codec(): return uses_of(pixelcnn, recipe_for(load("digits"), "smoke"), 384)


def run(codec, images=576, stop=None, resume=None):
    data = load("digits")
    config = recipe_for(data, "smoke")
    torch.manual_seed(0)
    tok, model = pixelcnn.build(config, **codec)
    state = state_for(model, config)
    if resume: state.load(*resume)
    losses = []
    for r in train(state, model.loss, feed(data, tok), images=images, batch=config.batch):
        losses.append(r.loss)
        if stop and r.images >= stop: break
    return state, losses, tok, model, config


@pytest.fixture(scope="module")
def whole(codec): return run(codec)


def test_training_resumes_exactly(whole, codec):
    half = run(codec, stop=192)[0]
    saved = {k: v.clone() for k, v in half.tensors().items()}, half.numbers()
    again = run(codec, resume=saved)[0]
    assert all(torch.equal(v, again.tensors()[k]) for k, v in whole[0].tensors().items())


def test_the_prior_learns_and_the_codec_stays(whole, codec):
    state, losses, _, model, config = whole
    assert sum(losses[-5:]) < .9 * sum(losses[:5]) and len(losses) == 36
    again = uses_of(pixelcnn, config, 384)["codec"].model.codec.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.codec.state_dict().items())
    assert not any(p.requires_grad for p in model.codec.parameters()) and not model.codec.training
    assert all(p.grad is not None for p in model.net.parameters()), "a weight that nobody hears"


def test_shuffled_codes_surprise_a_trained_prior(whole):
    state, _, tok, model, config = whole
    data = load("digits")
    codes, b = codes_of(model.codec, data, "test", 3, 100)
    own = bits_per_code(model.prior, tok, codes, b.captions)
    g = torch.Generator().manual_seed(0)
    mixed = Levels(*(torch.gather(c.flatten(1), 0, torch.rand(100, c[0].numel(), generator=g).argsort(0)).view_as(c) for c in codes))
    other = bits_per_code(model.prior, tok, mixed, b.captions)
    assert other["bottom"] > own["bottom"]
    assert own["bottom"] < math.log2(config.n_codes[1])


def test_recipe_paints_and_counts_its_calls(whole):
    _, _, tok, model, config = whole
    model.net.train()
    draw = model.painter(tok, config)
    x = draw(["a handwritten seven", ""], 0)
    assert x.shape == (2, 1, 16, 16) and x.isfinite().all() and model.net.training
    assert torch.equal(x, draw(["a handwritten seven", ""], 0)) and not torch.equal(x, draw(["a handwritten seven", ""], 1))
    assert model.calls(config) == 2 * 20 and model.calls(config | dict(guidance=1.)) == 20
    assert set(model.options) == {"temperature", "guidance"}


def test_published_grids_and_who_has_attention():
    "E018: three levels at 1024 pixels; attention at the top, coarse codes for the bottom."
    assert 256 // 8 == 32 and 256 // 4 == 64 and [1024 // f for f in (32, 16, 8)] == [32, 64, 128]
    config = recipe_for(load("painted"), "demo")
    _, prior = make_prior(config, uses_of(pixelcnn, config)["codec"].model.codec)
    assert len(prior.top.attend) and not len(prior.bottom.attend)
    assert hasattr(prior.bottom, "table_above") and not hasattr(prior.top, "table_above")
    assert prior.top.grid == (4, 4) and prior.bottom.grid == (8, 8)


def test_kept_reads_every_attribute():
    data = load("painted")
    config = recipe_for(data, "smoke")
    tok, model = built(pixelcnn, config)
    k = sweep.kept(model, tok, data, load_judge("painted"), config, 8)
    assert set(k) == set(data.attributes) and all(set(v) == {"own", "fine", "all"} for v in k.values())


def test_experiments_speak_of_every_arm(monkeypatch):
    monkeypatch.setitem(sweep.SWEEP, "smoke", dict(codec=32, images=32, n=10, read=32, painted=32, ways=((1., 1.),)))
    keys = list(made(sweep))
    assert keys[0] == "setting" and {f"bits.{a}.seed0" for a in ("histogram", "other_caption", *sweep.ARMS)} <= set(keys)
    assert {f"arms.{a}.seed0" for a in sweep.ARMS} <= set(keys) and "kept.seed0" in keys and "ways.seed0.t100w100" in keys
