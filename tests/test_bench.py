"`t2i bench digits`: the instrument, the comparison at equal size, and what is kept when it is interrupted."
import json

import pytest
import torch
from t2i_course import cli
from t2i_course.bench.digits import time_to_bar
from t2i_course.bench.meters import bare_cond, conv_peak, matmul_peak
from t2i_course.core.counting import multiply_adds, parameters
from t2i_course.bench.peers import PEERS, TorchCFM, Unit2, draw_peer, train_peer
from t2i_course.bench.ruler import Ruler
from t2i_course.bench.twins import TWINS
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.core.metrics import broken_strokes
from t2i_course.core.training import has_bf16
from t2i_course.diffusion.ddpm import UNet
from t2i_course.flow import flow_matching


def picture(*strokes):
    x = -torch.ones(1, 1, 28, 28)
    for rows, columns in strokes: x[0, 0, rows, columns] = 1
    return x


def test_broken_strokes_count_pieces():
    line, rest = (slice(4, 12), 10), (slice(15, 24), 10)
    speck, corner = (slice(2, 3), slice(2, 5)), (slice(12, 20), 11)  # three pixels; touches the line at a corner
    pictures = dict(line=(line,), torn=(line, rest), speckled=(line, speck), diagonal=(line, corner), empty=())
    said = {name: broken_strokes(picture(*parts)) for name, parts in pictures.items()}
    assert said == dict(line=0., torn=1., speckled=0., diagonal=0., empty=1.)
    assert broken_strokes(torch.cat([picture(line), picture(line, rest)])) == .5


def test_real_digits_are_whole():
    data = load("digits")
    assert broken_strokes(data.batch("test", Draws(0, torch.arange(300))).x) < .02


@pytest.fixture(scope="module")
def ruler(): return Ruler(load("digits"), 100)


def test_ruler(ruler):
    data = ruler.data
    kept = data.batch("test", Draws(0, torch.arange(len(data.labels["test"]))))

    def real(captions, seed):
        want = torch.tensor([data.demands(c)["digit"] for c in captions])
        place = {k: iter((kept.attrs["digit"] == k).nonzero()[:, 0].tolist()) for k in range(10)}
        return torch.stack([kept.x[next(place[k])] for k in want.tolist()])
    good = ruler.row(real)
    noise = ruler.row(lambda c, seed: Draws(0, torch.arange(len(c))).normal("x", *data.shape))
    assert good["accuracy"] > .97 and good["fd_floors"] < 2 and good["broken"] < .02
    assert noise["accuracy"] < .4 and noise["fd_floors"] > 10 and noise["recall"] < .5 < good["recall"]
    assert 0 < ruler.floor < 5 and ruler.about()["accuracy_real"] > .97


@pytest.mark.parametrize("name", PEERS)
def test_twins_are_as_large_as_the_published_networks(name):
    if name == "torchcfm": pytest.importorskip("torchcfm", exc_type=ImportError)
    peer, net, one = PEERS[name](), UNet(1, 96, d_emb=128, **TWINS[name]), torch.zeros(1, 1, 28, 28)
    with torch.no_grad():
        theirs = multiply_adds(lambda: peer.loss(one, torch.zeros(1, dtype=torch.int64)))
        ours = multiply_adds(lambda: net(one, torch.zeros(1), bare_cond(1)))
    assert abs(parameters(net) / parameters(peer.net) - 1) < .1 and abs(ours / theirs - 1) < .1


def test_peer_learns_and_draws():
    data, peer = load("digits"), Unit2()

    class Large:  # 28 x 28, as the published recipe wants
        attribute, shape, demands = data.attribute, (1, 28, 28), staticmethod(data.demands)

        def batch(self, split, draws):
            b = data.batch(split, draws)
            return b._replace(x=torch.nn.functional.interpolate(b.x, 28))
    took = train_peer(peer, Large(), .1)
    assert took["steps"] >= 1 and took["images"] == 128 * took["steps"] and took["train_seconds"] >= .1
    peer.draw = lambda y, x, draw=peer.draw: x + y[:, None, None, None]  # the 50 steps take seconds
    x = draw_peer(peer, Large(), list(data.sayings[:3]), 0)
    assert x.shape == (3, 1, 28, 28) and (x[2] - x[0]).mean() > 1


def rows(*pairs): return dict(rows=[dict(accuracy=a, fd_floors=f) for a, f in pairs])


def test_time_to_bar():
    arm = {"5": rows((.99, 5.)), "15": rows((.97, 3.), (1., 4.)), "60": rows((.99, 1.))}
    assert time_to_bar(arm) == dict(reached=15., missed=5.)
    assert time_to_bar({"60": rows((.99, 1.))}) == dict(reached=60., missed=None)
    assert time_to_bar({"5": rows((.9, 1.)), "15": rows((.99, 9.))}) == dict(reached="not reached", longest=15.)


def test_peaks_are_plausible():
    "Some GFLOP/s, and one number a shape"
    found = conv_peak(False, rounds=1)
    assert len(found) == 6 and all(.01 < v < 1e5 for v in found.values())
    assert 1e7 < matmul_peak("cpu", torch.float32, side=128, rounds=2) < 1e14


def test_command_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("t2i_course.bench.digits.load", lambda name: load("digits"))
    monkeypatch.setattr("t2i_course.bench.digits.roofline", lambda config, data, rounds: dict(stub=config["batch"]))
    args = ["bench", "digits", "--seconds", "1", "--seeds", "1", "--peers", "--out", "b.json"]
    assert cli.main(args) == 0
    first = json.loads((tmp_path / "b.json").read_text())
    assert set(first["ours"]) == {"1"} and first["plain"]["1"]["rows"][0]["method"] == "flow matching"
    assert {"accuracy", "fd_floors", "recall", "broken", "cpu_seconds"} <= set(first["ours"]["1"])
    assert cli.main(args) == 0
    assert json.loads((tmp_path / "b.json").read_text())["ours"] == first["ours"]


def test_recipe_for_follows_data_and_time():
    digits, painted = load("digits"), load("painted")
    quick, long = (flow_matching.recipe_for(digits, "demo", seconds) for seconds in (5, 60))
    assert list(quick.widths) == [32, 64] and list(long.widths) == [32, 96] and quick.n_layers == long.n_layers == 0
    assert flow_matching.recipe_for(painted, "demo", 5).n_layers == 1


def test_torchcfm_missing_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchcfm.models.unet", None)
    with pytest.raises(CourseError, match="pip install torchcfm"): TorchCFM()


@pytest.mark.parametrize("units", [True, False], ids=["bf16 units", "none"])
def test_speed_compares_the_same_work(tmp_path, monkeypatch, capsys, units):
    "The same command on both kinds of machine: where there are no units, bfloat16 is left out with a sentence."
    if units and not has_bf16(): pytest.skip("no bfloat16 units: the sizes of this bench would be emulated")
    monkeypatch.setattr("t2i_course.bench.meters.has_bf16", lambda device="cpu": units)
    monkeypatch.setenv("T2I_SCALE", "smoke")
    assert cli.main(["bench", "speed", "--out", str(tmp_path / "speed.json")]) == 0
    res = json.loads((tmp_path / "speed.json").read_text())
    said, kinds = capsys.readouterr().err, ("fp32", "bf16") if units else ("fp32",)
    assert "times as fast as diffusers" in said and ("bf16 not measured" in said) == (not units)
    assert res["dit"]["apart"] < 1e-4, "the same weights give the same pictures"
    assert res["dit"]["params"]["ours"] <= res["dit"]["params"]["diffusers"] # theirs has an embedder in every block
    for pair in ("unet", "dit"):
        ours, theirs = (res[pair]["multiply_adds"][k] for k in ("ours", "diffusers"))
        assert abs(ours / theirs - 1) < .1
        if not units: assert res[pair]["bf16"] == "not measured: no bfloat16 units" and "bf16 train" not in res[pair]
        for kind in (f"{precision} {step}" for precision in kinds for step in ("train", "draw")):
            ratio = res[pair][kind]["times_faster"]["diffusers"]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] and res[pair][kind]["share_of_peak"]["ours"] > 0
        assert res[pair]["fp32 memory"]["ours"] > 0
