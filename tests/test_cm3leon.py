"""CM3Leon: documents, masks, retrieval, pairs to recolour, tasks, cache."""
import pytest
import torch
from t2i_course.ar import cm3leon
from t2i_course.ar.cm3leon import DRAW, READ, RECOLOUR, Layout, Recoloured, answer, overlap, unseen_pairs
from t2i_course.core.conditioning import PAD
from t2i_course.core.data import HELD_OUT, Draws
from t2i_course.core.sources import load
from uses import built


@pytest.fixture(scope="module")
def made():
    "A fresh model with a filled memory and weights that are not near zero"
    data = load("painted")
    config = cm3leon.recipe_for(data, "smoke")
    torch.manual_seed(0)
    tok, model = built(cm3leon, config)
    for p in model.model.parameters(): p.data += .1 * torch.randn_like(p)
    model.prepare(data, tok, config)
    return tok, model, data, config


def test_slots_of_a_document():
    lay = Layout(10, 8, 3, (2, 2), 2)
    ids, codes = torch.arange(1, 7).view(1, 2, 3), torch.tensor([[[0, 1, 2, 3], [-1, -1, -1, -1]]])
    doc = lay.context(torch.tensor([RECOLOUR]), torch.tensor([[1, 5, PAD]]), torch.tensor([[7, 6, 5, 4]]), ids, codes)[0].tolist()
    code = lambda c: c + 10 + 3
    assert doc == [1, 2, 3, *map(code, range(4)), *[PAD] * 7, 10 + RECOLOUR, 1, 5, PAD, code(7), code(6), code(5), code(4)]
    assert lay.length == len(doc) + 4 and lay.size == 21


def test_padding_and_future_are_not_looked_at(made):
    tok, model, data, config = made
    lay, net = model.model.layout, model.model
    doc, _ = model.contexts(tok(["a red seven", "a bold blue two on pink"]), Draws(0, torch.arange(2)), 1)
    other = doc.clone()
    other[:, -3] = lay.first_code
    a, b = net(doc), net(other)
    assert torch.equal(a[:, :-3], b[:, :-3]) and not torch.equal(a[:, -3], b[:, -3])
    moved = net.place.data.clone()
    hidden = (doc[0] == PAD).nonzero()[:-1, 0] # the last place asks, so it hears itself
    net.place.data[hidden[:5]] += 1.
    c = net(doc)
    net.place.data.copy_(moved)
    seen = (doc[0] != PAD).nonzero()[:, 0]
    assert torch.allclose(a[0, seen], c[0, seen], atol=1e-5)


@pytest.mark.parametrize("kind", ["codes", "words"])
def test_cache_changes_nothing_and_answers_are_of_their_kind(made, kind):
    tok, model, data, config = made
    told, empty = model.contexts(tok(["a red seven", "a bold blue two on pink"]), Draws(0, torch.arange(2)), 2)
    draws = Draws(1, torch.arange(2))
    a, b = (answer(model.model, told, kind, draws, 1., 2., empty, cached=c) for c in (True, False))
    assert torch.equal(a, b)
    assert a.min() >= 0 and a.max() < (model.model.layout.n_codes if kind == "codes" else len(tok))


def test_retrieval_finds_the_most_alike(made):
    tok, model, data, config = made
    ids = tok(["a bold red seven on white", "a thin green two"]).ids
    found, codes = model.memory.retrieve(ids, Draws(0, torch.arange(2)), 2)
    fits = overlap(ids, model.memory.ids, len(tok))
    for i in range(2):
        got = overlap(ids[i:i + 1], found[i], len(tok))[0]
        assert torch.allclose(got.flip(0), fits[i].topk(2).values, atol=2e-3)
    _, some = model.memory.retrieve(ids, Draws(0, torch.arange(2)), 2, torch.tensor([0, 1]))
    assert (some[0] == -1).all() and (some[1, 0] == -1).all() and torch.equal(some[1, 1], codes[1, 1])


def test_memory_holds_training_pictures_only(made):
    tok, model, data, config = made
    b = data.batch("train", Draws(777, torch.arange(20)))
    assert torch.equal(model.memory.ids[:20], tok(b.captions).ids) and torch.equal(model.memory.codes[:20], model.codec.encode(b.x).flatten(1))


def test_recoloured_twins():
    "Only the ink differs, always, and never makes a held-out pair in training."
    data, draws = load("painted"), Draws(3, torch.arange(600))
    a, b = data.batch("train", draws), Recoloured().batch("train", draws)
    for k in data.attributes: assert torch.equal(a.attrs[k], b.attrs[k]) == (k != "ink")
    assert (a.attrs["ink"] != b.attrs["ink"]).all() and not unseen_pairs()[b.attrs["digit"], b.attrs["ink"]].any()
    assert unseen_pairs().sum() == len(HELD_OUT)
    assert len(b.attrs["ink"].unique()) == 6
    paper = a.x[:, :, 0, 0]
    assert torch.allclose(paper, b.x[:, :, 0, 0], atol=.1) and (a.x - b.x).abs().amax((1, 2, 3)).min() > .1


def test_lessons_are_what_they_say(made):
    tok, model, data, config = made
    draws = Draws(0, torch.arange(40))
    b = data.batch("train", draws)
    old, model.tasks = model.tasks, (1., 1., 1.)
    context, goal, size = model.lesson(b.x, tok(b.captions), draws)
    model.tasks = old
    lay, codes = model.model.layout, model.codec.encode(b.x).flatten(1)
    twins = model.codec.encode(Recoloured().batch("train", draws).x).flatten(1)
    task = context[:, lay.start] - lay.first_task
    assert set(task.tolist()) == {DRAW, RECOLOUR, READ}
    source = context[:, lay.start + 1 + lay.n_text:]
    for i, t in enumerate(task.tolist()):
        if t == DRAW:
            assert (source[i] == PAD).all() and torch.equal(goal[i, :lay.n_image], codes[i] + lay.first_code)
        else: assert torch.equal(source[i], codes[i] + lay.first_code)
        if t == READ:
            assert torch.equal(goal[i, :lay.n_text], tok(b.captions[i:i + 1]).ids[0]) and size[i] <= lay.n_text + 1
        else: assert size[i] == lay.n_image
        if t == RECOLOUR:
            assert torch.equal(goal[i, :lay.n_image], twins[i] + lay.first_code)


def test_no_recolouring_without_colours():
    data = load("digits")
    config = cm3leon.recipe_for(data, "smoke")
    tok, model = built(cm3leon, config)
    model.prepare(data, tok, config)
    draws = Draws(0, torch.arange(30))
    b = data.batch("train", draws)
    context, *_ = model.lesson(b.x, tok(b.captions), draws)
    lay = model.model.layout
    assert RECOLOUR not in (context[:, lay.start] - lay.first_task).tolist()
