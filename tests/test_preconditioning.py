"EDM's scalar skip against diffusers, its fit, and the ladder from DDPM to EDM."
import math

import pytest
import torch
from arms import made
from t2i_course.core.conditioning import raw_cond
from t2i_course.core.data import Draws, Painted
from t2i_course.core.sources import load
from t2i_course.diffusion.ddpm import VP, Coefs, Denoiser, linear_betas, recipe_for, v, view
from t2i_course.diffusion.preconditioning import ScalarSkip, fit_skip, make_arm, wiener
from t2i_course.diffusion.schedules import EDM, edm_sigmas, log_snr
from t2i_course.sweeps.diffusion import preconditioning as sweep

SIGMAS = [.002, .05, .5, 3., 80.]


# --- The scalar form ---

@pytest.mark.parametrize("sigma_data", [.25, .5, 1.])
def test_scalar_skip_is_diffusers_edm(sigma_data):
    "Input, output and the noise level it is told, at five noise levels."
    from diffusers import EDMEulerScheduler
    scheduler = EDMEulerScheduler(sigma_data=sigma_data)
    edm, skip = EDM(), ScalarSkip(EDM(), sigma_data)
    generator = torch.Generator().manual_seed(0)
    for value in SIGMAS:
        sigma = torch.tensor([value], dtype=torch.float64)
        x = torch.randn(1, 3, 4, 4, generator=generator) * (value**2 + sigma_data**2)**.5
        out = torch.randn(1, 3, 4, 4, generator=generator)
        guess = skip(x, edm.time(sigma), None)
        assert torch.allclose(guess.inputs, scheduler.precondition_inputs(x, sigma).float(), atol=1e-5, rtol=1e-5)
        ours = guess.x0_hat + guess.c_out * torch.einsum("bij,bjhw->bihw", guess.frame, out)
        assert torch.allclose(ours, scheduler.precondition_outputs(x, out, sigma).float(), atol=1e-5, rtol=1e-5)
        told = scheduler.precondition_noise(sigma).item()
        assert abs(told - math.log(value) / 4) < 1e-6


def test_denoiser_predicts_what_edm_predicts():
    "The whole way: c_skip x + c_out F(c_in x), by hand, and the noise that goes with it."
    edm, sd = EDM(), .4
    net = lambda x, t, cond: .3 * x.roll(1, -1) + t.view(-1, 1, 1, 1)
    den = Denoiser(net, edm, skip=ScalarSkip(edm, sd))
    sigma = torch.tensor([.1, 2.], dtype=torch.float64)
    x, t = torch.randn(2, 1, 4, 4), edm.time(sigma)
    s = sigma.float().view(-1, 1, 1, 1)
    both = s**2 + sd**2
    want = sd**2 / both * x + s * sd / both.sqrt() * net(x / both.sqrt(), t.float(), None)
    x0_hat, eps_hat = den.predict(x, t.float(), None)
    assert torch.allclose(x0_hat, want, atol=1e-5)
    assert torch.allclose(x0_hat + s * eps_hat, x, atol=1e-5)


def test_loss_is_edms_weighted_loss():
    "Unit weight on the output is (sigma^2 + sd^2) / (sigma sd)^2 on the picture; twice the weight would fail here."
    edm, sd, n = EDM(), .7, 6
    net = lambda x, t, cond: .2 * x.tanh() + .1
    null = raw_cond(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    cond = null.map(lambda field: field.expand(n, *field.shape[1:]))
    den = Denoiser(net, edm, skip=ScalarSkip(edm, sd), null=null)
    draws, x0 = Draws(3, torch.arange(n)), torch.randn(n, 1, 4, 4)
    sigma = view(edm.coefs(den.times(draws)).sigma, x0)
    x_t = x0 + sigma * draws.normal("eps", 1, 4, 4)
    x0_hat, _ = den.predict(x_t, den.times(draws), cond)
    weight = (sigma**2 + sd**2) / (sigma * sd)**2
    want = (weight * (x0_hat - x0)**2).flatten(1).mean(1)
    assert torch.allclose(den.loss(x0, cond, draws), want, rtol=2e-3)


def test_v_prediction_is_the_scalar_skip_on_a_vp_process():
    process, t = VP(linear_betas()), torch.tensor([.05, .4, .9])
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    c = Coefs(*(view(u, x0) for u in process.coefs(t)))
    guess = ScalarSkip(process, 1.)(c.alpha * x0 + c.sigma * eps, t, None)
    p, q = v(c)
    assert torch.allclose((x0 - guess.x0_hat) / guess.c_out, -(p * x0 + q * eps), atol=1e-4)


@pytest.mark.parametrize("process", [EDM(), VP(linear_betas())], ids=["edm", "vp"])
def test_unit_variance_at_every_noise_level(process):
    "Painted digits, sigma_data measured on training pictures; twice as much leaves a quarter at the ends."
    data = Painted()
    x = data.batch("train", Draws(1, torch.arange(600))).x
    unseen = data.batch("test", Draws(2, torch.arange(600))).x
    noise = torch.randn(unseen.shape, generator=torch.Generator().manual_seed(0))
    right = ScalarSkip(process).fit(x)
    sd = right.tables["sigma_data"].item()
    assert abs(sd - x.square().mean().sqrt().item()) < 1e-6 and abs(sd - .5) > .1

    def variances(skip, t):
        time = torch.full((len(unseen),), float(t))
        c = Coefs(*(view(u, unseen) for u in process.coefs(time)))
        guess = skip(c.alpha * unseen + c.sigma * noise, time, None)
        return guess.inputs.square().mean().item(), ((unseen - guess.x0_hat) / guess.c_out).square().mean().item()

    for t in torch.linspace(.1, .99, 8):
        assert all(abs(value - 1) < .06 for value in variances(right, t)), t
    wrong = ScalarSkip(process, 2 * sd)
    assert abs(variances(wrong, .02 if isinstance(process, VP) else .2)[0] - .25) < .02
    assert abs(variances(wrong, .999)[1] - .25) < .02


def test_skip_amplifies_least():
    "c_out as a function of c_skip has its minimum at the wiener gain."
    c, var = Coefs(torch.tensor(.7), torch.tensor(.6), None, None), torch.tensor(.3)
    gain, error = wiener(c, var)
    c_out = lambda k: (1 - c.alpha * k)**2 * var + k**2 * c.sigma**2
    assert abs(c_out(gain) - error) < 1e-6
    assert c_out(gain) < c_out(gain + .01) and c_out(gain) < c_out(gain - .01)


def test_scalar_skip_is_the_conditional_mean_of_gaussian_data():
    "Regress x0 on x_t: the slope is c_skip, what is left has the size c_out."
    generator, sd, sigma = torch.Generator().manual_seed(0), .6, .8
    x0 = sd * torch.randn(1, 1, 400, 400, generator=generator)
    x_t = x0 + sigma * torch.randn(x0.shape, generator=generator)
    guess = ScalarSkip(EDM(), sd)(x_t, EDM().time(torch.tensor([sigma])), None)
    slope = (x0 * x_t).sum() / x_t.square().sum()
    assert abs(slope - (guess.x0_hat / x_t).median()) < 5e-3
    assert abs((x0 - guess.x0_hat).square().mean().sqrt() / guess.c_out.item() - 1) < .01


def test_what_is_missed_is_uncorrelated_with_the_input():
    "Demand 2 in other words: no copy of the input says anything about F."
    generator, skip = torch.Generator().manual_seed(0), ScalarSkip(EDM(), .6)
    x0 = .6 * torch.randn(4, 1, 200, 200, generator=generator)
    for sigma in SIGMAS:
        x_t = x0 + sigma * torch.randn(x0.shape, generator=generator)
        guess = skip(x_t, EDM().time(torch.full((4,), sigma)), None)
        wanted = (x0 - guess.x0_hat) / guess.c_out
        assert abs((wanted * guess.inputs).mean()) < .01 and abs(wanted.square().mean() - 1) < .02, sigma


def test_fit_skip_measures_sigma_data_and_leaves_a_model_without_skip_alone():
    data, process = load("digits"), VP(linear_betas())
    config = recipe_for(data, "smoke")
    tok, den = make_arm(config, process, ScalarSkip(process))
    assert fit_skip(den, data, tok, 300) is den
    x = data.batch("train", Draws(1234, torch.arange(300))).x
    assert torch.equal(den.skip.tables["sigma_data"], x.square().mean().sqrt())
    tok, den = make_arm(config, process)
    assert fit_skip(den, data, tok, 300) is den and den.skip is None


# --- The ladder ---

def test_each_row_changes_one_thing():
    rows = list(sweep.rows().values())
    assert all(len(change) == 1 for change in list(sweep.CHANGES.values())[1:])
    for above, below in zip(rows, rows[1:]): assert sum(above[k] != below[k] for k in above) == 1


def test_ddpms_levels_on_edms_clock_are_the_same_levels():
    vp, edm, t = VP(linear_betas()), EDM(), torch.linspace(.02, .9, 9)
    there = sweep.same_levels(vp, edm, t)
    assert torch.allclose(log_snr(edm, there), log_snr(vp, t), atol=1e-4)
    assert sweep.same_levels(vp, edm, torch.ones(1)) == 1, "EDM ends at 80"


def test_the_process_changes_the_clock_and_nothing_else():
    "At equal levels the network sees and is asked for the same on DDPM's process and on EDM's."
    vp, edm, t = VP(linear_betas()), EDM(), torch.tensor([.1, .5, .9])
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def asked(process, t):
        c = Coefs(*(view(u, x0) for u in process.coefs(t)))
        guess = ScalarSkip(process, .7)(c.alpha * x0 + c.sigma * noise, t, None)
        return guess.inputs, (x0 - guess.x0_hat) / guess.c_out
    for a, b in zip(asked(vp, t), asked(edm, sweep.same_levels(vp, edm, t).float())): assert torch.allclose(a, b, atol=1e-3)


def test_experiments_measure_every_row():
    rows = made(sweep)
    assert rows["setting"]["sigma_data"] > .6 and rows["setting"]["calls"] == 5
    need = {"recipe", "params", "images", "train_seconds", "nfe", "fd", "fd_floor", "recall", "obedience"}
    for name in sweep.CHANGES:
        row = rows[f"ladder.{name}.seed0"]
        assert need <= row.keys() and math.isfinite(row["fd"]) and row["nfe"] == 5, name
    losses = {k: rows[f"ladder.{k}.seed0"]["loss"] for k in ("density", "levels", "heun")}
    assert len(set(losses.values())) == 1, "rows that differ in drawing share their model"
    assert len(edm_sigmas(3)) == 4 # three steps, 2*3-1 calls of Heun
