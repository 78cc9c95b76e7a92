"""What a stranger's folder gets: some hundred drawings, one caption each. The closed form does not learn them by heart."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import drawings
from t2i_course.run.data import expectation
from t2i_course.run.text import row_text
from t2i_course.core.runs import open_run
from t2i_course.run.train import train_run
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.metrics import LEAST, RandomFeatures, evaluate, frechet
from t2i_course.diffusion.closed_form import LADDER, CaptionGaussian, climb, fit_checked, held_together, on_common
from t2i_course.diffusion.preconditioning import fit_skip
from t2i_course.flow import flow_matching

LEVELS = (.1, .3, .5, .7, .9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load(str(drawings.write(tmp_path_factory.mktemp("stranger") / "drawings")))


def fitted(data, **changes):
    torch.manual_seed(0)
    config = flow_matching.recipe_for(data, "smoke") | changes
    tok, den = flow_matching.build(config)
    return tok, fit_skip(den, data, tok, config["fit_images"], 0), config


@pytest.fixture(scope="module")
def closed(data):
    return fitted(data)


def guessed(den, tok, x, captions, t):
    "Squared error of the guess of each picture, and the promised one"
    time = torch.full((len(x),), t)
    c = den.coefs(time, x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    g = den.skip(c.alpha * x + c.sigma * noise, time, tok(captions))
    return (g.x0_hat - x).square().flatten(1).mean(1), g.c_out.flatten()**2


@pytest.fixture(scope="module")
def plain(data):
    "The same form without captions"
    tok, den = flow_matching.build(flow_matching.recipe_for(data, "smoke"))
    b = data.batch("train", Draws(0, torch.arange(len(data.texts["train"]))))
    den.skip.fit(b.x, tok([""] * len(b.x)).ids)
    return den


# --- The strength ---

def test_the_folder_is_the_one_that_was_reported(data):
    n = sum(map(len, data.texts.values()))
    x, captions = drawings.unseen(data)
    assert n == 849 and len(set(data.texts["train"])) == len(data.texts["train"]) and len(x) > 400
    assert all(set(c.split()) <= set(data.words) for c in captions), "combinations are new, words are not"
    assert not set(captions) & set(data.texts["train"])


def test_words_are_trusted_less_where_there_are_few_pictures_for_them(closed, plain, data):
    tok, den, _ = closed
    assert den.skip.chosen["lam"] >= 400 and den.skip.chosen["lam_colour"] >= 40
    x, captions = drawings.unseen(data)
    for t in LEVELS:
        ours = guessed(den, tok, x, captions, t)[0].mean().sqrt()
        without = guessed(plain, tok, x, [""] * len(x), t)[0].mean().sqrt()
        assert ours < 1.01 * without, f"t={t}: {ours:.4f}, without captions {without:.4f}"


@pytest.mark.parametrize("name", ["painted", "digits"])
def test_the_courses_own_data_keep_their_closed_form(name):
    data = load(name)
    tok, den, config = fitted(data)
    assert den.skip.chosen["lam"] <= 40
    torch.manual_seed(0)
    today = flow_matching.build(config)[1]
    draws = Draws(0, torch.arange(config["fit_images"]))
    b = data.batch("train", draws)
    today.skip.fit(b.x, tok(b.captions).drop(draws.uniform("drop") >= .1, tok.null()).ids)
    b = data.batch("test", Draws(3, torch.arange(200)))
    for t in LEVELS:
        ours, before = (guessed(d, tok, b.x, b.captions, t)[0].mean().sqrt() for d in (den, today))
        assert ours < 1.02 * before, f"t={t}: {ours:.4f}, with the strength given {before:.4f}"


def test_captions_that_say_nothing_are_left_out():
    "Captions drawn by lot: the plain mean, to the last bit the same for all of them."
    x = load("painted").batch("train", Draws(0, torch.arange(800))).x
    ids = torch.randint(3, 60, (800, 5), generator=torch.Generator().manual_seed(0))
    skip = CaptionGaussian(flow_matching.LinearPath(), 60, rank=16)
    fit_checked(skip, x, ids, held_together(x, ids))
    assert skip.chosen["lam"] == math.inf
    mean = skip.mean(ids)
    assert torch.equal(mean, mean[:1].expand_as(mean))
    assert (mean[0] - x.flatten(2).mean(0)).abs().mean() < .05


def test_the_ladder_is_climbed_while_it_pays():
    seen = []
    def score(errors):
        return lambda lam: (seen.append(lam), errors[lam])[1]
    errors = dict(zip(LADDER, (5., 3., 2., 4., 1., 9., 3.)))
    assert climb(score(errors)) == (2., LADDER[2]) and seen == [*LADDER[:4], math.inf]
    assert climb(score(errors | {math.inf: 1.9})) == (1.9, math.inf)
    assert climb(score(errors | {math.inf: 2.001}))[1] == math.inf, "the plain mean wins where words are worth nothing"


# --- What is held out together ---

def test_nothing_of_a_held_out_caption_is_in_the_fit():
    x, ids = torch.randn(60, 1, 4, 4), torch.arange(60)[:, None] % 6 + 3
    ids = torch.cat([ids, (ids + 1 - 3) % 6 + 3], 1)[torch.randperm(60)]
    fold = held_together(x, ids)
    assert len(fold.unique()) > 1
    for caption in ids.unique(dim=0):
        assert len(fold[(ids == caption).all(1)].unique()) == 1


def test_labels_are_held_out_picture_by_picture_and_copies_with_them():
    x = torch.randn(80, 1, 4, 4)
    ids = torch.arange(80)[:, None] % 4 + 3
    again = torch.randperm(80)
    fold = held_together(torch.cat([x, x[again]]), torch.cat([ids, ids[again]]))
    assert torch.equal(fold[80:], fold[:80][again]), "the same picture twice is on one side"
    assert all(len(fold[:80][ids[:, 0] == k].unique()) > 1 for k in range(3, 7))


def test_captions_of_one_picture_stay_together():
    x = torch.randn(40, 1, 4, 4).repeat(3, 1, 1, 1)
    ids = torch.randint(3, 12, (120, 4), generator=torch.Generator().manual_seed(0))
    fold = held_together(x, ids).view(3, 40)
    assert (fold == fold[:1]).all()


def test_rare_words_of_a_large_vocabulary_are_left_aside(monkeypatch):
    monkeypatch.setattr("t2i_course.diffusion.closed_form.MOST", 3)
    f = (torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) < .2).float()
    f[:, 0] = 1
    looked = []
    def fit(f):
        looked.append(f.shape[1])
        return [torch.ones(f.shape[1], 2)]
    w, = on_common(fit, f, n=torch.ones(50), lam=4.)
    assert looked == [3] and w.shape == (40, 2) and (w[:, 0] > 0).sum() == 3 and w[0, 0] == 1


# --- The promise, and the loss ---

def test_the_promised_error_is_the_error_on_captions_outside_the_fit(closed, data):
    "Real over promised root mean square; one number for all pictures would not see the tail, so single pictures as well."
    tok, den, _ = closed
    test = data.batch("test", Draws(0, torch.arange(len(data.texts["test"]))))
    for x, captions in (drawings.unseen(data), (test.x, test.captions)):
        for t in LEVELS:
            error, promise = guessed(den, tok, x, captions, t)
            assert .8 < (error.mean() / promise.mean()).sqrt() < 1.15
            assert (error / promise).mean() < 1.25 and (error / promise).max() < 8


def test_no_step_jumps(data, closed):
    "The loss of every step against the mean of the 50 steps before it, trained as the command does"
    from t2i_course.core.ema import state_for
    from t2i_course.core.training import feed, train
    tok, den, config = closed
    state = state_for(den, config, "fp32")
    losses = [r.loss for r in train(state, den.loss, feed(data, tok), images=200 * 32, batch=32)]
    assert len(losses) == 200 and max(losses) < 2 and drawings.jumps(losses) < 2
    first = torch.tensor(losses)[:50]
    assert first.max() < 2 * first.mean()


def test_tables_are_enough_to_go_on(data, closed, tmp_path):
    "Stopped, resumed, and loaded: the chosen form is in the tables, and their shapes do not depend on the choice."
    out = train_run("flow_matching", str(data.path), scale="smoke", images=96, out=tmp_path / "run", quiet=True)
    saved = {k: v for k, v in load_file(out / "model.safetensors").items() if k.startswith("extra.")}
    tok, den, config = closed
    given = flow_matching.build(config)[1].skip
    b = data.batch("train", Draws(0, torch.arange(100)))
    given.fit(b.x, tok(b.captions).ids)
    assert {k: v.shape for k, v in saved.items()} == {f"extra.{k}": v.shape for k, v in given.tables.items()}
    model = open_run(out)
    x, captions = drawings.unseen(data)
    for a, b in zip(guessed(model.model, model.tok, x[:50], captions[:50], .5), guessed(den, tok, x[:50], captions[:50], .5)):
        assert torch.allclose(a, b, rtol=1e-4)


# --- What the row says ---

def memory(data):
    "Gives back the training picture of a caption, and the picture of the first word's ink for any other"
    known = {c: x / 127.5 - 1 for x, c in zip(data.x["train"], data.texts["train"])}
    blank = torch.ones(data.shape)
    return lambda captions, seed: torch.stack([known.get(c, blank) for c in captions])


def test_copies_on_training_captions_are_counted_and_told(data):
    row = evaluate(memory(data), data, n=1000, n_trained=200)
    assert row["nearest_train_captions"] == 1 and row["n_train_captions"] == 200 and row["nearest"] < .1
    text = row_text(row)
    assert "100.0% of 200 drawings of training captions: copies" in text
    assert f"{len(data.texts['test'])} drawings of test captions" in text and "features: random convolutions" in text
    test = {c: x / 127.5 - 1 for x, c in zip(data.x["test"], data.texts["test"])}
    def new(captions, seed): return torch.stack([test.get(c, data.x["test"][i % 85] / 127.5 - 1) for i, c in enumerate(captions)])
    fresh = evaluate(new, data, n=1000, n_trained=200)
    assert fresh["nearest_train_captions"] < .1 and "copies" not in row_text(fresh)
    assert "nearest_train_captions" not in evaluate(new, data, n=20)


def test_any_data_have_a_distance_with_floor_and_n(data):
    n = len(data.texts["test"])
    def right(captions, seed): return data.batch("test", Draws(20, torch.arange(len(captions)))).x
    row = evaluate(right, data, n=1000)
    assert row["n_asked"] == 1000 and row["n_note"] == f"{data.name} has {n} test pictures: {n} are used, not 1,000"
    assert row["n"] == n and row["n_reference"] == len(data.texts["train"]) and row["features"] == RandomFeatures.name
    assert row["fd"] == pytest.approx(row["fd_test"])
    assert abs(row["fd"] - row["fd_floor"]) < 5 * row["fd_floor_std"], "real pictures lie at the floor"
    soft = lambda captions, seed: torch.nn.functional.avg_pool2d(right(captions, seed), 3, 1, 1)
    for worse in (soft, memory(data)):
        assert evaluate(worse, data, n=1000)["fd"] > row["fd_floor"] + 5 * row["fd_floor_std"]
    json.dumps(row)


def test_random_features_are_the_same_everywhere_and_see_a_change(data):
    x = data.batch("train", Draws(0, torch.arange(400))).x
    torch.manual_seed(1)
    one, two = RandomFeatures(x), RandomFeatures(x)
    assert torch.equal(one(x), two(x)) and one(x).shape == (400, 64)
    assert one(x).std(0).sub(1).abs().max() < .01
    assert frechet(one(x[:200]), one(x[200:].flip(1))) > frechet(one(x[:200]), one(x[200:]))


def test_few_pictures_get_a_row_that_says_so(tmp_path):
    data = load(str(drawings.write(tmp_path / "few", n=40)))
    row = evaluate(memory(data), data, n=1000, n_trained=10)
    assert row["n"] < LEAST and "too few" in row["note"] and "fd" not in row and "too few" in row_text(row)
    assert row["nearest_train_captions"] == 1


# --- Before training ---

def test_what_to_expect_is_said_before_training(data, tmp_path, capsys):
    train_run("flow_matching", str(data.path), scale="smoke", images=64, out=tmp_path / "run", quiet=True)
    n, words = len(data.texts["train"]), len(data.words)
    said = capsys.readouterr().err
    assert f"{n} training pictures with {n} different captions and {words} words" in said
    assert "each caption names about one picture" in said and "copies" in said
    train_run("flow_matching", "digits", scale="smoke", images=64, out=tmp_path / "digits", quiet=True)
    assert "training pictures with" not in capsys.readouterr().err


def test_expectation_counts():
    once = [f"a drawing of thing{i}" for i in range(100)]
    text = expectation(once, 20_000)
    assert "100 training pictures with 100 different captions and 103 words, 100 of them in one caption alone" in text
    assert "20,000 images are 200 passes through them. Expect drawings" in text
    assert "500 images are 5 passes through them. With more than" in expectation(once, 500)
    assert "1,000 passes" in expectation(once, 100_000) and "Every 100 images are a pass" in expectation(once)
    assert "50 training pictures with 100" in expectation(once, 500, 50), "some pictures have several captions"
    assert expectation(["a red ball", "a blue ball"] * 50, 5_000) == "", "many pictures of each caption"


def test_two_sizes_of_a_folder_are_two_sets(tmp_path):
    where = str(drawings.write(tmp_path / "few", n=40))
    for size in (32, 16):
        data = load(where, size)
        assert evaluate(memory(data), data, n=4, n_trained=4)["nearest_train_captions"] == 1
