"DALL-E: masks and cache against brute force, counts against a loop, exact resume, errata."
import math

import pytest
import torch
from t2i_course.ar import dalle
from t2i_course.ar.dalle import (Cache, CausalBlock, Counts, Decoder, Prior, Scorer, Transformer, attend, best_of, causal,
                                 column_attend, column_mask, conv_mask, contrast, dalle_masks, nll, recipe_for, row_mask,
                                 sample_codes, tally)
from t2i_course.codec.vqvae import Palette, own_colours
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.data import Draws, Painted
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for
from t2i_course.core.training import State, feed, train
from t2i_course.sweeps.ar import dalle as sweep
from uses import uses_of

CAPTIONS = ["a bold red seven on white", "a thin blue three leaning right on pink", "", "a green digit"]


@pytest.fixture(scope="module")
def small():
    "Captions, codes and a Transformer with fitted counts; a 3 x 4 grid of 5 codes."
    torch.manual_seed(0)
    tok = WordTokenizer(Painted.words, Painted.size)
    cond = tok(CAPTIONS)
    codes = torch.randint(5, (4, 12))
    counts = Counts(len(tok), (3, 4), 5).fit(cond.ids, codes)
    net = Transformer(len(tok), Painted.size, 5, (3, 4), 16, 2, 2, counts=counts).eval()
    return tok, cond, codes, net


# --- Masks ---

@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_masks_by_brute_force(grid):
    h, w = grid
    row, column, conv = row_mask(6, grid), column_mask(6, grid), conv_mask(6, grid)
    for i in range(h * w):
        for j in range(h * w):
            (r, c), (r2, c2), past = divmod(i, w), divmod(j, w), j <= i
            assert row[6 + i, 6 + j] == (past and i - j <= w)
            assert column[6 + i, 6 + j] == (past and c == c2)
            assert conv[6 + i, 6 + j] == (past and abs(r - r2) <= 1 and abs(c - c2) <= 1)


@pytest.mark.parametrize("mask", [causal(22), row_mask(6, (4, 4)), column_mask(6, (4, 4)), conv_mask(6, (4, 4))])
def test_codes_see_all_words_by_causality_alone(mask):  # E044
    assert mask[6:, :6].all() and not mask[:6, 6:].any() and not mask.triu(1).any() and mask.diagonal().all()
    assert torch.equal(mask[:6, :6], causal(6))


def test_order_of_the_layers():
    masks = dalle_masks(8, 3, (4, 4))
    row, column, conv = row_mask(3, (4, 4)), column_mask(3, (4, 4)), conv_mask(3, (4, 4))
    for got, want in zip(masks, [row, column, row, row, row, column, row, conv]):
        assert torch.equal(got, want)


def test_columns_without_the_forbidden_pairs():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5 + 12, 8)
    assert torch.allclose(column_attend(q, k, v, 5, (3, 4)), attend(q, k, v, column_mask(5, (3, 4))), atol=1e-5)


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 8)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attend(q, k, v, causal(9)), theirs, atol=1e-6)


def test_block_is_that_of_torch():
    "torch's own pre-norm encoder layer with the same weights gives the same output."
    torch.manual_seed(0)
    ours = CausalBlock(16, 4)
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 64, 0., "gelu", batch_first=True, norm_first=True).eval()
    with torch.no_grad():
        for a, b in ((theirs.self_attn.in_proj_weight, ours.qkv.weight), (theirs.self_attn.in_proj_bias, ours.qkv.bias),
                     (theirs.self_attn.out_proj.weight, ours.out.weight), (theirs.self_attn.out_proj.bias, ours.out.bias),
                     (theirs.linear1.weight, ours.mlp[0].weight), (theirs.linear1.bias, ours.mlp[0].bias),
                     (theirs.linear2.weight, ours.mlp[2].weight), (theirs.linear2.bias, ours.mlp[2].bias)):
            a.copy_(b)
        x = torch.randn(2, 9, 16)
        assert torch.allclose(ours(x, causal(9)), theirs(x, src_mask=~causal(9)), atol=1e-5)


# --- The stream ---

@pytest.mark.parametrize("masks", [None, dalle_masks(3, 6, (4, 4))], ids=["dense", "sparse"])
def test_cache_changes_nothing(masks):
    torch.manual_seed(0)
    decoder = Decoder(16, 3, 2, 22, masks).eval()
    x, cache = torch.randn(3, 22, 16), Cache()
    whole = decoder(x)
    steps = torch.cat([decoder(x[:, :6], cache)] + [decoder(x[:, i:i + 1], cache) for i in range(6, 22)], 1)
    assert (steps - whole).abs().max() < 1e-5 and cache.length == 22


def test_next_is_forward(small):
    tok, cond, codes, net = small
    cache, (words, image) = Cache(), net(cond, codes)
    for k in range(12):
        assert torch.allclose(net.next(cond, codes[:, :k], cache), image[:, k], atol=1e-5)
        assert torch.allclose(net.next(cond, codes[:, :k]), image[:, k], atol=1e-5)
    assert words.shape == (4, Painted.size - 1, len(tok))


def test_nothing_looks_ahead(small):
    tok, cond, codes, net = small
    other = codes.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 5
    words, image = net(cond, codes)
    words2, image2 = net(cond, other)
    assert torch.equal(words, words2) and torch.equal(image[:, :8], image2[:, :8])
    assert not torch.allclose(image[:, 8:], image2[:, 8:])
    assert not torch.allclose(net(tok(CAPTIONS[::-1]), codes)[1], image)


@pytest.mark.parametrize("guidance, temperature", [(1., 1.), (3., .7), (2., 0.)])
def test_drawing_with_and_without_cache(small, guidance, temperature):
    tok, cond, _, net = small
    draw = lambda cond, index, **k: sample_codes(net, cond, Draws(0, index), temperature, guidance, tok.null(), **k)
    codes = draw(cond, torch.arange(4))
    assert torch.equal(codes, draw(cond, torch.arange(4), cached=False)) and codes.shape == (4, 12)
    assert torch.equal(codes[2:], draw(cond[torch.tensor([2, 3])], torch.arange(2, 4)))  # a picture does not depend on its batch
    known = codes[:, :5]
    assert torch.equal(draw(cond, torch.arange(4), known=known), codes)


def test_guidance_of_one_hears_the_caption_and_zero_does_not(small):
    tok, cond, _, net = small
    draw = lambda c, w: sample_codes(net, c, Draws(3, torch.arange(4)), 1., w, tok.null())
    assert torch.equal(draw(cond, 0.), draw(tok([""] * 4), 1.))


def test_loss_weights(small):
    tok, cond, codes, net = small
    words, image = nll(net, cond, codes)
    prior = Prior(net, tok.null(), p_drop=0.)
    assert torch.allclose(prior(codes.view(4, 3, 4), cond, Draws(0, torch.arange(4))), words / 8 + 7 * image / 8)
    log_p = net(cond, codes)[0].log_softmax(2)  # words up to and with the first PAD
    n = int(cond.mask[0].sum())
    want = -sum(log_p[0, i, cond.ids[0, i + 1]] for i in range(n)) / n
    assert torch.allclose(words[0], want, atol=1e-5)


def test_size_of_the_published_model():  # E045
    with torch.device("meta"):
        net = Transformer(16_384, 256, 8192, (32, 32), 3968, 64, 62)
    d = 62 * 64
    formula = 64 * 12 * d * d + (16384 + 256 + 8192) * d
    assert 11.9e9 < formula < 12.4e9
    assert sum(p.numel() for p in net.parameters()) == formula + 64 * 13 * d + 64 * d + 2 * d


# --- Counting ---

def test_tally():
    p = tally(torch.tensor([0, 0, 1]), torch.tensor([2, 2, 0]), 3, torch.ones(3) / 3, 3.)
    assert torch.allclose(p, torch.tensor([[1, 1, 3.], [2, 1, 1], [1, 1, 1]]) / torch.tensor([[5.], [4], [3]]))


def test_counts_by_brute_force(small):
    tok, cond, codes, net = small
    counts, K = net.counts, 5
    grid = codes.view(4, 3, 4)
    left = lambda b, r, c: grid[b, r, c - 1].item() if c else K
    above = lambda b, r, c: grid[b, r - 1, c].item() if r else K
    key = counts.key(codes).view(4, 3, 4)
    for b in range(4):
        for r in range(3):
            for c in range(4):
                assert key[b, r, c] == left(b, r, c) * (K + 1) + above(b, r, c)
    logits = counts(cond, codes)
    words = [set(ids[ids > 0].tolist()) for ids in cond.ids]
    want = counts.place[6] + .6 * sum(counts.word[w, 6] for w in words[1]) + .6 * counts.near[key[1, 1, 2]]
    assert torch.allclose(logits[1, 6], want, atol=1e-5)
    assert torch.allclose(counts(cond, codes[:, :6], 6, 7)[:, 0], logits[:, 6], atol=1e-6)


def test_counts_are_better_than_nothing():
    "Codes that follow from the caption and the left neighbour: counting finds both."
    torch.manual_seed(0)
    tok = WordTokenizer(["red", "blue"], 2)
    cond = tok(["red", "blue"] * 200)
    first = torch.arange(400) % 2 * 2
    codes = torch.stack([first + torch.randint(2, (400,)), torch.zeros(400, dtype=torch.long)], 1)
    codes[:, 1] = (codes[:, 0] + 1) % 4
    counts = Counts(len(tok), (1, 2), 4).fit(cond.ids, codes)
    with torch.no_grad():
        counts.gain.fill_(1.)
        loss = torch.nn.functional.cross_entropy(counts(cond, codes).mT, codes, reduction="none").mean(0)
    assert abs(loss[0] - math.log(2)) < .1 and loss[1] < .3 < math.log(2)


# --- The codec ---

def test_own_colours_are_a_change_of_coordinates():
    x = Painted().batch("test", Draws(0, torch.arange(32))).x
    centre, axes, m = own_colours(x)
    back = centre[:, :, None, None] + torch.einsum("bij,bjhw->bihw", axes, m)
    assert (back - x).abs().max() < .02 and m.abs().max() < 1.01
    assert (m[:, 0].flatten(1).median(1).values < -.5).all()  # paper is -1, ink +1, whatever the colours
    flat = torch.zeros(2, 3, 8, 8)
    assert own_colours(flat)[2].isfinite().all()


def test_palette_is_a_discrete_codec():
    torch.manual_seed(0)
    codec = Palette(3, (8, 16), 7, 4, columns=8).eval()
    x = Painted().batch("test", Draws(0, torch.arange(5))).x
    ids = codec.encode(x)
    assert ids.shape == (5, *codec.grid((3, 32, 32))) == (5, 9, 8) and ids.max() < 7
    assert codec.decode(ids).shape == x.shape and codec.cost(x, *codec(x)).shape == (5,)


# --- Re-ranking ---

def test_best_of():
    ok = torch.tensor([[True, False], [False, True], [True, True]])
    fit = torch.tensor([[.5, .5], [.6, .4], [.1, .9]])
    assert [best_of(ok, fit, k) for k in (1, 2, 3)] == [.5, 0., .5]
    assert best_of(ok, ok.float(), 2) == 1.


def test_scorer_learns_which_caption_belongs():
    torch.manual_seed(0)
    data = Painted()
    tok = WordTokenizer(data.words, data.size)
    scorer = Scorer(3, len(tok), data.size, 24, (16, 24, 32))
    losses = [r.loss for r in train(State(scorer, lr=4e-3), scorer, feed(data, tok), images=1600, batch=32)]
    assert sum(losses[-5:]) < .75 * sum(losses[:5])


# --- Training ---

@pytest.mark.parametrize("counts", [False, True])
def test_resume_is_exact(counts):
    data = load("digits")
    config = recipe_for(data, "smoke") | dict(count_images=64, batch=16, counts=counts)
    codec = uses_of(dalle, config, 64)

    def run(images, total, saved=None):
        torch.manual_seed(0)
        tok, model = dalle.build(config, **codec)
        state = state_for(model, config)
        if saved:
            state.load(*saved[:2])
            model.extra = saved[2]
        else: model.prepare(data, tok, config)
        for r in train(state, model.loss, feed(data, tok), images=total, batch=16, seed=0):
            if r.images >= images: break
        extra = {k: v.clone() for k, v in model.extra.items()}
        assert bool(extra) == counts
        return {k: v.clone() for k, v in state.tensors().items()}, state.numbers(), extra

    whole, *_ = run(128, 128)
    again, *_ = run(128, 128, run(48, 128))
    assert whole.keys() == again.keys() and not any("counts.place" in k for k in whole)
    assert all(torch.equal(whole[k], again[k]) for k in whole), [k for k in whole if not torch.equal(whole[k], again[k])][:5]


@pytest.mark.parametrize("name", ["painted2", "digits"])
def test_learns_and_draws(name):
    data = load(name)
    config = recipe_for(data, "smoke") | dict(batch=16)
    codec = uses_of(dalle, config, 640)
    torch.manual_seed(0)
    tok, model = dalle.build(config, **codec)
    state = state_for(model, config)
    seen = [r.loss for r in train(state, model.loss, feed(data, tok), images=704, batch=16)]
    assert sum(seen[-5:]) < .97 * sum(seen[:5]), (sum(seen[-5:]), sum(seen[:5]))
    captions = data.batch("test", Draws(0, torch.arange(3))).captions
    one = model.painter(tok, config)(captions, 0)
    best = model.painter(tok, config | dict(candidates=3))(captions, 0)
    assert one.shape == best.shape == (3, *data.shape) and one.isfinite().all() and not torch.equal(one, best)
    assert torch.equal(one, model.painter(tok, config)(captions, 0))
    assert set(model.options) == {"temperature", "guidance", "candidates"}
    assert model.calls(config | dict(guidance=1.)) == model.prior.net.n_image == model.calls(config | dict(guidance=2.)) // 2


def test_scorer_sees_the_batch_of_all_processes(monkeypatch):
    "Two processes with unequal shares: their losses are those of one, and so are the sums of their gradients."
    torch.manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(5, 4), dim=1) for _ in range(2))
    index, shares = torch.arange(10, 15), (slice(0, 3), slice(3, 5))

    def ask(part):
        own = [v.clone().requires_grad_() for v in (x[part], y[part], torch.tensor([7.]))]
        losses = contrast(*own, Draws(0, index[part]))
        losses.sum().backward()
        return losses.detach(), *(v.grad for v in own)
    alone = ask(slice(0, 5))
    monkeypatch.setattr(dalle, "everyone", lambda draws, *rows: (Draws(0, index), x, y))
    parts = [ask(s) for s in shares]
    for k, join in enumerate((torch.cat, torch.cat, torch.cat, sum)):
        assert torch.allclose(join([p[k] for p in parts]), alone[k], atol=1e-6), k


def test_experiments_cover_the_rows():
    assert {"dense", "sparse", "even", "silent", "counted", "early", "early_counted"} == sweep.ARMS.keys()
