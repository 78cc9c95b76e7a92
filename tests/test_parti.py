"""Parti: cross-attention, no look ahead, cache, published sizes, and the two kinds of prior on the same codes."""
import math

import pytest
import torch
import torch.nn.functional as F
from t2i_course.ar import parti
from t2i_course.ar.dalle import Cache, sample_codes
from t2i_course.codec.vqvae import VQVAE
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.sweeps.ar import parti as sweep
from uses import built


@pytest.fixture(scope="module")
def made():
    "A fresh model with weights that are not near zero, its tokenizer and its config"
    data = load("painted")
    config = parti.recipe_for(data, "smoke")
    torch.manual_seed(0)
    tok, model = built(parti, config)
    for p in model.prior.parameters(): p.data += .1 * torch.randn_like(p)
    return tok, model, config, data


@pytest.mark.parametrize("words", [[3, 7], [1, 5]])
def test_attention_equals_the_library(words):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = torch.arange(7) < torch.tensor(words)[:, None]
    heard, weights = parti.attend(q, k, v, mask[:, None, None])
    assert torch.allclose(heard, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]), atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 5)) and (weights.masked_select(~mask[:, None, None]) == 0).all()


def test_nobody_sees_the_future(made):
    "The gradient of the loss of code i with respect to later codes, and to itself, is zero."
    tok, model, config, data = made
    net = model.prior.net
    codes = torch.randint(net.n_codes, (2, net.n_image))
    cond = tok(["a red seven", "a bold blue two on pink"])
    for i in (0, 3, net.n_image - 2):
        other = codes.clone()
        other[:, i] = (other[:, i] + 1) % net.n_codes
        gap = (net(cond, codes) - net(cond, other)).abs().amax((0, 2))
        assert (gap[:i + 1] == 0).all() and (gap[i + 1:] > 0).all()


def test_padding_is_not_heard(made):
    "A caption gives the same answers beside a longer one as alone."
    tok, model, config, data = made
    net, codes = model.prior.net, torch.randint(model.codec.n_codes, (2, model.prior.net.n_image))
    both = net(tok(["a red seven", "a bold blue two leaning left on pink"]), codes)
    short = WordTokenizer(data.words, 4)(["a red seven"])
    assert torch.allclose(both[:1], net(short, codes[:1]), atol=1e-4)


@pytest.mark.parametrize("guidance", [1., 2.5])
def test_cache_changes_nothing(made, guidance):
    tok, model, config, data = made
    net, cond, draws = model.prior.net, tok(["a red seven", "a bold blue two on pink"]), Draws(3, torch.arange(2))
    a, b = (sample_codes(net, cond, draws, 1., guidance, tok.null(), cached=c) for c in (True, False))
    assert torch.equal(a, b)
    cache = Cache()
    step = torch.stack([net.next(cond, a[:, :k], cache) for k in range(net.n_image)], 1)
    assert (step - net(cond, a)).abs().max() < 1e-4


def test_looks_are_the_weights_that_are_used(made):
    "One head's value vectors, mixed by the shown weights, are what the block adds."
    tok, model, config, data = made
    net, cond = model.prior.net, tok(["a red seven", "a bold blue two on pink"])
    codes = torch.randint(net.n_codes, (2, net.n_image))
    looks = net.looks(cond, codes)
    assert looks.shape == (len(net.blocks), 2, config.n_heads, net.n_image, config.max_len)
    x, words, block = net.embed(codes[:, :-1]), net.read(cond), net.blocks[0]
    q, k, v = (block.heads(u) for u in block.qkv(block.norm1(x)).chunk(3, -1))
    x = x + block.out(F.scaled_dot_product_attention(q, k, v, attn_mask=net.past).transpose(1, 2).flatten(2))
    heard = block.heard((looks[0] @ words[0][1]).transpose(1, 2).flatten(2))
    assert torch.allclose(heard, block.look(x, words[0], cond.mask)[0], atol=1e-5)


def test_published_sizes():
    "The table of layers gives the names, to within 16%; exact numbers pinned."
    with torch.device("meta"): counts = {k: sum(p.numel() for p in parti.published(k).parameters()) for k in parti.PARTI}
    for name, told in {"350M": .35e9, "750M": .75e9, "3B": 3e9, "20B": 20e9}.items(): assert abs(counts[name] / told - 1) < .16
    deeper = counts["750M"] - counts["350M"]
    assert deeper == 24 * sum(p.numel() for p in parti.CrossBlock(1024, 16, 4096).parameters())


def test_the_two_arms_are_equally_large(made):
    tok, model, config, data = made
    sizes = [sum(p.numel() for p in parti.make_prior(arm, model.codec, tok, config).parameters()) for arm in ("encoder_decoder", "one_stream")]
    assert abs(sizes[0] / sizes[1] - 1) < .01


def test_codes_are_read_from_a_table_and_learned():
    "Codes of the split, in order and repeated; a prior learns to expect them, and not the caption-shuffled ones as well."
    data = load("digits")
    config = parti.recipe_for(data, "smoke")
    torch.manual_seed(0)
    tok = WordTokenizer(config.words, config.max_len)
    codec = VQVAE(1, (16, 16), 16, 8, 1).eval()
    feed = parti.coded(codec, data, tok, 64)
    codes, cond = feed(Draws(0, torch.arange(60, 70)))
    b = data.batch("train", Draws(0, torch.arange(64)))
    assert torch.equal(codes[:4], codec.encode(b.x)[60:64]) and torch.equal(codes[4:], codec.encode(b.x)[:6])
    assert torch.equal(cond.ids[0], tok(b.captions[60:61]).ids[0])
    prior = parti.CodePrior(parti.EncoderDecoder(len(tok), config.max_len, 16, codec.grid(data.shape), 32, 1, 1, 2), tok.null())
    before = parti.held_out_nll(prior, feed, 64)
    sweep.fit_prior(prior, feed, config, 2000)
    after = parti.held_out_nll(prior, feed, 64)
    assert after < before - .3 and abs(before - math.log2(16)) < .5
