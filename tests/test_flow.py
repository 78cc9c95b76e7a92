"Flow matching and the closed-form skip: formulas against brute force, steps against each other, tables against a file."
import math

import pytest
import torch
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.data import Draws, Painted
from t2i_course.diffusion import ddpm
from t2i_course.diffusion.ddpm import VP, Coefs, linear_betas, sample, solve, step, uniform_times
from t2i_course.diffusion.closed_form import CaptionGaussian
from t2i_course.diffusion.preconditioning import wiener
from t2i_course.flow import flow_matching
from t2i_course.flow.flow_matching import LinearPath, logit_normal
from t2i_course.sweeps.flow.flow_matching import Unframed

PROCESSES = [LinearPath(), VP(linear_betas())]
CAPTIONS = ["a bold red seven on white", "a thin blue three leaning right on pink", "", "a green digit"]


@pytest.fixture(scope="module")
def world():
    "Small captioned pictures (3x8x8), their tokenizer, and what a CaptionGaussian is fitted on."
    torch.manual_seed(0)
    data = Painted()
    tok = WordTokenizer(data.words)
    batch = data.batch("train", Draws(0, torch.arange(1500)))
    pictures = torch.nn.functional.avg_pool2d(batch.x, 4) + .05 * torch.randn(1500, 3, 8, 8)
    cond = tok(batch.captions).drop(Draws(0, torch.arange(1500)).uniform("drop") >= .1, tok.null())
    return tok, pictures, cond.ids


def fitted(world, process, rank=20):
    tok, pictures, ids = world
    groups = [[tok.index[word] for word in ("thin", "bold")], [tok.index[word] for word in ("left", "right")]]
    return CaptionGaussian(process, len(tok), groups, rank=rank).fit(pictures, ids)


def gaussian_of(skip, ids):
    "Mean (n) and covariance (n n), n = channels x pixels, of one caption, written out in full."
    mu = skip.mean(ids)
    kappa, frame = skip.colour(ids, mu)
    group = skip.group(ids)[0]
    U, L, Q, rest = skip.tables["U"], skip.tables["L"][group], skip.tables["Q"][group], skip.tables["rest"]
    space = U @ Q @ L.diag() @ Q.T @ U.T + rest * (torch.eye(len(U)) - U @ U.T)
    colour = frame[0] @ kappa[0].diag() @ frame[0].T
    return mu.flatten().double(), torch.kron(colour, space).double()


# --- The closed form ---

def test_one_number_is_edms_preconditioning():
    sigma, data = torch.tensor([.002, .1, 1., 80.]), .5
    gain, error = wiener(Coefs(torch.ones(4), sigma, None, None), torch.tensor(data**2))
    assert torch.allclose(gain, data**2 / (sigma**2 + data**2))
    assert torch.allclose(error.sqrt(), sigma * data / (sigma**2 + data**2).sqrt())


@pytest.mark.parametrize("process", PROCESSES, ids=["linear", "vp"])
@pytest.mark.parametrize("rank", [20, 64])
def test_guess_is_the_conditional_mean(world, process, rank):
    "E[x0|x_t] and the trace of the posterior covariance, by inverting a 192 x 192 matrix."
    skip, tok = fitted(world, process, rank), world[0]
    cond = tok(CAPTIONS)
    x_t, t = torch.randn(4, 3, 8, 8), torch.tensor([.1, .4, .7, .95])
    guess, c = skip(x_t, t, cond), process.coefs(t)
    for i in range(4):
        mu, cov = gaussian_of(skip, cond.ids[i:i + 1])
        alpha, sigma = c.alpha[i].double(), c.sigma[i].double()
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(len(mu)))
        want = mu + gain @ (x_t[i].flatten().double() - alpha * mu)
        left = (cov - alpha * gain @ cov).trace() / len(mu)
        assert torch.allclose(guess.x0_hat[i].flatten().double(), want, atol=2e-4)
        assert abs(guess.c_out[i].item() - left.sqrt().item()) < 1e-4


@pytest.mark.parametrize("process", PROCESSES, ids=["linear", "vp"])
def test_c_out_is_the_error_on_gaussian_data(world, process):
    skip, tok = fitted(world, process), world[0]
    n, cond = 2000, tok(CAPTIONS[:1] * 2000)
    mu, cov = gaussian_of(skip, cond.ids[:1])
    x0 = (mu + torch.randn(n, len(mu)).double() @ torch.linalg.cholesky(cov).T).float().view(n, 3, 8, 8)
    for t in (.1, .5, .9):
        time = torch.full((n,), t)
        c = process.coefs(time)
        x_t = c.alpha[0] * x0 + c.sigma[0] * torch.randn_like(x0)
        guess = skip(x_t, time, cond)
        rms = (guess.x0_hat - x0).square().mean().sqrt()
        assert abs(rms / guess.c_out[0].item() - 1) < .02
        target = torch.einsum("bij,bihw->bjhw", guess.frame, x0 - guess.x0_hat) / guess.c_out
        assert abs(target.square().mean() - 1) < .04


def test_frame_is_a_rotation(world):
    guess = fitted(world, LinearPath())(torch.randn(4, 3, 8, 8), torch.rand(4), world[0](CAPTIONS))
    assert torch.allclose(guess.frame @ guess.frame.mT, torch.eye(3).expand(4, 3, 3), atol=1e-5)
    assert guess.inputs.shape == (4, 9, 8, 8)


def test_saved_tables_give_the_same_guess(world, tmp_path):
    from safetensors.torch import load_file, save_file
    skip, tok = fitted(world, LinearPath()), world[0]
    save_file(skip.tables, tmp_path / "skip.safetensors")
    again = CaptionGaussian(LinearPath(), len(tok), skip.groups, rank=skip.rank)
    again.tables = load_file(tmp_path / "skip.safetensors")
    x_t, t, cond = torch.randn(4, 3, 8, 8), torch.rand(4), tok(CAPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(skip(x_t, t, cond), again(x_t, t, cond)))


def test_words_never_seen_and_long_captions_are_harmless(world):
    skip, tok = fitted(world, LinearPath()), world[0]
    cond = tok(["안녕 🙂 a digit", "a " * 50])
    guess = skip(torch.randn(2, 3, 8, 8), torch.tensor([1., 1e-4]), cond)
    assert all(part.isfinite().all() for part in guess)


# --- The path ---

@pytest.mark.parametrize("target", ["eps", "x0", "v", "velocity"])
def test_linear_path_and_back(target):
    t = torch.tensor([.05, .3, .5, .9])
    c = Coefs(*(u.view(-1, 1, 1, 1) for u in LinearPath().coefs(t)))
    x0, eps = torch.randn(2, 4, 3, 8, 8)
    p, q = getattr(ddpm, target)(c)
    found = solve(c, p, q, c.alpha * x0 + c.sigma * eps, p * x0 + q * eps)
    assert torch.allclose(found[0], x0, atol=1e-4) and torch.allclose(found[1], eps, atol=1e-4)


def test_velocity_is_the_derivative():
    t = torch.tensor([.2, .7], dtype=torch.float64)
    for process in PROCESSES:
        a, b, c = (process.coefs(s) for s in (t - 1e-4, t + 1e-4, t))
        assert torch.allclose((b.alpha - a.alpha) / 2e-4, c.dalpha, rtol=2e-2)
        assert torch.allclose((b.sigma - a.sigma) / 2e-4, c.dsigma, rtol=2e-2)


def test_step_on_the_line_is_eulers():
    x0, eps, path = torch.randn(4, 2), torch.randn(4, 2), LinearPath()
    t, s = torch.full((4, 1), .6), torch.full((4, 1), .5)
    x_t = .4 * x0 + .6 * eps
    assert torch.allclose(step(path.coefs(t), path.coefs(s), x0, eps), x_t - .1 * (eps - x0), atol=1e-6)


def test_sampler_on_the_line_is_eulers():
    "The whole loop of the library against equation 4, with a field that depends on x and t."
    def x0_of(x, t): return .5 * torch.tanh(x) * t.view(-1, 1)
    ts = torch.linspace(1, 0, 9)
    start = torch.randn(50, 2)
    x = start
    for t in ts[:-1]: x = x - (x - x0_of(x, t.expand(50))) / t / 8
    *_, found = sample(lambda x, t: (x0_of(x, t), None), LinearPath(), start, ts)
    assert torch.allclose(found, x, atol=1e-5)


# --- The times ---

def test_logit_normal_has_its_density():
    t = torch.linspace(1e-4, 1 - 1e-4, 200_001, dtype=torch.float64)
    p = torch.exp(-torch.logit(t)**2 / 2) / (t * (1 - t) * (2 * math.pi)**.5)
    assert abs(torch.trapezoid(p, t) - 1) < 1e-3 and p[0] < 1e-6
    middle = torch.trapezoid(p * ((t > .25) & (t < .75)), t).item()
    assert round(middle, 2) == .73
    drawn = logit_normal(0., 1.)(Draws(0, torch.arange(20_000)))
    assert abs(((drawn > .25) & (drawn < .75)).float().mean().item() - middle) < .005
    shifted = torch.logit(logit_normal(-.7, 1.4)(Draws(1, torch.arange(20_000))))
    assert abs(shifted.mean() + .7) < .02 and abs(shifted.std() - 1.4) < .03


@pytest.mark.parametrize("times", [uniform_times, logit_normal(-.3, 1.4), flow_matching.mode_times()])
def test_times_are_inside_and_repeatable(times):
    t = times(Draws(3, torch.arange(1000)))
    assert t.shape == (1000,) and 0 < t.min() and t.max() < 1
    assert torch.allclose(t[500:], times(Draws(3, torch.arange(500, 1000))), atol=1e-6)


# --- The recipe ---

def test_a_recipe_builds_the_same_model_again():
    data = Painted()
    config = flow_matching.recipe_for(data, "smoke")
    assert all(set(group) <= set(data.words) for group in config.groups)
    shapes = []
    for _ in range(2):
        tok, den = flow_matching.build(config)
        shapes.append({name: value.shape for name, value in den.net.state_dict().items()})
    assert shapes[0] == shapes[1]
    assert den.net.in_channels == 9 and isinstance(den.process, LinearPath)
    assert flow_matching.build(config | dict(skip=False))[1].net.in_channels == 3


def test_unframed_skip_is_the_same_denoiser_turned_back(world):
    skip = fitted(world, LinearPath())
    x_t, t, cond = torch.randn(4, 3, 8, 8), torch.rand(4), world[0](CAPTIONS)
    framed, plain = skip(x_t, t, cond), Unframed(skip)(x_t, t, cond)
    back = torch.einsum("bij,bihw->bjhw", framed.frame, plain.inputs[:, :3])
    assert torch.allclose(back, framed.inputs[:, :3], atol=1e-5)
    assert torch.equal(plain.x0_hat, framed.x0_hat)
