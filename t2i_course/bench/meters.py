"""Clocks and counters: what is timed is timed in turns, what is counted is counted by torch."""

import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from t2i_course.core.conditioning import Cond
from t2i_course.core.data import scale
from t2i_course.core.training import has_bf16


def precisions(
    device: str = "cpu",
) -> tuple:  # names of the precisions that are worth a measurement
    "float32, and bfloat16 where the device has units for it"
    return ("fp32", "bf16") if has_bf16(device) else ("fp32",)


def left_out(device: str = "cpu") -> dict:
    "What a result says of bfloat16 where it was not measured"
    return {} if has_bf16(device) else dict(bf16="not measured: no bfloat16 units")


def count(net) -> int:
    return sum(p.numel() for p in net.parameters())


def multiply_adds(run) -> int:
    "Of all convolutions and matrix products that a call makes"
    with FlopCounterMode(display=False) as f:
        run()
    return f.get_total_flops() // 2


def bare_cond(n: int, dim: int = 96) -> Cond:
    "A condition of n random vectors"
    ids = torch.zeros(n, 1, dtype=torch.int64)
    return Cond(torch.zeros(n, 1, dim), torch.randn(n, dim), ids == 0, ids)


def in_turns(
    steps: dict,  # name -> function
    rounds: int,  # of all of them
) -> dict:  # name -> sorted seconds of a call
    "Interleaved, so that a slow minute of the machine is slow for all; the first round does not count"
    took = {k: [] for k in steps}
    for i in range(rounds + 1):
        for k, f in steps.items():
            start = time.perf_counter()
            f()
            if i:
                took[k].append(time.perf_counter() - start)
    return {k: sorted(v) for k, v in took.items()}


def median(v) -> float:
    return sorted(v)[len(v) // 2]


def wait(device):  # GPUs work ahead of the program
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_peak(
    device: str,
    dtype,  # torch.float32 or torch.bfloat16
    side: int = None,  # of the matrices; default 2048 on a CPU (256 at smoke scale), 8192 on a GPU
    rounds: int = 8,
) -> float:  # FLOP/s
    "The fastest product of two square matrices that was seen"
    n = side or (8192 if device != "cpu" else 256 if scale() == "smoke" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def run():
        (a @ b)
        wait(device)

    return 2 * n**3 / min(in_turns({0: run}, rounds)[0])


def conv_peak(
    bf16: bool,  # or float32
    rounds: int = 6,
) -> dict:  # GFLOP/s of each shape; the largest is the peak
    "The fastest 3x3 convolution of this machine: forward and backward, several shapes, the best of"
    "several calls"
    found = {}
    for batch, c, s in (
        (64, 64, 14),
        (64, 128, 14),
        (128, 64, 28),
        (64, 256, 7),
        (128, 96, 7),
        (32, 128, 28),
    ):
        conv = nn.Conv2d(c, c, 3, padding=1).to(memory_format=torch.channels_last)
        x = torch.randn(batch, c, s, s).contiguous(memory_format=torch.channels_last).requires_grad_()
        if bf16:
            conv, x = conv.bfloat16(), x.detach().bfloat16().requires_grad_()
        g = torch.ones_like(x)
        took = min(in_turns({0: lambda conv=conv, x=x, g=g: conv(x).backward(g)}, rounds)[0])
        found[f"{batch}x{c}x{s}x{s}"] = 3 * 2 * batch * c * c * 9 * s * s / took / 1e9
    return found
