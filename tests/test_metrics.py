"The measuring instruments: equal to torchmetrics where it has the same quantity, known answers where there are some."
import json
import math
import shutil
import warnings
from itertools import permutations

import pytest
import torch
from torch import nn

from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.core.metrics import (
    SHIPPED, ceilings, evaluate, fingerprint, frechet, glyph_space, judge_for, kid, load_judge, make_judges,
    nearest_rate, obedience, obeys, precision_recall, protocol, read_card, read_judge, save_judge, shuffled,
    train_judge, weights_path)

SHIPPABLE = [name for name in SHIPPED if name != "mnist"]  # mnist's pictures may not be on this machine


def pictures(split, start, n, name="painted", seed=3):
    return load(name).batch(split, Draws(seed, torch.arange(start, start + n)))


# --- Distances ---

class Flat(nn.Module):
    "Twelve fixed random features of a picture; torchmetrics hands pictures to such a module as they are."
    num_features = 12

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(48, 12, generator=torch.Generator().manual_seed(0)) / 4)

    def forward(self, x): return torch.tanh(x.flatten(1).to(self.weight) @ self.weight)


@pytest.fixture
def two_sets():
    g = torch.Generator().manual_seed(1)
    return torch.randn(300, 3, 4, 4, generator=g), 1.3 * torch.randn(250, 3, 4, 4, generator=g) + .2


def test_frechet_equals_torchmetrics(two_sets):
    from torchmetrics.image.fid import FrechetInceptionDistance as fid
    metric = fid(feature=Flat(), normalize=True, input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    for x, real in zip(two_sets, (True, False)): metric.update(x, real=real)
    assert frechet(*map(Flat(), two_sets)) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_kid_equals_torchmetrics(two_sets):
    from torchmetrics.image.kid import KernelInceptionDistance as metric_class
    a, b = two_sets[0][:250], two_sets[1]
    warnings.simplefilter("ignore")
    metric = metric_class(feature=Flat(), subsets=1, subset_size=250, normalize=True)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert kid(Flat()(a), Flat()(b)) == pytest.approx(metric.compute()[0].item(), rel=1e-3)


def test_kid_equals_the_sum_over_pairs():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (7, 6))
    def k(x, y): return (x @ y / 5 + 1) ** 3
    def within(s): return sum(k(s[i], s[j]) for i, j in permutations(range(len(s)), 2)) / (len(s) * (len(s) - 1))
    brute = within(a) + within(b) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))
    assert kid(a, b) == pytest.approx(brute.item(), abs=1e-10)


def test_kid_is_unbiased_and_frechet_is_not():
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(40, 4, generator=g), torch.randn(40, 4, generator=g)) for _ in range(200)]
    kids = torch.tensor([kid(*p) for p in pairs])
    assert abs(kids.mean()) < 3 * kids.std() / math.sqrt(len(pairs))
    assert min(frechet(*p) for p in pairs) > 0


def test_frechet_of_known_gaussians():
    f = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert frechet(f, f) == pytest.approx(0, abs=1e-6)
    assert frechet(f, f + 2) == pytest.approx(24, rel=1e-6)
    tripled = 4 * torch.cov(f.T).trace() + 4 * f.mean(0).square().sum()
    assert frechet(f, f * 3) == pytest.approx(tripled.item(), rel=1e-6)
    few = torch.randn(5, 6)
    assert math.isfinite(frechet(few, f)), "fewer pictures than features"


def test_precision_and_recall_of_two_clusters():
    g = torch.Generator().manual_seed(0)
    a, b, elsewhere = (torch.randn(100, 2, generator=g) * .1 + c for c in (0, 5, 20))
    assert precision_recall(torch.cat([a, b]), torch.cat([a, b])) == (1, 1)
    precision, recall = precision_recall(torch.cat([a, b]), a + .001)
    assert precision > .9 and recall == pytest.approx(.5, abs=.05)
    precision, recall = precision_recall(a, torch.cat([a + .001, elsewhere]))
    assert precision == pytest.approx(.5, abs=.05) and recall > .9
    with pytest.raises(CourseError, match="more than 5"): precision_recall(a[:5], b)


def test_precision_and_recall_equal_the_definition():
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(30, 3, generator=g).double(), torch.randn(40, 3, generator=g).double() * 1.5
    def covered(points, centres):
        radius = [sorted((c - o).norm().item() for o in centres)[3] for c in centres]
        return sum(any((p - c).norm() <= r for c, r in zip(centres, radius)) for p in points) / len(points)
    assert precision_recall(real, fake, k=3) == pytest.approx((covered(fake, real), covered(real, fake)))


# --- Obedience ---

def test_only_what_the_caption_demands_counts():
    data = load("painted")
    shown = {k: torch.zeros(2, dtype=torch.int64) for k in data.attributes}  # twice: zero, red, black, thin, left
    result = obeys(shown, data, ["a red digit", "a blue zero on black"])
    assert result == dict(all=.5, digit=1., ink=.5, paper=1., weight=None, lean=None)
    assert obeys(shown, data, ["a digit", "a thin zero"])["all"] == 1, "a caption that demands nothing is left out"


def test_demands_agree_with_what_was_said():
    "The oracle of the data and the reader of captions are the same."
    data, b = load("painted"), pictures("test", 0, 300)
    for i, caption in enumerate(b.captions):
        assert data.demands(caption) == {k: b.attrs[k][i].item() for k in data.attributes if b.named[k][i]}


@pytest.mark.parametrize("name", SHIPPABLE)
def test_ceiling_on_handwriting_never_seen(name):
    found = ceilings(load_judge(name), load(name), n=1500)["ceilings"]
    assert found["test"]["all"] > .97
    if "heldout" in found: assert found["heldout"]["all"] > .97


@pytest.mark.parametrize("name", SHIPPABLE)
def test_shuffled_captions_are_obeyed_by_chance(name):
    found = ceilings(load_judge(name), load(name))["ceilings"]["chance"]
    assert found["judge"]["all"] <= found["oracle"]["all"] + .005


def test_judges_do_not_learn_from_test_glyphs():
    data = load("painted")
    draws = Draws(0, torch.arange(5000))
    learned, unseen = (set(data.attrs(split, draws)[0].tolist()) for split in ("judge", "test"))
    assert not learned & unseen


@pytest.mark.parametrize("name", SHIPPED)
def test_cards_state_ceilings_and_command(name):
    card = read_card(weights_path(name))
    assert card["ceilings"]["test"]["all"] > .97 and card["command"].startswith("t2i run metrics")
    chance = card["ceilings"]["chance"]
    assert chance["judge"]["all"] <= chance["oracle"]["all"] + .005
    assert load_judge(name)(torch.zeros(1, *card["shape"]))


# --- Weights ---

def test_changed_weights_are_refused(tmp_path):
    for end in (".safetensors", ".json"): shutil.copy(weights_path("digits").with_suffix(end), tmp_path)
    path = tmp_path / "digits.safetensors"
    assert fingerprint(read_judge(path)) == fingerprint(load_judge("digits"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CourseError, match="changed or damaged"): read_judge(path)
    path.write_bytes(raw[:1000])
    with pytest.raises(CourseError, match="changed or damaged"): read_judge(path)
    path.unlink()
    with pytest.raises(CourseError, match="cannot be read"): read_judge(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(CourseError, match="missing or damaged"): read_judge(path)


def test_a_saved_judge_is_the_same_judge(tmp_path):
    data = load("digits")
    judge = train_judge(data, 3, width=.4, batch=32)
    save_judge(judge, tmp_path / "j.safetensors", command="a test")
    again, x = read_judge(tmp_path / "j.safetensors"), pictures("test", 0, 20, "digits").x
    assert fingerprint(again) == fingerprint(judge)
    assert torch.equal(again.features(x), judge.features(x))
    assert not list(tmp_path.glob(".*")), "no half-written file is left"


def test_a_judge_is_repeatable_and_leaves_the_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = (fingerprint(train_judge(load("digits"), 3, width=.4, batch=32)) for _ in range(2))
    assert a == b and torch.equal(before, torch.get_rng_state())


def test_unknown_names_are_refused():
    with pytest.raises(CourseError, match="judge_for"): load_judge("cats")


def test_command_makes_weights_and_cards(tmp_path):
    cards = make_judges(tmp_path, scale="smoke", names=["digits"], say=lambda text: None)
    card = json.loads((tmp_path / "digits.json").read_text())
    assert json.loads(json.dumps(cards["digits"])) == card
    assert {"sha256", "command", "seconds", "steps", "ceilings", "date", "hardware", "versions"} <= set(card)
    read_judge(tmp_path / "digits.safetensors")


# --- Copies and the row ---

def test_copies_are_found_in_another_colour_and_place():
    n = 400
    train, real, other = pictures("train", 0, 4000), pictures("test", 0, n), pictures("test", n, n)
    copies = load("painted").batch("train", Draws(77, torch.arange(n)))
    rate = [nearest_rate(glyph_space(b.x), glyph_space(train.x), glyph_space(real.x)) for b in (copies, other)]
    assert rate[0] > .5 and rate[1] < .05


def test_row_of_a_perfect_painter():
    data, n = load("painted"), 200
    seen = []

    def draw(captions, seed):
        seen.append(captions)
        return pictures("test", n, n, seed=20).x if len(seen) == 1 else pictures("heldout", 0, len(captions), seed=20).x
    row = evaluate(draw, data, n=n, seed=4)
    assert len(seen[0]) == n and len(seen[1]) == row["heldout"]["n"] == n // 2
    assert row["fd"] == pytest.approx(row["fd_floor"]) and row["kid"] == pytest.approx(row["kid_floor"])
    assert row["obedience"]["all"] == row["obedience"]["ceiling"] > .97
    assert row["heldout"]["all"] > .97 and row["nearest"] == row["nearest_real"] < .04
    assert row["precision"] > .9 and row["recall"] > .9
    json.dumps(row)
    assert evaluate(lambda c, s: pictures("train", 0, len(c)).x, data, n=n, n_heldout=0)["obedience"]["all"] < .1


def test_finite_test_sets_are_halved():
    "Two sets of real pictures that shared pictures would make the floor too low."
    data = load("digits")
    row = evaluate(lambda c, s: pictures("train", 0, len(c), "digits").x, data, n=1000)
    assert row["n"] == len(data.labels["test"]) // 2 and row["fd_floor"] > 0 and "heldout" not in row
    assert protocol(data)["n"] == row["n"]


def test_pictures_with_nan_are_named():
    with pytest.raises(CourseError, match="3 of 200 pictures"):
        def draw(captions, seed):
            x = torch.zeros(200, 3, 32, 32)
            x[:3] = torch.nan
            return x
        evaluate(draw, load("painted"), n=200)


def test_pictures_without_attributes_get_a_row_with_a_note():
    class Bare:
        name, shape, attributes, splits, source = "bare", (3, 32, 32), {}, ("train", "test"), "a test"
        def batch(self, split, draws): return load("painted").batch(split, draws)
        def demands(self, caption): return {}
    row = evaluate(lambda c, s: torch.zeros(len(c), 3, 32, 32), Bare(), n=50)
    assert "without attributes" in row["note"] and "obedience" not in row and 0 <= row["nearest"] <= 1
    assert row["n"] == 50 and row["fd"] > 2 * row["fd_floor"] > 0, "blank pictures are far from real ones"
    assert judge_for(Bare()) is None and protocol(Bare())["features"] == row["features"]


def test_other_data_get_a_judge_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_DATA", str(tmp_path))
    data, said = load("digits"), []
    monkeypatch.setattr(data, "name", "digits-of-mine")
    monkeypatch.setattr("t2i_course.core.metrics.FIRST_USE", dict(steps=3, width=.4))
    judge = judge_for(data, say=said.append)
    assert "training one now" in said[0]
    assert fingerprint(judge_for(data, say=said.append)) == fingerprint(judge) and len(said) == 1
    next(tmp_path.glob("judges/*.safetensors")).write_bytes(b"damaged")
    assert fingerprint(judge_for(data, say=said.append)) == fingerprint(judge) and "made anew" in said[1]


def test_shuffled_gives_every_caption_away():
    captions = [str(i) for i in range(9)]
    assert sorted(shuffled(captions)) == captions and not [a for a, b in zip(captions, shuffled(captions)) if a == b]


def test_obedience_reads_the_picture():
    data, b = load("painted"), pictures("test", 0, 200)
    judge = load_judge("painted")
    assert obedience(judge, b.x, data, b.captions)["all"] > .95
    assert obedience(judge, b.x.roll(1, 0), data, b.captions)["all"] < .2
