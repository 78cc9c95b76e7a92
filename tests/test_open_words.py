"A mixture of Gaussians for the words that a caption leaves open: weights, guess, promise, and what its sweep measures."
import pytest
import torch
from arms import made
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.data import Draws, INKS, Painted
from t2i_course.core.sources import load
from t2i_course.diffusion.closed_form import CaptionGaussian, word_groups
from t2i_course.diffusion.ddpm import VP, linear_betas, view
from t2i_course.diffusion.open_words import OpenWords, completed, evidence, mixed, open_form
from t2i_course.flow import flow_matching
from t2i_course.sweeps.diffusion import open_words as sweep

OPEN, NAMED = "a bold two on white", "a bold red two on white"


@pytest.fixture(scope="module")
def world():
    "Small captioned pictures (3x8x8): tokenizer, a mixture over the inks, the same tables with one Gaussian."
    data, process = Painted(), VP(linear_betas())
    tok = WordTokenizer(data.words)
    draws = Draws(0, torch.arange(1500))
    batch = data.batch("train", draws)
    pictures = torch.nn.functional.avg_pool2d(batch.x, 4) + .05 * draws.normal("grain", 3, 8, 8)
    groups = [[tok.index[w] for w in g] for g in word_groups(data)]
    how = dict(groups=groups, rank=16, pairs_in_groups=True)
    mixture = OpenWords(process, len(tok), open_words=[tok.index[k] for k in INKS], **how)
    mixture.fit(pictures, tok(batch.captions).drop(draws.uniform("drop") >= .1, tok.null()).ids)
    one = CaptionGaussian(process, len(tok), **how)
    one.tables = mixture.tables
    return tok, mixture, one


def dense(skip, ids):
    "Mean and covariance of a caption's pictures, written out."
    mu, g = skip.mean(ids), skip.group(ids)[0]
    kappa, V = skip.colour(ids, mu)
    U, L, Q, rest = (skip.tables[k] for k in ("U", "L", "Q", "rest"))
    W = U @ Q[g]
    space = W * L[g] @ W.T + rest * (torch.eye(len(U)) - U @ U.T)
    return mu.flatten().double(), torch.kron(V[0] * kappa[0] @ V[0].T, space).double()


def noised(skip, x, t, seed=0):
    t = torch.full((len(x),), t)
    c = skip.process.coefs(t)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return view(c.alpha, x) * x + view(c.sigma, x) * noise, t


def test_evidence_is_the_density_of_the_whole_matrix(world):
    tok, mixture, _ = world
    x_t, t = noised(mixture, torch.zeros(1, 3, 8, 8), .4)
    c, found, known = mixture.process.coefs(t), [], []
    for caption in (NAMED, OPEN, "a thin blue nine on black", ""):
        ids = tok([caption]).ids
        mu, cov = dense(mixture, ids)
        cov = c.alpha.double() ** 2 * cov + c.sigma.double() ** 2 * torch.eye(len(mu), dtype=cov.dtype)
        normal = torch.distributions.MultivariateNormal(c.alpha.double() * mu, cov)
        known.append(normal.log_prob(x_t.flatten().double()).item())
        found.append(evidence(mixture, x_t, t, ids).item())
    off = [a - b for a, b in zip(known, found)]
    assert max(off) - min(off) < 1e-2 and max(known) - min(known) > 1


@pytest.mark.parametrize("time", [.1, .5, .8])
def test_mixture_is_the_weighted_guess_and_keeps_its_promise(world, time):
    "Pictures that really come from the six Gaussians."
    tok, mixture, one = world
    generator, n = torch.Generator().manual_seed(1), 600
    each = [tok([OPEN.replace("two", f"{k} two")] * n) for k in INKS]
    parts = [torch.distributions.MultivariateNormal(m, c + 1e-6 * torch.eye(len(m))) for m, c in (dense(mixture, i.ids[:1]) for i in each)]
    torch.manual_seed(0)
    which = torch.randint(len(INKS), (n,), generator=generator)
    x = torch.stack([parts[k].sample() for k in which]).view(n, 3, 8, 8).float()
    x_t, t = noised(mixture, x, time)
    g, single = mixture(x_t, t, tok([OPEN] * n)), one(x_t, t, tok([OPEN] * n))
    logs = torch.stack([evidence(mixture, x_t, t, i.ids) for i in each], 1)
    guesses = torch.stack([one(x_t, t, i).x0_hat for i in each], 1)
    want = (logs.softmax(1)[:, :, None] * guesses.flatten(2)).sum(1)
    assert torch.allclose(g.x0_hat.flatten(1), want, atol=1e-4)
    error = (g.x0_hat - x).square().mean().sqrt()
    assert abs(error / g.c_out.square().mean().sqrt() - 1) < .06
    assert error < (single.x0_hat - x).square().mean().sqrt()


def test_a_caption_with_the_word_has_one_gaussian(world):
    "Beside open captions in the same batch."
    tok, mixture, one = world
    x_t, t = noised(mixture, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)), .6)
    cond = tok([NAMED, OPEN, "", "an orange digit"])
    for a, b in zip(mixture(x_t, t, cond), one(x_t, t, cond)):
        assert torch.equal(a[[0, 3]], b[[0, 3]]) and not torch.equal(a[1:3], b[1:3])


def test_without_words_it_is_the_closed_form(world):
    tok, mixture, one = world
    none = OpenWords(mixture.process, len(tok), mixture.groups, rank=16, pairs_in_groups=True)
    none.tables = mixture.tables
    x_t, t = noised(mixture, torch.zeros(2, 3, 8, 8), .6)
    for a, b in zip(none(x_t, t, tok([OPEN, ""])), one(x_t, t, tok([OPEN, ""]))): assert torch.equal(a, b)


def test_the_network_sees_the_likeliest_words_frame(world):
    "Clear pictures of red digits: as if the caption had said red."
    tok, mixture, one = world
    told = tok([NAMED] * 3)
    x_t, t = noised(mixture, mixture.mean(told.ids).view(3, 3, 8, 8), .05)
    g, named = mixture(x_t, t, tok([OPEN] * 3)), one(x_t, t, told)
    for a, b in zip(g, named): assert torch.allclose(a, b, atol=1e-3)


def test_shapes_and_low_precision(world):
    tok, mixture, _ = world
    ids = tok([OPEN, ""]).ids
    assert completed(ids, mixture.open_words).shape == (2, 6, ids.shape[1] + 1)
    x_t, t = noised(mixture, torch.zeros(2, 3, 8, 8), .5)
    with torch.autocast("cpu", torch.bfloat16): low = mixture(x_t.bfloat16(), t, tok([OPEN, ""]))
    full = mixture(x_t.bfloat16().float(), t, tok([OPEN, ""]))
    for a, b in zip(low, full): assert a.dtype == torch.float32 and torch.equal(a, b)
    assert mixed(mixture, x_t, t, ids).inputs.shape == (2, 9, 8, 8)


def test_recipe_asks_for_inks_where_there_are_some():
    assert open_form(load("painted"), "smoke")["open_words"] == [*INKS]
    assert open_form(load("digits"), "smoke")["open_words"] == []
    config = flow_matching.recipe_for(load("painted"), "smoke")
    assert type(flow_matching.build(config)[1].skip) is OpenWords and flow_matching.build(config | dict(skip=False))[1].skip is None


def test_sweep():
    rows = made(sweep)
    assert {k.split(".")[0] for k in rows} == {"setting", "short", "long"}
    by = rows["short.mixture.seed0"]["by"]
    assert by["left_open"]["ink"] is None and by["named"]["ink"] is not None
