"Memory against measurement, hours against clocks, shards read by many ranks, interrupted, damaged; the commands."
import json
import os
import subprocess
import tarfile

import pytest
import torch
import torch.distributed as dist
from t2i_course import cli
from t2i_course.run.model import Model
from t2i_course.core.conditioning import TextEncoder, WordTokenizer
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.sources import load
from t2i_course.core.ema import EMA
from t2i_course.core.training import State, feed, has_bf16, train
from t2i_course.diffusion import ddpm
from t2i_course.scale import recipes
from t2i_course.scale.fsdp import held, parallelize
from t2i_course.scale.recipes import Shards, numbers, prepare

DIGITS = load("digits")
CONFIG = ddpm.recipe(1, DIGITS.words, DIGITS.size, "smoke") | dict(shape=[1, 16, 16])


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
    found = recipes.kept(net := make(), lambda: call(net, batch), precision)
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
    assert abs(want / recipes.allocated(run) - 1) < .15


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
    assert recipes.macs(make, call) == 8 * 3 * 9 * 100


# --- Shards ---

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    prepare(DIGITS, out, 100, shard_size=16, batch=8)
    return out


def test_pictures_come_back_as_they_were(folder):
    shards, draws = Shards(folder, window=0), Draws(0, torch.arange(100))
    got, want = shards.batch("train", draws), DIGITS.batch("train", draws)
    assert torch.equal(got.x, want.x) and got.captions == want.captions
    for field in ("attrs", "named"):
        assert getattr(got, field).keys() == getattr(want, field).keys()
        assert all(torch.equal(getattr(got, field)[k], v) for k, v in getattr(want, field).items())
    test = Draws(0, torch.arange(5))
    assert torch.equal(shards.batch("test", test).x, DIGITS.batch("test", test).x)


def test_it_is_webdatasets_format(folder):
    import webdataset
    with tarfile.open(folder / "shard-000001.tar") as tar: names = tar.getnames()
    assert names[:3] == ["000000016.json", "000000016.safetensors", "000000016.txt"] and len(names) == 48
    first = next(iter(webdataset.WebDataset(str(folder / "shard-000001.tar"), shardshuffle=False)))
    assert first["txt"].decode() == DIGITS.batch("train", Draws(0, torch.tensor([16]))).captions[0]


def test_bytes_survive_as_bytes(tmp_path):
    class Bytes:
        name, shape, source, words, size, attributes, splits = "bytes", (1, 4, 4), "test", (), 1, {}, ("train",)
        def batch(self, split, draws):
            from t2i_course.core.data import Batch
            return Batch(draws.choice("p", 256).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 127.5 - 1, ["x"] * len(draws), {}, {})
    prepare(Bytes(), tmp_path, 40, store="uint8", shard_size=64)
    draws = Draws(0, torch.arange(40))
    assert torch.equal(Shards(tmp_path, window=0).batch("train", draws).x, Bytes().batch("train", draws).x)


@pytest.mark.parametrize("window", [0, 1, 3, 99])
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(window):
    lengths = (5, 7, 1, 4)
    for epoch in (0, 1):
        index = torch.arange(17) + 17 * epoch
        whole = numbers(lengths, Draws(3, index), window)
        assert sorted(whole.tolist()) == list(range(17))
        one_by_one = torch.cat([numbers(lengths, Draws(3, i[None]), window) for i in index])
        assert torch.equal(whole, one_by_one)
    if window:
        assert not torch.equal(numbers(lengths, Draws(3, torch.arange(17)), window), whole)
        assert not torch.equal(numbers(lengths, Draws(4, torch.arange(17)), window), numbers(lengths, Draws(3, torch.arange(17)), window))


def test_a_window_opens_few_shards_at_a_time():
    lengths = (10,) * 12
    order = numbers(lengths, Draws(0, torch.arange(120)), 3)
    for part in order.view(4, 30): assert len((part // 10).unique()) == 3


def test_ranks_share_a_batch_without_overlap_in_its_order(folder):
    shards = Shards(folder, window=2)
    for step in range(6):  # 96 < 100 < 120: over the end of an epoch
        batch = torch.arange(20 * step, 20 * step + 20)
        whole = shards.batch("train", Draws(1, batch))
        for world in (1, 2, 4):
            parts = [shards.batch("train", Draws(1, part)) for part in batch.tensor_split(world)]
            assert torch.equal(torch.cat([p.x for p in parts]), whole.x)
            assert [c for p in parts for c in p.captions] == whole.captions
            read = [numbers(shards.lengths, Draws(1, part), 2) for part in batch.tensor_split(world)]
            assert len(torch.cat(read)) == 20 and (step == 5 or len(torch.cat(read).unique()) == 20)


def test_training_reads_shards_as_it_reads_data_and_resumes_exactly(folder):
    losses = {}
    for name, data in dict(data=DIGITS, shards=Shards(folder, window=0)).items():
        tok, den, state = state_of()
        losses[name] = [r.loss for r in train(state, den.loss, feed(data, tok), images=96, batch=24)]
    assert losses["data"] == losses["shards"]
    def run(stop=None):
        tok, den, state = state_of()
        for r in train(state, den.loss, feed(Shards(folder, window=3), tok), images=168, batch=24):
            if r.images == stop: break
        return tok, den, state
    _, _, whole = run()
    _, _, first = run(72)
    tensors, note = {k: v.clone() for k, v in first.tensors().items()}, first.numbers()
    tok, den, second = state_of(seed=9)
    second.load(tensors, note)
    list(train(second, den.loss, feed(Shards(folder, window=3), tok), images=168, batch=24))
    assert all(torch.equal(v, second.tensors()[k]) for k, v in whole.tensors().items())


class Stop(Exception): pass


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_interrupted_prepare_goes_on(tmp_path, folder):
    def stop(done):
        if done >= 48: raise Stop
    with pytest.raises(Stop): prepare(DIGITS, tmp_path, 100, shard_size=16, batch=8, progress=stop)
    with pytest.raises(CourseError, match="not prepared to the end.*prepare"): Shards(tmp_path)
    (tmp_path / ".shard-000003.tar.1.part").write_bytes(b"half")
    when = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    assert len(when) == 3
    prepare(DIGITS, tmp_path, 100, shard_size=16, batch=32)
    assert all((tmp_path / name).stat().st_mtime_ns == t for name, t in when.items())
    assert files(tmp_path) == files(folder)  # the same bytes as without the interruption


def test_two_processes_share_the_work(tmp_path, folder):
    assert prepare(DIGITS, tmp_path, 100, shard_size=16, rank=1, size=2) is None
    assert prepare(DIGITS, tmp_path, 100, shard_size=16, rank=0, size=2)
    assert files(tmp_path) == files(folder)


def test_a_folder_holds_one_thing(folder):
    with pytest.raises(CourseError, match="seed differ"): prepare(DIGITS, folder, 100, shard_size=16, seed=1)
    with pytest.raises(CourseError, match="float32"): prepare(DIGITS, folder, 100, store="int4")
    with pytest.raises(CourseError, match="at least 1"): prepare(DIGITS, folder, 0)
    with pytest.raises(CourseError, match="has the splits"): prepare(DIGITS, folder / "new", 9, split="heldout")
    assert not (folder / "new").exists()


@pytest.mark.parametrize("how", ["cut", "bit", "gone", "not a tar"])
def test_a_damaged_shard_says_what_to_do(tmp_path, folder, how):
    for name, raw in files(folder).items(): (tmp_path / name).write_bytes(raw)
    path = tmp_path / "shard-000002.tar"
    raw = bytearray(path.read_bytes())
    if how == "cut": path.write_bytes(raw[:len(raw) // 2])
    if how == "bit": raw[1500] ^= 4; path.write_bytes(raw)
    if how == "gone": path.unlink()
    if how == "not a tar": path.write_bytes(b"x" * len(raw))
    fine, hurt = Draws(0, torch.arange(32)), Draws(0, torch.arange(32, 40))
    for check in (True, False) if how in ("cut", "gone") else (True,):
        shards = Shards(tmp_path, window=0, check=check)
        shards.batch("train", fine)
        with pytest.raises(CourseError, match="shard-000002.tar is damaged.*prepare"): shards.batch("train", hurt)
    prepare(DIGITS, tmp_path, 100, shard_size=16, batch=8)
    assert torch.equal(Shards(tmp_path, window=0).batch("train", hurt).x, DIGITS.batch("train", hurt).x)


def test_latents_and_text_are_cached_once(tmp_path):
    from t2i_course.codec.vae import VAE
    torch.manual_seed(0)
    codec, tok = VAE(1, 2, (8, 8)), WordTokenizer(DIGITS.words, DIGITS.size)
    encoder = TextEncoder(len(tok), DIGITS.size, 16, 1).eval()
    def text(captions):
        with torch.no_grad(): return encoder(tok(captions))
    prepare(DIGITS, tmp_path, 40, codec, text, shard_size=16)
    shards, draws = Shards(tmp_path, codec, window=0), Draws(5, torch.arange(24))
    first = Draws(0, draws.index)
    real = DIGITS.batch("train", first)
    with torch.no_grad(): want = codec.sample(codec.encode(real.x), draws.normal("posterior", *shards.shape))
    assert shards.shape == (2, 4, 4) and torch.allclose(shards.batch("train", draws).x, want, atol=1e-5)
    x, cond = shards.told()(draws)
    told = text(real.captions)
    assert torch.allclose(cond.seq, told.seq, atol=1e-5) and torch.equal(cond.mask, told.mask)
    assert torch.allclose(shards.null().pooled, text([""]).pooled, atol=1e-6)
    other = VAE(1, 2, (8, 8))
    with pytest.raises(CourseError, match="another codec"): Shards(tmp_path, other)
    with pytest.raises(CourseError, match="by a codec"): Shards(tmp_path)
    with pytest.raises(CourseError, match="has the splits train"): shards.batch("test", draws)


def test_pictures_alone_have_no_text(folder):
    with pytest.raises(CourseError, match="text="): Shards(folder).told()
    assert recipes.is_shards(folder) and not recipes.is_shards(folder.parent)
    assert json.loads((folder / "index.json").read_text())["wids_version"] == 1


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
    assert Model(tmp_path / "run").draw(["a handwritten two"]).shape == (1, 1, 16, 16)
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
        assert Model(run).draw(["a red two", "a blue four on gray"]).shape == (2, 3, 32, 32)
    assert cli.main(["eval", out("ddpm"), "--n", "16"]) == 0
    assert cli.main(["train", "ddpm", "--data", out("z"), "--images", "64", "--out", out("no"), *small]) == 2
    assert "codec" in capsys.readouterr().err
    assert cli.main(["train", "ddpm", "--data", "digits", "--codec", out("codec"), "--images", "64", "--out", out("no"), *small]) == 2
