"Verdicts: SciPy's paired t test, known error rates, the cases without an interval; arms that share a seed."
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import ttest_1samp, ttest_rel
from tree import notebooks

from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load

from t2i_course.core.experiments import (
    Arm, Verdict, best_precision, fit, paired_interval, per_seed, setting, verdict, verdicts)
from t2i_course.core.metrics import judge_for

# --- The interval and SciPy's tests ---

VALUES = st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=12)


def spread_of(pairs):
    a, b = np.array(pairs).T
    return a, b, np.std(a - b)


@settings(deadline=None, max_examples=100)
@given(VALUES, st.sampled_from(["lower", "higher"]), st.sampled_from([.9, .95, .99]))
def test_a_direction_is_the_one_sided_paired_t_test(pairs, expect, level):
    a, b, spread = spread_of(pairs)
    if spread < 1e-3: return
    found = verdict(a, b, expect, level=level)
    sides = dict(lower=("less", "greater"), higher=("greater", "less"))[expect]
    yes, no = (ttest_rel(a, b, alternative=side).pvalue for side in sides)
    if min(abs(p - (1 - level)) for p in (yes, no)) < 1e-9: return
    assert found.outcome == ("held" if yes < 1 - level else "the opposite" if no < 1 - level else "undecided")
    assert (found.mean, found.n) == (pytest.approx((a - b).mean()), len(a))


@settings(deadline=None, max_examples=100)
@given(VALUES, st.floats(.01, 50))
def test_equality_is_two_one_sided_tests(pairs, margin):
    a, b, spread = spread_of(pairs)
    if spread < 1e-3: return
    above = ttest_1samp(a - b, -margin, alternative="greater").pvalue
    below = ttest_1samp(a - b, margin, alternative="less").pvalue
    if abs(max(above, below) - .05) < 1e-9: return
    assert (verdict(a, b, "equal", margin=margin).outcome == "held") == (max(above, below) < .05)


@settings(deadline=None, max_examples=100)
@given(VALUES, st.floats(.01, 50), st.sampled_from(["lower", "higher"]))
def test_a_margin_moves_the_question(pairs, margin, expect):
    "At least so much lower is lower than the second arm moved by the margin."
    a, b, spread = spread_of(pairs)
    if spread < 1e-3: return
    moved = b - margin if expect == "lower" else b + margin
    low, high = paired_interval(a - b)
    if min(abs(abs(v) - margin) for v in (low, high)) < 1e-9: return
    assert verdict(a, b, expect, margin=margin).outcome == verdict(a, moved, expect).outcome


def test_interval_is_scipys():
    d = np.random.default_rng(0).normal(size=7)
    for level in (.9, .95, .99):
        theirs = ttest_1samp(d, 0).confidence_interval(2 * level - 1)
        assert paired_interval(d, level) == pytest.approx((theirs.low, theirs.high))


def test_swapping_the_arms_swaps_the_outcome():
    a, b = [1., 1.2, 1.1], [2., 2.1, 2.3]
    assert verdict(a, b, "lower").outcome == verdict(b, a, "higher").outcome == "held"
    assert verdict(b, a, "lower").outcome == verdict(a, b, "higher").outcome == "the opposite"
    assert verdict(a, b, "equal", margin=.1).outcome == "the opposite"


@pytest.mark.parametrize("by,outcome,why", [(.3, "held", ""), (.05, "the opposite", "not by the margin"), (0, "the opposite", "not by the margin"),
                                            (-.3, "the opposite", ""), (.1, "undecided", "")])
def test_a_difference_smaller_than_the_margin_is_not_called_its_contrary(by, outcome, why):
    b, luck = np.array([1., 1.2, 1.1]), np.array([-.005, 0, .006])
    for found in (verdict(b - by + luck, b, "lower", margin=.1), verdict(b + by + luck, b, "higher", margin=.1)):
        assert (found.outcome, found.why) == (outcome, why) and why in str(found)
    assert verdict(b + by + luck, b, "equal", margin=.1).why == ""


# --- How often it errs ---

@pytest.mark.parametrize("n,rho", [(2, .9), (3, 0.), (10, .9)])
def test_without_an_effect_one_claim_in_twenty_holds(n, rho):
    rng = np.random.default_rng(n)
    shared, own = rng.normal(size=(2000, n)), rng.normal(size=(2, 2000, n))
    a, b = (rho**.5 * shared + (1 - rho)**.5 * v for v in own)
    outcomes = [verdict(x, y, "lower").outcome for x, y in zip(a, b)]
    for outcome in ("held", "the opposite"):
        assert abs(outcomes.count(outcome) / 2000 - .05) < 4 * (.05 * .95 / 2000)**.5


def test_unequal_arms_are_seldom_called_equal():
    "At the margin itself, the worst case, one experiment in twenty says equal."
    d = 1 + np.random.default_rng(1).normal(size=(2000, 20)) * .5
    found = [verdict(v, 0., "equal", margin=1.).outcome for v in d]
    assert abs(found.count("held") / 2000 - .05) < 4 * (.05 * .95 / 2000)**.5


def test_pairing_finds_what_the_arms_hide():
    luck = np.random.default_rng(2).normal(size=5)
    a, b = luck, luck + .1 + np.array([.01, -.02, .015, 0., -.005])
    assert verdict(a, b, "lower").outcome == "held"
    assert verdict(a, b[::-1], "lower").outcome == "undecided"


# --- Cases without an interval ---

def test_one_pair_decides_nothing():
    v = verdict([1.], [9.], "lower")
    assert (v.outcome, v.mean, v.low, v.high, v.n) == ("undecided", -8., -math.inf, math.inf, 1)
    assert "one pair" in str(v) and "no interval" in str(v)


@pytest.mark.parametrize("a,b", [([1, 2, 3], [2, 3, 4]), ([.3, .3], [.3, .3]), ([.1, .2], [.4, .5]), ([0, 0], [0, 0])])
def test_equal_differences_decide_nothing(a, b):
    for claim in (dict(expect="lower"), dict(expect="equal", margin=.5)):
        v = verdict(a, b, **claim)
        assert v.outcome == "undecided" and "all differences are the same" in str(v)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_run_without_a_number_fails_its_arm(bad):
    v = verdict([.1, bad, .2], [.4, .5, .7], "lower")
    assert v.outcome == "failed" and "1 of 3 runs of the first arm gave no number" in str(v)
    assert verdict([.4, .5, .7], [.1, bad, .2], "lower").outcome == "failed"


def test_an_arm_at_chance_decides_nothing():
    good, bad = [.9, .92, .95], [.1, .1, .4]
    assert verdict(good, bad, "higher").outcome == "held"
    v = verdict(good, bad, "higher", chance=.1)
    assert v.outcome == "failed" and "2 of 3 runs of the second arm are at chance level" in str(v)
    assert verdict(good, bad, "higher", chance=.05).outcome == "held"
    assert verdict([3., 3.1, 3.3], [50., 40., 49.], "lower", chance=45, better="lower").outcome == "failed"
    assert verdict(good, .05, "higher", chance=.1).outcome == "held"  # a number to beat is not an arm


def test_what_cannot_be_paired_is_refused():
    for first, second in (([1, 2], [1]), ([], []), ([1, 2], [1, 2, 3]), ({"a": 1, "b": 2}, {"a": 1, "c": 2})):
        with pytest.raises(CourseError, match="Train both arms with the same seeds"): verdict(first, second, "lower")
    with pytest.raises(CourseError, match="needs a margin"): verdict([1, 2], [1, 2], "equal")
    with pytest.raises(CourseError, match="'lower', 'higher' or 'equal'"): verdict([1, 2], [1, 2], "better")
    with pytest.raises(CourseError, match="negative"): verdict([1, 2], [1, 2], "lower", margin=-1)


def test_lists_arrays_tensors_dicts_and_a_number():
    a, b = [1., 2., 2.5], [1.4, 2.7, 3.]
    for wrap in (np.array, partial(torch.tensor, dtype=torch.float64), tuple): assert verdict(wrap(a), wrap(b), "lower") == verdict(a, b, "lower")
    by_seed = dict(zip("xyz", a)), dict(zip("zyx", b[::-1]))
    assert verdict(*by_seed, "lower") == verdict(a, b, "lower")
    assert verdict(a, 4, "lower") == verdict(a, [4] * 3, "lower")


# --- What is printed ---

def test_a_verdict_prints_outcome_difference_interval_and_n():
    v = verdict([.5012, .4907, .5101], [.6023, .5934, .6188], "lower")
    text = str(v)
    assert text == "held: difference -0.1042, [-0.1109, -0.0974], n=3"
    assert "[+117, +7788]" in str(Verdict("held", 3952.4, 117.2, 7788.1, 2))
    assert "12345" in str(Verdict("held", 12345.2, 12344.9, 12345.6, 2))


def test_several_verdicts_stand_below_one_another():
    lines = verdicts({"a": verdict([1, 2], [3, 4.1], "lower"), "long claim": verdict([1], [2], "lower")}).splitlines()
    assert len(lines) == 2 and lines[0].index("n=2") == lines[1].index("n=1") and "one pair" in lines[1]


def test_per_seed_walks_through_a_result_file():
    found = dict(arms=dict(a=dict(seed10=dict(fd=3., o=dict(all=.3)), seed2=dict(fd=2., o=dict(all=.2)))),
                 rows=[dict(fd=7.), dict(fd=8.)], bits={"0": [.1, .2], "1": [.3, .4]}, flat=dict(seed0=1., seed1=2.))
    assert per_seed(found, "arms.a.{}.fd") == [2., 3.]  # in the order of the seeds, not of the letters
    assert per_seed(found, "arms.a.{}.o.all") == [.2, .3]
    assert per_seed(found, "rows.{}.fd") == [7., 8.]
    assert per_seed(found, "bits.{}.1") == [.2, .4]
    assert per_seed(found, "flat.{}") == [1., 2.]
    with pytest.raises(CourseError, match="there is no 'b', only a"): per_seed(found, "arms.b.{}.fd")
    with pytest.raises(CourseError, match="where the seeds stand"): per_seed(found, "arms.a.seed2.fd")


# --- One function for all pages ---

OWN_RULE = r"def verdict\(|within noise|twice the (larger|largest|seed)|seed spread"


@pytest.mark.parametrize("page", notebooks(), ids=str)
def test_no_page_has_a_rule_of_its_own(page):
    "Conclusions come from `verdict`; the chapter that defines it shows another rule, to say what is wrong with it."
    if page.path.stem == "07_experiments": return
    texts = [cell.source for cell in page.cells] + ["".join(output.get("text", "")) for output in page.outputs]
    assert not [found[0] for text in texts if (found := re.search(OWN_RULE, text))]


# --- Arms ---

class Denoising:
    def __init__(self, shape, width):
        size = math.prod(shape)
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(size, width), torch.nn.SiLU(), torch.nn.Linear(width, size))
        self.scale, self.shape = 1., shape

    def to(self, device): return self

    def loss(self, x0, cond, draws):
        return (self.net(x0 + self.scale * draws.normal("noise", *x0.shape[1:])) - x0.flatten(1)).square().mean(1)

    def painter(self, tok, config):
        return lambda captions, seed: self.net(torch.zeros(len(captions), *self.shape)).view(-1, *self.shape)

    def calls(self, config): return 1


CONFIG = dict(lr=2e-3, half_life=200, batch=16, width=16)


def train(digits, seed=0, **how):
    def build(config): return WordTokenizer(digits.words, digits.size), Denoising(digits.shape, config["width"])
    return fit(build, CONFIG, digits, 160, seed, **how)


@pytest.fixture(scope="module")
def digits(): return load("digits")


def same(a, b): return all(torch.equal(u, v) for u, v in zip(a.model.net.state_dict().values(), b.model.net.state_dict().values()))


def test_a_seed_repeats_an_arm_to_the_last_bit(digits):
    arm = train(digits, 3)
    torch.manual_seed(99)
    assert same(arm, train(digits, 3)) and not same(arm, train(digits, 4))


def test_arms_of_one_seed_begin_with_the_same_weights(digits):
    begun = []
    def look(model, scale): begun.append({k: v.clone() for k, v in model.net.state_dict().items()}); model.scale = scale
    one, other = (train(digits, 1, change=partial(look, scale=s)) for s in (1., .5))
    assert all(torch.equal(u, v) for u, v in zip(begun[0].values(), begun[1].values())) and not same(one, other)


def test_a_loss_of_its_own(digits):
    half = train(digits, loss=lambda model: lambda *args: .5 * model.loss(*args))
    assert half.about["loss"] == pytest.approx(.5 * train(digits).about["loss"], rel=.05)


def test_a_clock_in_seconds_says_how_many_images_it_was(digits):
    def build(config): return WordTokenizer(digits.words, digits.size), Denoising(digits.shape, config["width"])
    images = fit(build, CONFIG, digits, seconds=.2).about["images"]
    assert images > 0 and images % CONFIG["batch"] == 0


def test_a_row_says_what_was_measured_and_what_training_took(digits):
    arm = train(digits)
    assert isinstance(arm, Arm) and arm.about["params"] == 2 * 256 * 16 + 16 + 256 and arm.about["images"] == 160
    row = arm.row(digits, judge_for(digits), 16, seed=2, n_heldout=0, recipe="toy")
    assert {"fd", "obedience", "train_seconds", "cpu_seconds", "loss", "params"} <= row.keys()
    assert (row["recipe"], row["nfe"], row["seed"]) == ("toy", 1, 2)


def test_setting_holds_what_all_arms_share(digits):
    made = setting(dict(images=160, n=16), (0, 1), digits, steps=3)
    assert made | dict(fd_floor=0) == dict(images=160, n=16, steps=3, seeds=[0, 1], precision=best_precision(), fd_floor=0)
    assert made["fd_floor"] > 0
