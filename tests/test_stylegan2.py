"StyleGAN2: modulated convolution, published sizes, path lengths, style mixing, growing, exact resume."
import math

import pytest
import torch
import torch.nn.functional as F
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for
from t2i_course.core.metrics import load_judge, obeys
from t2i_course.core.training import feed, train
from t2i_course.gan.stylegan2 import (Growing, Large, Latents, Mapping, StyleDiscriminator, StyledConv, StyleGAN, StyleGenerator,
                                      Tinted, build, followers, group_std, growth, larger, modulated_conv, path_lengths,
                                      read_tinted, recipe_for, shrunk, smaller, stroke, swapped, widths)
from t2i_course.sweeps.gan.stylegan2 import path_spread, smoothness

DATA = Tinted()


def batch(n=8, seed=0, split="train", data=DATA):
    return data.batch(split, Draws(seed, torch.arange(n)))


def model(data=DATA, seed=0, **change):
    torch.manual_seed(seed)
    config = recipe_for(data, "smoke") | change
    return (*build(config), config)


# --- Modulated convolution (arXiv:1912.04958, eqs. 1-3) ---

def by_definition(x, weight, style, demodulate=True):
    "Each sample with a weight of its own, no grouped convolution."
    out = []
    for x_b, s in zip(x, style, strict=True):
        w = weight * s[None, :, None, None]
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        out.append(F.conv2d(x_b[None], w, padding=weight.shape[-1] // 2))
    return torch.cat(out)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_modulated_conv_is_the_definition(size, demodulate, fused):
    torch.manual_seed(0)
    x, weight, style = torch.randn(5, 7, 8, 8), torch.randn(6, 7, size, size), torch.randn(5, 7).exp()
    want = by_definition(x, weight, style, demodulate)
    got = modulated_conv(x, weight, style, demodulate, fused)
    assert torch.allclose(got, want, atol=1e-5 * want.abs().max())
    assert not torch.allclose(modulated_conv(x, weight, style.roll(1, 0), demodulate, fused), want, atol=.1)


def test_gradients_of_both_ways_agree():
    torch.manual_seed(0)
    x, weight, style = torch.randn(3, 4, 6, 6), torch.randn(5, 4, 3, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    grads = [torch.autograd.grad(modulated_conv(x, weight, style, fused=f).tanh().sum(), (weight, style)) for f in (True, False)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_demodulation_gives_unit_variance():
    torch.manual_seed(0)
    x, weight, style = torch.randn(64, 16, 10, 10), torch.randn(8, 16, 3, 3) * 3, torch.randn(64, 16).exp()
    y = modulated_conv(x, weight, style)[:, :, 1:-1, 1:-1]
    assert ((y.var((0, 2, 3)) - 1).abs() < .1).all()
    assert modulated_conv(x, weight, style, demodulate=False)[:, :, 1:-1, 1:-1].var() > 100


def test_the_size_of_a_style_does_not_matter_but_its_direction_does():
    x, layer, w = torch.randn(2, 4, 8, 8), StyledConv(4, 6, 5), torch.randn(2, 5)
    torch.nn.init.zeros_(layer.style.bias)
    assert torch.allclose(layer(x, w), layer(x, 3 * w), atol=1e-4)
    assert not torch.allclose(layer(x, w), layer(x, w.flip(1)), atol=.1)


def test_noise_is_silent_at_first_and_heard_later():
    x, layer, w, noise = torch.randn(2, 4, 8, 8), StyledConv(4, 6, 5), torch.randn(2, 5), torch.randn(2, 1, 8, 8)
    assert torch.equal(layer(x, w, noise), layer(x, w))
    torch.nn.init.ones_(layer.strength)
    assert not torch.allclose(layer(x, w, noise), layer(x, w), atol=.1)


# --- Published sizes ---

def test_config_f_counts_as_published():
    w = widths(1024, 32768, 512)
    with torch.device("meta"):
        gen, disc = StyleGenerator((3, 1024, 1024), w), StyleDiscriminator((3, 1024, 1024), w)
    count = [sum(p.numel() for p in m.parameters()) for m in (gen, disc)]
    assert count == [30_370_060, 29_012_513]
    assert w == [512] * 5 + [256, 128, 64, 32] and gen.synthesis.n_ws == 18
    assert gen.synthesis.sizes == [[4, 4], *([4 << k] * 2 for k in range(1, 9) for _ in range(2))]


def test_full_recipe_has_the_published_settings():
    c = recipe_for(load("painted"), "full")
    assert (c["gamma"], c["every"], c["path"], c["path_every"], c["mixing"]) == (10., 16, 2., 4, .9)
    assert (c["mapping"], c["pace"], c["path_decay"], c["loss"]) == (8, .01, .01, "logistic")


# --- Mapping and styles ---

def test_mapping_listens_to_caption_and_z():
    m, z, c = Mapping(6, 5, 8, 2, .3), torch.randn(3, 6), torch.randn(3, 5)
    assert not torch.allclose(m(z, c), m(z, c.flip(0))) and not torch.allclose(m(z, c), m(z.flip(0), c))
    assert torch.allclose(m(z, c), m(3 * z, c), atol=1e-4), "z is brought to unit size"


def test_two_styles_meet_at_the_cut():
    gen = StyleGenerator((1, 16, 16), (8, 8), 4, 4)
    a, b = torch.zeros(2, 4), torch.ones(2, 4)
    ws = gen.spread(a, b, torch.tensor([1, 4]))
    assert gen.synthesis.n_ws == 4 and ws[:, :, 0].tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]


def test_swapping_all_or_none_is_drawing_one_caption():
    tok, gan, _ = model()
    gen, draws = gan.artist, Draws(3, torch.arange(4))
    a, b = tok(batch(4).captions), tok(batch(4, 1).captions)
    z, noise = draws.normal("z", gen.z_dim), gen.synthesis.noise(draws)
    only = [gen(Latents(z, noise=noise), c) for c in (a, b)]
    assert torch.allclose(swapped(gen, a, b, gen.synthesis.n_ws, draws), only[0], atol=1e-6)
    assert torch.allclose(swapped(gen, a, b, 0, draws), only[1], atol=1e-6)
    assert not torch.allclose(swapped(gen, a, b, 2, draws), only[0], atol=1e-3)


def test_late_layers_cannot_change_the_coarse_grid():
    "What the first grid draws does not depend on styles of later layers."
    gen = StyleGenerator((1, 16, 16), (8, 8, 8), 4, 4)
    w, other = torch.randn(2, 4), torch.randn(2, 4)
    a, b = (gen.synthesis(gen.spread(w, other, cut), depth=1) for cut in (2, 6))
    assert torch.equal(a, b)
    assert not torch.equal(*(gen.synthesis(gen.spread(w, other, cut)) for cut in (2, 6)))


# --- Path lengths ---

def test_path_length_of_a_linear_generator():
    torch.manual_seed(0)
    A = torch.randn(16, 5)
    linear = lambda ws, noise=None, depth=None: (ws[:, 0] @ A.T).view(-1, 1, 4, 4)
    y = torch.randn(20_000, 1, 4, 4)
    got = path_lengths(linear, torch.randn(20_000, 1, 5), None, y)
    assert torch.allclose(got, (y.flatten(1) @ A / 4).norm(dim=1), atol=1e-4)
    assert abs((16 * got.square()).mean() / A.square().sum() - 1) < .03


def test_path_length_is_the_jacobian_of_the_generator():
    gen = StyleGenerator((1, 8, 8), (6, 6), 4, 4)
    ws, y = gen.ws(torch.randn(1, 4)), torch.randn(1, 1, 8, 8)
    J = torch.autograd.functional.jacobian(lambda v: gen.synthesis(v).flatten(), ws.detach())
    want = (torch.einsum("p,pblw->lw", y.flatten() / 8, J)).square().sum(1).mean().sqrt()
    assert torch.allclose(path_lengths(gen.synthesis, ws, None, y), want, rtol=1e-4)


def test_penalty_reaches_the_weights_and_moves_the_mean():
    tok, gan, _ = model()
    b = batch()
    loss = gan.path_loss(b.x, tok(b.captions), Draws(0, torch.arange(8)))
    assert loss.shape == (8,) and gan.artist.path_mean > 0
    loss.mean().backward()
    assert gan.artist.synthesis.blocks[0].conv.weight.grad.abs().sum() > 0
    assert gan.artist.mapping.layers[0].weight.grad.abs().sum() > 0, "the mapping is held responsible as well"


def test_lazy_turns():
    "E011: 16 for the discriminator, 4 for the generator."
    gan = StyleGAN(*(m((1, 16, 16), (8, 8, 8)) for m in (StyleGenerator, StyleDiscriminator)), every=16, path_every=4, gamma=1.)
    turns = {t.name: (t.part, t.every, t.gain) for t in gan.loss}
    assert turns["r1"] == ("disc", 16, 16) and turns["path"] == ("gen", 4, 4)
    assert math.isclose(gan.parts["gen"]["lr"], 2e-3 * 4 / 5) and math.isclose(gan.parts["disc"]["lr"], 2e-3 * 16 / 17)
    none = StyleGAN(*(m((1, 16, 16), (8, 8, 8)) for m in (StyleGenerator, StyleDiscriminator)), path=0.)
    assert "path" not in [t.name for t in none.loss] and none.parts["gen"]["lr"] == 2e-3


# --- The discriminator ---

def test_a_collapsed_generator_gives_itself_away():
    x = torch.randn(1, 3, 4, 4).expand(8, -1, -1, -1)
    assert group_std(x)[:, -1].max() < 1e-3 < .5 < group_std(torch.randn(8, 3, 4, 4))[:, -1].min()
    assert group_std(torch.randn(6, 3, 4, 4)).shape == (6, 4, 4, 4), "a last, odd batch"


def test_discriminator_reads_the_caption():
    tok, gan, _ = model()
    b, disc = batch(4), gan.net["disc"]
    assert disc(b.x, tok(b.captions)).shape == (4,)
    assert not torch.allclose(disc(b.x, tok(b.captions)), disc(b.x, tok(batch(4, 9).captions)))


# --- Growing ---

def test_growth_is_a_function_of_the_progress():
    g, index = growth(.75, 3, steady=.5), torch.arange(8)
    depth = [g(Draws(0, index + 8 * i, progress=i / 400)) for i in range(400)]
    assert depth[0] == depth[99] == 1 and depth == sorted(depth) and 1 < depth[101] < 1.1
    assert 1.4 < depth[125] < 1.6 and depth[150] == 2 == depth[199] and depth[250] == depth[399] == 3


def test_faded_in_layer_is_nothing_at_first_and_all_at_last():
    gen = StyleGenerator((1, 16, 16), (8, 8), 4, 4, patch=2)
    disc = StyleDiscriminator((1, 16, 16), (8, 8), grows=True, patch=2)
    ws = gen.ws(torch.randn(2, 4))
    small, barely, full = (gen.synthesis(ws, depth=d) for d in (1, 1 + 1e-6, 2))
    assert small.shape[-1] == 8 and torch.allclose(larger(small), barely, atol=1e-4)
    assert torch.equal(full, gen.synthesis(ws)) and not torch.allclose(full, barely, atol=1e-2)
    x = torch.randn(4, 1, 16, 16)
    disc.depth = 1
    want = disc(smaller(x))
    disc.depth = 1 + 1e-6
    assert torch.allclose(disc(shrunk(x, 2, disc.depth)), want, atol=1e-3)


def test_real_pictures_fade_in():
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(shrunk(x, 3, 3), x) and torch.equal(shrunk(x, 3, 1), smaller(smaller(x)))
    assert torch.allclose(shrunk(x, 3, 2.25), .75 * smaller(x).repeat_interleave(2, 2).repeat_interleave(2, 3) + .25 * x)


def test_large_digits_are_the_digits():
    a, b = batch(4, data=Large()), batch(4, data=load("digits"))
    assert a.x.shape[1:] == (1, 32, 32) and torch.equal(a.attrs["digit"], b.attrs["digit"])
    assert (smaller(a.x) - b.x).abs().mean() < .1


# --- Training, exact ---

@pytest.mark.parametrize("grow", [0., 1.])
def test_resume_is_exact(grow):
    def fresh():
        tok, gan, config = model(grow=grow, every=2, path_every=2)
        assert isinstance(gan, Growing) == bool(grow)
        return state_for(gan, config), gan, tok

    def go(state, gan, tok, n):
        for r in train(state, gan.loss, feed(DATA, tok), images=80, batch=8):
            if r.step == n:
                return state
        return state

    whole, half = go(*fresh(), 10), go(*fresh(), 5)
    kept = {k: v.clone() for k, v in half.tensors().items()}, half.numbers()
    state, gan, tok = fresh()
    again = go(state.load(*kept), gan, tok, 10)
    mine, theirs = whole.tensors(), again.tensors()
    assert mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())
    assert "net.gen.path_mean" in kept[0] and kept[0]["net.gen.w_mean"].abs().sum() > 0
    # the mean of the lengths is part of the state: without it the run takes another way
    state, gan, tok = fresh()
    state.load(*kept)
    state.net["gen"].path_mean.zero_()
    other = go(state, gan, tok, 10).tensors()
    assert not torch.equal(other["net.gen.synthesis.const"], mine["net.gen.synthesis.const"])


def test_a_turn_moves_its_own_part_alone():
    tok, gan, config = model()
    state = state_for(gan, config)
    before = {k: v.clone() for k, v in state.net.state_dict().items()}
    turns = [t for t in gan.loss if t.name == "path"]
    next(iter(train(state, turns, feed(DATA, tok), images=16, batch=8)))
    moved = {k.split(".")[0] for k, v in state.net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"gen"}


# --- Drawing ---

def test_truncation():
    tok, gan, config = model()
    gan.artist.w_mean.normal_()
    captions = batch(4).captions
    draw = lambda **o: gan.painter(tok, config | o)(captions, 1)
    plain = draw()
    assert torch.equal(plain, draw()) and plain.shape == (4, 3, 16, 16) and torch.equal(draw(truncation=1.), plain)
    same = [draw(truncation=0., centre=c) for c in ("all", "caption")]
    spread = lambda x: (x - x[:1]).abs().max()
    assert spread(same[0]) < 1e-5 < spread(same[1]), "towards all captions nothing of the caption is left"
    assert not torch.allclose(plain, draw(truncation=.5))
    twice = gan.painter(tok, config | dict(truncation=0., centre="caption"))([captions[0]] * 2, 1)
    assert torch.allclose(twice[0], twice[1], atol=1e-5)


def test_painter_leaves_the_mode():
    tok, gan, config = model()
    gan.net.train()
    gan.painter(tok, config)(["a red seven on blue"])
    assert gan.artist.training and gan.calls(config) == 1 and list(gan.options) == ["truncation"]


@pytest.mark.parametrize("name", ["digits", "painted", "painted2", "mnist"])
def test_recipe_fits_every_data_set(name):
    try:
        data = load(name)
        data.batch("train", Draws(0, torch.arange(2)))
    except CourseError:
        pytest.skip(f"{name} is not on this machine")
    tok, gan, config = model(data)
    state = state_for(gan, config)
    r = next(iter(train(state, gan.loss, feed(data, tok), images=16, batch=8)))
    assert set(r.turns) == {"disc", "r1", "gen", "path"} and all(map(math.isfinite, r.turns.values()))
    assert gan.painter(tok, config)(data.batch("test", Draws(0, torch.arange(3))).captions).shape == (3, *data.shape)


# --- The chapter's measures ---

def test_reader_of_tinted_digits():
    b = batch(200, split="test")
    read = read_tinted(load_judge("digits"), DATA, b.x)
    assert obeys(read, DATA, b.captions)["all"] > .97
    assert obeys(read, DATA, b.captions[1:] + b.captions[:1])["all"] < .2
    mask = stroke(b.x)[0]
    assert mask.shape == (200, 1, 16, 16) and mask.min() >= -1 and mask.max() <= 1


def test_followers_ends_are_clear():
    "All layers: whatever the drawings show, both ends compare the same drawings with the other caption."
    tok, gan, _ = model()
    f = followers(gan.artist, DATA, load_judge("digits"), tok, 24)
    assert set(f) == set(DATA.attributes) and all(len(v) == gan.artist.synthesis.n_ws + 1 and all(0 <= u <= 1 for u in v) for v in f.values())


def test_smoothness_of_a_constant_generator_is_zero():
    tok, gan, _ = model()
    gen, cond, draws = gan.artist, tok(batch(16).captions), Draws(0, torch.arange(16))
    features = lambda x: x.flatten(1)
    rough = smoothness(gen, cond, draws, features)
    assert rough["detour"] >= 1 and rough["ppl"] > 0
    for block in gen.synthesis.blocks:
        torch.nn.init.zeros_(block.rgb.weight)
    assert smoothness(gen, cond, draws, features)["ppl"] == 0


def test_an_even_way_has_no_detour():
    "Features that are a linear function of w: the drawing goes straight."
    class Straight:
        z_dim, synthesis = 4, staticmethod(lambda ws: ws[:, 0])
        w = staticmethod(lambda z, cond: z)
        spread = staticmethod(lambda w: w[:, None])
    draws = Draws(0, torch.arange(16))
    assert abs(smoothness(Straight, None, draws, lambda x: x)["detour"] - 1) < 1e-4
    assert smoothness(Straight, None, draws, lambda x: (x > 0).float())["detour"] > 2


def test_spread_of_path_lengths_sees_an_uneven_generator():
    tok, gan, _ = model()
    b = batch(64)
    even = path_spread(gan.artist, tok(b.captions), Draws(0, torch.arange(64)), DATA.shape)
    assert even["length"] > 0
    with torch.no_grad():
        for block in gan.artist.synthesis.blocks:
            block.rgb.style.bias.zero_()
            block.rgb.style.weight.mul_(10)
    uneven = path_spread(gan.artist, tok(b.captions), Draws(0, torch.arange(64)), DATA.shape)
    assert uneven["spread"] > even["spread"]
