"""DiT: published counts and multiply-adds, equal outputs with diffusers, its start, its four conditionings, its recipe."""
import math

import pytest
import torch
import torch.nn.functional as F

from arms import made
from t2i_course.core.conditioning import Cond, raw_cond
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.core.ema import state_for
from t2i_course.core.training import feed, train
from t2i_course.diffusion.preconditioning import fit_skip
from t2i_course.sweeps.transformer import dit as sweep
from t2i_course.sweeps.transformer.dit import UNetBeside, build_unet
from t2i_course.transformer.dit import (
    DiT, WAYS, ZeroBlock, build, counted_macs, fast_attend, from_diffusers, macs, n_params, patchify,
    positions, published, recipe_for, time_waves, to_diffusers, unpatchify)

PAPER = dict(S=(32.96, 6.06), B=(130.51, 23.01), L=(458.10, 80.70), XL=(675.13, 118.62)) # million, billion


def told(n=2, d=16, l=5, seed=0):
    "A condition of random vectors; the last word of the second caption is padding."
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(n, l, dtype=torch.bool)
    mask[1:, -1] = False
    return Cond(torch.randn(n, l, d, generator=g), torch.randn(n, d, generator=g), mask, torch.zeros(n, l, dtype=torch.int64))


def tiny(cond="zero", seed=0, live=True, **more):
    "A small network; `live` gives every weight a value, so that nothing is hidden behind a zero."
    torch.manual_seed(seed)
    net = DiT(3, 8, **(dict(patch=2, width=16, depth=2, heads=2) | more), cond=cond)
    if live:
        for p in net.parameters(): torch.nn.init.normal_(p, std=.2)
    return net


def labels(y):
    return raw_cond(torch.as_tensor(y)[:, None], torch.ones(len(y), 1, dtype=torch.bool))


# ---- the published sizes ----
@pytest.mark.parametrize("name", PAPER)
def test_published_sizes(name):
    with torch.device("meta"):
        model = published(name)
        cond = model.encoder(labels([0]))
    millions, billions = PAPER[name]
    assert round(n_params(model) / 1e6, 2) == millions
    assert round(macs(model.net) / 1e9, 2) == billions
    assert counted_macs(model.net, cond) == macs(model.net), "counted by torch, to the last one"


def test_multiply_adds_follow_patch_and_size():
    with torch.device("meta"):
        for more, billions in ((dict(patch=4), 29.05), (dict(patch=8), 7.39), (dict(size=64), 524.6)): # the paper's
            assert abs(macs(published("XL", **more).net) / 1e9 / billions - 1) < 1e-3
        assert n_params(published("S", 4)) < 1.01 * n_params(published("S", 2)), "patches hardly change the parameters"


@pytest.mark.parametrize("cond, millions, billions", [("tokens", 449, 119.37), ("cross", 598, 137.62),
                                                      ("adaln", 600, 118.56), ("zero", 675, 118.64)])
def test_the_other_conditionings_have_the_published_sizes_too(cond, millions, billions):
    with torch.device("meta"): model = published("XL", cond=cond)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions, "the paper leaves out the positions here"
    assert abs(macs(model.net, words=1) / 1e9 / billions - 1) < 2e-3


@pytest.mark.parametrize("cond", WAYS)
def test_multiply_adds_of_every_conditioning(cond):
    net = tiny(cond)
    assert counted_macs(net, told()) == macs(net, words=5)


# ---- the pieces ----
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_an_inverse_pair_and_a_convolution(patch):
    x = torch.randn(2, 3, 8, 8)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, (8 // patch)**2, 3 * patch**2)
    assert torch.equal(unpatchify(tokens, patch, 8 // patch), x)
    w = torch.randn(7, 3, patch, patch)
    want = F.conv2d(x, w, stride=patch).flatten(2).mT
    assert torch.allclose(tokens @ w.flatten(1).T, want, atol=1e-5)


def test_positions_equal_the_published_table():
    from diffusers.models import embeddings
    for rows, dim in ((4, 16), (16, 1152)):
        theirs = torch.as_tensor(embeddings.get_2d_sincos_pos_embed(dim, rows, base_size=rows, output_type="pt")).float()
        assert torch.allclose(positions(rows, dim), theirs, atol=1e-6)
    p = positions(3, 8)
    assert torch.equal(p[0, :4], p[3, :4]) and torch.equal(p[0, 4:], p[1, 4:]), "first half: column, second half: row"
    assert len(p.unique(dim=0)) == 9


def test_time_waves():
    t = (torch.tensor([0, 17, 999]) + 1) / 1000
    i = torch.tensor([0., 17., 999.])[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    assert torch.allclose(time_waves(t), torch.cat([i.cos(), i.sin()], 1), atol=2e-4)
    assert (time_waves(t) - time_waves(t, 1.)).abs().max() > .1, "diffusers' frequencies are others"


@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_is_the_fused_one(masked):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g) for n in (6, 5, 5))
    mask = torch.tensor([True, True, False, True, False])[None, None, None].expand(2, 1, 1, 5) if masked else None
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(fast_attend(q, k, v, mask), want, atol=1e-6)
    low = fast_attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert low.dtype == torch.bfloat16 and (low.float() - want).abs().max() < .05


# ---- diffusers ----
@pytest.fixture(scope="module", params=[1e-5, 1e-6], ids=["eps 1e-5", "eps 1e-6"])
def reference(request):
    "A small DiTTransformer2DModel with random weights and, as in published ones, one embedder for all blocks."
    import diffusers
    torch.manual_seed(0)
    ref = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_eps=request.param).eval()
    for p in ref.parameters(): torch.nn.init.normal_(p, std=.1)
    first = ref.transformer_blocks[0].norm1.emb.state_dict()
    for block in ref.transformer_blocks: block.norm1.emb.load_state_dict(first)
    return ref


@torch.no_grad()
def test_equal_outputs_with_diffusers(reference):
    ours = from_diffusers(reference.config, reference.state_dict())
    x, i, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 10])
    want = reference(x, i, y).sample
    got = ours(x, (i + 1) / 1000, labels(y))
    assert got.shape == want.shape == (3, 8, 8, 8) and want.std() > .05
    assert (got - want).abs().max() < 1e-5
    assert (ours(x, i / 1000, labels(y)) - want).abs().max() > 1e-5, "one step off is seen"


def test_there_and_back(reference):
    theirs = reference.state_dict()
    back = to_diffusers(from_diffusers(reference.config, theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[k], w) for k, w in theirs.items())


def test_blocks_with_embedders_of_their_own_are_refused(reference):
    theirs = {k: w.clone() for k, w in reference.state_dict().items()}
    theirs["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"][0, 0] += 1
    with pytest.raises(CourseError, match="here they share it"): from_diffusers(reference.config, theirs)


# ---- the start ----
def test_zero_blocks_start_as_the_identity_and_the_others_do_not():
    x, c = torch.randn(2, 16, 16), torch.randn(2, 16)
    for cond in WAYS:
        block = tiny(cond, live=False).blocks[0]
        args = (x, c, torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
        assert torch.equal(block(*args), x) == (cond == "zero")
    assert WAYS["zero"] is ZeroBlock and ZeroBlock.n_ada == 6


@pytest.mark.parametrize("cond", WAYS)
def test_output_starts_at_zero(cond):
    net = tiny(cond, live=False)
    assert not net(torch.randn(2, 3, 8, 8), torch.rand(2), told()).any()


def test_learning_reaches_the_network_from_the_end():
    "Step 1 moves the head alone, step 2 the gates, step 3 everything."
    net = tiny(live=False)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    x, moved = torch.randn(4, 3, 8, 8), []
    for _ in range(3):
        opt.zero_grad()
        (net(x, torch.full((4,), .5), told(4)) - x).square().mean().backward()
        moved.append({k for k, p in net.named_parameters() if p.grad.abs().max() > 0})
        opt.step()
    assert moved[0] == {"head.weight", "head.bias"}
    assert "blocks.0.ada.weight" in moved[1] and "blocks.0.attn.qkv.weight" not in moved[1]
    assert moved[2] == {k for k, _ in net.named_parameters()}


def test_start_can_be_made_again_after_the_meta_device():
    with torch.device("meta"): net = DiT(3, 8, 2, 16, 2, 2)
    net = net.to_empty(device="cpu")
    net.start()
    assert torch.equal(net.place, positions(4, 16)) and not net.head.weight.any() and net.stem.weight.std() > .1
    assert all(p.isfinite().all() for p in net.parameters())


# ---- the four conditionings ----
@pytest.mark.parametrize("cond", WAYS)
def test_time_and_caption_come_in(cond):
    net, x, t, c = tiny(cond), torch.randn(2, 3, 8, 8), torch.tensor([.2, .7]), told()
    out = net(x, t, c)
    assert out.shape == x.shape
    assert not torch.allclose(out, net(x, t.flip(0), c), atol=1e-4)
    other = told(seed=1)
    assert not torch.allclose(out, net(x, t, Cond(other.seq, other.pooled, c.mask, c.ids)), atol=1e-4)
    assert torch.allclose(out[:1], net(x[:1], t[:1], c[:1]), atol=1e-5), "a picture does not see its neighbours"


def test_cross_attention_reads_words_and_not_padding():
    net, x, t, c = tiny("cross"), torch.randn(2, 3, 8, 8), torch.tensor([.2, .7]), told()
    seq = c.seq.clone()
    seq[1, -1] += 9
    assert torch.allclose(net(x, t, c), net(x, t, Cond(seq, c.pooled, c.mask, c.ids)), atol=1e-5)
    seq[1, 0] += 9
    assert not torch.allclose(net(x, t, c), net(x, t, Cond(seq, c.pooled, c.mask, c.ids)), atol=1e-3)


def test_only_positions_tell_patches_apart():
    net, x = tiny(), torch.randn(1, 3, 8, 8)
    moved = lambda: unpatchify(patchify(net(x, torch.ones(1) / 2, told(1)), 2).flip(1), 2, 4)
    flipped = lambda: net(unpatchify(patchify(x, 2).flip(1), 2, 4), torch.ones(1) / 2, told(1))
    assert not torch.allclose(moved(), flipped(), atol=1e-3)
    net.place.zero_()
    assert torch.allclose(moved(), flipped(), atol=1e-4)


def test_impossible_sizes_are_refused():
    for bad in (dict(size=9), dict(width=18), dict(heads=3)):
        with pytest.raises(CourseError): DiT(**(dict(channels=3, size=8, patch=2, width=16, depth=1, heads=2) | bad))


# ---- the recipe ----
def ready(name="digits", **changes):
    data = load(name)
    config = recipe_for(data, "smoke") | dict(fit_images=256, rank=16) | changes
    torch.manual_seed(0)
    tok, den = build(config)
    fit_skip(den, data, tok, config.fit_images)
    return data, config, tok, den


@pytest.mark.parametrize("name", ["digits", "painted"])
def test_recipe_learns_and_draws(name):
    data, config, tok, den = ready(name, skip=False, lr=4e-3)
    state = state_for(den, config)
    losses = [r.loss for r in train(state, den.loss, feed(data, tok), images=1280, batch=32)]
    assert sum(losses[-5:]) < .85 * sum(losses[:5])
    x = den.painter(tok, config | dict(steps=2))(["a handwritten seven", "a red two"], 0)
    assert x.shape == (2, *data.shape) and x.isfinite().all()
    assert den.calls(config) == config.steps + 20 == 45  # guided while t > .2: 20 of 25 steps


def test_with_a_skip_an_untrained_network_is_the_closed_form():
    data, config, tok, den = ready()
    b = data.batch("test", Draws(0, torch.arange(4)))
    t, cond = torch.full((4,), .5), tok(b.captions)
    x_t = .7 * b.x + .7 * torch.randn_like(b.x)
    assert torch.equal(den.predict(x_t, t, cond)[0], den.skip(x_t, t, cond).x0_hat)
    assert den.net.net.in_channels == 3 * data.shape[0]


def test_every_shape_of_the_course():
    for name, shape in dict(digits=(1, 16, 16), painted=(3, 32, 32), painted2=(3, 32, 32)).items():
        for scale in ("smoke", "demo", "full"):
            with torch.device("meta"):
                config = recipe_for(load(name), scale)
                net = build(config)[1].net
            assert config.shape == list(shape) and shape[1] % config.patch == 0
            assert net.net.rows**2 <= 256


def test_resume_is_exact():
    def run(stop=None, take=None):
        data, config, tok, den = ready()
        state = state_for(den, config)
        if take: state.load(*take)
        for r in train(state, den.loss, feed(data, tok), images=192, batch=32, seed=1):
            if r.step == stop: break
        return state
    whole, half = run(), run(stop=3)
    again = run(take=({k: v.clone() for k, v in half.tensors().items()}, half.numbers()))
    assert whole.images == again.images == 192
    assert all(torch.equal(v, again.tensors()[k]) for k, v in whole.tensors().items())


def test_the_unet_takes_the_same_place():
    data, config, tok, den = ready()
    beside = UNetBeside(**vars(config), widths=(16, 32), depths=(1, 1), d_emb=64)
    with torch.device("meta"): unet = build_unet(beside)[1]
    assert type(unet.process) is type(den.process) and unet.target is den.target
    assert unet.net.net.in_channels == den.net.net.in_channels


def test_sweep_has_every_row(monkeypatch):
    rows = made(sweep)
    assert {"setting", "study.S.4.seed0", "study.S.2.seed0", "study.S.8.seed0", "ways.adaln.seed0", "ways.cross.seed0",
            "ways.tokens.seed0"} <= rows.keys()
    for start in ("plain", "skip"):
        for arm in ("dit", "unet", "unet_longer"):
            row = rows[f"painted.{start}.{arm}.seed0"]
            assert row["fd"] > 0 and row["macs"] > 0 and row["params"] > 0 and row["train_seconds"] > 0
    assert rows["study.S.2.seed0"]["macs"] > rows["study.S.4.seed0"]["macs"] > rows["study.S.8.seed0"]["macs"]
