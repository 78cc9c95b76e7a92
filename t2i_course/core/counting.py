"""What a network costs: parameters, multiply-adds, memory of a step, and the peak of its machine."""

import os
import time
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def parameters(
    net: nn.Module,
) -> int:
    "All of its weights, shared ones once"
    return sum(p.numel() for p in net.parameters())


# ---- arithmetic ----
def multiply_adds(
    run,  # called with nothing
) -> int:
    "Of all matrix products and convolutions; attention in its plain form, which torch counts everywhere"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as f:
        run()
    return f.get_total_flops() // 2


def macs(
    make,  # make() -> net
    call,  # call(net, b) -> losses of b pictures
) -> int:  # multiply-adds of one forward pass of one picture
    "With fake tensors, which have a shape and no numbers: a network of any size fits"
    with FakeTensorMode(), torch.no_grad():
        net = make()
        return multiply_adds(lambda: call(net, 1))


# ---- memory ----
def tensor_bytes(
    tensors,
) -> int:
    "Memory of some tensors; two views of one memory count once"
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


class Kept(NamedTuple):
    "Bytes that autograd keeps from the forward pass for the backward pass"

    whole: int  # of the whole network
    checkpointed: (
        int  # with checkpointing: what lies outside the blocks, what enters them, and one block at work
    )
    largest: int  # of the largest tensor: the backward pass needs about one more like it


def kept(
    net: nn.Module,  # its weights are counted elsewhere
    run,  # called with nothing; gives losses
    blocks: dict = None,  # name -> module: what checkpointing would compute again; none: all is kept
) -> Kept:
    "Every tensor that autograd saves passes through our hands; two views of one memory count once"
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    saved, enters, inside, alive = {}, {}, [""], []  # alive: no memory is given back and counted again

    def note(table, t, *value):
        memory = t.untyped_storage()
        if memory._cdata not in own and memory._cdata not in table:
            alive.append(t)
            table[memory._cdata] = (*value, memory.nbytes())

    def pack(t):
        note(saved, t, inside[-1])
        return t

    def goes_in(name):
        def hook(block, args):
            for t in args:
                if isinstance(t, Tensor):
                    note(enters, t)
            inside.append(name)

        return hook

    def goes_out(*_):
        inside.pop()

    hooks = [block.register_forward_pre_hook(goes_in(name)) for name, block in (blocks or {}).items()]
    hooks += [block.register_forward_hook(goes_out) for block in (blocks or {}).values()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run().sum()
    finally:
        for h in hooks:
            h.remove()
    return _summary(saved, enters)


def _summary(saved: dict, enters: dict) -> Kept:
    between = {k: b for k, (b,) in enters.items()} | {k: b for k, (name, b) in saved.items() if not name}
    blocks = {}
    for k, (name, b) in saved.items():
        blocks[name] = blocks.get(name, 0) + b * (k not in between)
    sizes = [b for _, b in saved.values()]
    return Kept(sum(sizes), sum(between.values()) + max(blocks.values(), default=0), max(sizes, default=0))


@contextmanager
def _silent():  # the profiler writes to the process's error stream that it found no GPU
    stream, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stream, 2)
        os.close(stream)
        os.close(null)


def allocated(
    run,  # called with nothing
) -> int:  # bytes
    "Measured: the most that torch's CPU allocator gave out at once while it ran"
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    with _silent():
        found = p.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    return max(accumulate((b for _, b in events), initial=0))


# ---- time ----
def in_turns(
    jobs: dict,  # name -> function without arguments
    rounds: int = 3,  # of all of them
    warm: int = 1,  # rounds before these, which do not count
) -> dict:  # name -> seconds of each call, in order
    "One after the other and again, so that a slow minute of the machine is slow for all"
    took = {k: [] for k in jobs}
    for i in range(rounds + warm):
        for k, f in jobs.items():
            start = time.perf_counter()
            f()
            if i >= warm:
                took[k].append(time.perf_counter() - start)
    return took


def wait(device):
    "Until the device has done what it was given: GPUs work ahead of the program"
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def product(
    n: int,  # side of the matrices
    dtype=torch.float32,
    device: str = "cpu",
) -> tuple:  # floating point operations, a function that does them
    "A product of two square matrices, waited for"
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def run():
        a @ b
        wait(device)

    return 2 * n**3, run


def convolution(
    shape: tuple,  # (b c h w); the side h for both
    dtype=torch.float32,
    backward: bool = False,  # and back again: three times the arithmetic
) -> tuple:  # floating point operations, a function that does them
    "A 3x3 convolution that keeps the number of channels"
    b, c, h, w = shape
    conv = (
        nn.Conv2d(c, c, 3, padding=1).to(dtype).to(memory_format=torch.channels_last).requires_grad_(backward)
    )
    x = (
        torch.randn(b, c, h, w)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_(backward)
    )
    g, flops = torch.ones_like(x), 2 * b * c * c * 9 * h * w
    return (3 * flops, lambda: conv(x).backward(g)) if backward else (flops, lambda: conv(x))


def peak(
    jobs,  # (floating point operations, function), as from `product` and `convolution`
    rounds: int = 8,
    seconds: float = None,  # in place of rounds: how long to look
) -> float:  # operations a second of the fastest call of all
    "The roof of this machine, as far as these jobs reach it"
    best, end = 0.0, time.perf_counter() + (seconds or 0)
    for flops, run in jobs:
        run()  # the first call of a shape chooses its kernel
    while time.perf_counter() < end if seconds else rounds:
        rounds -= not seconds
        for flops, run in jobs:
            start = time.perf_counter()
            run()
            best = max(best, flops / (time.perf_counter() - start))
    return best
