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
from t2i_course.core.files import CourseError, fingerprint
from t2i_course.core.sources import load
from t2i_course.core.metrics import (DRAWINGS, N_SPLITS, SEED, SHIPPED, at_most, ceilings, cut_at, evaluate,
                                     even_order, frechet, glyph_space, judge_for, kid, load_judge,
                                     make_judges, nearest_rate, obedience, obeys, paired_gap,
                                     precision_recall, protocol, read_card, read_judge, real_floor,
                                     reference, save_judge, shuffled, train_judge, weights_path)

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


# --- Floors ---

def simulated(draw, n, m, times=200):
    "Mean distance of n pictures from m others, and its standard error, when there is no end of pictures."
    found = torch.tensor([frechet(draw(n), draw(m)) for _ in range(times)])
    return found.mean().item(), found.std().item() / times ** .5


@pytest.mark.parametrize("pool, n, m", [(400, 200, 200), (400, 60, 300), (400, 1500, 400)])
def test_a_floor_is_what_a_direct_simulation_gives(pool, n, m):
    "Also where it is carried to more drawings than there are real pictures."
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=g, dtype=torch.float64)
    def draw(k): return torch.randn(k, 12, generator=g, dtype=torch.float64) @ mixing
    floors = torch.tensor([real_floor(draw(pool), n, m, splits=20)["fd_floor"] for _ in range(20)])
    want, error = simulated(draw, n, m)
    assert floors.mean().item() == pytest.approx(want, abs=3 * (error ** 2 + floors.var().item() / 20) ** .5 + .02 * want)


def test_one_cut_is_no_floor_and_many_are():
    f = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
    single = torch.tensor([frechet(f[i[:200]], f[i[200:]]) for i in map(torch.randperm, [400] * 50)])
    floor, other = (real_floor(f[torch.randperm(400)], 200, 200, splits=100)["fd_floor"] for _ in range(2))
    assert abs(floor - other) < .1 * single.std() * 3 and single.max() - single.min() > 20 * abs(floor - other)


def test_labels_in_their_shares_make_no_distance():
    "Drawings are asked for in the shares of the reference, so the floor is cut in these shares too."
    g, means = torch.Generator().manual_seed(0), 6 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(300) % 4
    def draw(y): return means[y] + torch.randn(len(y), 8, generator=g)
    want = sum(frechet(draw(labels[:152]), draw(labels[:148])) for _ in range(200)) / 200
    floors = [real_floor(draw(labels), 152, 148, labels, splits=20) for _ in range(15)]
    assert sum(r["fd_floor"] for r in floors) / 15 == pytest.approx(want, rel=.08)
    assert real_floor(draw(labels), 152, 148, splits=20)["fd_floor"] > 2 * want
    assert floors[0]["splits"] == 20 and floors[0]["floor_sizes"] == [152, 148]


def test_every_stretch_of_an_even_order_holds_each_label_in_its_share():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    for seed in range(20):
        i = even_order(labels, seed)
        assert sorted(i.tolist()) == list(range(100))
        for first, last in ((0, 10), (0, 50), (33, 66), (50, 100)):
            share = labels[i[first:last]].bincount(minlength=3) - torch.tensor([.5, .3, .2]) * (last - first)
            assert share.abs().max() < 1 + 1e-6
    assert not torch.equal(even_order(labels, 0), even_order(labels, 1))


@pytest.mark.parametrize("p, n, m, cut", [(2000, 1000, 1000, (1000, 1000)), (1797, 5000, 1797, (898, 899)), (1797, 100, 1797, (100, 1697)),
                                          (950, 850, 100, (850, 100))])
def test_a_cut_is_as_near_to_the_row_as_real_pictures_permit(p, n, m, cut): assert cut_at(p, n, m) == cut


def test_the_floor_of_digits_is_no_unlucky_cut():
    "359 unseen digits: halves lie 2.6 apart on average; the first cut that came to hand gave 4.55."
    f = load_judge("digits").features(pictures("test", 0, 359, "digits", SEED).x)
    floor = real_floor(f, 179, 180, splits=N_SPLITS)
    assert floor["fd_floor"] == pytest.approx(2.67, abs=.2) and floor["fd_floor_std"] == pytest.approx(.99, abs=.15)
    assert frechet(f[:179], f[179:358]) == pytest.approx(4.55, abs=.01)


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
        held = Draws(SEED, torch.arange(len(captions)))
        return [pictures("test", n, n, seed=SEED).x, data.batch("heldout", held).x, data.seen_matched(held).x][len(seen) - 1]
    row = evaluate(draw, data, n=n, seed=4)
    assert [len(c) for c in seen] == [n, n // 2, n // 2] and row["heldout"]["n"] == n // 2
    assert abs(row["fd"] - row["fd_floor"]) < 4 * row["fd_floor_std"] and row["kid"] == pytest.approx(row["kid_floor"])
    assert row["floor_sizes"] == [n, n] and row["n_reference"] == row["n_asked"] == n and row["splits"] == 30
    assert row["obedience"]["all"] == row["obedience"]["ceiling"] > .97
    assert row["heldout"]["all"] > .97 and row["nearest"] == row["nearest_real"] < .04
    assert row["precision"] > .9 and row["recall"] > .9
    json.dumps(row)
    assert evaluate(lambda c, s: pictures("train", 0, len(c)).x, data, n=n, n_heldout=0)["obedience"]["all"] < .1


def of_label(data, captions, split="train"):
    "For each caption another picture of its label."
    b = data.batch(split, Draws(5, torch.arange(4 * len(captions) + 400)))
    own = {k: (b.attrs["digit"] == k).nonzero()[:, 0].tolist() for k in range(10)}
    return torch.stack([b.x[own[data.demands(c)["digit"]].pop()] for c in captions])


def test_digits_are_measured_with_more_drawings_than_there_are_real_ones():
    "No n is cut: the captions ask for each digit in its share, however many they are."
    data, asked = load("digits"), []
    def draw(captions, seed):
        asked.extend(data.demands(c)["digit"] for c in captions)
        return of_label(data, captions)
    row = evaluate(draw, data, n=2500)
    every = torch.cat([data.labels["train"], data.labels["test"]]).bincount()
    assert (torch.tensor(asked).bincount() - 2500 * every / 1797).abs().max() < 3
    assert row["n"] == row["n_asked"] == 2500 and row["n_reference"] == 1797 and "n_note" not in row and "heldout" not in row
    assert row["floor_sizes"] == [898, 899] and row["n_each"] == 898 and row["n_unseen"] == 359
    assert row["fd"] < row["fd_floor"], "a reference that holds training pictures rewards whoever returns them"
    assert row["fd_unseen"] > row["fd_unseen_floor"] and row["nearest"] > .5 # and this is where it shows
    said = protocol(data, n=2500)
    assert "359 pictures of the test split and 1,438 of the training split" in said["reference"] and "898 and 899" in said["fd_floor"]
    assert DRAWINGS["digits"] == protocol(data)["n"] == 5000


def test_the_reference_of_digits_is_unmoved_and_complete():
    data = load("digits")
    r = reference(data, load_judge("digits"), 100)
    still = load("digits").still()
    every = torch.cat([still.batch(k, Draws(SEED, torch.arange(len(still.labels[k])))).x for k in ("test", "train")])
    assert torch.allclose(r["features"], load_judge("digits").features(every), atol=1e-4)
    assert len(every.flatten(1).unique(dim=0)) > 1790, "no picture twice"


def test_what_is_compared_has_the_same_n():
    "Two methods at one n share reference, captions and floor; another n has another floor, which its row states."
    data = load("digits")
    one, two = (evaluate(lambda c, s, k=k: of_label(data, c, k), data, n=60) for k in ("train", "test"))
    keys = ("n", "n_reference", "n_each", "fd_floor", "splits", "floor_sizes", "precision_real")
    assert [one[k] for k in keys] == [two[k] for k in keys]
    more = evaluate(lambda c, s: of_label(data, c), data, n=240)
    assert more["fd_floor"] == pytest.approx(one["fd_floor"] * (1 / 240 + 1 / 1797) / (1 / 60 + 1 / 1797), rel=.15)


def test_too_few_test_pictures_are_told(capsys):
    data = load("digits")
    assert at_most(data, 300) == 300 and not capsys.readouterr().out
    assert at_most(data, 1000) == 359
    assert capsys.readouterr().out == "digits has 359 test pictures: 359 are used, not 1,000\n"
    assert at_most(load("painted"), 10 ** 6) == 10 ** 6


# --- Held-out captions and their partners ---

def painter_with_errors(data, wrong):
    "Draws what is demanded, but another ink in the share `wrong(digit, ink)` of the cases."
    from t2i_course.core.data import draw_masks, glyph_split, glyphs, paint
    y = glyphs()[1][glyph_split()["test"]]
    def draw(captions, seed):
        n, d = len(captions), Draws(seed, torch.arange(len(captions)))
        free = dict(digit=d.choice("digit", 10), ink=d.choice("ink", 6), paper=d.choice("paper", 4), weight=d.choice("weight", 2),
                    lean=torch.ones(n, dtype=torch.int64))
        a = {k: torch.tensor([data.demands(c).get(k, v[i].item()) for i, c in enumerate(captions)]) for k, v in free.items()}
        share = torch.tensor([wrong(p, q) for p, q in zip(a["digit"].tolist(), a["ink"].tolist())])
        a["ink"] = torch.where(d.uniform("wrong") < share, (a["ink"] + 1) % 6, a["ink"])
        one = torch.tensor([glyph_split()["test"][(y == k).nonzero()[0, 0]] for k in a["digit"].tolist()])
        still = torch.zeros(n)
        return paint(draw_masks(one, a["weight"], (a["lean"] - 1) * .42, still, still + .72, torch.zeros(n, 2)), a["ink"], a["paper"])
    return draw


def test_equally_good_on_both_is_equal_and_only_worse_on_unseen_pairs_is_not():
    data = load("painted")
    from t2i_course.core.data import HELD_OUT, INKS, NUMBERS
    unseen = {(NUMBERS.index(d), list(INKS).index(i)) for d, i in HELD_OUT}
    measure = lambda wrong: evaluate(painter_with_errors(data, wrong), data, n=64, n_heldout=400)["heldout"]
    even = measure(lambda d, i: .2)
    assert even["gap_low"] < 0 < even["gap_high"] and even["all"] == pytest.approx(.8, abs=.08)
    assert even["seen_matched"]["n"] == even["n"] == 400 and even["gap"] == pytest.approx(even["all"] - even["seen_matched"]["all"])
    assert measure(lambda d, i: .5 if (d, i) in unseen else .2)["gap_high"] < 0
    perfect = measure(lambda d, i: 0.)
    assert perfect["all"] > .98 and perfect["seen_matched"]["all"] > .98 and abs(perfect["gap"]) < .02


def test_too_few_captions_for_partners_are_told():
    row = evaluate(lambda c, s: torch.zeros(len(c), 3, 32, 32), load("painted"), n=16, n_heldout=1)
    assert "seen_matched" not in row["heldout"] and "no seen partners" in row["heldout"]["note"]


def test_the_interval_of_a_gap_covers_it():
    g, hits, empty = torch.Generator().manual_seed(0), 0, paired_gap([True] * 50, [True] * 50)
    for _ in range(400):
        both = torch.rand(80, generator=g) < .7 # what the two have in common
        first, second = (both & (torch.rand(80, generator=g) < p) for p in (.9, .8))
        found = paired_gap(first.tolist(), second.tolist())
        hits += found["gap_low"] < .07 < found["gap_high"]
    assert .92 < hits / 400 < .985
    assert empty["gap"] == 0 and empty["gap_low"] < 0 < empty["gap_high"]


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
