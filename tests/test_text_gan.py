"Text GANs: attention, word scores, the wrong caption, mean picture, adaptive kernels, both stages, exact resume."
import pytest
import torch
import torch.nn.functional as F
from t2i_course.core.conditioning import attend, raw_cond, WordTokenizer
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for
from t2i_course.core.training import State, feed, train
from t2i_course.gan.text_gan import (APART, AdaptiveConv, MeanPicture, Sketched, StackGAN, TextGAN, Upscaled,
                                     WordAttention, build, by_demands, contrast, recipe_for, sketcher, spread,
                                     word_scores)


def small(name="digits", **changes):
    "A tiny model of the recipe."
    data = load(name)
    config = recipe_for(data, "smoke") | dict(batch=8) | changes
    torch.manual_seed(0)
    tok, model = build(config)
    return data, config, tok, model


def seeded(*shape, n=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(n))


# --- Words and places ---

def test_attention_is_torchs_own():
    q, k, v = seeded(3, 7, 8), seeded(3, 5, 8, n=1), seeded(3, 5, 6, n=2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0]]).bool()
    heard, weights = attend(q, k, v, mask[:, None])
    assert torch.allclose(heard, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]), atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 7)) and (weights[1, :, 2:] == 0).all()


def test_word_attention_ignores_padding_and_order():
    torch.manual_seed(0)
    net, x, words = WordAttention(6, 4), seeded(2, 6, 3, 3), seeded(2, 5, 4, n=1)
    cond = raw_cond(torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 0, 0]] * 2).bool())
    cond.seq = words
    y = net(x, cond)
    cond.seq = words[:, [2, 0, 1, 3, 4]] + torch.tensor([0, 0, 0, 9., 9.])[:, None]
    assert torch.allclose(net(x, cond), y, atol=1e-5)
    assert not torch.allclose(y, x)


def test_word_scores_are_the_papers_steps():
    r, w = F.normalize(seeded(3, 4, 6), dim=-1), F.normalize(seeded(2, 5, 6, n=1), dim=-1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    for i in range(3):
        for j in range(2):
            share = (5 * (w[j] @ r[i].T)).softmax(1)
            found = F.cosine_similarity(share @ r[i], w[j], dim=1)
            assert torch.allclose(word_scores(r, w, mask)[i, j], found[mask[j]].mean(), atol=1e-5)


def test_contrast_does_not_punish_equal_captions():
    scores = torch.zeros(4, 4)
    same = torch.tensor([0, 0, 1, 2])[:, None] == torch.tensor([0, 0, 1, 2])
    best = torch.where(same, 30., -30.)
    assert torch.allclose(contrast(best, same)[:2], torch.full((2,), 2.).log(), atol=1e-4)  # two captions share the weight
    assert contrast(best, same)[2] < 1e-4
    assert torch.allclose(contrast(scores, same), torch.full((4,), 4.).log())
    own = torch.eye(4).bool()
    assert torch.allclose(contrast(seeded(4, 4), own).mean(), (F.cross_entropy(seeded(4, 4), torch.arange(4))
                          + F.cross_entropy(seeded(4, 4).T, torch.arange(4))) / 2, atol=1e-6)


# --- The generator ---

def test_the_mean_picture_learns_the_mean():
    torch.manual_seed(0)
    data = load("digits")
    tok = WordTokenizer(data.words, data.size)
    mean = MeanPicture(data.shape, len(tok))
    loss = lambda x0, cond, draws: (mean(None, cond) - x0).square().flatten(1).mean(1)
    for _ in train(State(mean, lr=.05, betas=(.9, .99), weight_decay=0.), loss, feed(data, tok), images=1600, batch=32): pass
    b = data.batch("train", Draws(7, torch.arange(1500)))
    got = mean(None, tok(b.captions)).detach()
    for digit in (0, 1, 7):
        own = b.attrs["digit"] == digit
        assert (got[own][0] - b.x[own].mean(0)).square().mean() < .04 < b.x[own].var(0).mean()


def test_words_that_are_not_there_do_not_count():
    mean = MeanPicture((3, 4, 4), 9)
    torch.nn.init.normal_(mean.shapes)
    padded, short = raw_cond(torch.tensor([[1, 5, 0, 0]]), None), raw_cond(torch.tensor([[1, 5]]), None)
    assert torch.equal(mean(None, padded), mean(None, short))
    assert not torch.allclose(mean(None, raw_cond(torch.tensor([[1, 6]]), None)), mean(None, short))


def test_adaptive_kernels_are_the_mixture():
    torch.manual_seed(0)
    conv, x, emb = AdaptiveConv(4, 6, 3), seeded(2, 4, 5, 5), seeded(2, 6, n=1)
    mixed = conv.choose(emb).softmax(1)
    want = sum(mixed[:, k, None, None, None] * F.conv2d(x, conv.kernels[k], padding=1) for k in range(3))
    assert torch.allclose(conv(x, emb), want, atol=1e-5)


def test_the_body_does_not_teach_its_sketch():
    _, config, tok, model = small()
    cond = tok(["a handwritten three"] * 2)
    model.artist(torch.randn(2, config["z_dim"]), cond).sum().backward()
    assert all(p.grad is None for p in model.artist.base.parameters())
    assert all(p.grad is not None for p in model.artist.body.parameters())


# --- The game ---

def test_a_step_moves_everything_and_each_turn_its_own_part():
    data, config, tok, model = small()
    torch.nn.init.normal_(model.artist.base.shapes, std=.01)  # from 0 the colours would wait a step
    old = {k: v.clone() for k, v in model.net.state_dict().items()}
    records = list(train(state_for(model, config), model.loss, feed(data, tok), images=64, batch=8))
    assert set(records[0].turns) == {"disc", "gen", "mean"}
    unread = ("encoder.table",)  # words that no caption of these had
    still = [k for k, v in model.net.state_dict().items() if torch.equal(v, old[k]) and not k.endswith(unread)]
    assert not still, still


def test_a_wrong_caption_counts_as_drawn():
    "With the real pictures and their captions alone, only the mismatch term can teach the caption."
    data, config, tok, model = small(matching=0., guide=0., mismatch=1., gamma=0.)
    model.fakes = lambda cond, draws: torch.zeros(len(cond), *data.shape)
    disc = model.net["disc"]
    opt = torch.optim.Adam(disc.parameters(), 3e-3)
    for i in range(60):
        b = data.batch("train", Draws(0, torch.arange(32 * i, 32 * i + 32)))
        loss = model.disc_loss(b.x, tok(b.captions), Draws(0, torch.arange(32))).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    b = data.batch("test", Draws(1, torch.arange(200)))
    right, wrong = (disc(b.x, tok(c)) for c in (b.captions, b.captions[1:] + b.captions[:1]))
    assert (right > wrong).float().mean() > .75


def test_losses_change_with_their_weights():
    data, _, tok, model = small()
    b = data.batch("train", Draws(0, torch.arange(8)))
    cond, draws = tok(b.captions), Draws(0, torch.arange(8))
    base = {t.name: t.loss(b.x, cond, draws).mean().item() for t in model.loss}
    assert all(len(t.loss(b.x, cond, draws)) == 8 for t in model.loss)
    model.guide *= 2
    assert model.gen_loss(b.x, cond, draws).mean().item() > base["gen"]
    model.mismatch *= 2
    assert model.disc_loss(b.x, cond, draws).mean().item() > base["disc"]


def test_the_two_stages():
    data, config, tok, model = small("painted", stack=.5, batch=16)
    assert isinstance(model, StackGAN) and isinstance(model.artist.base, Upscaled) and model.calls(config) == 2
    seen = [set(r.turns) for r in train(state_for(model, config), model.loss, feed(data, tok), images=128, batch=16)]
    assert seen[0] == {"disc 1", "gen 1", "mean 1"} and seen[3] == {"disc 1", "gen 1"} and seen[4:] == [{"disc", "gen"}] * 4
    z, cond = torch.randn(2, config["z_dim"]), tok(["a red two on pink", "a digit"])
    assert model.first.artist(z, cond).shape == (2, 3, 16, 16) and model.artist(z, cond).shape == (2, 3, 32, 32)
    first = sum(p.numel() for p in model.first.artist.parameters())
    assert sum(p.numel() for p in model.artist.parameters()) > first


@pytest.mark.parametrize("stack", [0., .5])
def test_resume_is_exact(stack):
    kind = dict(stack=stack, widths=(16, 16), d_emb=8) if stack else {}
    def run(cut):
        data, config, tok, model = small(**kind)
        state, records = state_for(model, config), []
        for r in train(state, model.loss, feed(data, tok), images=64, batch=8, seed=3):
            records.append(r.turns)
            if r.step == cut:
                saved = {k: v.clone() for k, v in state.tensors().items()}, state.numbers()
                data, config, tok, model = small(**kind)
                torch.nn.init.normal_(next(model.net.parameters()))  # everything must come from what was saved
                state = state_for(model, config).load(*saved)
                records += [r.turns for r in train(state, model.loss, feed(data, tok), images=64, batch=8, seed=3)]
                break
        return state.tensors(), records
    (one, a), (two, b) = run(None), run(5)
    assert a == b and one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


# --- What is measured, and the recipe ---

def test_by_demands_counts():
    data = load("painted")

    class Reader:
        def read(self, x): return {k: torch.zeros(len(x), dtype=torch.int64) for k in data.attributes}
    got = by_demands(Reader(), torch.zeros(4, 3, 32, 32), data, ["a digit", "a zero", "a red zero", "a red one"])
    assert got == {1: (1, 1.), 2: (2, .5)}


@pytest.mark.parametrize("name", ["painted", "painted2", "digits"])
def test_recipe_draws(name):
    data, config, tok, model = small(name)
    draw = model.painter(tok, config)
    captions = data.batch("test", Draws(0, torch.arange(3))).captions
    x = draw(captions, 5)
    assert x.shape == (3, *data.shape) and torch.equal(x, draw(captions, 5)) and not torch.equal(x, draw(captions, 6))
    assert torch.equal(x[1:2], draw(captions, 5)[1:2]) and model.net.training
    assert isinstance(model, TextGAN) and isinstance(model.artist, Sketched)
    assert sketcher(model, tok)(captions, 5).abs().max() == 0  # not trained yet: shapes start at 0
    assert spread(draw, captions[:1], 4) > 0


def test_order_of_words_matters_for_two_digits():
    data, config, tok, model = small("painted2")
    draw = model.painter(tok, config)
    a, b = (draw([c], 0) for c in ("a red two left of a blue seven", "a blue seven left of a red two"))
    assert not torch.equal(a, b)


def test_two_drawings_of_a_caption_have_to_differ():
    _, config, tok, model = small()
    x = torch.zeros(3, 1, 4, 4)
    assert torch.allclose(model.alike(x, x), torch.ones(3), atol=.01)
    assert (model.alike(x, x + APART) < 1e-3).all() and (model.alike(x, x + 2 * APART) == 0).all()
    assert torch.allclose(model.alike(x, x + APART / 2), torch.full((3,), .5), atol=.01)
    assert {"seek", "info"} <= config.keys()


def test_z_is_read_off_a_drawing():
    _, _, tok, model = small()
    draws = Draws(0, torch.arange(5))
    f = torch.randn(5, model.net["disc"].code.in_features)
    want = (model.net["disc"].code(f) - model.noise(draws)).square().mean(1)
    assert torch.allclose(model.unread(f, draws), want)
