"Memory against measurement, hours against clocks; the commands."
import os
import subprocess

import pytest
import torch
import torch.distributed as dist
from t2i_course import cli
from t2i_course.core.runs import open_run
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.core.ema import EMA
from t2i_course.core.training import State, feed, has_bf16, train
from t2i_course.diffusion import ddpm
from t2i_course.scale import recipes
from t2i_course.scale.fsdp import held, parallelize, units
from t2i_course.core.counting import allocated, kept, macs
from t2i_course.core.shards import Shards

DIGITS = load("digits")
CONFIG = ddpm.recipe_for(DIGITS, "smoke")


def state_of(config=CONFIG, seed=0, **how):
    torch.manual_seed(seed)
    tok, den = ddpm.build(config)
    return tok, den, State(den.net, ema=EMA(den.net, 1e4), **how)


# --- Memory ---

@pytest.fixture(scope="module")
def counts():
    return recipes.count(*recipes.of_recipe(CONFIG, ddpm.build))


def test_parameters_and_the_static_bytes_are_exact(counts):
    tok, den, state = state_of()
    list(train(state, den.loss, feed(DIGITS, tok), images=8, batch=8))
    want, got = recipes.memory(counts, 8), held(state)
    assert recipes.n_params(counts) == sum(p.numel() for p in den.net.parameters())
    assert {k: want[k] for k in got} == got


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [3, 32])
def test_fake_tensors_count_what_real_tensors_hold(counts, precision, batch):
    make, call = recipes.of_recipe(CONFIG, ddpm.build)
    net = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): found = kept(net, lambda: call(net, batch), units(net))
    want = recipes.memory(counts, batch, precision=precision)
    assert want["activations"] + want["copies"] == found.whole


@pytest.mark.parametrize("precision,checkpointing", [("fp32", False), ("bf16", False), ("fp32", True)])
def test_peak_is_near_what_the_allocator_gave_out(counts, precision, checkpointing):
    if precision == "bf16" and not has_bf16(): pytest.skip("no bfloat16 units: emulation is slow and keeps copies of its own")
    def run():
        tok, den, state = state_of(precision=precision)
        parallelize(den.net, "none", checkpointing=checkpointing)
        list(train(state, den.loss, feed(DIGITS, tok), images=128, batch=64))
    DIGITS.batch("train", Draws(0, torch.arange(2)))  # its tables are made once and stay
    want = recipes.memory(counts, 64, precision=precision, checkpointing=checkpointing)["peak"]
    assert abs(want / allocated(run) - 1) < .15


def test_checkpointing_and_sharding_save_memory(counts):
    def peak(*a, **k): return recipes.memory(counts, 64, *a, **k)["peak"]
    assert peak(checkpointing=True) < peak() and peak(precision="bf16") < peak()
    assert peak(4, "fsdp") < peak(4, "ddp") < peak()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_of_four_holds_what_the_formula_says(counts, rank):
    "torch's fake process group: one process that plays rank 2 of 4."
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        tok, den = ddpm.build(CONFIG)
        parallelize(den.net, "fsdp")
        state = State(den.net)
        b = DIGITS.batch("train", Draws(0, torch.arange(4)))
        den.loss(b.x, tok(b.captions), Draws(0, torch.arange(4))).mean().backward()
        state.opts[""].step()
        got = held(state)
    finally: dist.destroy_process_group()
    want = recipes.memory(counts, 4, 4, "fsdp", ema=False, rank=rank)
    assert {k: want[k] for k in got} == got


def test_the_largest_batch_fits_and_one_more_does_not(counts):
    how = dict(world=2, shard="fsdp", precision="bf16")
    n = recipes.most(counts, 20e6, **how)
    assert recipes.memory(counts, 2*n, **how)["peak"] <= 20e6 < recipes.memory(counts, 2*n + 2, **how)["peak"]
    assert recipes.most(counts, 1e3) == 0


def test_known_answers_and_words_for_wrong_ones(counts):
    with pytest.raises(CourseError, match="none, ddp or fsdp"): recipes.memory(counts, 4, shard="zero")
    with pytest.raises(CourseError, match="ddp or fsdp"): recipes.memory(counts, 4, world=2)
    with pytest.raises(CourseError, match="sd15"): recipes.of_published("sd2")


# --- Hours and money ---

def test_hours_of_a_published_run():
    "DiT-XL/2 at 25% of an A100: the ~108 images/s of fast-DiT."
    per_second = 1 / (3600 * recipes.hours(1, 118.64e9, recipes.PEAKS["a100"], .25))
    assert 105 < per_second < 115
    assert recipes.hours(1e6, 1e9, 1e12, .5, 4) == pytest.approx(recipes.hours(1e6, 1e9, 1e12, .5) / 4)
    assert recipes.cost(100, 8, (1, 2)) == (800, 1600)


def test_multiply_adds_of_a_convolution():
    make, call = (lambda: torch.nn.Conv2d(3, 8, 3, padding=1)), (lambda net, b: net(torch.empty(b, 3, 10, 10)))
    assert macs(make, call) == 8 * 3 * 9 * 100


# --- Commands ---

@pytest.mark.skipif(os.name == "nt", reason="commands of a cluster, for bash")
def test_commands_are_valid_bash(tmp_path):
    for gpus, nodes in ((1, 1), (8, 1), (8, 4)):
        line = recipes.command("dit", gpus, nodes, "fsdp", data="shards", out="run", images=1000)
        assert f"--nproc-per-node {gpus}" in line and ("--nnodes 4" in line) == (nodes == 4)
        assert "-m t2i_course train dit --scale full --shard fsdp --precision bf16 --data shards --out run --images 1000" in line
        subprocess.run(["bash", "-n", "-c", line], check=True)
    script = tmp_path / "job.sh"
    script.write_text(recipes.slurm("dit", 4, data="shards", out="run"))
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(os.name == "nt", reason="commands of a cluster, for bash")
def test_slurm_script_asks_every_machine_for_one_torchrun(tmp_path):
    "Run with stand-ins for srun, scontrol and torchrun, to see what would be called."
    for name, body in dict(scontrol="echo first; echo second", srun='exec "$@"', torchrun='printf "%s\\n" "$@"').items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(recipes.slurm("dit", 2, data="shards", out="run"))
    env = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_ID="7")
    said = subprocess.run(["bash", tmp_path / "job.sh"], env=env, check=True, capture_output=True, text=True).stdout.split("\n")
    assert said[said.index("--rdzv-endpoint") + 1] == "first:29500" and said[said.index("--rdzv-id") + 1] == "7"
    assert "--resume" in said and said[said.index("--nnodes") + 1] == "2"


def test_presets_are_computed_from_the_recipes():
    row = recipes.preset_row(recipes.PRESETS[0])
    assert row["params"] > 1e6 and row["dollars"][0] < row["dollars"][1] and row["memory"] > 0


def test_the_command_prepares_and_training_reads(tmp_path, capsys):
    out = str(tmp_path / "shards")
    assert cli.main(["prepare", "digits", "--images", "100", "--shard-size", "40", "--out", out, "--quiet"]) == 0
    assert len(Shards(out)) == 100 and "--data" in capsys.readouterr().out
    assert cli.main(["train", "ddpm", "--data", out, "--scale", "smoke", "--images", "64", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert open_run(tmp_path / "run").draw(["a handwritten two"]).shape == (1, 1, 16, 16)
    assert cli.main(["prepare", "digits", "--images", "0", "--out", out]) == 2
    (tmp_path / "shards" / "index.json").unlink()
    assert cli.main(["train", "ddpm", "--data", out, "--scale", "smoke", "--images", "64", "--out", str(tmp_path / "other"), "--quiet"]) == 2
    assert "t2i prepare" in capsys.readouterr().err


def test_latents_by_command_from_codec_to_picture(tmp_path, capsys):
    small = ["--scale", "smoke", "--quiet"]
    def out(name): return str(tmp_path / name)
    assert cli.main(["train", "vae", "--data", "painted", "--images", "128", "--out", out("codec"), *small]) == 0
    assert cli.main(["prepare", "painted", "--images", "96", "--shard-size", "40", "--codec", out("codec"), "--out", out("z"), "--quiet"]) == 0
    assert f"--codec {out('codec')}" in capsys.readouterr().out
    for recipe in ("ddpm", "flow_matching"):
        run = out(recipe)
        assert cli.main(["train", recipe, "--data", out("z"), "--codec", out("codec"), "--images", "64", "--out", run, *small]) == 0
        assert open_run(run).draw(["a red two", "a blue four on gray"]).shape == (2, 3, 32, 32)
    assert cli.main(["eval", out("ddpm"), "--n", "16"]) == 0
    assert cli.main(["train", "ddpm", "--data", out("z"), "--images", "64", "--out", out("no"), *small]) == 2
    assert "codec" in capsys.readouterr().err
    assert cli.main(["train", "ddpm", "--data", "digits", "--codec", out("codec"), "--images", "64", "--out", out("no"), *small]) == 2
