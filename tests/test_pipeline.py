"The diffusers + accelerate pipeline: tokenizer, accumulation, what happens at a step and what does not, exact resume, the format on disk."
import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from arms import made
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.core.metrics import evaluate, load_judge
from t2i_course.scale.pipeline import (TINY, Drawer, Run, Settings, as_pipeline, bpe_tokenizer, drop_captions, fresh_accelerator,
                                       load_pipeline, main, make_parts, make_vae, painter, set_scale, tokens, train_vae)
from t2i_course.sweeps.scale import pipeline as sweep
from t2i_course.sweeps.scale.pipeline import SWEEP, ours

DATA = load("digits")
S = Settings(**TINY | dict(steps=6, batch=4, accumulate=2, warmup=2, lr=1e-3, schedule="linear"))


@pytest.fixture(scope="module")
def fresh():
    "Untrained parts with a scaling factor."
    parts = make_parts(DATA, S)
    parts.vae.eval().requires_grad_(False)
    set_scale(parts.vae, DATA.batch("train", Draws(0, torch.arange(64))).x)
    return parts


def all_of(run): return torch.cat([p.detach().flatten() for p in (*run.net.parameters(), *run.ema.shadow_params)])


@pytest.fixture(scope="module")
def straight(fresh, tmp_path_factory):
    "A run to its end, and the checkpoint it left at half time."
    run, folder = Run(copy.deepcopy(fresh), DATA, S), tmp_path_factory.mktemp("run") / "checkpoint"
    updates = []
    for u in run.train():
        updates.append(u)
        if u.step == 3: run.save(folder)
    return run, updates, folder


# --- Settings ---

def test_optimizer_is_that_of_the_script():
    s = Settings()
    assert (s.lr, s.betas, s.weight_decay, s.eps, s.clip, s.ema_decay) == (1e-4, (.9, .999), 1e-2, 1e-8, 1., .9999)
    assert s.drop == .1
    json.dumps(asdict(s))


@pytest.mark.parametrize("scale", SWEEP)
@pytest.mark.parametrize("name", ["digits", "painted"])
def test_every_scale_has_settings(scale, name):
    s = ours(name, scale, 3)
    assert s.seed == 3 and s.accumulate > 1 and len(s.vae_widths) == 3


# --- Text ---

def test_tokenizer_knows_the_captions_and_spells_the_rest(tmp_path):
    painted = load("painted")
    captions = painted.batch("train", Draws(0, torch.arange(500))).captions
    tok = bpe_tokenizer(captions)
    back = tok.batch_decode(tok(captions).input_ids, skip_special_tokens=True)
    assert [b.strip() for b in back] == captions
    assert max(len(ids) for ids in tok(captions).input_ids) == tok.model_max_length
    for word in painted.words: assert len(tok(word).input_ids) == 3, word          # one token between two ends
    assert tok.decode(tok("Zebra 99").input_ids, skip_special_tokens=True).split() == ["zebra", "9", "9"]
    ids = torch.tensor([i for c in (*captions, "zebra é") for i in tok(c).input_ids])
    assert ids.max() < len(tok) and len(set(tok.get_vocab().values())) == len(tok)
    tok.save_pretrained(tmp_path)
    again = type(tok).from_pretrained(tmp_path)
    assert torch.equal(tokens(again, captions), tokens(tok, captions)) and again.model_max_length == tok.model_max_length


def test_long_captions_are_cut_and_short_ones_padded(fresh):
    tok = fresh.tokenizer
    ids = tokens(tok, ["", "a handwritten seven and a handwritten seven", "a handwritten seven"])
    assert ids.shape == (3, tok.model_max_length)
    assert (ids[0, 1:] == tok.eos_token_id).all() and ids[1, -1] == tok.eos_token_id


def test_captions_are_dropped_one_by_one():
    torch.manual_seed(0)
    ids, empty = torch.arange(5).expand(40_000, 5), torch.full((1, 5), 9)
    out = drop_captions(ids, empty, .1)
    gone = (out == 9).all(1)
    assert torch.equal(out[~gone], ids[~gone]) and abs(gone.double().mean() - .1) < .01
    groups = gone.view(-1, 64)
    assert (groups.any(1) & ~groups.all(1)).double().mean() > .99
    assert torch.equal(drop_captions(ids, empty, 0.), ids) and (drop_captions(ids, empty, 1.) == 9).all()


# --- Training ---

def test_schedule_ends_in_noise_and_asks_for_v(fresh):
    noiser = fresh.scheduler
    x0, eps, t = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.tensor([0, 300, 700, 999])
    a, s = (v.sqrt().view(-1, 1, 1, 1) for v in (noiser.alphas_cumprod[t], 1 - noiser.alphas_cumprod[t]))
    assert torch.allclose(noiser.add_noise(x0, eps, t), a * x0 + s * eps, atol=1e-6)
    assert torch.allclose(noiser.get_velocity(x0, eps, t), a * eps - s * x0, atol=1e-6)
    assert noiser.alphas_cumprod[-1].sqrt() < 1e-3


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_four_micro_batches_are_one_batch(fresh, dtype, most):
    torch.manual_seed(0)
    x, y, t = torch.randn(8, 4, 4, 4, dtype=dtype), torch.randn(8, 4, 4, 4, dtype=dtype), torch.arange(8) * 100
    ids = tokens(fresh.tokenizer, DATA.batch("train", Draws(0, torch.arange(8))).captions)
    found = []
    for k in (1, 4):
        acc, net = fresh_accelerator(replace(S, accumulate=k)), copy.deepcopy(Drawer(fresh.text_encoder, fresh.unet)).to(dtype)
        net, opt = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=.1))
        for i in torch.arange(8).split(8 // k):
            with acc.accumulate(net):
                acc.backward(F.mse_loss(net(x[i], t[i], ids[i]), y[i]))
                opt.step()
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    start = torch.cat([p.detach().flatten() for p in Drawer(fresh.text_encoder, fresh.unet).parameters()]).to(dtype)
    assert (found[0] - found[1]).norm() < most * (found[0] - start).norm()


def test_clip_average_and_rate_move_once_a_step(fresh):
    run, norms, rates = Run(copy.deepcopy(fresh), DATA, replace(S, clip=.5)), [], []
    clip = run.acc.clip_grad_norm_
    def counted(params, most):
        params = list(params)
        norm = clip(params, most)
        norms.append(torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm().item())
        return norm
    run.acc.clip_grad_norm_ = counted
    for u in run.train(): rates.append(u.lr)
    assert len(norms) == S.steps and max(norms) < .5001
    assert run.ema.optimization_step == S.steps and all(s["step"] == S.steps for s in run.opt.state_dict()["state"].values())
    assert rates == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_all_of_it_resumes_to_the_bit(fresh, straight):
    run, updates, folder = straight
    again = Run(copy.deepcopy(fresh), DATA, S).load(folder)
    rest = list(again.train())
    assert [u.step for u in rest] == [4, 5, 6] and [u.loss for u in rest] == [u.loss for u in updates[3:]]
    assert torch.equal(all_of(again), all_of(run))
    assert again.progress.seconds > updates[2].seconds and rest[-1].images == updates[-1].images == 48


@pytest.mark.parametrize("broken", ["data", "generator", "average"])
def test_resume_needs_each_of_its_pieces(fresh, straight, broken):
    run, _, folder = straight
    again = Run(copy.deepcopy(fresh), DATA, S).load(folder)
    if broken == "data": again.acc.skip_first_batches = lambda loader, n: loader
    if broken == "generator": again.loader.generator = None
    if broken == "average": again.ema.load_state_dict(Run(copy.deepcopy(fresh), DATA, S).ema.state_dict())
    for _ in again.train(): pass
    assert not torch.equal(all_of(again), all_of(run))


def test_averaged_weights_are_there_inside_and_gone_afterwards(straight):
    run = straight[0]
    own = [p.detach().clone() for p in run.net.parameters()]
    with pytest.raises(KeyError), run.averaged() as parts:
        assert parts is run.parts
        assert all(torch.equal(p, q) for p, q in zip(run.net.parameters(), run.ema.shadow_params))
        raise KeyError
    assert all(torch.equal(p, q) for p, q in zip(run.net.parameters(), own))
    assert any(not torch.equal(p, q) for p, q in zip(own, run.ema.shadow_params))


def test_a_loss_that_is_not_a_number_stops_the_run(fresh):
    parts = copy.deepcopy(fresh)
    next(parts.unet.parameters()).data.fill_(float("nan"))
    with pytest.raises(CourseError, match="learning rate"): next(Run(parts, DATA, S).train())


def test_autoencoder_learns_and_is_scaled():
    s, losses = replace(S, vae_images=480), []
    torch.manual_seed(0)
    vae = make_vae(DATA.shape, s)
    train_vae(vae, DATA, s, progress=lambda r: losses.append(r.loss))
    assert sum(losses[-4:]) < .7 * sum(losses[:4])
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.training
    with torch.no_grad(): z = vae.encode(DATA.batch("test", Draws(0, torch.arange(100))).x).latent_dist.sample()
    assert .8 < (z * vae.config.scaling_factor).std() < 1.25


# --- On disk and drawing ---

def test_pipeline_is_the_same_from_disk(straight, tmp_path):
    run, words = straight[0], ["a handwritten two", "", "a handwritten nine"]
    with run.averaged() as parts:
        as_pipeline(parts).save_pretrained(tmp_path)
        x = painter(as_pipeline(parts), 3)(words, 5)
    y = painter(load_pipeline(tmp_path), 3)(words, 5)
    assert torch.equal(x, y) and x.shape == (3, 1, 16, 16) and x.min() >= -1 and x.max() <= 1
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_a_picture_depends_on_its_seed_and_place_alone(straight):
    pipe, words = as_pipeline(straight[0].parts), [f"a handwritten {w}" for w in ("one", "two", "three")]
    x = painter(pipe, 3)(words, 1)
    assert torch.allclose(painter(pipe, 3, batch=1)(words, 1), x, atol=1e-4)
    assert (painter(pipe, 3)(words, 2) - x).abs().max() > .01


def test_row_of_the_protocol(straight):
    row = evaluate(painter(as_pipeline(straight[0].parts), 2), DATA, load_judge("digits"), 20, 0)
    assert {"fd", "fd_floor", "kid", "recall", "obedience", "nearest", "seconds_per_1000"} <= row.keys()


def test_command_line(tmp_path, capsys, monkeypatch):
    small = [w for k, v in (TINY | dict(steps=2, accumulate=1)).items()
             for w in (f"--{k}", ",".join(map(str, v)) if isinstance(v, tuple) else str(v))]
    main(["--data", "digits", "--out", str(tmp_path), "--processes", "1", *small])
    assert (tmp_path / "unet").is_dir() and (tmp_path / "checkpoint").is_dir() and "1 processes" in capsys.readouterr().out
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 2
    with pytest.raises(CourseError, match="2"): main(["--data", "digits", "--out", str(tmp_path), "--processes", "2", *small])


def test_experiments_yield_rows(monkeypatch):
    monkeypatch.setitem(SWEEP, "smoke", SWEEP["smoke"] | dict(n=12, draw=2))
    monkeypatch.setattr(sweep, "ours", lambda name, scale, seed=0: replace(S, steps=1, seed=seed, vae_images=32))
    found = made(sweep)
    assert set(found) == {"setting", "codec.digits", "arms.digits.seed0", "codec.painted", "arms.painted.seed0"}
    json.dumps(found)
