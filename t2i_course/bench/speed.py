"""`t2i bench speed`: the same work in two libraries."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from t2i_course.bench.meters import (
    bare_cond,
    left_out,
    matmul_peak,
    median,
    precisions,
)
from t2i_course.bench.peers import Unit2
from t2i_course.bench.twins import TWINS
from t2i_course.core.conditioning import Cond
from t2i_course.core.counting import in_turns, kept, multiply_adds, parameters, wait
from t2i_course.core.data import scale
from t2i_course.core.files import write_json
from t2i_course.diffusion.ddpm import UNet


def stepper(
    net,  # called as run(net, x) -> (b c h w)
    run,
    x,  # (b c h w) noised pictures
    bf16: bool,  # autocast, or float32
    train: bool,  # a training step with fused AdamW, or only the forward pass
):  # a function without arguments
    "One step of a network: the loss is the same for both libraries"
    device = x.device.type
    opt = torch.optim.AdamW(net.parameters(), 1e-5, fused=True) if train else None

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return run(net, x).float()

    def step():
        if train:
            opt.zero_grad(set_to_none=True)
            F.mse_loss(forward(), x).backward()
            opt.step()
        else:
            with torch.no_grad():
                forward()
        wait(device)

    return step


def memory_of(net, run, x, bf16: bool) -> int:
    "Bytes that a step keeps for its backward pass, weights left out; on a GPU the peak that was allocated"
    device = x.device.type
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        stepper(net, run, x, bf16, True)()
        return torch.cuda.max_memory_allocated()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        return kept(net, lambda: run(net, x)).whole


def race(
    nets: dict,  # name -> network, ours first
    runs: dict,  # name -> run(net, x)
    x,  # (b c h w) the same pictures for all
    macs: dict,  # name -> multiply-adds of one picture
    rounds: int = 12,
) -> dict:
    "Training and drawing steps in turns: seconds, ratios with their range, share of the matmul peak, memory"
    device, out = (
        x.device.type,
        dict(batch=len(x), params={k: parameters(n) for k, n in nets.items()}, multiply_adds=macs),
    )
    kinds = dict(fp32=torch.float32, bf16=torch.bfloat16)
    (ours, *others), peak = nets, {p: matmul_peak(device, kinds[p]) for p in precisions(device)}
    for precision in precisions(device):
        for kind in ("train", "draw"):
            steps = {k: stepper(n, runs[k], x, precision == "bf16", kind == "train") for k, n in nets.items()}
            took = in_turns(steps, rounds, warm=2)
            passes = 3 if kind == "train" else 1
            flops = {k: passes * 2 * macs[k] * len(x) / median(v) for k, v in took.items()}
            ratios = {k: sorted(b / a for a, b in zip(took[ours], took[k])) for k in others}
            out[f"{precision} {kind}"] = dict(
                seconds={k: median(v) for k, v in took.items()},
                images_per_second={k: len(x) / median(v) for k, v in took.items()},
                times_faster={k: dict(median=median(r), low=r[0], high=r[-1]) for k, r in ratios.items()},
                share_of_peak={k: v / peak[precision] for k, v in flops.items()},
            )
        out[f"{precision} memory"] = {
            k: memory_of(n, runs[k], x, precision == "bf16") for k, n in nets.items()
        }
    return out | dict(matmul_peak=peak) | left_out(device)


def unets(device: str, batch: int):
    "Our U-Net and diffusers' (in both layouts of memory) at about equal parameters and multiply-adds"
    torch.manual_seed(0)
    label = torch.zeros(batch, 4, 28, 28, device=device)
    net = UNet(1, 96, d_emb=128, **TWINS["diffusers"]).to(device, memory_format=torch.channels_last)
    theirs = Unit2().unet.to(device)
    last = Unit2().unet.to(device, memory_format=torch.channels_last)
    t, cond = torch.rand(batch, device=device), bare_cond(batch).to(device)
    step = (1000 * t).long()

    def ask(n, x):
        return n(torch.cat([x, label], 1), step).sample

    runs = dict(
        ours=lambda n, x: n(x, t, cond),
        diffusers=ask,
        diffusers_channels_last=lambda n, x: (
            n(torch.cat([x, label], 1).contiguous(memory_format=torch.channels_last), step).sample
        ),
    )
    return (
        dict(ours=net, diffusers=theirs, diffusers_channels_last=last),
        runs,
        torch.randn(batch, 1, 28, 28, device=device),
    )


def dits(device: str, batch: int, width: int = 384, depth: int = 12, size: int = 16):
    "The same DiT twice, with the same weights: ours and diffusers' (latents of 4 channels, patch 2)"
    from diffusers import DiTTransformer2DModel
    from t2i_course.transformer.dit import from_diffusers

    torch.manual_seed(0)
    heads = width // (72 if width == 1152 else 64)
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    weights = theirs.state_dict()
    for k, v in weights.items():  # the published start has an output of 0: both would agree on nothing
        if v.is_floating_point() and "pos_embed.pos" not in k:
            v.copy_(torch.randn_like(v) * 0.02 if v.ndim > 1 else v)
    first = {
        k.split(".", 2)[2]: v
        for k, v in weights.items()
        if k.startswith("transformer_blocks.0.") and ".emb." in k
    }
    for k, v in weights.items():
        if ".emb." in k:
            v.copy_(first[k.split(".", 2)[2]])
    ours = from_diffusers(dict(theirs.config), weights).to(device)
    theirs = theirs.to(device).train()
    step, label = (
        torch.randint(0, 1000, (batch,), device=device),
        torch.randint(0, 1000, (batch,), device=device),
    )
    ids = label[:, None]
    cond = Cond(torch.zeros(batch, 1, 1, device=device), torch.zeros(batch, 1, device=device), ids >= 0, ids)
    runs = dict(
        ours=lambda n, x: n(x, (step + 1) / 1000, cond)[:, :4],
        diffusers=lambda n, x: n(x, timestep=step, class_labels=label).sample[:, :4],
    )
    return dict(ours=ours, diffusers=theirs), runs, torch.randn(batch, 4, size, size, device=device)


def speed(
    stamp: dict,  # chapter, command, date, hardware, versions
    path: Path,  # results file
    device: str = "cpu",
    say=print,
):
    "U-Net and DiT beside diffusers' classes; on a GPU also the published sizes with torch.compile"
    small, res = scale() == "smoke", stamp | dict(device=device, threads=torch.get_num_threads())
    rounds, batch = (2, 4) if small else (12, 64)
    pairs = dict(
        unet=lambda: unets(device, batch),
        dit=lambda: dits(device, batch // 2, **(dict(width=64, depth=2) if small else {})),
    )
    if device == "cuda":
        for k, shape, n in (("B", (768, 12), 256), ("XL", (1152, 28), 64)):
            pairs[f"DiT-{k}/2"] = partial(dits, device, n, *shape, size=32)
    for k, why in left_out(device).items():
        say(f"{k} {why}")
    for name, make in pairs.items():
        nets, runs, x = make()
        with torch.no_grad():
            for n in nets.values():
                n.eval()
            macs = {k: multiply_adds(partial(runs[k], n, x)) // len(x) for k, n in nets.items()}
            far = (
                (runs["ours"](nets["ours"], x) - runs["diffusers"](nets["diffusers"], x)).abs().max().item()
                if name != "unet"
                else None
            )
            for n in nets.values():
                n.train()
        if device == "cuda" and "DiT-" in name:
            nets["ours"].compile()
            nets["diffusers"].compile()
        res[name] = race(nets, runs, x, macs, rounds) | dict(apart=far)
        for k, v in res[name].items():
            if not isinstance(v, dict) or "times_faster" not in v:
                continue
            ratios = ", ".join(
                f"{t['median']:.2f} times as fast as {r} ({t['low']:.2f} to {t['high']:.2f})"
                for r, t in v["times_faster"].items()
            )
            say(
                f"{name} {k}: {ratios}; {v['images_per_second']['ours']:.0f} images a second, "
                f"{v['share_of_peak']['ours']:.0%} of the matmul peak"
            )
        write_json(path, res)
    say(f"wrote {path}")
