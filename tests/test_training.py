"The training loop: exact resume, accumulation, clocks, what stops it, and the choice of threads."
import math
import random
from pathlib import Path

import pytest
import torch
from t2i_course.core.data import Draws, Painted
from t2i_course.core.files import CourseError
from t2i_course.core.ema import EMA, settle
from t2i_course.core.training import Record, State, Threads, Turn, feed, has_bf16, pick_device, train, warm_linear
from torch import nn


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 6))


def data(draws):
    return draws.uniform("picture", 6) * 2 - 1, draws.choice("label", 3)


def denoise(net):
    def loss(x0, cond, draws): return (net(x0 + draws.normal("eps", 6)) - x0).square().mean(1)
    return loss


def fresh(precision="fp32", seed=0):
    net = make(seed)
    return State(net, ema=EMA(net, 200), precision=precision)


def go(state, stop=None, **kw):
    "Train; leave the loop after step `stop`."
    records = []
    for record in train(state, denoise(state.net), data, **({"images": 150, "batch": 16} | kw)):
        records.append(record)
        if record.step == stop: break
    return records


def assert_same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a: assert torch.equal(a[name], b[name]), name


# --- Exact resume ---

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stop", [1, 4, 9, 10])
def test_resume_is_exact(precision, stop):
    "Interrupted and taken up in another network: the same bytes, the last and shorter batch included."
    straight, broken = fresh(precision), fresh(precision)
    records = go(straight)
    assert len(records) == 10 and records[-1].images == 150
    go(broken, stop)
    tensors, numbers = {name: v.clone() for name, v in broken.tensors().items()}, broken.numbers()
    resumed = fresh(precision, seed=99).load(tensors, numbers)
    rest = go(resumed)
    assert_same_bytes(straight.tensors(), resumed.tensors())
    assert [r.loss for r in records[stop:]] == [r.loss for r in rest]
    assert (straight.step, straight.images) == (resumed.step, resumed.images)


def test_resume_survives_several_interruptions_and_a_disturbed_generator():
    straight, state, rng = fresh(), fresh(), random.Random(3)
    go(straight, images=400, accumulate=2)
    while state.images < 400:
        go(state, state.step + rng.randrange(1, 9), images=400, accumulate=2)
        saved = {name: v.clone() for name, v in state.tensors().items()}
        state = fresh(seed=rng.randrange(1000)).load(saved, state.numbers())
    assert_same_bytes(straight.tensors(), state.tensors())


def test_a_loaded_state_does_not_write_into_what_it_was_loaded_from():
    state = fresh()
    go(state, 3)
    tensors = state.tensors()
    before = {name: v.clone() for name, v in tensors.items()}
    go(fresh(seed=1).load(tensors, state.numbers()))
    assert_same_bytes(before, tensors)


def test_another_network_is_refused():
    state = fresh()
    go(state, 2)
    other = State(nn.Linear(6, 6))
    with pytest.raises((KeyError, RuntimeError)): other.load(state.tensors(), state.numbers())


def test_the_running_generator_does_not_matter():
    a, b = fresh(), fresh()
    go(a)
    for _ in train(b, denoise(b.net), data, images=150, batch=16): torch.rand(7)
    assert_same_bytes(a.tensors(), b.tensors())


def test_seed_matters():
    a, b = fresh(), fresh()
    go(a), go(b, seed=1)
    assert not torch.equal(a.net[0].weight, b.net[0].weight)


# --- One step ---

@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulation_equals_the_larger_batch(accumulate):
    whole, pieces = fresh(), fresh()
    a, b = go(whole, images=160), go(pieces, images=160, accumulate=accumulate)
    for x, y in zip(whole.net.parameters(), pieces.net.parameters()): assert torch.allclose(x, y, atol=1e-5)
    assert [r.loss for r in a] == pytest.approx([r.loss for r in b], rel=1e-4)
    assert [r.grad_norm for r in a] == pytest.approx([r.grad_norm for r in b], rel=1e-3)


def test_first_step_is_the_one_written_by_hand():
    state, net = fresh(), make()
    [record] = go(state, images=16, schedule=lambda f: 1.)
    draws = Draws(0, torch.arange(16))
    x0, cond = data(draws)
    losses = denoise(net)(x0, cond, draws)
    losses.mean().backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.)
    torch.optim.AdamW(net.parameters(), 4e-3, betas=(.9, .95), weight_decay=.01).step()
    for a, b in zip(state.net.parameters(), net.parameters()): assert torch.allclose(a, b, atol=1e-6)
    assert record.loss == pytest.approx(losses.mean().item()) and record.grad_norm == pytest.approx(norm.item())


def test_clipping_bounds_what_the_optimizer_sees():
    state = fresh()
    state.opts[""] = torch.optim.SGD(state.net.parameters(), 1.)
    state.lr = 1.
    before = torch.cat([p.detach().flatten().clone() for p in state.net.parameters()])
    [record] = go(state, images=16, clip=.01, schedule=lambda f: 1.)
    after = torch.cat([p.detach().flatten() for p in state.net.parameters()])
    assert record.grad_norm > .01
    assert (after - before).norm().item() == pytest.approx(.01, rel=1e-3)


def test_weights_and_gradients_stay_float32_under_bf16():
    state = fresh("bf16")
    go(state, 2)
    for p in state.net.parameters(): assert p.dtype == p.grad.dtype == torch.float32


def test_records_tell_the_run():
    records = go(fresh())
    assert isinstance(records[0], Record)
    assert [r.step for r in records] == list(range(1, 11))
    assert [r.images for r in records] == [*range(16, 160, 16), 150]
    assert records[-1].progress == 1 and len(records[-1].losses) == 6
    assert records[-1].losses.mean().item() == pytest.approx(records[-1].loss, rel=1e-5)
    assert torch.equal(records[1].draws.index, torch.arange(16, 32))


# --- Clocks ---

def test_a_run_needs_a_clock():
    with pytest.raises(CourseError, match="give it images=, seconds="): next(train(fresh(), None, None))


def test_of_two_clocks_the_first_ends_the_run():
    by_images = go(fresh(), images=150, seconds=600)
    assert by_images[-1].images == 150 and by_images[-1].progress == 1
    state = fresh()
    by_time = go(state, images=10**9, seconds=.2)
    assert .2 <= state.seconds < 10 and by_time[-1].progress == 1
    assert by_time[-1].lr < .5 * max(r.lr for r in by_time) # the schedule follows the clock that is ahead


def test_seconds_end_a_run_and_are_kept():
    state = fresh()
    records = go(state, images=None, seconds=.2)
    assert records[-1].progress == 1 and state.seconds >= .2
    assert all(r.progress < 1 for r in records[:-1])
    resumed = fresh(seed=1).load(state.tensors(), state.numbers())
    assert go(resumed, images=None, seconds=.2) == []
    assert go(resumed, images=None, seconds=.3)[0].step == state.step + 1


def test_time_of_the_caller_is_not_training_time():
    state, clock = fresh(), [0.]
    for record in train(state, denoise(state.net), data, images=64, batch=16):
        torch.randn(1_000_000).sort()
        clock.append(record.seconds)
    assert clock == sorted(clock)
    assert state.seconds == clock[-1]


def test_an_images_run_leaves_the_threads_alone():
    before = torch.get_num_threads()
    go(fresh())
    assert torch.get_num_threads() == before


def test_schedule():
    assert [warm_linear(f) for f in (0, .05, .525, 1)] == pytest.approx([0, 1, .5, 0])
    assert warm_linear(0, 0) == 1
    rates = [r.lr for r in go(fresh(), images=1600)]
    assert rates[0] == 0 and max(rates) == pytest.approx(4e-3) and 0 < rates[-1] < 1e-4


# --- What stops a run ---

@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nan_stops_and_leaves_the_last_good_weights(bad, precision):
    def poisoned(draws):
        x0, cond = data(draws)
        return (x0 * bad if 48 in draws.index else x0), cond
    state, before = fresh(precision), None
    with pytest.raises(CourseError, match=r"step 4 \(48 images\).*precision fp32"):
        for _ in train(state, denoise(state.net), poisoned, images=150, batch=16):
            before = {name: v.clone() for name, v in state.tensors().items()}
    assert_same_bytes(before, state.tensors())
    assert all(v.isfinite().all() for v in state.net.state_dict().values())
    assert (state.step, state.images) == (3, 48)


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is_fine():
    "The slope of a square root at 0."
    state, before = fresh(), None

    def loss(x0, cond, draws):
        out = state.net(x0)
        return out.square().mean(1) if draws.index[0] < 16 else (out - out).square().sum(1).sqrt()

    with pytest.raises(CourseError, match=r"loss 0, gradient norm nan"):
        for _ in train(state, loss, data, images=150, batch=16):
            before = {name: v.clone() for name, v in state.net.state_dict().items()}
    assert_same_bytes(before, state.net.state_dict())


def test_fp16_skips_an_overflow_and_goes_on():
    state = fresh("fp16")
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.**60)
    weights = state.net[0].weight.detach().clone()
    records = go(state, 1)
    assert not math.isfinite(records[0].grad_norm)
    assert torch.equal(weights, state.net[0].weight) and state.scaler.get_scale() < 2.**60


# --- Threads ---

@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drive(threads, costs, steps):
    "Steps with made-up times; which number of threads each one used."
    used = []
    for _ in range(steps):
        threads.before()
        used.append(torch.get_num_threads())
        threads.after(costs[used[-1]])
    return used


@pytest.mark.parametrize("costs, winner", [({2: .04, 1: .06}, 2), ({2: .3, 1: .06}, 1)])
def test_threads_tries_both_and_keeps_the_faster(threads_restored, costs, winner):
    used = drive(Threads(most=2, tries=3), costs, 10)
    assert used[:6] == [2] * 3 + [1] * 3
    assert used[6:] == [winner] * 4


def test_threads_are_tried_again_when_steps_become_slow(threads_restored):
    threads = Threads(most=2, tries=3)
    assert drive(threads, {2: .04, 1: .06}, 20)[-1] == 2
    used = drive(threads, {2: .3, 1: .07}, 20)
    assert used[:8] == [2] * 8 and used[8:14] == [2] * 3 + [1] * 3 and set(used[14:]) == {1}


def test_one_slow_step_changes_nothing(threads_restored):
    threads = Threads(most=2, tries=3)
    drive(threads, {2: .04, 1: .06}, 10)
    threads.after(10.)
    assert set(drive(threads, {2: .04, 1: .06}, 20)) == {2}


def test_first_step_of_a_trial_is_a_warm_up(threads_restored):
    threads, seconds = Threads(most=2, tries=3), iter([9., .01, .01, .02, .02, .02])
    for _ in range(6):
        threads.before()
        threads.after(next(seconds))
    assert torch.get_num_threads() == 2


def test_nothing_to_choose_on_one_thread(threads_restored):
    torch.set_num_threads(1)
    assert set(drive(Threads(most=1), {1: .05}, 30)) == {1}


# --- Small parts ---

def test_feed_is_a_function_of_the_draws():
    f = feed(Painted(), list)
    (a, words), (b, again) = f(Draws(0, torch.arange(8))), f(Draws(0, torch.arange(4, 8)))
    assert torch.equal(a[4:], b) and words[4:] == again and a.shape == (8, 3, 32, 32)


def test_device():
    assert pick_device() in ("cpu", "cuda", "mps")


MASKS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


@pytest.fixture
def unmasked(monkeypatch):
    for name in MASKS: monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists the flags of its processor in a file")
def test_bf16_units_are_those_the_kernel_sees(unmasked):
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert has_bf16() == bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


@pytest.mark.parametrize("found, units", [
    ({}, False), ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False), ({"avx512_bf16": True}, True),
    ({"amx_bf16": True}, True), ({"architecture": "aarch64", "bf16": True}, True), ({"architecture": "aarch64", "bf16": False}, False)])
def test_bf16_units_of_processors(unmasked, found, units):
    unmasked.setattr(torch.cpu, "get_capabilities", lambda: found)
    unmasked.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    unmasked.setattr("sys.platform", "linux")
    assert has_bf16() is units


@pytest.mark.parametrize("name, value, units", [
    ("ONEDNN_MAX_CPU_ISA", "AVX2", False), ("ONEDNN_MAX_CPU_ISA", "avx512_core_vnni", False), ("DNNL_MAX_CPU_ISA", "AVX2", False),
    ("ATEN_CPU_CAPABILITY", "avx2", False), ("ATEN_CPU_CAPABILITY", "default", False), ("ATEN_CPU_CAPABILITY", "avx512", True),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", True), ("ONEDNN_MAX_CPU_ISA", "ALL", True)])
def test_a_mask_hides_the_units(unmasked, name, value, units):
    unmasked.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    unmasked.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    unmasked.setattr("sys.platform", "linux")
    unmasked.setenv(name, value)
    assert has_bf16() is units


def test_bf16_units_of_gpus(monkeypatch):
    for version, units in {(7, 5): False, (8, 0): True, (9, 0): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, version=version: version)
        assert has_bf16("cuda") is has_bf16("cuda:1") is units
    assert has_bf16("mps") is False


def test_learns_and_the_control_does_not():
    def run(shift):
        net = make()
        state = State(net, lr=2e-2)

        def loss(x0, cond, draws): return (net(x0 + .3 * draws.normal("eps", 6)) - x0.roll(shift, 0)).square().mean(1)
        return [r.loss for r in train(state, loss, data, images=6400, batch=32)]
    true, shuffled = run(0), run(1)
    assert sum(true[-10:]) / 10 < .5 * true[0]
    assert sum(shuffled[-10:]) / 10 > .9 * 1 / 3   # the variance of the uniform numbers


# --- Several losses ---

def players(seed=0, begin=None):
    "Two networks: one denoises, the other guesses the first one's error lazily, in the second half"
    net = nn.ModuleDict({"a": make(seed), "b": make(seed + 1)})
    def first(x0, cond, draws): return (net["a"](x0 + draws.normal("eps", 6)) - x0).square().mean(1)
    def second(x0, cond, draws):
        x = x0 + draws.normal("eps", 6)
        return (net["b"](x) - (net["a"](x) - x0)).square().mean(1)
    state = State(net, ema=EMA(net, 200), parts={"a": {}, "b": {"lr": 1e-3, "betas": (0., .99)}})
    return state, [Turn("first", first, "a"), Turn("second", second, "b", every=3, gain=3., since=.5, begin=begin)]


def play(state, turns, stop=None, **kw):
    records = []
    for record in train(state, turns, data, **({"images": 320, "batch": 16} | kw)):
        records.append(record)
        if record.step == stop: break
    return records


def test_turns_come_when_they_should():
    "A stage begins at half-time, a lazy turn at each third step; a record has the losses of its step."
    begun = []
    state, turns = players(begin=lambda state: begun.append(state.step))
    records = play(state, turns)
    assert [list(r.turns) for r in records] == [["first", "second"] if i >= 10 and i % 3 == 0 else ["first"] for i in range(20)]
    assert begun == [12] and state.begun == ["first", "second"] or state.begun == ["second"]
    assert all(r.loss == r.turns["first"] for r in records)


def test_a_turn_moves_its_part_alone():
    "The second player looks at the first and changes nothing of it; each optimizer has the settings of its part."
    (both, turns), (alone, one) = players(), players()
    play(both, turns); play(alone, one[:1])
    for a, b in zip(both.net["a"].parameters(), alone.net["a"].parameters()): assert torch.equal(a, b)
    moved = [not torch.equal(a, b) for a, b in zip(both.net["b"].parameters(), alone.net["b"].parameters())]
    assert all(moved) and all(p.requires_grad for p in both.net.parameters())
    assert both.opts["b"].param_groups[0]["betas"] == (0., .99) and both.rate("b") == 1e-3 and both.rate("a") == both.lr


@pytest.mark.parametrize("stop", [1, 9, 10, 12, 13, 19])
def test_resume_is_exact_with_turns(stop):
    "Stopped before, at and after the begin of the second stage, which begins once."
    begun = []
    straight, turns = players()
    play(straight, turns)
    broken, again = players(begin=lambda state: begun.append(state.step))
    play(broken, again, stop)
    tensors, numbers = {name: v.clone() for name, v in broken.tensors().items()}, broken.numbers()
    resumed, rest = players(50, begin=lambda state: begun.append(state.step))
    play(resumed.load(tensors, numbers), rest)
    assert_same_bytes(straight.tensors(), resumed.tensors())
    assert begun == [12]


def test_the_learning_rate_of_a_stage_runs_over_its_own_window():
    state, turns = players()
    only = [turns[1]._replace(every=1)]
    rates = [r.lr for r in play(state, only, schedule=lambda f: 1 - f)]
    assert len(rates) == 10 and rates == pytest.approx([1e-3 * (1 - i / 10) for i in range(10)])


def test_a_gain_multiplies_the_gradient():
    "With plain gradient descent and no clipping, ten times the gain is ten times the step."
    moves = []
    for gain in (1., 10.):
        state, turns = players()
        state.opts["a"] = torch.optim.SGD(state.net["a"].parameters(), 1.)
        before = torch.cat([p.detach().flatten().clone() for p in state.net["a"].parameters()])
        play(state, [turns[0]._replace(gain=gain)], images=16, clip=math.inf, schedule=lambda f: 100.)
        moves.append(torch.cat([p.detach().flatten() for p in state.net["a"].parameters()]) - before)
    assert torch.allclose(10 * moves[0], moves[1], rtol=1e-3, atol=1e-5)


def test_turns_see_the_same_pictures_and_ask_for_them_once():
    asked = []
    def counted(draws):
        asked.append(draws.index[0].item())
        return data(draws)
    state, turns = players()
    list(train(state, [turns[0], turns[1]._replace(every=1, since=0.)], counted, images=64, batch=16, accumulate=2))
    assert asked == list(range(0, 64, 8))


def test_settle_makes_the_average_the_weights():
    "The first stage ends; the second begins with its average, which then stays."
    state, (first, second) = players()
    stages = [first._replace(until=.5), second._replace(every=1, begin=settle("a"))]
    play(state, stages, 10)
    shadow = {k: v.clone() for k, v in state.ema.shadow.items() if k.startswith("a.")}
    own = state.net.state_dict()
    assert any(not torch.equal(v, own[k]) for k, v in shadow.items())
    play(state, stages)
    own = state.net.state_dict()
    for k, v in shadow.items(): assert torch.equal(v, own[k]) and torch.allclose(v, state.ema.shadow[k], atol=1e-6)


def test_resume_is_exact_with_weights_in_another_memory_layout():
    "A file holds tensors in plain order; the optimizer's averages have to be laid out as their weights are."
    def small():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)).to(memory_format=torch.channels_last)
        return State(net, ema=EMA(net, 100))
    def pictures(draws): return draws.normal("x", 3, 8, 8), draws.choice("label", 3)
    def run(state, stop=None):
        def loss(x0, cond, draws): return (state.net(x0 + draws.normal("eps", 3, 8, 8)) - x0).square().flatten(1).mean(1)
        for r in train(state, loss, pictures, images=160, batch=16):
            if r.step == stop: break
        return state
    straight, broken = run(small()), run(small(), 5)
    saved = {k: v.contiguous().clone() for k, v in broken.tensors().items()}
    assert_same_bytes(straight.tensors(), run(small().load(saved, broken.numbers())).tensors())


# --- Progress and groups ---

def noted(seen, net):
    def loss(x0, cond, draws):
        seen.append((draws.progress, draws.index[0].item()))
        return (net(x0 + draws.normal("eps", 6)) - x0).square().mean(1)
    return loss


def test_draws_know_the_progress_of_the_run():
    "The share at the start of the step: the same for all its micro-batches, for the pictures and for the loss"
    state, seen, fed = fresh(), [], []
    def data_too(draws):
        fed.append(draws.progress)
        return data(draws)
    list(train(state, noted(seen, state.net), data_too, images=80, batch=16, accumulate=2))
    assert [p for p, _ in seen] == fed == [i / 5 for i in range(5) for _ in range(2)]
    assert Draws(0, torch.arange(3)).progress == 0


def test_progress_is_no_part_of_a_random_number():
    a, b = Draws(0, torch.arange(5)), Draws(0, torch.arange(5), progress=.7)
    assert torch.equal(a.normal("eps", 3), b.normal("eps", 3))


@pytest.mark.parametrize("stop", [1, 4])
def test_resume_is_exact_where_a_loss_depends_on_progress(stop):
    def cooling(net):
        def loss(x0, cond, draws): return (net(x0 + (1 - draws.progress) * draws.normal("eps", 6)) - x0).square().mean(1)
        return loss
    def run(state, stop=None):
        for r in train(state, cooling(state.net), data, images=160, batch=16):
            if r.step == stop: break
        return state
    straight, broken = run(fresh()), run(fresh(), stop)
    tensors, numbers = {k: v.clone() for k, v in broken.tensors().items()}, broken.numbers()
    assert_same_bytes(straight.tensors(), run(fresh(seed=9).load(tensors, numbers)).tensors())
    plain = fresh()
    go(plain, images=160)
    assert any(not torch.equal(straight.tensors()[k], v) for k, v in plain.tensors().items())  # it does depend on it


class Buckets:
    "Every six indices one shape"
    name, group = "buckets", 6
    def batch(self, split, draws):
        from t2i_course.core.data import Batch
        which = draws.index // self.group
        assert len(which.unique()) == 1, "a tensor of two shapes"
        n = 4 + which[0].item() % 3
        return Batch(draws.uniform("x", n) - .5, [""] * len(draws), {}, {})


@pytest.mark.parametrize("batch, accumulate, cut", [(6, 1, 6), (3, 1, 3), (12, 1, 6), (24, 2, 6), (24, 3, 6), (6, 2, 3)])
def test_a_micro_batch_has_one_shape(batch, accumulate, cut):
    "Whatever the batch, cut where the group ends, the run is the same up to rounding"
    def run(batch, accumulate=1):
        torch.manual_seed(0)
        net, sizes = nn.Linear(1, 1), []
        def loss(x0, cond, draws):
            sizes.append(len(x0))
            return (net(x0[..., None]) - 1).square().flatten(1).mean(1)
        state = State(net)
        list(train(state, loss, feed(Buckets(), lambda c: torch.zeros(len(c))), images=48, batch=batch, accumulate=accumulate))
        return sizes, net.weight.item()
    sizes, weight = run(batch, accumulate)
    assert max(sizes) == cut and sum(sizes) == 48
    assert weight == pytest.approx(run(batch, 4 * accumulate if batch > 6 else 1)[1], abs=1e-6)


def test_a_batch_that_does_not_fit_the_groups_is_refused():
    state = State(nn.Linear(1, 1))
    with pytest.raises(CourseError, match="one shape for every 6 images.*got 8"):
        next(train(state, noted([], state.net), feed(Buckets(), None), images=48, batch=8))


def test_turns_and_wrappers_hand_the_group_on():
    from t2i_course.core.data import Wrapped
    class Marked(Wrapped):
        def batch(self, split, draws): return super().batch(split, draws)._replace(more={"n": draws.index})
    import copy
    marked = Marked(Buckets())
    assert marked.group == feed(marked, None).group == copy.copy(marked).group == 6 and marked.name == "buckets"
    assert marked.batch("train", Draws(0, torch.arange(6))).more["n"].tolist() == list(range(6))
    with pytest.raises(AttributeError, match="nothing"): marked.nothing
    state, turns = players()
    with pytest.raises(CourseError, match="got 8"): next(train(state, turns, feed(marked, None), images=48, batch=8))


def test_a_budget_of_nothing_is_used_up():
    "Nought is no clock to run for ever on"
    from types import SimpleNamespace
    from t2i_course.core.training import spent
    state = SimpleNamespace(images=0, seconds=0.)
    assert spent(state, None, 0.) >= 1 and spent(state, 0) >= 1 and spent(state, None, -1.) >= 1 and spent(state, 10, 10.) == 0
