"""A small part learns inside a base that stays as it is: the base is neither moved, nor averaged, nor saved, and resume is exact."""
import pytest
import torch
from t2i_course.core.contracts import Defaults
from t2i_course.core.ema import EMA, settle, state_for
from t2i_course.core.files import CourseError, load_tensors
from t2i_course.core.training import ALONE, State, Turn, frozen, load_trained, train
from torch import nn


class Adapted(nn.Module):
    "A frozen layer with running means and a place table; beside it a low-rank correction that learns"
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(7)  # of the base, which every run finds as it is
        self.base = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 6)).requires_grad_(False)
        self.base.register_buffer("places", torch.randn(3))
        torch.manual_seed(seed)
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)
        self.register_buffer("seen", torch.zeros(()))
    def forward(self, x):
        self.seen += 1
        return self.base(x) + self.up(self.down(x))


def data(draws): return draws.uniform("picture", 6) * 2 - 1, draws.choice("label", 3)


def loss_of(net): return lambda x0, cond, draws: (net(x0 + draws.normal("eps", 6)) - x0).square().mean(1)


def fresh(seed=0):
    net = Adapted(seed)
    return State(net, ema=EMA(net, 200))


def go(state, stop=None, loss=None, **kw):
    for r in train(state, loss or loss_of(state.net), data, **(dict(images=160, batch=16) | kw)):
        if r.step == stop: break
    return state


def copied(tensors): return {k: v.clone() for k, v in tensors.items()}


def base_of(net): return {k: v.clone() for k, v in net.state_dict().items() if k.startswith("base.")}


def test_the_base_is_untouched_and_absent():
    state = fresh()
    before, start = base_of(state.net), copied(state.tensors())
    assert state.frozen == set(before) and len(before) == 10
    go(state)
    after = base_of(state.net)
    assert all(torch.equal(after[k], before[k]) for k in before)  # BatchNorm's running means as well
    assert not any("base" in k for k in state.tensors()) and not any("base" in k for k in state.ema.shadow)
    assert len(state.opts[""].param_groups[0]["params"]) == 4 and state.tensors()["net.seen"] == 10
    assert any(not torch.equal(state.tensors()[k], start[k]) for k in start if k.startswith("net.up"))
    assert all(p.requires_grad != n.startswith("base.") for n, p in state.net.named_parameters())


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_resume_is_exact_to_the_byte(stop, tmp_path):
    "Through a file, in a network that begins elsewhere"
    straight, broken = go(fresh()), go(fresh(), stop)
    ALONE.save(broken, tmp_path, dict(config="x"))
    saved, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    assert not any("base" in k for k in saved)
    resumed = fresh(seed=50)
    assert ALONE.load(resumed, tmp_path, lambda note: note["config"] == "x") == {}
    go(resumed)
    a, b = straight.tensors(), resumed.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(v, base_of(resumed.net)[k]) for k, v in base_of(straight.net).items())


@pytest.mark.parametrize("stop", [1, 4])
def test_resume_is_exact_where_processes_save_together(stop, tmp_path):
    from t2i_course.scale.fsdp import load_sharded, save_sharded
    straight, broken = go(fresh()), go(fresh(), stop)
    folder = save_sharded(broken, tmp_path)
    import torch.distributed.checkpoint as dcp
    assert not any(".base." in k or k.startswith("base") for k in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    resumed = fresh(seed=50)
    before = base_of(resumed.net)
    load_sharded(resumed, tmp_path)
    go(resumed)
    a, b = straight.tensors(), resumed.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(v, base_of(resumed.net)[k]) for k, v in before.items())


def test_the_average_is_borrowed_and_given_without_the_base():
    state = go(fresh())
    before, own = base_of(state.net), state.net.up.weight.detach().clone()
    with state.ema.applied(state.net): assert torch.equal(state.net.up.weight, state.ema.shadow["up.weight"])
    assert torch.equal(state.net.up.weight, own)
    state.ema.give(state.net)
    assert torch.equal(state.net.up.weight, state.ema.shadow["up.weight"])
    assert all(torch.equal(base_of(state.net)[k], v) for k, v in before.items())
    other = Adapted(3)
    load_trained(other, copied(state.ema.shadow))  # what a finished run is opened by
    assert torch.equal(other.up.weight, state.net.up.weight)


@pytest.mark.parametrize("spoil", [lambda t: t.pop("up.bias"), lambda t: t.update({"base.0.weight": torch.zeros(16, 6)}),
                                   lambda t: t.update(strange=torch.zeros(1)), lambda t: t.update({"up.bias": torch.zeros(7)})])
def test_weights_of_another_network_are_refused(spoil):
    net = Adapted()
    before = copied(net.state_dict())
    tensors = {k: v.clone() + 1 for k, v in net.state_dict().items() if k not in frozen(net)}
    spoil(tensors)
    with pytest.raises(RuntimeError): load_trained(net, tensors)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items() if k.startswith("base."))


def test_parts_do_not_unfreeze():
    "Two optimizers, one of a module half of which is frozen; a stage settles; resume stays exact"
    def players(seed=0):
        net = nn.ModuleDict(dict(a=Adapted(seed), b=nn.Linear(6, 6)))
        def first(x0, cond, draws): return (net["a"](x0 + draws.normal("eps", 6)) - x0).square().mean(1)
        def second(x0, cond, draws): return (net["b"](x0) - net["a"](x0)).square().mean(1)
        state = State(net, ema=EMA(net, 200), parts=dict(a={}, b=dict(lr=1e-3)))
        return state, [Turn("first", first, "a", until=.5), Turn("second", second, "b", since=.5, begin=settle("a"))]
    def play(state, turns, stop=None): return go(state, stop, turns)
    straight, turns = players()
    before = base_of(straight.net["a"])
    play(straight, turns)
    assert all(torch.equal(base_of(straight.net["a"])[k], v) for k, v in before.items())
    assert all(p.requires_grad != n.startswith("a.base.") for n, p in straight.net.named_parameters())
    broken, again = players()
    play(broken, again, 7)
    resumed, rest = players(50)
    resumed.net["b"].load_state_dict(broken.net["b"].state_dict())
    play(resumed.load(copied(broken.tensors()), broken.numbers()), rest)
    a, b = straight.tensors(), resumed.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and not any("base" in k for k in a)


def test_drawing_in_between_does_not_wake_the_base():
    "A painter sets eval and train for the whole network"
    state = fresh()
    before = base_of(state.net)
    for _ in train(state, loss_of(state.net), data, images=64, batch=16): state.net.eval().train()
    assert all(torch.equal(base_of(state.net)[k], v) for k, v in before.items()) and state.net.training


def test_a_buffer_belongs_to_the_nearest_module_with_weights():
    net = Adapted()
    assert "seen" not in frozen(net) and {"base.places", "base.1.running_mean"} < frozen(net)
    assert frozen(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))) == set()
    assert frozen(net.requires_grad_(False)) == set(net.state_dict())


def test_nothing_to_learn_is_said():
    with pytest.raises(CourseError, match="nothing of this network learns"): State(Adapted().requires_grad_(False))


def test_state_for_follows_what_a_model_says_is_trained():
    "A model that names fewer weights than require a gradient has the others frozen"
    class Model(Defaults):
        def __init__(self):
            self.net = Adapted()
            self.trained = {k: p for k, p in self.net.named_parameters() if k.startswith("up.")}
    model = Model()
    state = state_for(model, dict(lr=1e-3, half_life=100))
    assert {k for k in state.tensors()} == {"net.up.weight", "net.up.bias", "net.seen", "ema.up.weight", "ema.up.bias", "ema.seen"}
    start = model.net.down.weight.clone()
    go(state)
    assert torch.equal(model.net.down.weight, start)
