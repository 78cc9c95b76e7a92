"""Steps of two networks of equal size, and the share of what the machine can do."""

import torch
import torch.nn.functional as F

from t2i_course.bench.meters import (
    bare_cond,
    conv_peak,
    left_out,
    median,
    precisions,
)
from t2i_course.bench.peers import BATCH, PEERS
from t2i_course.core.counting import in_turns, multiply_adds, parameters
from t2i_course.core.ema import EMA
from t2i_course.core.training import State, feed, train
from t2i_course.diffusion.ddpm import UNet


# our UNet with about as many parameters and multiply-adds as the other one (a test holds them within 10%)
TWINS = dict(
    diffusers=dict(widths=(16, 288), depths=(2, 1), patch=1),
    torchcfm=dict(widths=(48, 192), depths=(2, 1), patch=1),
)


def our_step(net, size: int, bf16: bool):
    "One step of plain flow matching with a given network: a function without arguments"
    opt = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    x0, t, cond = torch.randn(size, 1, 28, 28), torch.rand(size), bare_cond(size)

    def step():
        noise = torch.randn_like(x0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = net((1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise, t, cond)
        opt.zero_grad()
        F.mse_loss(out.float(), noise - x0).backward()
        opt.step()

    return step


def peer_step(peer, size: int):
    "One step of a published recipe: a function without arguments"
    opt = torch.optim.Adam(peer.net.parameters(), 1e-4)
    x0, y = torch.randn(size, 1, 28, 28), torch.randint(0, 10, (size,))

    def step():
        opt.zero_grad()
        peer.loss(x0, y).backward()
        opt.step()

    return step


def equal_size(
    name: str,  # of a peer
    rounds: int = 8,
) -> dict:  # seconds a step, and ratios of seconds
    "Training steps of batch 128 at about equal parameters and multiply-adds"
    torch.manual_seed(0)
    peer, net = PEERS[name](), UNet(1, 96, d_emb=128, **TWINS[name]).to(memory_format=torch.channels_last)
    one = torch.zeros(1, 1, 28, 28)
    with torch.no_grad():
        theirs = multiply_adds(lambda: peer.loss(one, torch.zeros(1, dtype=torch.int64)))
        ours = multiply_adds(lambda: net(one, torch.zeros(1), bare_cond(1)))
    took = in_turns(
        {"peer fp32": peer_step(peer, BATCH)}
        | {f"ours {p}": our_step(net, BATCH, p == "bf16") for p in precisions()},
        rounds,
    )
    took = {k: median(v) for k, v in took.items()}
    return (
        dict(
            params=[parameters(peer.net), parameters(net)],
            multiply_adds=[theirs, ours],
            seconds_a_step=took,
            times_faster={k: took["peer fp32"] / v for k, v in took.items() if k != "peer fp32"},
        )
        | left_out()
    )


def roofline(
    config,  # of flow matching, as from `recipe_for`
    data,  # digits
    rounds: int = 30,
) -> dict:  # GFLOP/s of the whole step and its share of the peak
    "The arithmetic of a training step (convolutions, matrix products), over its time and the machine's peak"
    from t2i_course.flow.flow_matching import build
    from t2i_course.diffusion.preconditioning import fit_skip
    from torch.profiler import ProfilerActivity, profile

    before, out = torch.get_num_threads(), {}
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            peak = {p: max(conv_peak(p == "bf16").values()) for p in precisions()}
            for precision in precisions():
                torch.manual_seed(0)
                tok, den = build(config)
                fit_skip(den, data, tok, config.fit_images)
                state = State(den.net, config.lr, EMA(den.net, config.half_life), precision=precision)
                steps = train(
                    state,
                    den.loss,
                    feed(data, tok),
                    images=(rounds + 15) * config.batch,
                    batch=config.batch,
                )
                for _ in range(4):
                    next(steps)
                macs = multiply_adds(lambda steps=steps: next(steps))
                took = median(in_turns({0: lambda steps=steps: next(steps)}, rounds)[0])
                speed = 2 * macs / took / 1e9
                out[f"{precision}, {threads} thread{'s' * (threads > 1)}"] = row = dict(
                    conv_peak=peak,
                    gflop_a_step=2 * macs / 1e9,
                    seconds_a_step=took,
                    gflops=speed,
                    share_of_peak=speed / peak[precision],
                )
                if "bf16" in peak:
                    row["share_of_bf16_peak"] = speed / peak["bf16"]
                if precision == precisions()[-1]:  # the one that trains here
                    with profile(activities=[ProfilerActivity.CPU]) as p:
                        for _ in range(5):
                            next(steps)
                    ops = sorted(
                        ((e.key, e.self_cpu_time_total) for e in p.key_averages()), key=lambda e: -e[1]
                    )
                    whole = sum(v for _, v in ops)
                    row["profile"] = {k: round(v / whole, 4) for k, v in ops[:14]}
    finally:
        torch.set_num_threads(before)
    return out | left_out()
