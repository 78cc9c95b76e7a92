"Every data set: same by (seed, index), held out stays held out, captions and oracle agree, errors name the remedy."
import json
import multiprocessing
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from t2i_course.core.data import (HELD_OUT, INKS, LEANS, NUMBERS, PAPERS, WEIGHTS, Draws, deal_inks, dial, glyph_split,
                                  glyphs, in_epochs, mix, results, scale, split_words)
from t2i_course.core.files import CourseError
from t2i_course.core.sources import DATA, load
from t2i_course.core.downloads import data_root
from t2i_course.core.folders import Folder

EMBEDDED = ('digits', 'painted', 'painted2')
every_set = pytest.mark.parametrize('name', EMBEDDED)


def indices(n, start=0): return torch.arange(start, start+n)


def unsigned(v): return [x % (1 << 64) for x in v.flatten().tolist()]


# --- Draws ---

def test_mix_is_splitmix64():
    "The first outputs of the reference generator with seed 0 (Vigna, splitmix64.c)"
    golden = 0x9E3779B97F4A7C15
    counter = [(k*golden) % (1 << 64) for k in (1, 2, 3, 4)]
    z = torch.tensor([c-(1 << 64) if c >= 1 << 63 else c for c in counter])
    assert unsigned(mix(z)) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]


def test_draws_keep_their_values():
    "These numbers are in every trained model: they must not change"
    d = Draws(3, torch.tensor([0, 1, 10**12]))
    assert torch.equal(d.uniform('t'), torch.tensor([0.6494810581207275, 0.019798755645751953,
                                                     0.08864492177963257]))
    assert torch.allclose(d.normal('eps', 2), torch.tensor([[1.414452, .189175], [-1.075102, -.062962],
                                                            [-.296938, 1.718906]]), atol=1e-6)
    assert d.choice('glyph', 1437).tolist() == [99, 980, 705]



def test_uniform_statistics():
    u = Draws(1, indices(4000)).uniform('u', 100).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean()-.5) < 5*(1/12/u.numel())**.5
    assert abs(u.var()-1/12) < 1e-3
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts-u.numel()/64).square()/(u.numel()/64)).sum() < 63+5*(2*63)**.5 # chi square


def test_normal_statistics():
    z = Draws(2, indices(4000)).normal('eps', 100).double()
    n = z.numel()
    assert z.isfinite().all()
    assert abs(z.mean()) < 5/n**.5 and abs(z.var()-1) < 5*(2/n)**.5
    assert abs((z**3).mean()) < 5*(15/n)**.5 and abs((z**4).mean()-3) < 5*(96/n)**.5
    for q in (1., 2., 3.): # tails on both sides
        want = torch.special.ndtr(torch.tensor(-q, dtype=torch.float64)).item()
        assert abs((z > q).double().mean()-want) < 5*(want/n)**.5
        assert abs((z < -q).double().mean()-want) < 5*(want/n)**.5


@pytest.mark.parametrize('other', ['index', 'stream', 'seed', 'place', 'half'])
def test_draws_are_independent(other):
    "Neighbours in every direction are uncorrelated, and so are their squares"
    d, n = Draws(4, indices(100_000)), 100_000
    z = d.normal('a', 4)[:, 0]
    w = dict(index=Draws(4, indices(n, 1)).normal('a', 4)[:, 0], stream=d.normal('b', 4)[:, 0],
             seed=Draws(5, indices(n)).normal('a', 4)[:, 0], place=d.normal('a', 4)[:, 1],
             half=d.normal('a', 4)[:, 2])[other] # half: the other one of the same Box-Muller pair
    for f in (lambda v: v, torch.square, torch.abs):
        assert abs(torch.corrcoef(torch.stack([f(z), f(w)]))[0, 1]) < 5/n**.5


def test_every_choice_is_equally_likely():
    counts = torch.bincount(Draws(0, indices(60_000)).choice('ink', 6), minlength=6)
    assert ((counts-10_000).square()/10_000).sum() < 5+5*10**.5


@given(st.integers(-2**40, 2**40), st.lists(st.integers(0, 2**50), min_size=1, max_size=8), st.text(max_size=8))
@settings(deadline=None, max_examples=40)
def test_a_draw_knows_only_its_own_index(seed, index, stream):
    together = Draws(seed, torch.tensor(index)).uniform(stream, 3)
    alone = torch.cat([Draws(seed, torch.tensor([i])).uniform(stream, 3) for i in index])
    assert torch.equal(together, alone)


# --- the same by (seed, index) ---

def same(a, b):
    return torch.equal(a.x, b.x) and a.captions == b.captions and all(torch.equal(a.attrs[k], b.attrs[k])
                                                                      for k in a.attrs)


@every_set
def test_same_whatever_the_batches(name):
    data = load(name)
    for split in data.splits:
        whole = data.batch(split, Draws(7, indices(40)))
        for part in (indices(1, 13), indices(9, 31), torch.tensor([39, 2, 17])):
            b = data.batch(split, Draws(7, part))
            assert torch.allclose(b.x, whole.x[part], atol=1e-6)
            assert b.captions == [whole.captions[i] for i in part]
            assert all(torch.equal(b.attrs[k], whole.attrs[k][part]) for k in b.attrs)
            assert all(torch.equal(b.named[k], whole.named[k][part]) for k in b.named)


def _work(name):
    torch.set_num_threads(1)
    b = load(name).batch('train', Draws(7, indices(16)))
    return b.x.numpy(), b.captions


def test_same_in_a_worker():
    with multiprocessing.get_context('spawn').Pool(1) as pool: x, captions = pool.apply(_work, ('painted',))
    b = load('painted').batch('train', Draws(7, indices(16)))
    assert captions == b.captions and np.allclose(x, b.x.numpy(), atol=1e-6)


@every_set
def test_seeds_and_indices_differ(name):
    data = load(name)
    a, b = data.batch('train', Draws(0, indices(64))), data.batch('train', Draws(1, indices(64)))
    assert not same(a, b)
    assert len({x.numpy().tobytes() for x in a.x}) == 64


@every_set
def test_shapes_and_ranges(name):
    data = load(name)
    for split in data.splits:
        b = data.batch(split, Draws(0, indices(50)))
        assert b.x.shape == (50, *data.shape) and b.x.dtype == torch.float32 and len(b.captions) == 50
        assert b.x.min() >= -1 and b.x.max() <= 1 and b.x.std() > .1
        assert set(b.attrs) == set(b.named) == set(data.attributes)
        for k, values in data.attributes.items():
            assert 0 <= b.attrs[k].min() and b.attrs[k].max() < len(values) and b.named[k].dtype == torch.bool
        assert max(map(len, map(split_words, b.captions)))+1 <= data.size
        assert {w for c in b.captions for w in split_words(c)} <= set(data.words)
    with pytest.raises(CourseError, match='has the splits train, test'):
        data.batch('validation', Draws(0, indices(2)))


def test_each_digit_once_an_epoch():
    n = len(glyph_split()['train'])
    first, second = in_epochs(n, Draws(0, indices(n))), in_epochs(n, Draws(0, indices(n, n)))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(n))
    assert not torch.equal(first, second) and not torch.equal(first, in_epochs(n, Draws(1, indices(n))))
    across = in_epochs(n, Draws(0, indices(20, n-10)))
    assert torch.equal(across, torch.cat([first[-10:], second[:10]]))


# --- splits ---

def test_glyph_splits_are_disjoint_and_stratified():
    s, (g, y) = glyph_split(), glyphs()
    assert len(g) == 1797
    assert set(s['train'].tolist()).isdisjoint(s['test'].tolist())
    assert len(s['train'])+len(s['test']) == 1797
    for k in range(10): assert abs((y[s['test']] == k).sum()/(y == k).sum()-.2) < .01


def test_held_out_pairs_are_spread():
    assert len(set(HELD_OUT)) == 8 and len({d for d, _ in HELD_OUT}) == 8 and {i for _, i in HELD_OUT} == set(INKS)


@pytest.mark.parametrize('name,pairs', [('painted', [('digit', 'ink')]),
                                        ('painted2', [('digit_left', 'ink_left'), ('digit_right', 'ink_right')])])
def test_held_out_pairs_only_where_they_belong(name, pairs):
    data = load(name)
    for split in data.splits:
        b = data.batch(split, Draws(0, indices(4000)))
        for d, i in pairs:
            seen = {(NUMBERS[p], tuple(INKS)[q]) for p, q in zip(b.attrs[d].tolist(), b.attrs[i].tolist())}
            if split == 'heldout': assert seen == set(HELD_OUT) and b.named[d].all() and b.named[i].all()
            elif split == 'judge': assert len(seen) == 60
            else: assert len(seen) == 52 and seen.isdisjoint(HELD_OUT)


@pytest.mark.parametrize('name', ['painted', 'painted2'])
@pytest.mark.parametrize('n', [40, 500])
def test_partners_of_held_out_captions_name_the_same_in_seen_pairs(name, n):
    "Multisets of every attribute agree, and each caption names what its partner names"
    data, draws = load(name), Draws(20, indices(n))
    held, seen = data.batch('heldout', draws), data.seen_matched(draws)
    for k in data.attributes:
        assert sorted(held.attrs[k].tolist()) == sorted(seen.attrs[k].tolist()) and torch.equal(held.named[k], seen.named[k])
        if not k.startswith('ink'): assert torch.equal(held.attrs[k], seen.attrs[k])
    wanted = [[data.demands(c) for c in b.captions] for b in (held, seen)]
    assert [list(d) for d in wanted[0]] == [list(d) for d in wanted[1]]
    for d, i in [('digit', 'ink')] if name == 'painted' else [('digit_left', 'ink_left'), ('digit_right', 'ink_right')]:
        pairs = [{(NUMBERS[w[d]], tuple(INKS)[w[i]]) for w in ws} for ws in wanted]
        assert pairs[0] <= set(HELD_OUT) and pairs[1].isdisjoint(HELD_OUT)
        if n == 500: assert len(pairs[1]) > 35, 'of 40: each of the eight digits in each of its five seen inks'
    assert torch.equal(data.seen_matched(draws).x, seen.x)
    changed = (held.x-seen.x).abs().flatten(1).amax(1) > .1
    assert changed.all(), 'another ink in every picture'


def test_inks_that_cannot_be_dealt_out_are_refused():
    purple = torch.tensor([list(INKS).index('purple')]*3)
    with pytest.raises(CourseError, match='take more'):
        deal_inks(torch.tensor([NUMBERS.index('two')]*3), purple, Draws(0, indices(3)))
    both = torch.tensor([NUMBERS.index(d) for d in ('two', 'zero')]), torch.tensor([list(INKS).index(i) for i in ('purple', 'blue')])
    assert deal_inks(*both, Draws(0, indices(2))).tolist() == both[1].flip(0).tolist()


def test_still_digits_do_not_move():
    data = load('digits')
    a, b = (data.still().batch('train', Draws(s, indices(1438))) for s in (0, 1))
    assert torch.allclose(a.x.flatten(1).sum(1).sort().values, b.x.flatten(1).sum(1).sort().values, atol=1e-3)
    assert data.jitter == 1 and not torch.equal(a.x, data.batch('train', Draws(0, indices(1438))).x)


def test_training_glyphs_stay_in_training():
    s = {k: set(v.tolist()) for k, v in glyph_split().items()}
    for split in load('painted').splits:
        g, _ = load('painted').attrs(split, Draws(0, indices(4000)))
        assert set(g.tolist()) <= s['train' if split in ('train', 'judge') else 'test']


# --- captions and what they demand ---

@every_set
def test_a_caption_demands_what_it_names(name):
    data = load(name)
    for split in data.splits:
        b = data.batch(split, Draws(5, indices(400)))
        for i, c in enumerate(b.captions):
            assert data.demands(c) == {k: b.attrs[k][i].item() for k in data.attributes if b.named[k][i]}, c


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_captions_and_demands_agree(choose):
    "For every picture that could be drawn and everything a caption could say of it"
    data = load(choose.draw(st.sampled_from(EMBEDDED)))
    attrs = {k: choose.draw(st.integers(0, len(v)-1)) for k, v in data.attributes.items()}
    named = {k: choose.draw(st.booleans()) for k in data.attributes}
    if attrs.get('lean') == LEANS.index('upright'): named['lean'] = False
    more = dict(swap=torch.tensor([choose.draw(st.integers(0, 1))])) if data.name == 'painted2' else {}
    c, = data.captions({k: torch.tensor([v]) for k, v in attrs.items()},
                       {k: torch.tensor([v]) for k, v in named.items()}, **more)
    want = {k: v for k, v in attrs.items() if named[k]}
    assert data.demands(c) == want and data.demands(c.upper()+'.') == want


def test_demands_of_what_people_type():
    one, two = load('painted'), load('painted2')
    assert one.demands('A RED seven, please!') == dict(ink=0, digit=7)
    assert one.demands('left a two') == dict(digit=2) and one.demands('') == {} and one.demands('빨간 일곱 🎨') == {}
    a, b = two.demands('a red two left of a blue seven'), two.demands('a blue seven left of a red two')
    assert a == dict(ink_left=0, digit_left=2, ink_right=2, digit_right=7)
    assert b == dict(ink_left=2, digit_left=7, ink_right=0, digit_right=2)
    assert two.demands('a blue seven right of a red two') == a and two.demands('a red two on pink') == dict(paper=3)


def test_weights_and_leans_show():
    "Bold has more ink than thin, and the slant of the ink follows the lean"
    b = load('painted').batch('train', Draws(0, indices(2000)))
    paper = torch.tensor(list(PAPERS.values()))[b.attrs['paper']]/127.5-1
    ink = torch.tensor(list(INKS.values()))[b.attrs['ink']]/127.5-1
    d = (ink-paper)[:, :, None, None]
    mask = ((b.x-paper[:, :, None, None])*d).sum(1)/d.square().sum(1)
    area = mask.mean((1, 2))
    thin, bold = (area[b.attrs['weight'] == i].mean() for i in range(len(WEIGHTS)))
    assert bold > 1.4*thin
    top, bottom = mask[:, :14].sum(1), mask[:, 18:].sum(1)
    u = torch.arange(32.)
    lean = (top*u).sum(1)/top.sum(1)-(bottom*u).sum(1)/bottom.sum(1)
    left, up, right = (lean[b.attrs['lean'] == i].mean() for i in range(3))
    assert left < up-2 and right > up+2


# --- torchvision's sets ---

def idx(path, a): path.write_bytes(struct.pack('>HBB', 0, 8,
                                               a.ndim)+struct.pack(f'>{a.ndim}I', *a.shape)+a.tobytes())


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    raw = tmp_path/'MNIST/raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (('train', 50), ('t10k', 20)):
        idx(raw/f'{part}-images-idx3-ubyte', rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        idx(raw/f'{part}-labels-idx1-ubyte', (np.arange(n) % 10).astype(np.uint8))
    monkeypatch.setenv('T2I_DATA', str(tmp_path))
    return tmp_path


def test_mnist_from_files_already_there(small_mnist):
    data = load('mnist')
    assert data.shape == (1, 28, 28) and data.source == 'mnist, 50 training images in T2I_DATA'
    b = data.batch('train', Draws(0, indices(50)))
    assert torch.bincount(b.attrs['digit']).tolist() == [5]*10
    assert b.captions == [f'a handwritten {NUMBERS[i]}' for i in b.attrs['digit']]
    assert all(data.demands(c) == dict(digit=i) for c, i in zip(b.captions, b.attrs['digit'].tolist()))
    assert torch.equal(data.batch('train', Draws(0, indices(7, 47))).x,
                       torch.cat([b.x[47:], data.batch('train', Draws(0, indices(4, 50))).x]))
    assert len(data.batch('test', Draws(0, indices(20))).captions) == 20


def test_damaged_mnist_is_a_sentence(small_mnist):
    file = small_mnist/'MNIST/raw/train-images-idx3-ubyte'
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CourseError, match='is damaged .* delete that folder'): load('mnist')


@pytest.mark.parametrize('name,label,caption', [('fashion', 'sneaker', 'a sneaker'),
                                                ('fashion', 'ankle boot',
                                                 'an ankle boot'), ('fashion', 't-shirt', 'a t-shirt'),
                                                ('fashion', 'trousers',
                                                 'trousers'), ('cifar10', 'cat',
                                                               'a cat'), ('cifar10', 'airplane', 'an airplane')])
def test_article_and_label(name, label, caption):
    from t2i_course.core.data import Labelled
    from t2i_course.core.downloads import SETS, Vision, _bare
    data = Vision.__new__(Vision)
    *_, data.attribute, data.sayings, data.anything = SETS[name]
    data.names = tuple(map(_bare, data.sayings))
    Labelled.__init__(data, name, SETS[name][2], {}, '')
    i = data.names.index(label)
    assert data.sayings[i] == caption and data.demands(caption) == dict(label=i)
    assert data.captions(dict(label=torch.tensor([i])), dict(label=torch.tensor([False]))) == [data.anything]


def test_missing_t2i_data(tmp_path, monkeypatch):
    monkeypatch.setenv('T2I_DATA', str(tmp_path/'nowhere'))
    with pytest.raises(CourseError, match='does not exist: make that folder'): load('mnist')
    assert not (tmp_path/'nowhere').exists()


def test_unwritable_t2i_data(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('T2I_DATA', str(tmp_path/'file')) # a file, because root may write to any folder
    with pytest.raises(CourseError, match='cannot write to .* set T2I_DATA to a folder you may write to'):
        load('cifar10')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root writes everywhere')
def test_read_only_t2i_data(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.setenv('T2I_DATA', str(tmp_path))
    with pytest.raises(CourseError, match='set T2I_DATA to a folder you may write to'): load('mnist')


@pytest.mark.parametrize('name', ['mnist', 'fashion', 'cifar10'])
def test_impossible_download(name, tmp_path, monkeypatch):
    import urllib.request
    def refuse(*a, **k): raise urllib.error.URLError('no network here')
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    monkeypatch.setenv('T2I_DATA', str(tmp_path))
    with pytest.raises(CourseError, match='could not be downloaded .*check the network, or copy'): load(name)
    assert not list(tmp_path.iterdir())


def test_relative_t2i_data_is_resolved_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('T2I_DATA', f'data-of-{tmp_path.name}')
    first = data_root()
    monkeypatch.chdir('/')
    assert data_root() == first == tmp_path/f'data-of-{tmp_path.name}'
    monkeypatch.delenv('T2I_DATA')
    assert data_root().parts[-2:] == ('.cache', 't2i_course')


def test_unknown_name():
    with pytest.raises(CourseError) as e: load('paintd')
    assert all(name in str(e.value) for name in DATA)


# --- folders ---

def picture(path, color=(200, 30, 30), size=(40, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, color).save(path)


def captioned(folder, n=30):
    for i in range(n):
        picture(folder/f'{i:03}.png', (i*8, 0, 255))
        (folder/f'{i:03}.txt').write_text(f'a blue square number {i}', 'utf-8')


def test_folder_with_text_files(tmp_path):
    captioned(tmp_path)
    data = load(str(tmp_path))
    train, test = (len(data.texts[s]) for s in ('train', 'test'))
    assert train+test == 30 and 1 <= test <= 8 and not set(data.texts['train'])&set(data.texts['test'])
    b = data.batch('train', Draws(0, indices(train)))
    assert sorted(b.captions) == sorted(data.texts['train']) and b.attrs == b.named == data.attributes == {}
    for x, c in zip(b.x, b.captions): assert torch.allclose(x[:, 16, 16],
                                                            torch.tensor([int(c.split()[-1])*8, 0,
                                                                          255])/127.5-1, atol=.02)
    assert data.shape == (3, 32, 32)
    assert data.size == 6
    assert set(data.words) == {w for c in data.texts['train'] for w in c.split()}
    assert data.demands('a blue square') == {} and Folder(tmp_path, size=8).shape == (3, 8, 8)
    with pytest.raises(CourseError, match='in its files'): data.captions({}, {})


def test_the_split_of_an_image_stays_when_others_come(tmp_path):
    captioned(tmp_path, 40)
    before = set(Folder(tmp_path).texts['test'])
    captioned(tmp_path, 60)
    assert before <= set(Folder(tmp_path).texts['test'])


def test_folder_robust(tmp_path, capsys):
    captioned(tmp_path, 12)
    (tmp_path/'broken.png').write_bytes(b'not a picture')
    (tmp_path/'broken.txt').write_text('a broken one')
    whole = (tmp_path/'000.png').read_bytes()
    (tmp_path/'cut.png').write_bytes(whole[:len(whole)//2])
    (tmp_path/'cut.txt').write_text('a cut one')
    picture(tmp_path/'bare.png')
    picture(tmp_path/'blank.jpg')
    (tmp_path/'blank.txt').write_text(' \n')
    picture(tmp_path/'latin.png')
    (tmp_path/'latin.txt').write_bytes('ein grünes Quadrat'.encode('latin-1'))
    (tmp_path/'notes.md').write_text('not an image')
    data = Folder(tmp_path)
    err = capsys.readouterr().err
    assert sum(map(len, data.texts.values())) == 12
    assert 'skipped 3 that could not be read: ' in err and all(k in err for k in ('broken.png', 'cut.png', 'latin.txt'))
    assert 'skipped 2 without a caption: bare.png, blank.jpg' in err and err.count('skipped') == 2


def test_folder_with_jsonl(tmp_path, capsys):
    lines = []
    for i in range(10):
        picture(tmp_path/f'pictures/{i}.jpg')
        lines.append(json.dumps(dict(file_name=f'pictures/{i}.jpg', text=f'빨간 네모 {i} 🎨'), ensure_ascii=i % 2 == 0))
    lines += ['{"file_name": "pictures/1.jpg", "te', '', '{"text": "no file"}', '[1]',
              '{"file_name": "gone.png", "text": "gone"}', '{"file_name": "pictures/2.jpg", "text": 5}']
    (tmp_path/'metadata.jsonl').write_text('\n'.join(lines), 'utf-8')
    data = load(str(tmp_path))
    assert sum(map(len, data.texts.values())) == 10 and {'빨간', '네모', '🎨'} <= set(data.words)
    assert 'skipped 5 that could not be read: metadata.jsonl line 11' in capsys.readouterr().err


def test_transparent_gray_and_turned_pictures(tmp_path):
    Image.new('RGBA', (9, 9), (0, 0, 0, 0)).save(tmp_path/'clear.png')
    Image.new('L', (9, 30), 128).save(tmp_path/'gray.png')
    Image.new('P', (64, 9)).save(tmp_path/'palette.gif')
    turned = Image.new('RGB', (20, 20), 'black')
    turned.paste('white', (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3 # upside down
    turned.save(tmp_path/'turned.jpg', exif=exif)
    for f in list(tmp_path.iterdir()): f.with_suffix('.txt').write_text(f.stem)
    data = Folder(tmp_path, 16)
    x = {c: v/127.5-1 for s in data.splits for v, c in zip(data.x[s], data.texts[s])}
    assert x['clear'].min() == 1 and abs(x['gray']).max() < .01 and len(x) == 4
    assert x['turned'][:, 12].mean() > .9 and x['turned'][:, 3].mean() < -.9


@pytest.mark.parametrize('n', [0, 1])
def test_nothing_usable(tmp_path, n):
    captioned(tmp_path, n)
    picture(tmp_path/'bare.png')
    with pytest.raises(CourseError, match='usable captioned image.*put NAME.txt'): load(str(tmp_path))


@pytest.mark.parametrize('n', [2, 3, 5])
def test_tiny_folders_have_both_splits(tmp_path, n):
    captioned(tmp_path, n)
    data = Folder(tmp_path)
    assert data.texts['train'] and data.texts['test']


# --- the dial and the results ---

def test_dial(monkeypatch):
    monkeypatch.delenv('T2I_SCALE', raising=False)
    monkeypatch.setenv('IN_TEST', '1')
    assert scale() == 'smoke' and dial(1, 2, 3) == 1
    monkeypatch.delenv('IN_TEST')
    assert dial(1, 2, 3) == 2
    monkeypatch.setenv('T2I_SCALE', 'full')
    assert dial(1, 2, 3) == 3
    monkeypatch.setenv('T2I_SCALE', 'huge')
    with pytest.raises(CourseError, match='smoke, demo or full'): scale()


def test_results(tmp_path, monkeypatch):
    (tmp_path/'results').mkdir()
    (tmp_path/'settings.ini').write_text('')
    (tmp_path/'results/x.json').write_text('{"a": 1}')
    (tmp_path/'nbs/01').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'nbs/01')
    assert results('x') == {'a': 1} and results('never_measured') == {}


def test_loading_embedded_data_imports_no_torchvision():
    code = ("import sys; from t2i_course.core.sources import load; load('painted'); load('digits'); "
            "print('torchvision' in sys.modules)")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          check=True).stdout.strip() == 'False'
