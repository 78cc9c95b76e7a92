"""One, two and four processes are the same run; what each holds; checkpoints that fit any number; a process that dies."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from t2i_course import cli
from t2i_course.core.runs import open_run
from t2i_course.run.train import train_run
from t2i_course.core.files import CourseError, load_tensors
from t2i_course.core.training import ALONE
from t2i_course.diffusion.ddpm import UNet
from t2i_course.scale import fsdp

STEPS = 8 # of a run, where nothing else is said
ARMS = {k: dict(steps=STEPS) | o for k, o in dict(
    fp32={}, double=dict(double=True), bf16=dict(precision="bf16"), fp16=dict(precision="fp16"),
    odd=dict(batch=7, accumulate=2), slim=dict(checkpointing=True, steps=4), few=dict(batch=3, steps=4)).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(folder):
    "One process: this one"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for k, o in ARMS.items(): fsdp.trial(folder / f"1{k}", **o)
    torch.set_num_threads(before)
    return {k: torch.load(folder / f"1{k}" / "end.pt") for k in ARMS}


@pytest.fixture(scope="module")
def two(folder):
    todo = {(how, k): dict(out=folder / f"2{how}{k}", how=how, **o) for how in ("ddp", "fsdp") for k, o in ARMS.items()}
    more = [dict(out=folder / "stopped", how="fsdp", steps=STEPS, stop=3)]
    return dict(zip([*todo, "stopped"], fsdp.launch(2, *todo.values(), *more)))


@pytest.fixture(scope="module")
def four(folder):
    pairs = (("fsdp", "fp32"), ("ddp", "double"), ("fsdp", "double"), ("fsdp", "few"))
    todo = {(how, k): dict(out=folder / f"4{how}{k}", how=how, **ARMS[k]) for how, k in pairs}
    return dict(zip([*todo, "saved"], fsdp.launch(4, *todo.values(), dict(out=folder / "reshard", how="fsdp", steps=STEPS, stop=3))))


@pytest.fixture(scope="module")
def again(folder, two, four):
    "Two processes go on with what two and four have saved"
    todo = [dict(out=folder / name, how="fsdp", steps=STEPS, resume=True, **o) for name, o in dict(stopped={}, reshard=dict(stop=6)).items()]
    return dict(zip(("stopped", "reshard"), fsdp.launch(2, *todo)))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("arm", ["fp32", "odd", "slim", "few"])
def test_two_processes_lose_what_one_loses(alone, two, how, arm):
    d = fsdp.apart(alone[arm], two[how, arm])
    assert d["loss"] < 1e-6 and d["norm"] < 1e-4 and d["weights"] < 1e-3 and len(two[how, arm]["log"]) == len(alone[arm]["log"])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_in_float64_with_sgd_only_rounding_is_left(alone, two, four, how):
    for found in (two, four):
        d = fsdp.apart(alone["double"], found[how, "double"])
        assert d["weights"] < 1e-9 and d["average"] < 1e-9 and d["loss"] < 1e-9
    start, end = alone["double"]["log"][0][0], alone["double"]["log"][-1][0]
    assert start != end # it did train


def test_four_processes_and_fewer_pictures_than_processes(alone, four):
    assert fsdp.apart(alone["fp32"], four["fsdp", "fp32"])["loss"] < 1e-6
    assert fsdp.apart(alone["few"], four["fsdp", "few"])["loss"] < 1e-6 # three pictures for four


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_stay_near(alone, two, how, precision):
    assert fsdp.apart(alone[precision], two[how, precision])["loss"] < .01 < alone["fp32"]["log"][0][0]
    assert fsdp.apart(alone["fp32"], two[how, precision])["loss"] > 0


def test_each_process_holds_what_the_formula_says(two, four):
    for found, n in ((two, 2), (four, 4)):
        for how in ("ddp", "fsdp"):
            if (how, "fp32") not in found: continue
            for r, h in enumerate(found[how, "fp32"]["held"]):
                share = fsdp.shard_bytes(h["shapes"], *((n, r) if how == "fsdp" else (1, 0)))
                assert h["weights"] == h["gradients"] == h["average"] == share and h["optimizer"] == 2 * share


def test_resharding_four_two_one(alone, again, folder):
    assert len(again["reshard"]["log"]) == 3
    fsdp.trial(folder / "reshard", steps=STEPS, resume=True)
    end = torch.load(folder / "reshard" / "end.pt")
    d = fsdp.apart(alone["fp32"] | dict(log=alone["fp32"]["log"][6:]), end)
    assert d["loss"] < 1e-6 and d["weights"] < 1e-3 and len(end["log"]) == 2


def test_resume_is_exact_at_the_same_number(two, again):
    end, straight = again["stopped"], two["fsdp", "fp32"]
    assert end["log"] == straight["log"][3:] and len(end["log"]) == STEPS - 3
    for k in ("weights", "average"):
        for n, v in straight[k].items(): assert torch.equal(v, end[k][n])


def test_a_checkpoint_without_its_last_file_is_not_one(folder, two, tmp_path):
    good = fsdp.checkpoints(folder / "stopped")
    assert [p.name for p in good] == ["checkpoint-24"]
    (tmp_path / "checkpoint-99").mkdir()
    assert fsdp.checkpoints(tmp_path) == []
    state = SimpleNamespace(net=torch.nn.Linear(2, 2), ema=None, opts={})
    with pytest.raises(CourseError, match="belongs to another run"):
        fsdp.load_sharded(state, folder / "stopped", lambda note: note.get("config") == "other")


def test_units_and_names():
    net = UNet(3, 8, (16, 32), (1, 2), 32)
    names = list(net.state_dict())
    assert list(fsdp.units(net)) == ["down.0", "middle.0", "middle.1", "up.0"]
    fsdp.parallelize(net, "none", checkpointing=True)
    assert list(net.state_dict()) == names
    with pytest.raises(CourseError, match="ddp"): fsdp.parallelize(net, "fsdp2")


def test_slices_are_the_batch():
    for n in range(1, 20):
        for size in (1, 2, 3, 4, 8):
            parts = [fsdp.Ranks.mine(SimpleNamespace(rank=r, size=size), torch.arange(n)) for r in range(size)]
            assert torch.equal(torch.cat(parts), torch.arange(n))
    assert ALONE.mine(torch.arange(3)).tolist() == [0, 1, 2] and ALONE.sum(1, 2.) == [1, 2.]


def test_sentences_for_wrong_starts(tmp_path, capsys, monkeypatch):
    assert cli.main(["train", "ddpm", "--data", "digits", "--scale", "smoke", "--images", "64", "--out", str(tmp_path / "a"), "--shard", "ddp"]) == 2
    assert "torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "ddpm", "--data", "digits", "--scale", "smoke", "--images", "64", "--out", str(tmp_path / "a")]) == 2
    assert "--shard ddp or --shard fsdp" in capsys.readouterr().err and not (tmp_path / "a").exists()


# ---- the command, with processes that die ----
def start(out, *more, size=2):
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", T2I_SCALE="smoke")
    env["PYTHONPATH"] = os.pathsep.join([str(Path(fsdp.__file__).resolve().parents[2]), env.get("PYTHONPATH", "")])
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    return subprocess.Popen([sys.executable, *run, "-m", "t2i_course", "train", *more, "--out", str(out), "--save-every", "0.2"],
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


NEW = ["ddpm", "--data", "digits", "--scale", "smoke", "--images", "1920", "--precision", "fp32"]


@pytest.fixture(scope="module")
def undisturbed(folder):
    p = start(folder / "straight", *NEW, "--shard", "fsdp")
    out, err = p.communicate(timeout=1800)
    assert p.returncode == 0, err[-2000:]
    assert "process 0 of 2 holds" in err and "process 1 of 2 holds" in err and out.count("trained") == 1
    return load_tensors(folder / "straight" / "model.safetensors")[0]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes through /proc")
def test_a_process_that_dies_stops_the_others_and_the_run_goes_on(undisturbed, folder):
    out = folder / "killed"
    p = start(out, *NEW, "--shard", "fsdp")
    while p.poll() is None and not fsdp.checkpoints(out): time.sleep(.1)
    workers = [int(s.parent.name) for s in Path("/proc").glob("[0-9]*/stat") if int(s.read_text().rsplit(")", 1)[1].split()[1]) == p.pid]
    assert len(workers) == 2, "two processes at work"
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = p.communicate(timeout=1800)
    assert p.returncode != 0 and time.monotonic() - began < 600 # a process waits half an hour for one that does not answer: it was told
    assert "--resume" in err or "Signal 9" in err or "SIGKILL" in err, err[-2000:]
    assert not (out / "model.safetensors").exists() and fsdp.checkpoints(out)
    shutil.copytree(out, folder / "handed on")
    p = start(out, "ddpm", "--shard", "fsdp", "--resume")
    _, err = p.communicate(timeout=1800)
    assert p.returncode == 0 and "going on at" in err, err[-2000:]
    again, _ = load_tensors(out / "model.safetensors")
    for k, v in undisturbed.items(): assert torch.equal(v, again[k])
    assert open_run(out).draw(["a handwritten seven"]).shape == (1, 1, 16, 16)
    # and one process finishes what two began
    train_run("ddpm", resume=True, out=folder / "handed on", quiet=True)
    again, _ = load_tensors(folder / "handed on" / "model.safetensors")
    for k, v in undisturbed.items(): assert (v.float() - again[k].float()).abs().max() < .02
    assert json.loads((folder / "handed on" / "train.json").read_text())["images"] == 1920
