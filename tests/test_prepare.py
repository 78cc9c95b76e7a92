"Shards: read by many ranks, interrupted, damaged, latents and text, what else is known of the pictures."
import json
import pickle
import tarfile

import pytest
import torch
from t2i_course.core.conditioning import TextEncoder, WordTokenizer
from t2i_course.core.contracts import Data
from t2i_course.core.data import Batch, Draws, Wrapped
from t2i_course.core.ema import EMA
from t2i_course.core.files import CourseError
from t2i_course.core.prepare import prepare, restored, stored
from t2i_course.core.shards import Shards, is_shards, numbers
from t2i_course.core.sources import load
from t2i_course.core.training import State, feed, train
from t2i_course.diffusion import ddpm

DIGITS = load("digits")
CONFIG = ddpm.recipe_for(DIGITS, "smoke")


def state_of(config=CONFIG, seed=0, **how):
    torch.manual_seed(seed)
    tok, den = ddpm.build(config)
    return tok, den, State(den.net, ema=EMA(den.net, 1e4), **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    prepare(DIGITS, out, 100, shard_size=16, batch=8)
    return out


def test_pictures_come_back_as_they_were(folder):
    shards, draws = load(folder), Draws(0, torch.arange(100))
    shards.window = 0
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
    assert is_shards(folder) and not is_shards(folder.parent)
    assert json.loads((folder / "index.json").read_text())["wids_version"] == 1


def test_what_else_is_known_of_the_pictures_comes_back(tmp_path):
    "Masks and edges travel with the pictures, through wrappers, shards and the order of an epoch"
    class Outlined(Wrapped):
        def batch(self, split, draws):
            b = super().batch(split, draws)
            return b._replace(more=b.more | dict(mask=b.x[:, 0] > 0, which=draws.index))
    data, draws = Outlined(DIGITS), Draws(0, torch.arange(40))
    prepare(data, tmp_path, 40, shard_size=16)
    want, got = data.batch("train", draws), Shards(tmp_path, window=0).batch("train", draws)
    assert got.more.keys() == want.more.keys() and all(torch.equal(got.more[k], v) for k, v in want.more.items())
    mixed = Shards(tmp_path, window=2).batch("train", draws)
    assert mixed.more["which"].tolist() != list(range(40)) and sorted(mixed.more["which"].tolist()) == list(range(40))
    assert torch.equal(mixed.x, want.x[mixed.more["which"]]) and torch.equal(mixed.more["mask"], want.more["mask"][mixed.more["which"]])


def test_codes_stay_whole_numbers(tmp_path):
    class Codes:
        "A codec whose z are codes"
        training = False
        def __init__(self): self.encoder = torch.nn.Linear(1, 1)
        def eval(self): return self
        train = parameters = lambda self, *_: iter(self.encoder.parameters())
        def grid(self, shape): return shape[1] // 4, shape[2] // 4
        def encode(self, x): return (x[:, 0, ::4, ::4] * 100).long()
        def sample(self, z, noise=None): return z
        def decode(self, x0): return x0
    codec, draws = Codes(), Draws(0, torch.arange(20))
    prepare(DIGITS, tmp_path, 20, codec, shard_size=8, store="float16")
    x = Shards(tmp_path, codec, window=0).batch("train", draws).x
    assert x.dtype == torch.int64 and torch.equal(x, codec.encode(DIGITS.batch("train", draws).x))


@pytest.mark.parametrize("how", ["float32", "float16", "uint8"])
def test_stored_and_restored(how):
    x = (torch.arange(256) / 127.5 - 1).view(1, 16, 16)
    assert torch.allclose(restored(stored(x, how)), x, atol=dict(float32=0, float16=5e-4, uint8=1e-6)[how])
    assert torch.equal(restored(stored(torch.arange(3), how)), torch.arange(3))


def test_few_shards_are_open_at_a_time_and_a_copy_opens_its_own(folder):
    shards = Shards(folder, window=1)
    for i in torch.arange(100).split(10):
        shards.batch("train", Draws(0, i))
        assert len(shards.tars.open) <= 2
    other = pickle.loads(pickle.dumps(Shards(folder, window=1)))  # as a process that loads data gets it
    draws = Draws(0, torch.arange(30))
    assert torch.equal(other.batch("train", draws).x, shards.batch("train", draws).x)


def test_unseen_pictures_need_the_data_set_that_was_prepared(folder):
    with pytest.raises(CourseError, match=r"with load\("): Shards(folder).batch("test", Draws(0, torch.arange(2)))
    assert load(folder).origin().name == "digits" and isinstance(load(folder), Data)
    assert isinstance(load(folder).whole(), Data)


def test_another_index_is_refused(tmp_path):
    (tmp_path / "index.json").write_text('{"shards": []}')  # as an earlier version of the course cached latents
    with pytest.raises(CourseError, match="another kind.*t2i prepare"): Shards(tmp_path)


def test_numbers_and_pictures_of_a_condition_are_cached_too(tmp_path):
    "What a frozen encoder says beside vectors: the size of a picture, a picture to follow"
    tok = WordTokenizer(DIGITS.words, DIGITS.size)
    encoder = TextEncoder(len(tok), DIGITS.size, 8, 1).eval()
    def text(captions):
        with torch.no_grad(): cond = encoder(tok(captions))
        cond.numbers, cond.image = torch.full((len(cond), 2), 16.), torch.ones(len(cond), 1, 4, 4)
        return cond
    prepare(DIGITS, tmp_path, 20, text=text, shard_size=8, store="float16")
    shards = Shards(tmp_path, window=0)
    _, cond = shards.told()(Draws(0, torch.arange(6)))
    assert cond.numbers.shape == (6, 2) and cond.image.shape == (6, 1, 4, 4) and (cond.numbers == 16).all()
    assert shards.null().image.shape == (1, 1, 4, 4) and cond.drop(torch.arange(6) < 3, shards.null()).seq.shape == cond.seq.shape
