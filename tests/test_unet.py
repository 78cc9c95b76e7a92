"The U-Net of Stable Diffusion: sizes, the same function as the published class, its folder, its maps, its recipe, its sweeps."
import json

import pytest
import torch
from arms import made
from diffusers import UNet2DConditionModel
from t2i_course.core.conditioning import Cond
from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.diffusion import unet as page
from t2i_course.diffusion.unet import (PUBLISHED, Attention, FeedForward, ResBlock, StableUNet, TransformerBlock, arguments, attention_maps,
                                       descend, from_diffusers, open_unet, overlap, side_masks, side_words, to_diffusers, waves, word_overlap)
from t2i_course.sweeps.diffusion import unet as sweep, unet_maps

TOLD = dict(use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=16)
KINDS = dict( # heads, which grids have transformers, blocks in each, further settings
    sd15=(4, (1, 1, 1, 0), 1, {}),
    sd21=((2, 4, 8, 8), (1, 1, 1, 0), 1, dict(use_linear_projection=True)),
    sdxl=((2, 4, 8), (0, 1, 1), (1, 2, 3), TOLD | dict(projection_class_embeddings_input_dim=12 + 6 * 16)),
    refiner=((2, 4, 8, 8), (0, 1, 1, 0), 2, TOLD | dict(projection_class_embeddings_input_dim=12 + 5 * 16)),
    scaled=(2, (1, 0), 1, dict(resnet_time_scale_shift="scale_shift", layers_per_block=1)),
)


def reference(kind):
    heads, cross, layers, more = KINDS[kind]
    names = ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross]
    torch.manual_seed(0)
    blocks = dict(down_block_types=names, up_block_types=[n.replace("Down", "Up") for n in names[::-1]])
    ref = UNet2DConditionModel(sample_size=16, block_out_channels=(32, 64, 64, 64)[:len(names)], attention_head_dim=heads, cross_attention_dim=24,
                               transformer_layers_per_block=layers, norm_num_groups=8, **blocks, **more)
    for p in ref.parameters(): p.data.normal_(0, .1)
    return ref.eval()


def asked(kind, b=2, side=16):
    n = dict(refiner=5).get(kind, 6)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    cond = Cond(torch.randn(b, 7, 24), torch.randn(b, 12), mask, torch.zeros(b, 7, dtype=torch.int64), torch.randint(0, 99, (b, n)).float())
    return torch.randn(b, 4, side, side), torch.tensor([3, 997]), cond


@pytest.mark.parametrize("name,count", dict(sd15=859_520_964, sd21=865_910_724, sdxl=2_567_463_684, refiner=2_259_526_660).items())
def test_published_sizes(name, count):
    with torch.device("meta"): assert parameters(StableUNet(**PUBLISHED[name])) == count


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_same_function_as_diffusers_both_ways(kind):
    ref = reference(kind)
    net = from_diffusers(StableUNet(**arguments(dict(ref.config))), ref.state_dict()).eval()
    x, steps, cond = asked(kind)
    how = dict(encoder_attention_mask=cond.mask, added_cond_kwargs=dict(text_embeds=cond.pooled, time_ids=cond.numbers))
    want, got = ref(x, steps, cond.seq, **how).sample, net(x, (steps + 1) / 1000, cond)
    assert (want - got).abs().max() <= 1e-5 and want.std() > .05
    torch.manual_seed(1)
    other = StableUNet(**arguments(dict(ref.config))).eval()
    ref.load_state_dict(to_diffusers(other))
    assert (ref(x, steps, cond.seq, **how).sample - other(x, (steps + 1) / 1000, cond)).abs().max() <= 1e-5


@torch.no_grad()
def test_adapters_add_as_in_diffusers():
    ref = reference("sd15")
    net = from_diffusers(StableUNet(**arguments(dict(ref.config))), ref.state_dict()).eval()
    x, steps, cond = asked("sd15")
    left = descend(net.down, net.stem(x), net.embed((steps + 1) / 1000, cond), cond.seq, cond.mask)
    more = [torch.randn_like(v) for v in (*left, left[-1])]
    adapter = dict(down_block_additional_residuals=more[:-1], mid_block_additional_residual=more[-1])
    want = ref(x, steps, cond.seq, encoder_attention_mask=cond.mask, **adapter).sample
    assert (want - net(x, (steps + 1) / 1000, cond, more)).abs().max() <= 1e-5
    with pytest.raises(CourseError, match="adds 13 tensors"): net(x, steps / 1000, cond, more[1:])


def test_a_published_folder_opens(tmp_path):
    ref = reference("sdxl")
    ref.save_pretrained(tmp_path / "unet")
    for folder in (tmp_path, tmp_path / "unet"):
        net = open_unet(folder)
        own = to_diffusers(net)
        assert not net.training and all(torch.equal(v, own[k]) for k, v in ref.state_dict().items())
    low, (x, steps, cond) = open_unet(tmp_path, torch.bfloat16), asked("sdxl")
    told = Cond(cond.seq.bfloat16(), cond.pooled, cond.mask, cond.ids, cond.numbers)
    out = low(x.bfloat16(), steps / 1000, told)
    assert out.dtype == torch.bfloat16 and torch.allclose(out.float(), net(x, steps / 1000, cond), atol=.05)


@pytest.mark.parametrize("side", [(18, 18), (16, 24), (13, 21)])
@torch.no_grad()
def test_sides_of_any_length_as_in_diffusers(side):
    ref = reference("sd15")
    net = from_diffusers(StableUNet(**arguments(dict(ref.config))), ref.state_dict()).eval()
    _, steps, cond = asked("sd15")
    x = torch.randn(2, 4, *side)
    want = ref(x, steps, cond.seq, encoder_attention_mask=cond.mask).sample
    assert (want - net(x, (steps + 1) / 1000, cond)).abs().max() <= 1e-5


def test_weights_are_copied_where_the_network_has_its_own():
    ref = reference("scaled")
    net = from_diffusers(StableUNet(**arguments(dict(ref.config))), ref.state_dict())
    torch.nn.init.zeros_(net.stem.weight)
    assert ref.conv_in.weight.any()


def test_what_sdxl_is_told_has_to_fit():
    net = from_diffusers(StableUNet(**arguments(dict(reference("sdxl").config))), reference("sdxl").state_dict())
    x, steps, cond = asked("refiner")
    with pytest.raises(CourseError, match=r"12 \+ 5 x 16 numbers, and this network was built for 108"): net(x, steps / 1000, cond)


def test_what_is_no_published_folder_is_refused(tmp_path):
    with pytest.raises(CourseError, match="is not there: give the folder"): open_unet(tmp_path)
    reference("scaled").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def changed(**fields): (tmp_path / "config.json").write_text(json.dumps(config | fields))
    odd = dict(act_fn="gelu", class_embed_type="timestep", _class_name="UNet2DModel", time_embedding_act_fn="silu", future="yes")
    for field, value in odd.items():
        changed(**{field: value})
        with pytest.raises(CourseError, match=f"{field} = '{value}'"): open_unet(tmp_path)
    changed(down_block_types=["AttnDownBlock2D", "DownBlock2D"])
    with pytest.raises(CourseError, match="AttnDownBlock2D"): open_unet(tmp_path)
    changed(up_block_types=config["up_block_types"][::-1])
    with pytest.raises(CourseError, match="the same on the way up"): open_unet(tmp_path)
    changed(layers_per_block=[1, 2])
    with pytest.raises(CourseError, match="one number for all grids"): open_unet(tmp_path)
    changed(layers_per_block=2)
    with pytest.raises(CourseError, match="another network"): open_unet(tmp_path)
    changed(cross_attention_dim=32)
    with pytest.raises(CourseError, match="another size"): open_unet(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CourseError, match="cannot be read"): open_unet(tmp_path)


@torch.no_grad()
def test_waves_are_those_of_diffusers():
    from diffusers.models.embeddings import Timesteps
    steps = torch.tensor([0., 3., 512., 999.])
    assert torch.allclose(waves(steps[:, None], 64), Timesteps(64, True, 0)(steps), atol=2e-4) # theirs are float32
    assert waves(torch.ones(2, 6), 256).shape == (2, 1536)


@pytest.mark.parametrize("d", [8, 64])
def test_counts_of_the_feed_forward_layer(d):
    assert parameters(FeedForward(d)) == 12 * d * d + 9 * d and parameters(FeedForward(d, gated=False)) == 12 * d * d + 7 * d


def test_switches():
    x, words, mask = torch.randn(1, 16, 32), torch.randn(1, 5, 24), torch.ones(1, 5, dtype=torch.bool)
    alone = TransformerBlock(32, 24, 4, look=False)
    y = x.clone()
    y[:, 1:] = 0
    assert torch.allclose(alone(x, words, mask)[:, 0], alone(y, words, mask)[:, 0], atol=1e-6) # no place sees another
    both = TransformerBlock(32, 24, 4)
    assert not torch.allclose(both(x, words, mask)[:, 0], both(y, words, mask)[:, 0], atol=1e-3)
    assert parameters(ResBlock(32, 32, 64, 8, scale_shift=True)) - parameters(ResBlock(32, 32, 64, 8)) == 64 * 32 + 32


@torch.no_grad()
def test_padding_is_not_heard_and_zeroed_says_nothing():
    torch.manual_seed(0)
    config = page.recipe_for(load("painted"), "smoke")
    tok, den = page.build(config)
    net = den.net.net
    x, t = torch.randn(2, net.in_channels, 32, 32), torch.tensor([.2, .9])
    assert not net(x, t, den.net.encoder(tok(["a red two", ""]))).any()
    torch.nn.init.normal_(net.head.weight)
    for p in net.parameters(): p.add_(.02 * torch.randn(p.shape))
    long, short = den.net.encoder(tok(["a red two"] * 2)), den.net.encoder(tok(["a red two"] * 2))
    short.seq[:, 4:] = 7.
    assert torch.equal(net(x, t, long), net(x, t, short)) and net(x, t, long).std() > 0


@torch.no_grad()
def test_maps_are_shares_of_words():
    data = load("painted2")
    tok, den = page.build(page.recipe_for(data, "smoke") | dict(skip=False))
    b = data.batch("test", Draws(0, torch.arange(5)))
    maps = attention_maps(den, b.x, torch.full((5,), .4), tok(b.captions))
    assert maps.shape == (5, tok.max_len, 8, 8) and torch.allclose(maps.sum(1), torch.ones(5, 8, 8), atol=1e-5)
    assert not maps[~tok(b.captions).mask].any()
    assert not any(m._forward_pre_hooks for m in den.net.modules())
    wide = attention_maps(den, torch.randn(2, 3, 40, 64), torch.full((2,), .4), tok(["a red two", ""]))
    assert wide.shape == (2, tok.max_len, 8, 13) and torch.allclose(wide.sum(1), torch.ones(2, 8, 13), atol=1e-5)


def test_overlap():
    truth = torch.zeros(2, 4, 4, dtype=torch.bool)
    truth[:, 1:3, 1:3] = True
    assert overlap(truth.float(), truth).tolist() == [1, 1] and overlap(-truth.float(), truth).tolist() == [0, 0]
    half = torch.zeros(2, 4, 4)
    half[:, 1:3, 2:4] = 1
    assert overlap(half, truth).tolist() == pytest.approx([1 / 3] * 2)


def test_words_and_strokes_of_either_side():
    assert side_words("a red two left of a blue seven on white") == dict(left=[2, 3], right=[7, 8])
    assert side_words("an orange eight right of a red digit") == dict(right=[2, 3], left=[7])
    data = load("painted2")
    b = data.batch("test", Draws(0, torch.arange(50)))
    m = side_masks(b)
    assert not (m["left"] & m["right"]).any() and not m["left"][:, :, 16:].any() and not m["right"][:, :, :16].any()
    assert (m["left"].sum((1, 2)) > 15).all() and (m["right"].sum((1, 2)) > 15).all()
    perfect = torch.zeros(50, data.size, 32, 32)
    keep = [i for i, c in enumerate(b.captions) if all(b.named[k][i] for k in b.named if k != "paper")]
    for i in keep:
        for side, tokens in side_words(b.captions[i]).items(): perfect[i, tokens] = m[side][i].float()
    own = dict(left=m["left"][keep], right=m["right"][keep])
    captions = [b.captions[i] for i in keep]
    with pytest.raises(CourseError, match="no such word for the left digit"): word_overlap(perfect[:1], ["a digit left of a red two"], own)
    assert (word_overlap(perfect[keep], captions, own) == 1).all() and (word_overlap(perfect[keep], captions, own, swap=True) < .1).all()


def test_sides_that_do_not_fit_are_refused():
    config = page.recipe_for(load("painted"), "smoke")
    with pytest.raises(CourseError, match="must be multiples of 64"): page.build(config | dict(patch=32))
    assert page.recipe_for(load("digits"), "full").patch == 2
    assert page.recipe_for(load("painted"), "full").patch == 2


def test_attention_is_the_fused_product():
    layer, x, told = Attention(32, 24, 4), torch.randn(2, 9, 32), torch.randn(2, 5, 24)
    low = layer.bfloat16()(x.bfloat16(), told.bfloat16())
    assert torch.allclose(low.float(), layer.float()(x, told), atol=.03)


def test_sweeps():
    rows = made(sweep)
    assert {k.rsplit(".", 1)[0] for k in rows} == {"setting", *(f"arms.{a}" for a in sweep.ARMS)}
    found = made(unet_maps)
    kinds = "own inks digits other_digit other_caption untrained".split()
    maps = [m[u] for k, m in found.items() if k.startswith(("latents.", "pixels.")) for u in kinds]
    assert 0 < found["best_possible"] < 1 and len(maps) == 12 and all(len(m) == len(unet_maps.TIMES) and all(0 <= w <= 1 for w in m) for m in maps)
