"""The one counter of parameters, multiply-adds, memory and time, against numbers known beforehand."""
import time

import pytest
import torch
import torch.nn.functional as F
from t2i_course.core import counting
from torch import nn


def test_parameters_count_shared_weights_once():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3, bias=False))
    assert counting.parameters(net) == 20 + 15
    net[1].weight = nn.Parameter(net[0].weight.T.contiguous())
    both = nn.ModuleList([net[0], nn.Linear(3, 5)])
    both[1].weight = both[0].weight
    assert counting.parameters(both) == 15 + 5 + 5


@pytest.mark.parametrize("run, want", [
    (lambda: nn.Linear(30, 20)(torch.zeros(4, 30)), 4 * 30 * 20),
    (lambda: nn.Conv2d(3, 5, 3, padding=1)(torch.zeros(2, 3, 8, 8)), 2 * 64 * 5 * 3 * 9),
    (lambda: F.scaled_dot_product_attention(*torch.zeros(3, 2, 4, 6, 8)), 2 * 4 * 2 * 6 * 6 * 8),  # the fused kernel as well
    (lambda: torch.zeros(100) + 1, 0)])
def test_multiply_adds_of_known_operations(run, want):
    assert counting.multiply_adds(run) == want


def test_the_backward_pass_of_a_product_costs_two_more():
    layer, x = nn.Linear(8, 4), torch.zeros(2, 8, requires_grad=True)
    assert counting.multiply_adds(lambda: layer(x).sum().backward()) == 3 * 2 * 8 * 4


def test_macs_makes_no_number():
    "A network of a hundred billion weights, counted in this machine's memory"
    make, call = lambda: nn.Linear(316_228, 316_228), lambda net, b: net(torch.empty(b, 316_228))
    assert counting.macs(make, call) == 316_228 ** 2


def test_tensor_bytes_counts_a_memory_once():
    big = torch.zeros(100)
    assert counting.tensor_bytes([big, big[:10], big.view(10, 10)]) == 400
    assert counting.tensor_bytes([big, torch.zeros(3, dtype=torch.int64)]) == 424


def test_kept_counts_what_autograd_saves_and_no_weight():
    x, layer = torch.randn(4, 3, requires_grad=True), nn.Linear(3, 5)
    assert counting.kept(layer, lambda: layer(x).sum(1)).whole == 4 * 3 * 4
    relu = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    found = counting.kept(relu, lambda: relu(x).sum(1))
    assert found.whole == 4 * 3 * 4 + 4 * 5 * 4  # the output of ReLU is also the input of the next
    assert found.largest == 4 * 5 * 4


def test_checkpointing_keeps_what_enters_a_block_and_one_block_at_work():
    net, x = nn.Sequential(*[nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8)) for _ in range(5)]), torch.randn(4, 8)
    blocks = {str(i): m for i, m in enumerate(net)}
    found = counting.kept(net, lambda: net(x), blocks)
    row, wide = 4 * 8 * 4, 4 * 32 * 4
    assert found.whole == 5 * row + 5 * 2 * wide  # of each: its input, and what enters and leaves SiLU
    assert found.checkpointed == 5 * row + 2 * wide
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net)


def test_allocated_sees_the_peak_and_not_the_sum():
    "Two megabytes at once, four in all"
    def run():
        for _ in range(2): torch.zeros(1 << 18) + torch.zeros(1 << 18) * 0
    found = counting.allocated(run)
    assert 2 << 20 <= found < 5 << 20
    assert counting.allocated(lambda: torch.zeros(1 << 20)) >= 4 << 20


def test_in_turns_interleaves():
    order = []
    took = counting.in_turns(dict(a=lambda: order.append("a"), b=lambda: order.append("b")), 3)
    assert order == list("abababab") and len(took["a"]) == len(took["b"]) == 3
    order.clear()
    assert len(counting.in_turns(dict(a=lambda: order.append("a")), 2, warm=0)["a"]) == len(order) == 2


def test_the_peak_is_the_fastest_of_all_calls():
    naps = iter([0., .03, .01, .02])
    found = counting.peak([(1e6, lambda: time.sleep(next(naps)))], rounds=3)
    assert 1e6 / .02 < found <= 1e6 / .01
    flops, run = counting.product(64)
    assert flops == 2 * 64 ** 3 and counting.multiply_adds(run) == 64 ** 3
    for backward, times in ((False, 1), (True, 3)):
        flops, run = counting.convolution((2, 8, 6, 6), backward=backward)
        assert flops == times * 2 * 2 * 36 * 8 * 8 * 9
        assert counting.multiply_adds(run) == flops // 2
    assert counting.peak([counting.product(64)], seconds=.05) > 0
