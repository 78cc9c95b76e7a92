"""What all benches share: precisions, peaks of this machine, medians."""

import torch

from t2i_course.core.conditioning import Cond
from t2i_course.core.counting import convolution, peak, product
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


def bare_cond(n: int, dim: int = 96) -> Cond:
    "A condition of n random vectors"
    ids = torch.zeros(n, 1, dtype=torch.int64)
    return Cond(torch.zeros(n, 1, dim), torch.randn(n, dim), ids == 0, ids)


def median(v) -> float:
    return sorted(v)[len(v) // 2]


def matmul_peak(
    device: str,
    dtype,  # torch.float32 or torch.bfloat16
    side: int = None,  # of the matrices; default 2048 on a CPU (256 at smoke scale), 8192 on a GPU
    rounds: int = 8,
) -> float:  # FLOP/s
    "The fastest product of two square matrices that was seen"
    n = side or (8192 if device != "cpu" else 256 if scale() == "smoke" else 2048)
    return peak([product(n, dtype, device)], rounds)


def conv_peak(
    bf16: bool,  # or float32
    rounds: int = 6,
) -> dict:  # GFLOP/s of each shape; the largest is the peak
    "The fastest 3x3 convolution of this machine: forward and backward, several shapes, best of several calls"
    found = {}
    for batch, c, s in (
        (64, 64, 14),
        (64, 128, 14),
        (128, 64, 28),
        (64, 256, 7),
        (128, 96, 7),
        (32, 128, 28),
    ):
        job = convolution((batch, c, s, s), torch.bfloat16 if bf16 else torch.float32, backward=True)
        found[f"{batch}x{c}x{s}x{s}"] = peak([job], rounds) / 1e9
    return found
