"Cond, tokens, encoders: fields stay together, padding is not seen, words nobody knows are said."
import unicodedata

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from t2i_course.core.conditioning import (PAD, START, UNKNOWN, Block, Cond, Conditioned, LabelEmbedder,
                                          TextEncoder, WordBag, WordTokenizer, attend, caption_encoder, cat, raw_cond)
from t2i_course.core.data import Draws
from t2i_course.core.sources import load

WORDS = load('painted').words


@pytest.fixture
def tok(): return WordTokenizer(WORDS, 9)


def encoders(tok):
    torch.manual_seed(0)
    return WordBag(len(tok), 16), TextEncoder(len(tok), tok.max_len, 16, 2, 4)


def fields(c): return c.seq, c.pooled, c.mask, c.ids, c.numbers, c.image


# --- tokens ---

def test_known_captions(tok):
    c = tok(['a red seven', 'a'])
    assert c.ids.shape == c.mask.shape == (2, 9)
    assert len(c) == 2
    assert c.seq.shape == (2, 9, 0)
    assert c.pooled.shape == (2, 0)
    assert c.ids[0, 0] == START and c.mask.sum(1).tolist() == [4, 2] and torch.equal(c.mask, c.ids != PAD)
    assert [tok.words[i-3] for i in c.ids[0, 1:4].tolist()] == ['a', 'red', 'seven']
    assert torch.equal(tok(['A RED, seven!']).ids[:, [1, 2, 4]], tok(['a red seven']).ids[:, [1, 2, 3]])


@pytest.mark.parametrize('name', ['digits', 'painted', 'painted2'])
def test_every_caption_fits(name):
    data = load(name)
    tok = WordTokenizer(data.words, data.size)
    captions = data.batch('train', Draws(0, torch.arange(1000))).captions
    c = tok(captions)
    assert (c.ids != UNKNOWN).all() and not any(tok.notes(s) for s in captions)
    assert c.mask[:, -1].any() # and the length is not larger than it must be
    assert len({tuple(r) for r in c.ids.tolist()}) == len(set(captions))


def test_words_nobody_knows(tok):
    c = tok(['a 빨간 seven 🎨'])
    assert (c.ids == UNKNOWN).sum() == 2 and c.mask.sum() == 5
    assert tok.notes('a 빨간 seven 🎨 🎨') == ["'a 빨간 seven 🎨 🎨': the model never saw 빨간, 🎨; read as 'unknown word'"]
    pieces = unicodedata.normalize('NFD', '빨간') # as some systems type it
    assert WordTokenizer(['빨간'])([pieces]).ids[0, 1] == 3
    # the invisible variation sign is not named
    assert tok.notes('a ❤️ seven') == ["'a ❤️ seven': the model never saw ❤; read as 'unknown word'"]


def test_too_long(tok):
    eight = 'a bold red seven leaning left on pink'
    assert tok.notes(eight) == [] and tok([eight]).mask.all()
    note, = tok.notes(eight+' on black')
    assert note == f"'{eight} on black': cut after 'pink' (8 words at most)"
    assert torch.equal(tok([eight]).ids, tok([eight+' on black']).ids)


@pytest.mark.parametrize('empty', ['', ' ', '\t\n'])
def test_empty_caption_is_null(tok, empty):
    assert all(torch.equal(a, b) for a, b in zip(fields(tok([empty])), fields(tok.null())))
    assert tok.notes(empty) == []
    assert tok.null().mask.sum() == 1 and tok.null().ids[0, 0] == START


@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
@settings(deadline=None, max_examples=100)
def test_any_text_gives_tokens(captions):
    tok = WordTokenizer(WORDS, 9)
    c = tok(captions)
    assert c.ids.shape == (len(captions), 9) and c.mask[:, 0].all() and c.ids.max() < len(tok)
    assert all(isinstance(n, str) for s in captions for n in tok.notes(s))


# --- dropping ---

def full(b=6, l=4, d=3, n=0, c=0):
    g = torch.Generator().manual_seed(0)
    more = dict(numbers=torch.randn(b, n, generator=g)) if n else {}
    if c: more |= dict(image=torch.randn(b, c, 5, 5, generator=g))
    return Cond(torch.randn(b, l, d, generator=g), torch.randn(b, d, generator=g),
                torch.rand(b, l, generator=g) < .5, torch.randint(9, (b, l), generator=g), **more)


def nothing(n=0, c=0):
    more = dict(numbers=torch.full((1, n), 9.)) if n else {}
    if c: more |= dict(image=torch.full((1, c, 5, 5), 3.))
    return Cond(torch.full((1, 4, 3), 7.), torch.full((1, 3), 8.), torch.tensor([[True, False, False, False]]),
                torch.full((1, 4), 5), **more)


with_more = pytest.mark.parametrize('n, c', [(0, 0), (2, 0), (0, 3), (2, 1)])


@with_more
def test_drop_takes_all_fields_sample_by_sample(n, c):
    c, null = full(n=n, c=c), nothing(n, c)
    keep = torch.tensor([True, False, True, True, False, False])
    for was, now, put in zip(fields(c), fields(c.drop(keep, null)), fields(null)):
        assert torch.equal(now[keep], was[keep])
        assert torch.equal(now[~keep], put.expand_as(was)[~keep])
        assert now.dtype == was.dtype
    assert all(torch.equal(a, b) for a, b in zip(fields(c.drop(torch.ones(6, dtype=torch.bool), null)), fields(c)))


def test_a_null_without_the_picture_is_not_taken_for_one():
    "A model that follows a picture needs a null that has one: what it is not told may not stay by mistake"
    with pytest.raises(RuntimeError): full(c=3).drop(torch.zeros(6, dtype=torch.bool), nothing())


def test_what_is_left_out_has_width_0(tok):
    for c in (full(), tok(['a red seven']), nothing()):
        assert c.numbers.shape == (len(c), 0) and c.image.shape == (len(c), 0, 1, 1)
        assert c.numbers.dtype == c.image.dtype == torch.float32


@with_more
def test_expand_repeats_one_condition(n, c):
    null = nothing(n, c)
    for one, many in zip(fields(null), fields(null.expand(5))):
        assert many.shape == (5, *one.shape[1:]) and all(torch.equal(row, one[0]) for row in many)


def test_encoders_hand_numbers_and_picture_on(tok):
    c = tok(['a red seven', ''])
    c.numbers, c.image = torch.ones(2, 3), torch.ones(2, 1, 4, 4)
    for enc in (*encoders(tok), LabelEmbedder(20, 4)):
        out = enc(c)
        assert out.numbers is c.numbers and out.image is c.image


def test_dropped_tokens_encode_as_the_empty_caption(tok):
    c = tok(['a red seven', 'a blue two', 'a digit']).drop(torch.tensor([False, True, False]), tok.null())
    for enc in encoders(tok):
        got, empty, kept = enc(c), enc(tok(['']*3)), enc(tok(['a blue two']*3))
        assert torch.allclose(got.pooled[[0, 2]], empty.pooled[[0, 2]], atol=1e-6)
        assert torch.allclose(got.pooled[1], kept.pooled[1], atol=1e-6)


@with_more
def test_cat_index_map(n, c):
    c = full(n=n, c=c)
    two = cat(c, c[:2])
    assert len(two) == 8 and all(torch.equal(a, b) for a, b in zip(fields(two[6:]), fields(c[:2])))
    assert c.to('cpu').seq.device.type == 'cpu' and c[torch.tensor([3, 1])].ids.shape == (2, 4)
    assert all(torch.equal(a, b) for a, b in zip(fields(c.map(torch.clone)), fields(c)))
    if torch.cuda.is_available(): assert all(v.device.type == 'cuda' for v in fields(c.to('cuda')))


# --- encoders ---

def test_attention_is_softmax_of_products():
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)
    mask = torch.rand(2, 1, 1, 7) < .6
    mask[..., 0] = True
    heard, weights = attend(q, k, v, mask)
    torch.testing.assert_close(heard, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    torch.testing.assert_close(attend(q, k, v)[0], F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
    assert (weights.masked_select(~mask.expand_as(weights)) == 0).all()
    assert attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)[0].dtype == torch.bfloat16


@pytest.mark.parametrize('n_layers, kind', [(0, WordBag), (1, TextEncoder), (2, TextEncoder)])
def test_caption_encoder_has_as_many_blocks_as_asked_for(tok, n_layers, kind):
    enc = caption_encoder(tok, 8, n_layers)
    assert type(enc) is kind and enc(tok(['a red seven'])).pooled.shape == (1, 8)
    assert sum(isinstance(m, Block) for m in enc.modules()) == n_layers


def test_block_equals_torch():
    "The same numbers as nn.TransformerEncoderLayer"
    torch.manual_seed(0)
    ours, ref = Block(16, 4), torch.nn.TransformerEncoderLayer(16, 4, 64, 0., F.gelu, batch_first=True,
                                                               norm_first=True)
    with torch.no_grad():
        for a, b in ((ref.self_attn.in_proj_weight, ours.qkv.weight), (ref.self_attn.in_proj_bias, ours.qkv.bias),
                     (ref.self_attn.out_proj.weight, ours.out.weight),
                     (ref.self_attn.out_proj.bias, ours.out.bias)): a.copy_(b)
    ref.linear1.load_state_dict(ours.mlp[0].state_dict())
    ref.linear2.load_state_dict(ours.mlp[2].state_dict())
    ref.norm1.load_state_dict(ours.norm1.state_dict())
    ref.norm2.load_state_dict(ours.norm2.state_dict())
    x, mask = torch.randn(3, 7, 16), torch.arange(7) < torch.tensor([[7], [4], [1]])
    torch.testing.assert_close(ours(x, mask)[mask], ref(x, src_key_padding_mask=~mask)[mask])


def test_padding_is_not_seen(tok):
    captions = ['a red seven', 'a']
    long = WordTokenizer(WORDS, 12)
    for enc, wide in zip(encoders(tok), encoders(long)):
        state = {k: v for k, v in enc.state_dict().items()}
        if 'place' in state: state['place'] = torch.cat([state['place'], torch.randn(3, 16)])
        wide.load_state_dict(state)
        a, b = enc(tok(captions)), wide(long(captions))
        torch.testing.assert_close(a.pooled, b.pooled)
        torch.testing.assert_close(a.seq[a.mask], b.seq[b.mask])


def test_only_the_transformer_sees_order():
    data = load('painted2')
    tok = WordTokenizer(data.words, data.size)
    bag, transformer = encoders(tok)
    there, back = 'a red two left of a blue seven', 'a blue seven left of a red two'
    torch.testing.assert_close(*bag(tok([there, back])).pooled)
    a, b = transformer(tok([there, back])).pooled
    assert (a-b).abs().max() > 1e-3


def test_labels():
    enc = LabelEmbedder(10, 8)
    c = raw_cond(torch.tensor([[3], [7], [3]]), torch.ones(3, 1, dtype=torch.bool))
    out = enc(c.drop(torch.tensor([True, True, False]), enc.null()))
    assert out.seq.shape == (3, 1, 8)
    assert torch.equal(out.pooled[0], enc.table.weight[3])
    assert torch.equal(out.pooled[2], enc.table.weight[10])


def test_conditioned_trains_both(tok):
    class Net(torch.nn.Module):
        in_channels = 3
        def __init__(self):
            super().__init__()
            self.f = torch.nn.Linear(16, 3)
        def forward(self, x_t, t, cond): return x_t*t[:, None, None, None]+self.f(cond.pooled)[:, :, None, None]
    net = Conditioned(encoders(tok)[1], Net())
    out = net(torch.randn(2, 3, 4, 4), torch.rand(2), tok(['a red seven', 'a']))
    out.square().mean().backward()
    assert out.shape == (2, 3, 4, 4) and net.in_channels == 3 and all(p.grad is not None for p in net.parameters())
