"The KL autoencoder: gradients, closed forms, both turns, exact resume, diffusers' AutoencoderKL, latents on disk."
import json

import pytest
import torch
from t2i_course.codec.vae import (Config, KL_F8, LDM_KL_F8, VAE, WHITENING, Decoder, Encoder, KLModel, PatchDiscriminator,
                                  Perceptual, StableVAE, active_units, adaptive_weight, build, from_diffusers,
                                  kl_to_normal, lookalikes, psnr, recipe_for, reparameterise, whiten)
from t2i_course.core.contracts import from_json, to_json
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for
from t2i_course.core.metrics import load_judge, obedience
from t2i_course.core.prepare import prepare
from t2i_course.core.training import feed, train


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def small(**changes):
    "A tiny model of the recipe on digits."
    config = recipe_for(load("digits"), "smoke") | dict(widths=[8, 16], d_disc=8, batch=16) | changes
    torch.manual_seed(0)
    tok, model = build(config)
    return config, tok, model


# --- Networks ---

@pytest.mark.parametrize("widths, depth", [((8,), 0), ((8, 16), 1), ((8, 8, 16), 2)])
def test_factor_is_two_to_the_number_of_grids(widths, depth):
    f, x = 2 ** len(widths), torch.randn(2, 3, 32, 16)
    z = Encoder(3, 5, widths, depth)(x)
    assert z.shape == (2, 5, 32 // f, 16 // f)
    assert Decoder(3, 5, widths, depth)(z).shape == x.shape
    assert VAE(3, 4, widths, depth).grid((3, 32, 16)) == (4, 32 // f, 16 // f)


def test_every_weight_gets_a_gradient():
    torch.manual_seed(0)
    codec = VAE(1, 4, (8, 16))
    for block in codec.modules():  # the last convolution of a block starts at zero and would hold back the one before
        if hasattr(block, "conv2"): torch.nn.init.normal_(block.conv2.weight, std=.1)
    mean, logvar = codec.encode(torch.randn(2, 1, 16, 16)).chunk(2, 1)
    codec.decoder(reparameterise(mean, logvar, torch.randn(mean.shape))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())


# --- The posterior ---

def test_gradient_of_a_draw_is_that_of_the_expectation():
    "E (m + s e - a)^2 = (m-a)^2 + s^2: gradients 2(m-a) for the mean and s^2 for the log-variance."
    mean, logvar = torch.tensor(.7, requires_grad=True), torch.tensor(-.4, requires_grad=True)
    noise = torch.randn(400_000, generator=seeded())
    (reparameterise(mean, logvar, noise) - .2).square().mean().backward()
    assert abs(mean.grad - 2 * .5) < .01
    assert abs(logvar.grad - logvar.exp()) < .01


@pytest.mark.parametrize("mean, logvar", [(0., 0.), (1.5, -2.), (-.3, 1.)])
def test_kl_is_that_of_torch_and_of_counting(mean, logvar):
    mean, logvar = torch.tensor(mean), torch.tensor(logvar)
    q, p = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0., 1.)
    assert torch.allclose(kl_to_normal(mean, logvar), torch.distributions.kl_divergence(q, p), atol=1e-6)
    z = reparameterise(mean, logvar, torch.randn(400_000, generator=seeded()))
    assert abs((q.log_prob(z) - p.log_prob(z)).mean() - kl_to_normal(mean, logvar)) < .02


def test_active_units_counts_numbers_that_depend_on_the_picture():
    mean = torch.zeros(500, 2, 1, 2)
    mean[:, 0, 0, 1] = torch.randn(500, generator=seeded())
    mean[:, 1, 0, 0] = .05 * torch.randn(500, generator=seeded(1))
    assert active_units(mean) == .25 and active_units(mean, least=1e-4) == .5


# --- The losses ---

def test_adaptive_weight_sets_the_ratio_of_the_gradients():
    head = torch.nn.Linear(5, 3)
    y = head(torch.randn(7, 5, generator=seeded()))
    nll, fool = (y - 1).abs().mean(), 40 * (y.square() + y[:, :1]).mean()
    w = adaptive_weight(nll, fool, head.weight, .5)
    a, b = (torch.autograd.grad(v, head.weight, retain_graph=True)[0].norm() for v in (nll, fool))
    assert not w.requires_grad and torch.allclose(w * b / a, torch.tensor(.5), atol=1e-4)


def test_adaptive_weight_does_not_depend_on_units():
    "Errors summed instead of averaged give the weighted adversary the same share."
    head = torch.nn.Linear(5, 3)
    y = head(torch.randn(7, 5, generator=seeded()))
    nll, fool = (y - 1).abs().mean(), -y.mean()
    assert torch.allclose(adaptive_weight(1000 * nll, fool, head.weight), 1000 * adaptive_weight(nll, fool, head.weight), rtol=1e-4)


def test_perceptual_distance_is_read_from_the_judge():
    judge, x = load_judge("digits"), load("digits").batch("test", Draws(0, torch.arange(4))).x
    seen, y = Perceptual(judge, (1, 4)), x.flip(3)
    assert seen(x, x).abs().max() < 1e-9
    h, g, want = x, y, 0.
    for i, layer in enumerate(judge.body[:5]):  # with its normalisation as it stands
        h, g = layer(h), layer(g)
        if i in (1, 4):
            a, b = (v / v.norm(dim=1, keepdim=True) for v in (h, g))
            want = want + (a - b).square().sum(1).mean((1, 2))
    assert torch.allclose(seen(x, y), want, atol=1e-4)
    assert not any(p.requires_grad for p in seen.body.parameters())


def test_psnr():
    x = torch.zeros(2, 1, 4, 4)
    assert torch.allclose(psnr(x, x + .2), torch.tensor(20.), atol=1e-4)


def test_loss_without_discriminator_is_the_sum_of_its_terms():
    _, tok, model = small(kl=.01, perceptual=.3)
    b = load("digits").batch("train", Draws(0, torch.arange(4)))
    draws = Draws(1, torch.arange(4))
    model.net.eval()
    t = model.terms(b.x, model.repeat(b.x, draws))
    assert torch.allclose(model.codec_loss(b.x, None, draws), t["rec"] + .3 * t["seen"] + .01 * t["kl"])
    r = model.repeat(b.x, draws)
    nats = kl_to_normal(r.mean, r.logvar).flatten(1).sum(1)
    assert torch.allclose(t["kl"] * 256, nats) and torch.allclose(t["rec"], (b.x - r.y).abs().mean((1, 2, 3)))


def test_facts_of_the_published_training():
    assert LDM_KL_F8 == dict(kl=1e-6, disc_start=50001, disc_weight=.5)


# --- Training: two turns ---

def run(images, model=None, upto=None):
    config, tok, fresh = small()
    model = model or fresh
    state = state_for(model, config)
    for _ in train(state, model.loss, feed(load("digits"), tok), images=images, batch=16, seed=3):
        if upto and state.images >= upto: break
    return state


def test_discriminator_begins_at_its_share():
    config, tok, model = small(since=.5)
    state, seen = state_for(model, config), []
    before = {k: v.clone() for k, v in model.disc.state_dict().items()}
    for r in train(state, model.loss, feed(load("digits"), tok), images=128, batch=16):
        seen.append("disc" in r.turns)
        same = all(torch.equal(v, before[k]) for k, v in model.disc.state_dict().items())
        assert bool(model.net.plays) == seen[-1] and same == (sum(seen) < 2)  # its first step has learning rate 0
    assert seen == [False] * 4 + [True] * 4


@pytest.mark.parametrize("stop", [32, 80, 96])
def test_resume_is_exact(stop):
    "Before the discriminator plays, at its first step, and after."
    whole, half = run(128), run(128, upto=stop)
    saved = {k: v.contiguous().clone() for k, v in half.tensors().items()}  # as a file gives them back
    config, tok, model = small()
    rest = state_for(model, config).load(saved, json.loads(json.dumps(half.numbers())))
    for _ in train(rest, model.loss, feed(load("digits"), tok), images=128, batch=16, seed=3): pass
    a, b = whole.tensors(), rest.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learns_and_a_control_does_not():
    config, tok, model = small(perceptual=0., adversarial=0., widths=(16, 32))
    data, state = load("digits"), None
    state = state_for(model, config)
    losses = [r.loss for r in train(state, model.loss, feed(data, tok), images=960, batch=16)]
    assert sum(losses[-10:]) < .6 * sum(losses[:10])
    b = data.batch("test", Draws(0, torch.arange(64)))
    model.net.eval()
    with torch.no_grad(): y = model.codec(b.x)
    assert (y - b.x).abs().mean() < .7 * (y.roll(1, 0) - b.x).abs().mean()


# --- The protocol: encode, sample, decode ---

def test_sample_whitens_and_decode_undoes_it():
    torch.manual_seed(0)
    codec, x = VAE(1, 4, (8, 16)), load("digits").batch("train", Draws(0, torch.arange(400))).x
    whiten(codec, x)
    with torch.no_grad():
        z = codec.encode(x)
        assert torch.equal(z, codec.encode(x)) and z.shape == (400, 8, 4, 4)
        mean, logvar = z.chunk(2, 1)
        noise = torch.randn(mean.shape, generator=seeded())
        x0 = codec.sample(z, noise)
        assert x0.mean((0, 2, 3)).abs().max() < .05 and (x0.std((0, 2, 3)) - 1).abs().max() < .05
        assert torch.allclose(codec.decode(x0), codec.decoder(reparameterise(mean, logvar, noise)), atol=1e-4)
        assert torch.allclose(codec(x), codec.decoder(mean), atol=1e-4)


def test_training_watches_mean_and_variance():
    codec, drawn = VAE(1, 2, (8,)), torch.randn(200, 2, 4, 4, generator=seeded()) * torch.tensor([3., .2])[:, None, None] + 1
    for _ in range(200): codec.watch(drawn)
    assert torch.allclose(codec.shift, drawn.mean((0, 2, 3)), atol=1e-3)
    assert torch.allclose(codec.var.sqrt(), drawn.std((0, 2, 3)), rtol=.01)


@pytest.mark.parametrize("name", WHITENING)
def test_whitening_of_the_published_models_can_be_undone(name):
    (scale, shift), z = WHITENING[name], torch.randn(4)
    assert torch.allclose((z - shift) * scale / scale + shift, z, atol=1e-6)
    codec = StableVAE(widths=(8, 8), depth=1, groups=4, scale=scale, shift=shift)
    assert torch.allclose(codec.sample(torch.cat([z, z]).view(1, 8, 1, 1)).flatten(), (z - shift) * scale)


# --- Stable Diffusion's autoencoder ---

def test_published_size_is_exact():
    with torch.device("meta"): codec = StableVAE(**KL_F8)
    assert sum(p.numel() for p in codec.parameters()) == 83_653_863 and codec.factor == 8


@pytest.mark.parametrize("widths, depth, z_channels, old", [((16, 32), 1, 4, False), ((8, 16, 16), 2, 4, True), ((8, 16, 24, 24), 2, 16, False)])
def test_same_weights_same_output_as_diffusers(widths, depth, z_channels, old):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    kind = len(widths)
    theirs = AutoencoderKL(block_out_channels=widths, layers_per_block=depth, latent_channels=z_channels, norm_num_groups=8,
                           down_block_types=("DownEncoderBlock2D",) * kind, up_block_types=("UpDecoderBlock2D",) * kind).eval()
    ours, x = StableVAE(z_channels=z_channels, widths=widths, depth=depth, groups=8, scale=1.), torch.rand(2, 3, 32, 48, generator=seeded()) * 2 - 1

    @torch.no_grad()
    def differ():
        state = theirs.state_dict()
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")) if old else ():
            state = {k.replace(new, name): v for k, v in state.items()}
        ours.load_state_dict(from_diffusers(state))
        q, z = theirs.encode(x).latent_dist, ours.encode(x)
        pairs = (z, torch.cat([q.mean, q.logvar], 1)), (ours.decode(ours.sample(z)), theirs.decode(q.mean).sample)
        return max((a - b).abs().max() / max(1., b.abs().max()) for a, b in pairs)
    assert differ() < 1e-5
    for p in theirs.parameters():
        if p.ndim == 1: torch.nn.init.normal_(p, 1. if p.mean() == 1 else 0., .3)  # so that no bias or gain goes unnoticed
    theirs, ours, x = theirs.double(), ours.double(), x.double()
    assert differ() < 1e-9


# --- Latents on disk ---

def test_latents_read_back_are_what_was_encoded(tmp_path):
    torch.manual_seed(0)
    codec, data = VAE(1, 4, (8, 16)).eval(), load("digits")
    prepare(data, tmp_path, 50, codec, shard_size=20, batch=8)
    latents = load(tmp_path, codec=codec)
    latents.window = 0
    read, captions, _ = latents.read(Draws(0, torch.arange(50)))
    parts = [i for shard in torch.arange(50).split(20) for i in shard.split(8)]
    with torch.no_grad(): z = torch.cat([codec.encode(data.batch("train", Draws(0, i)).x) for i in parts])
    assert torch.equal(torch.stack([r["z"] for r in read]), z) and latents.lengths == (20, 20, 10)
    assert captions == data.batch("train", Draws(0, torch.arange(50))).captions
    draws = Draws(4, torch.arange(60, 90))
    b = latents.batch("train", draws)
    assert b.x.shape == (30, *latents.shape) == (30, 4, 4, 4) and latents.demands(b.captions[0]) == {"digit": b.attrs["digit"][0]}
    assert torch.equal(b.x, latents.batch("train", draws).x)
    assert not torch.equal(b.x, latents.batch("train", Draws(5, torch.arange(60, 90))).x)  # the posterior is drawn anew


# --- The recipe ---

@pytest.mark.parametrize("name, most", [("painted", .02), ("digits", .02)])
def test_lookalikes_show_what_is_demanded(name, most):
    data = load(name)
    captions = data.batch("test", Draws(20, torch.arange(40, 80))).captions
    x = lookalikes(data, captions, 1)
    assert x.shape == (40, *data.shape) and torch.equal(x, lookalikes(data, captions, 1))
    assert obedience(load_judge(name), x, data, captions)["all"] > .9
    other = obedience(load_judge(name), x.roll(1, 0), data, captions)["all"]
    assert other < .6


def test_lookalikes_are_unseen_pictures():
    "Of a finite set: test pictures, none twice while there are others; another seed takes others."
    data = load("digits")
    test = data.batch("test", Draws(20, torch.arange(len(data.labels["test"])))).x
    captions = data.batch("test", Draws(21, torch.arange(60))).captions
    x, y = (lookalikes(data, captions, seed) for seed in (0, 1))
    whole, shown = ({p.numpy().tobytes() for p in v} for v in (test, x))
    assert shown <= whole and len(shown) == 60 and (x - y).abs().flatten(1).amax(1).gt(0).sum() > 30


def test_painter_repeats_in_eval_mode():
    config, tok, model = small()
    model.net.train()
    draw = model.painter(tok, config)
    x = draw(["a handwritten seven"] * 3, 0)
    assert model.net.training and x.shape == (3, 1, 16, 16)
    with torch.no_grad(): assert torch.allclose(x, model.codec(lookalikes(load("digits"), ["a handwritten seven"] * 3, 0)), atol=1e-5)
    assert model.options == {} and model.calls(config) == 1 and model.artist is model.codec


@pytest.mark.parametrize("name", ["digits", "painted", "painted2"])
@pytest.mark.parametrize("scale", ["smoke", "demo"])
def test_recipe_builds_from_json(name, scale):
    made = recipe_for(load(name), scale)
    config = from_json(Config, json.loads(json.dumps(to_json(made))), "config.json")
    assert config == made
    tok, model = build(config)
    c, h, w = model.codec.grid(config.shape)
    assert (c, 4 * h, 4 * w) == (4, *config.shape[1:])
    assert isinstance(model, KLModel) and isinstance(model.disc, PatchDiscriminator) and tok.notes("a") == tok.notes("a")
