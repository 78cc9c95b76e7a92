"""DDIM upwards against diffusers and against itself; edits by caption.

`python tests/test_inversion.py` prints the largest difference of each comparison."""
from functools import partial

import pytest
import torch
from arms import made
from t2i_course.core.shipped import shipped
from t2i_course.diffusion.ddpm import VP, guided, linear_betas, sample
from t2i_course.diffusion.inversion import ddim_invert, edit_caption, inversion_error
from t2i_course.diffusion.samplers import exact, rho_times
from t2i_course.diffusion.schedules import EDM
from t2i_course.flow.flow_matching import LinearPath
from t2i_course.sweeps.diffusion import inversion as sweep
from walks import CENTRES, FREE, equals_diffusers, largest_error, printed, theirs_inverse

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("same_noise")]

CASES = {
    "DDIM inverse, leading": (ddim_invert, partial(theirs_inverse, 10, "leading")),
    "DDIM inverse, trailing": (ddim_invert, partial(theirs_inverse, 20, "trailing")),
}


test_equals_diffusers = equals_diffusers(CASES)


def test_the_comparison_can_fail():
    assert largest_error(partial(ddim_invert, rounds=2), CASES["DDIM inverse, trailing"][1]) > 1e-3


@pytest.mark.parametrize("process", [LinearPath(), EDM(), VP(linear_betas())], ids=["line", "edm", "vp"])
def test_inversion_comes_back(process):
    p = exact(process, CENTRES)
    x0 = CENTRES.repeat(20, 1) + .2 * torch.randn(60, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    def off(n, rounds):
        ts = rho_times(process, n)
        *_, noise = ddim_invert(p, process, x0, ts.flip(0), rounds=rounds)
        *_, back = sample(p, process, noise, ts, clamp=FREE)
        return (back - x0).norm(dim=1).median().item() # points between the centres are not sent back by any sampler
    once, often, fine = off(20, 1), off(20, 20), off(80, 1)
    assert often < .05 * once and fine < .5 * once, (once, often, fine)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_trip_of_a_gaussian(rounds):
    "The exact network of normal data is a multiplication: what a trip loses is known."
    s2, process, ts = 1., EDM(), torch.tensor([.5, .55], dtype=torch.float64)
    low, high = process.coefs(ts).sigma.double().tolist()
    def p(x, t):
        l = process.coefs(t).sigma.double().view(-1, 1)
        return x * s2 / (s2 + l * l), x * l / (s2 + l * l)
    x = torch.tensor([[1.]], dtype=torch.float64)
    up, = ddim_invert(p, process, x, ts, rounds=rounds)
    down, = sample(p, process, up, ts.flip(0), clamp=FREE)
    q = (high - low) * high / (s2 + high * high)
    assert abs(down.item() - (1 - q**(rounds + 1))) < 1e-5


def pictures(den, tok, n=4):
    noise = torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    cond = tok([f"a handwritten {w}" for w in ("one", "two", "three", "four")[:n]])
    *_, x = sample(guided(den, cond), den.process, noise, torch.linspace(1, 0, 21))
    return x, cond


def test_edits_on_the_shipped_model():
    "The same caption returns the picture, another one does not; turned round early, nothing changes."
    tok, den = shipped("mnist_ddpm")
    x, cond = pictures(den, tok)
    other = tok([f"a handwritten {w}" for w in ("eight", "nine", "zero", "six")])
    off = lambda after, **more: (edit_caption(den, cond, after, x, 20, **more) - x).square().mean().sqrt().item()
    same, changed, early = off(cond), off(other), off(other, up_to=.2)
    assert same < .1 < .3 < changed and early < .15, (same, changed, early)
    one, four = (inversion_error(guided(den, cond), den.process, x, 10, r)[0] for r in (1, 4))
    assert four < .7 * one, (one, four)


def test_sweep(runs_at_smoke):
    rows = made(sweep, **runs_at_smoke("inversion"))
    assert {k.split(".")[0] for k in rows} == {"setting", "inversion", "edit"}
    assert {k.split(".")[1] for k in rows if k.startswith("edit")} == {*sweep.EDITS, "fresh"}


def test_the_next_number():
    assert [sweep.next_number(f"a handwritten {w}") for w in ("zero", "nine")] == ["a handwritten one", "a handwritten zero"]


if __name__ == "__main__": printed(CASES)
