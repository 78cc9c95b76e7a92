"Guidance: against diffusers' formulas, against Gaussians whose every density is known, and each part against a wrong one."
import json
import math
from functools import partial

import pytest
import torch
from arms import made
from t2i_course.core.conditioning import Cond, WordTokenizer, raw_cond
from t2i_course.core.contracts import Identity
from t2i_course.core.runs import Finished
from t2i_course.core.data import NUMBERS, Draws
from t2i_course.core.sources import load
from t2i_course.diffusion import guidance
from t2i_course.diffusion.ddpm import VP, Denoiser, eps, guided, linear_betas, sample, v, x0
from t2i_course.diffusion.guidance import (BOUND, FIXES, NoisyClassifier, Nulls, both, by_classifier, demanded,
                                           diversity, dynamic_threshold, interval, label_reader, nulls, on_gray,
                                           painter, rescale, rescaled, saturation, threshold)
from t2i_course.sweeps.diffusion import guidance as shipped_sweep, guidance_trained as sweep

PROCESS = VP(linear_betas())
W = 3.5


class Fixed:
    "A denoiser without a network: its answer depends on the condition, and it counts its calls."
    process = PROCESS
    null = raw_cond(torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool))
    coefs = Denoiser.coefs

    def __init__(self):
        self.calls = []

    def predict(self, x_t, t, cond, boost=1.):
        self.calls.append(len(x_t))
        c, k = self.coefs(t, x_t), cond.ids[:, 0].float().view(-1, 1, 1, 1)
        picture = 1.3 * torch.sin(x_t * (1 + .3 * k) + k)
        return picture, (x_t - c.alpha * picture) / c.sigma


def labels(*ids):
    return raw_cond(torch.tensor(ids)[:, None], torch.ones(len(ids), 1, dtype=torch.bool))


def scene(b=4, t=.4, seed=0):
    x = torch.randn(b, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.full((b,), t), labels(*range(1, b + 1))


def consistent(den, x_t, t, answer):
    "A guessed picture and a guessed noise must make the noised picture again."
    c = den.coefs(t, x_t)
    assert torch.allclose(c.alpha * answer[0] + c.sigma * answer[1], x_t, atol=1e-4)


# --- the two answers ---

def test_both_is_two_single_answers_in_one_call():
    den, (x, t, cond) = Fixed(), scene()
    (xc, ec), (xu, eu) = both(den, cond)(x, t)
    assert den.calls == [8]
    assert torch.equal(xc, den.predict(x, t, cond)[0]) and torch.equal(eu, den.predict(x, t, labels(0, 0, 0, 0))[1])
    assert not torch.allclose(xc, xu) and not torch.allclose(ec, eu)


@pytest.mark.parametrize("w", [0., 1., 1.3, 7.5])
def test_scale_is_one_more_than_in_the_paper(w):
    "E037: u + w (c - u) is (1+w') c - w' u with w' = w - 1."
    den, (x, t, cond) = Fixed(), scene()
    (xc, ec), (xu, eu) = both(den, cond)(x, t)
    picture, noise = guided(den, cond, w)(x, t)
    paper = w - 1
    assert torch.allclose(picture, (1 + paper) * xc - paper * xu, atol=1e-5)
    assert torch.allclose(noise, (1 + paper) * ec - paper * eu, atol=1e-4)


def test_interval_guides_inside_only():
    den, (x, _, cond) = Fixed(), scene()
    guide = interval(W, .2, .6)(den, cond)
    for t, inside in ((.1, False), (.2, False), (.21, True), (.6, True), (.61, False), (1., False)):
        t = torch.full((4,), t)
        other = guided(den, cond, W)(x, t) if inside else den.predict(x, t, cond)
        assert torch.equal(guide(x, t)[0], other[0]) and torch.equal(guide(x, t)[1], other[1])
    assert torch.equal(interval(W)(den, cond)(x, torch.full((4,), .9))[0], guided(den, cond, W)(x, torch.full((4,), .9))[0])


# --- equal to diffusers ---

@pytest.mark.parametrize("phi", [0., .3, .7, 1.])
def test_rescale_is_diffusers(phi):
    from diffusers.guiders import guider_utils as guiders
    g = torch.Generator().manual_seed(1)
    louder, plain = 4 * torch.randn(3, 4, 8, 8, generator=g) + 1, torch.randn(3, 4, 8, 8, generator=g)
    theirs = guiders.rescale_noise_cfg(louder, plain, guidance_rescale=phi)
    assert torch.allclose(rescale(louder, plain, phi), theirs, atol=1e-5)
    if phi: assert not torch.allclose(rescale(louder, plain, phi), louder)


@pytest.mark.parametrize("ratio", [.9, .995])
@pytest.mark.parametrize("most", [1., 1.5, 100.])
def test_dynamic_threshold_is_diffusers(ratio, most):
    from diffusers import schedulers
    scheduler = schedulers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=most)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * torch.tensor([.1, .5, 1., 2., 5.]).view(5, 1, 1, 1)
    assert torch.allclose(dynamic_threshold(x, ratio, most), scheduler._threshold_sample(x), atol=1e-5)


def test_diffusers_default_divides_by_one():
    from diffusers import schedulers
    x = 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(schedulers.DDPMScheduler(thresholding=True)._threshold_sample(x), x.clamp(-1, 1))
    assert not torch.allclose(dynamic_threshold(x), x.clamp(-1, 1), atol=.1)


@pytest.mark.parametrize("target", [eps, x0, v], ids=lambda f: f.__name__)
def test_rescaled_guide(target):
    "What the network would have answered, guided and rescaled by hand, then solved for the picture."
    den, (x, t, cond) = Fixed(), scene()
    answer = rescaled(W, .7, target)(den, cond)(x, t)
    consistent(den, x, t, answer)
    p, q = target(den.coefs(t, x))
    (xc, ec), (xu, eu) = both(den, cond)(x, t)
    plain, nothing = p * xc + q * ec, p * xu + q * eu
    want = rescale(nothing + W * (plain - nothing), plain, .7)
    assert torch.allclose(p * answer[0] + q * answer[1], want, atol=1e-4)
    untouched = rescaled(W, 0., target)(den, cond)(x, t)
    assert torch.allclose(untouched[0], guided(den, cond, W)(x, t)[0], atol=1e-3)


def test_threshold_guide():
    den, (x, t, cond) = Fixed(), scene()
    answer = threshold(W)(den, cond)(x, t)
    consistent(den, x, t, answer)
    louder = guided(den, cond, W)(x, t)[0]
    assert louder.abs().max() > 1.5 and answer[0].abs().max() <= 1
    assert torch.allclose(answer[0], dynamic_threshold(louder)) and not torch.allclose(answer[0], louder.clamp(-1, 1), atol=.1)


# --- a classifier's gradient, where everything is Gaussian ---

class Gaussian:
    "Exact denoiser of N(mean, var) in every pixel, two classes of equal weight at -mean and +mean."
    process, null = PROCESS, labels(2)
    coefs = Denoiser.coefs
    mean, var = .7, .2

    def split(self, x_t, t):
        c = self.coefs(t, x_t)
        both = c.alpha**2 * self.var + c.sigma**2
        return c, both

    def logits(self, x_t, t):
        c, both = self.split(x_t, t)
        return torch.stack([-(x_t - s * c.alpha * self.mean).square().div(2 * both).flatten(1).sum(1) for s in (-1, 1)], 1)

    def predict(self, x_t, t, cond, boost=1.):
        c, both = self.split(x_t, t)
        each = torch.stack([s * self.mean + c.alpha * self.var / both * (x_t - s * c.alpha * self.mean) for s in (-1, 1)], 1)
        share = self.logits(x_t, t).softmax(1)
        known = torch.nn.functional.one_hot(cond.ids[:, 0], 3)[:, :2].float()
        share = torch.where((cond.ids[:, :1] < 2), known, share).view(len(x_t), 2, 1, 1, 1)
        picture = (share * each).sum(1)
        return picture, (x_t - c.alpha * picture) / c.sigma


@pytest.mark.parametrize("t", [.05, .3, .7, 1.])
@pytest.mark.parametrize("s", [0., 1., 3.])
def test_classifier_guidance_equals_classifier_free(t, s):
    "With exact densities the gradient of log p(y|x_t) is the difference of the two answers, for any scale."
    den, x = Gaussian(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(4)) * .7
    t, cond = torch.full((4,), t), labels(0, 1, 1, 0)
    with torch.no_grad():
        ours = by_classifier(den.logits, lambda cond: cond.ids[:, 0], s)(den, cond)(x, t)
    free = guided(den, cond, s)(x, t)
    consistent(den, x, t, ours)
    assert torch.allclose(ours[0], free[0], atol=1e-3) and torch.allclose(ours[1], free[1], atol=1e-3)
    if s and t[0] < .5: assert not torch.allclose(ours[1], den.predict(x, t, labels(2, 2, 2, 2))[1], atol=1e-2)


def test_guided_sampling_sharpens():
    "More guidance, farther from the other class and closer together."
    den, start = Gaussian(), torch.randn(400, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    cond, ends = labels(*[1] * 400), {}
    for w in (1., 4.):
        *_, ends[w] = sample(guided(den, cond, w), PROCESS, start, torch.linspace(1, 0, 151), clamp=math.inf)
    assert abs(ends[1.].mean() - .7) < .05 and abs(ends[1.].std() - .2**.5) < .05
    assert ends[4.].mean() > ends[1.].mean() + .02 and ends[4.].std() < .95 * ends[1.].std()


# --- the classifier ---

def test_classifier_without_time_ignores_it():
    torch.manual_seed(0)
    x, t = torch.randn(3, 1, 16, 16), torch.tensor([.1, .5, .9])
    for knows in (True, False):
        clf = NoisyClassifier(knows_time=knows)
        for p in clf.parameters(): torch.nn.init.normal_(p, std=.1)
        assert torch.equal(clf(x, t), clf(x, t.flip(0))) is not knows


def test_label_reader():
    data = load("digits")
    tok = WordTokenizer(data.words)
    read = label_reader(tok)
    captions = [f"a handwritten {d}" for d in NUMBERS] + ["a handwritten digit", ""]
    assert read(tok(captions)).tolist() == [*range(10), -1, -1]


@pytest.fixture(scope="module")
def classifier():
    data = load("digits")
    tok = WordTokenizer(data.words)
    return data, tok, guidance.train_classifier(PROCESS, tok, data, 2000)


def test_classifier_learns(classifier):
    data, tok, clf = classifier
    near, far = guidance.accuracy_by_t(clf, PROCESS, tok, data, (.02, 1.))
    assert near > .4 and far < .25
    shifted = {f"a handwritten {d}": f"a handwritten {NUMBERS[(k + 3) % 10]}" for k, d in enumerate(NUMBERS)}
    wrong, = guidance.accuracy_by_t(clf, PROCESS, Shifted(tok, shifted), data, (.02,))
    assert wrong < .25  # the same pictures, other labels


class Shifted:
    "A tokenizer that hands every caption on to another digit."
    def __init__(self, tok, table): self.tok, self.table, self.index = tok, table, tok.index
    def __call__(self, captions): return self.tok([self.table[c] for c in captions])


def test_classifier_training_is_repeatable(classifier):
    data, tok, _ = classifier
    a, b = (guidance.train_classifier(PROCESS, tok, data, 128, seed=s) for s in (0, 0))
    other = guidance.train_classifier(PROCESS, tok, data, 128, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.head.weight, other.head.weight) and not any(p.requires_grad for p in a.parameters())


# --- three ways to say nothing ---

def encode(cond):
    k = 1. + cond.ids.sum(1, keepdim=True)
    return Cond(k[:, :, None].expand(-1, cond.ids.shape[1], 4), k.expand(-1, 4), cond.mask, cond.ids)


def test_nulls_and_per_sample_drop():
    tok = WordTokenizer(["seven", "two"])
    module, kinds = Nulls(encode, 4), nulls(tok)
    words = tok(["seven", "two", "seven", "two"])
    keep = torch.tensor([True, False, True, False])
    want = dict(text=encode(tok.null()).pooled[0], learned=module.nothing, zeros=torch.zeros(4))
    for name, null in kinds.items():
        out = module(words.drop(keep, null))
        assert torch.equal(out.pooled[0], encode(words).pooled[0]) and torch.equal(out.pooled[2], encode(words).pooled[2])
        for i in (1, 3): assert torch.equal(out.pooled[i], want[name]) and torch.equal(out.seq[i, 0], want[name])
    assert len({tuple(w.tolist()) for w in want.values()}) == 3


def test_learned_null_is_trained_only_when_used():
    tok = WordTokenizer(["seven", "two"])
    module, words = Nulls(encode, 4), tok(["seven", "two"])
    for name, null in nulls(tok).items():
        module.nothing.grad = None
        module(words.drop(torch.tensor([True, False]), null)).pooled.sum().backward()
        assert module.nothing.grad.abs().sum().item() == (4 if name == "learned" else 0), name


def test_training_drops_sample_by_sample():
    "E099: a batch holds both kinds."
    seen = []

    def net(x_t, t, cond):
        seen.append(cond.ids[:, 0].clone())
        return x_t
    Denoiser(net, PROCESS, v, null=labels(0), p_drop=.3).loss(torch.zeros(64, 1, 4, 4), labels(*[7] * 64), Draws(0, torch.arange(64)))
    dropped = (seen[0] == 0).sum()
    assert 8 < dropped < 32


# --- measures ---

def test_diversity():
    space = lambda x: x.flatten(1)
    x = torch.tensor([0., 3., 10., 14., 99., 5.]).view(6, 1, 1, 1)
    assert diversity(x, torch.tensor([0, 0, 1, 1, -1, 2]), space) == pytest.approx(3.5)
    assert diversity(x[:1].expand(5, -1, -1, -1), torch.zeros(5, dtype=torch.long), space) == 0
    assert diversity(x[:2], torch.tensor([-1, -1]), space) == 0
    data = load("painted")
    assert demanded(data, ["a red seven on white", "a digit"]).tolist() == [7, -1]


def test_no_real_picture_is_saturated():
    data = load("painted")
    captions = on_gray(data)
    b = data.batch("train", Draws(0, torch.arange(3000)))
    allowed = (b.attrs["paper"] == 2) & (b.attrs["ink"] != 5)
    assert saturation(b.x[allowed]) == 0 and b.x[allowed].abs().max() > .85 and saturation(b.x) > .1
    wanted = [data.demands(c) for c in captions]
    assert len(set(captions)) == 86 and all(d["paper"] == 2 and d["ink"] != 5 and "digit" in d for d in wanted)
    assert saturation(torch.tensor([0., .9, -.96, 2.])) == .5 and BOUND == .95


def test_remedies_are_guides():
    den, (x, _, cond) = Fixed(), scene()
    for name, (guide, clamp) in FIXES.items():
        *steps, last = sample(guide(W)(den, cond), PROCESS, x, torch.linspace(1, 0, 5), clamp=clamp)
        assert last.shape == x.shape and last.isfinite().all(), name


def test_painter_keeps_the_noise():
    "w = 0 and w = 1 from the same start: the start is the first thing the network sees."
    seen = []

    class Spy(Fixed):
        net, codec = torch.nn.Linear(1, 1), Identity()

        def predict(self, x_t, t, cond, boost=1.):
            seen.append(x_t[:2])
            return super().predict(x_t, t, cond, boost)
    den = Spy()
    for w in (1., 2.):
        painter(den, lambda captions: labels(*range(1, len(captions) + 1)), (3, 8, 8), partial(guided, w=w), 2)(["a", "b"], 3)
    assert torch.equal(seen[0], seen[2])


# --- the sweep ---

def test_experiments(monkeypatch):
    tiny = dict(images=320, classifier=320, painted=320, gray=2, steps=2, scales=(1., 2.), classifier_scales=(1.,),
                p_drop=(0., .1), painted_scales=(1., 2.), fix_scales=(2.,))
    monkeypatch.setitem(sweep.SWEEP, "smoke", tiny)
    monkeypatch.setattr(sweep, "FIXES", {k: FIXES[k] for k in ("none", "dynamic")})
    found = made(sweep)
    json.dumps(found)
    assert next(iter(found)) == "setting" and {"n", "images", "steps", "fd_floor", "precision"} <= set(found["setting"])
    row = found["row.seed0"]
    assert {"recipe", "params", "images", "train_seconds", "nfe", "fd", "fd_floor", "kid", "precision", "recall", "obedience",
            "nearest", "seconds_per_1000", "seed"} <= set(row)
    assert len(found["digits.free.seed0"]) == 2 and set(found["dropout.10.seed0"]) == {"1", "3"}
    assert found["null.text.text.seed0"]["fd"] == found["dropout.10.seed0"]["3"]["fd"]  # one base model for both
    assert {f"null.{a}.{b}.seed0" for a in ("text", "learned", "zeros") for b in ("text", "learned", "zeros")} <= set(found)
    assert {"fixes.dynamic.seed0", "fixed.none.seed0", "spans.seed0", "cost.seed0", "classifier.clean.seed0"} <= set(found)


def test_experiments_on_a_finished_run():
    "Every scale, interval and remedy from one model; the same noise for all of them, another for each seed."
    data = load("digits")
    tok, model = guidance.digits_model(guidance.recipe_for(data, "smoke"))
    run = Finished(tok, model, guidance.recipe_for(data, "smoke"), None)
    pairs = dict(shipped_sweep.experiments("smoke", (0, 1), run))
    assert {"setting", "scales.100.seed0", "scales.300.seed1", "spans.middle.seed0", "fixes.dynamic.seed1"} <= set(pairs)
    assert "fixes.static.seed0" not in pairs and shipped_sweep.RUNS and shipped_sweep.SEEDS == 10
    found = {k: pairs[k]() for k in ("setting", "scales.100.seed0", "scales.300.seed0", "fixes.none.seed0")}
    json.dumps(found)
    assert found["setting"]["n"] == 16 and found["setting"]["seeds"] == [0, 1]
    for row in list(found.values())[1:]: assert {"fd", "diversity", "diversity_real", "obedience", "beyond", "brightness"} <= set(row)
    assert found["scales.300.seed0"]["beyond"] == 0, "the sampler clips"
