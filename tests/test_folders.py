"Pictures of strangers: names, links, formats, lists of captions, scripts, bit depth, sizes and archives."
import io
import json
import os
import subprocess
import sys
import tarfile
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, features

from t2i_course import cli
from t2i_course.run.data import open_data
from t2i_course.run.measure import eval_run
from t2i_course.core.register import recipe as module_of
from t2i_course.core.training import feed
from t2i_course.run.settings import settings as settings_of
from t2i_course.run.train import train_run
from t2i_course.core import piles
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.data import Draws, split_words
from t2i_course.core.files import CourseError
from t2i_course.core.sources import DATA, is_path, load
from t2i_course.core.folders import Folder

COLORS = ((230, 26, 26), (26, 179, 51), (38, 77, 242), (242, 217, 26), (153, 38, 191), (255, 128, 13))


def draw(path, k=0, mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (12, 10), COLORS[k % 6]).convert(mode).save(path)


def captioned(folder, n=6, text='a square number {}', ending='png'):
    for i in range(n):
        draw(folder/f'{i:02}.{ending}', i)
        (folder/f'{i:02}.txt').write_text(text.format(i), encoding='utf-8')
    return folder


def listed(folder, rows, name='metadata.jsonl'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text(''.join(json.dumps(r, ensure_ascii=False)+'\n' for r in rows), encoding='utf-8')


def texts(data): return sorted(t for s in data.splits for t in data.texts[s])


def by_caption(data):
    return {t: data.x[s][k] for s in data.splits for k, t in zip(data.which[s].tolist(), data.texts[s])}


# --- words in every script ---

@pytest.mark.parametrize('text,words', [
    ('लाल बिल्ली', ['लाल', 'बिल्ली']), ('红猫', ['红', '猫']), ('a\u200b red square', ['a', 'red', 'square']),
    ('一只红色的猫', list('一只红色的猫')), ('赤いねこ', list('赤いねこ')), ('猫2匹', ['猫', '2', '匹']),
    ('ラーメン', ['ラー', 'メ', 'ン']), ('ｶﾞｰ', ['ｶﾞｰ']), ('か\u3099', ['が']), ('時々', ['時', '々']), ('\U00020000犬', ['\U00020000', '犬']),
    ('빨간 고양이', ['빨간', '고양이']), (unicodedata.normalize('NFD', '빨간 고양이'), ['빨간', '고양이']),
    ('ที่นั่ง สีแดง', ['ที่นั่ง', 'สีแดง']), ('แมว\u200bแดง', ['แมว', 'แดง']), ('சிவப்பு பூனை', ['சிவப்பு', 'பூனை']),
    ('قِطَّة حَمراء', ['قِطَّة', 'حَمراء']), ('חָתוּל אָדוֹם', ['חָתוּל', 'אָדוֹם']), ('می\u200cخواهم', ['میخواهم']),
    ('क्\u200dष', ['क्ष']), ('\ufeff7', ['7']), ('7\ufeff', ['7']), ('soft\u00adhyphen', ['softhyphen']),
    ('\u202bred\u202c \u2066cat\u2069\u200e', ['red', 'cat']), ('葛\U000e0100', ['葛']), ('e\u0301te\u0301', ['été']),
    ('x\u0336 y', ['x\u0336', 'y']), ('❤\ufe0f 👨\u200d👩\u200d👧', ['❤', '👨', '👩', '👧']), ('7\ufe0f\u20e3', ['7', '\u20e3']),
    ('don’t a_b, c!', ['don', '’', 't', 'a', 'b', ',', 'c', '!']), ('bad\ud800 half', ['bad', 'half']), ('', []), ('\u200b', [])])
def test_words(text, words):
    assert split_words(text) == words


@given(st.text(st.characters(exclude_categories=['Cs']), max_size=30))
@settings(deadline=None, max_examples=200)
def test_words_whatever_the_text(text):
    "Composed or not they are the same words; none is empty or begins a line; what is not seen changes nothing"
    words = split_words(text)
    assert words == split_words(unicodedata.normalize('NFD', text)) == split_words('\ufeff'+text+'\u2060')
    assert all(w and not any(c.isspace() for c in w) for w in words)
    assert split_words(' '.join(words)) == [v for w in words for v in split_words(w)]


@given(st.text(st.characters(codec='ascii'), max_size=30))
@settings(deadline=None, max_examples=300)
def test_ascii_is_cut_by_the_same_rules(text):
    assert split_words(text) == split_words(text+' é')[:-1]


@pytest.mark.parametrize('first,last', [(0x900, 0x97f), (0xe00, 0xe7f), (0xb80, 0xbff), (0x590, 0x5ff), (0x620, 0x669)])
def test_letters_and_marks_of_a_script_hold_together(first, last):
    "Every sign of a script that is a letter, a mark or a digit is a part of the word around it"
    for c in map(chr, range(first, last+1)):
        if unicodedata.category(c) in ('Lo', 'Lm', 'Mn', 'Mc', 'Nd'):
            word = unicodedata.normalize('NFC', 'a'+c+'b')
            assert split_words(word) == [word.lower()], hex(ord(c))


def test_a_mark_before_a_prompt_loses_nothing():
    tok = WordTokenizer(load('painted').words, 16)
    for a, b in (('\ufeffseven on pink', 'seven on pink'), ('sev\u00aden\u200b on pink', 'seven on pink')):
        assert torch.equal(tok([a]).ids, tok([b]).ids)
    assert load('painted').demands('\ufeffred') == dict(ink=0)


# --- a name is not a path ---

@pytest.mark.parametrize('name', DATA)
def test_a_bare_word_is_a_data_set(name): assert not is_path(name)


@pytest.mark.parametrize('name', ['./digits', '../digits', '/tmp/digits', 'a/b', '.', '..', '~/photos', 'shards.tar', Path('digits')])
def test_paths(name): assert is_path(name)


def test_a_folder_does_not_take_the_place_of_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('digits', 'painted'):
        captioned(tmp_path/name)
        assert load(name).shape == dict(digits=(1, 16, 16), painted=(3, 32, 32))[name]
        assert f'./{name}' in capsys.readouterr().err
        for path in (f'./{name}', f'{name}/', str(tmp_path/name), Path(name)): assert len(texts(load(path))) == 6
    assert capsys.readouterr().err == ''


def test_a_bare_word_that_is_a_folder_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captioned(tmp_path/'photos')
    with pytest.raises(CourseError, match='./photos'): load('photos')


def test_the_name_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captioned(tmp_path/'digits')
    captioned(tmp_path/'mine')
    def config(data): return settings_of('ddpm', data, 'smoke', None, 64, 0, 'fp32')
    assert config('digits')['data'] == 'digits' and config('digits')['shape'] == [1, 16, 16] and config('digits')['size'] is None
    assert config('./digits')['data'] == str(tmp_path/'digits') and config('./mine/')['data'] == str(tmp_path/'mine')


def test_trains_on_the_built_in_set_beside_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captioned(tmp_path/'digits')
    assert cli.main(['train', 'ddpm', '--data', 'digits', '--scale', 'smoke', '--images', '64', '--quiet']) == 0
    assert json.loads((tmp_path/'runs/ddpm-digits-0/config.json').read_text(encoding='utf-8'))['data'] == 'digits'


# --- nothing is left out in silence ---

@pytest.fixture
def links(tmp_path):
    if os.name == 'nt': pytest.skip('links need a privilege on Windows')
    return tmp_path


def test_linked_folders_and_pictures(links):
    mine = captioned(links/'mine')
    captioned(links/'elsewhere/more', 6, 'from elsewhere {}')
    draw(links/'one.png')
    (mine/'more').symlink_to('../elsewhere/more')
    (mine/'one.png').symlink_to(links/'one.png')
    (mine/'one.txt').write_text('one alone', encoding='utf-8')
    assert len(texts(load(mine))) == 13


def test_links_in_circles(links):
    "Each folder is read once, under its own name where it has one"
    mine = captioned(links/'mine')
    captioned(mine/'zebra', 2, 'a zebra {}')
    (mine/'a').symlink_to(mine/'zebra')
    (mine/'up').symlink_to('..')
    (mine/'zebra/self').symlink_to(mine)
    captioned(links/'other', 2, 'other {}')
    (mine/'b').symlink_to(links/'other')
    (links/'other/back').symlink_to(mine/'zebra')
    (links/'other/loop').symlink_to('loop')
    pile = piles.Pile(mine)
    assert len(pile.captioned()) == 10 and 'zebra/00.png' in pile.names and 'b/00.png' in pile.names


def test_a_link_that_leads_nowhere_is_named(links, capsys):
    (captioned(links/'mine')/'lost.png').symlink_to('gone.png')
    load(links/'mine')
    assert 'lost.png (a link that leads nowhere)' in capsys.readouterr().err


def test_every_format_that_pillow_reads(tmp_path):
    "Those it also writes, that is: they are written here"
    Image.init()
    made = []
    for ending, kind in sorted(Image.registered_extensions().items()):
        if kind not in Image.SAVE or kind in ('PDF', 'PALM'): continue
        for mode in ('RGB', 'L', '1', 'P', 'RGBA'):
            file = tmp_path/f'{ending[1:]}{ending}'
            try: draw(file, mode=mode)
            except Exception: file.unlink(missing_ok=True) # a format without this mode, or one that needs a plugin
            else: break
        if not file.exists(): continue
        try: Image.open(file).load()
        except Exception: # PostScript without its interpreter, for one
            file.unlink()
            continue
        (tmp_path/f'{ending[1:]}.txt').write_text(ending, encoding='utf-8')
        made.append(ending)
    assert {'.jpg', '.jfif', '.png', '.tga', '.ppm', '.pgm', '.ico', '.pcx', '.qoi', '.sgi', '.tiff', '.mpo'} <= set(made)
    assert ('.avif' in made) == features.check('avif')
    assert texts(load(tmp_path)) == sorted(made)


def test_a_format_that_pillow_does_not_read_is_named(tmp_path, capsys):
    captioned(tmp_path)
    for name in ('phone.heic', 'drawing.svg'):
        (tmp_path/name).write_bytes(b'something')
        (tmp_path/name).with_suffix('.txt').write_text('a picture', encoding='utf-8')
    load(tmp_path)
    err = capsys.readouterr().err
    assert 'phone.heic (Pillow does not read .heic)' in err and 'drawing.svg (Pillow does not read .svg)' in err


def test_hidden_files_are_left_out_quietly(tmp_path, capsys):
    captioned(tmp_path)
    for place in ('.ipynb_checkpoints', '__MACOSX', 'sub/__MACOSX', '.git', 'sub/.thumbs'): captioned(tmp_path/place, 3, 'hidden {}')
    for name in ('._00.png', '.DS_Store', 'sub/._x.png'): (tmp_path/name).write_bytes(b'\0')
    (tmp_path/'._00.txt').write_text('no', encoding='utf-8')
    assert len(texts(load(tmp_path))) == 6 and capsys.readouterr().err == ''


def test_a_hidden_folder_that_was_asked_for(tmp_path): assert len(texts(load(captioned(tmp_path/'.mine')))) == 6


@pytest.mark.parametrize('how', ['rows', 'list', 'both'])
def test_several_captions_of_a_picture(tmp_path, how):
    "All are known, the picture is kept once, and never in both splits"
    said = {f'{i}.png': [f'picture {i} in words {k}' for k in range(5)] for i in range(3)}
    for i in range(3): draw(tmp_path/f'{i}.png', i)
    rows = dict(rows=[dict(file_name=f, text=c) for f, cs in said.items() for c in cs],
                list=[dict(file_name=f, captions=cs) for f, cs in said.items()])
    rows['both'] = rows['list']+rows['rows'] # the same pair twice is one pair
    listed(tmp_path, rows[how])
    data = load(tmp_path)
    assert len(texts(data)) == 15 == len(set(texts(data))) and sum(map(len, data.x.values())) == 3
    assert {c.split()[1] for c in data.texts['train']}.isdisjoint(c.split()[1] for c in data.texts['test'])
    n = len(data.texts['train'])
    b = data.batch('train', Draws(0, torch.arange(n)))
    assert sorted(b.captions) == sorted(data.texts['train'])
    for x, c in zip(b.x, b.captions): assert ((x[:, 9, 9]+1)*127.5).round().tolist() == list(COLORS[int(c.split()[1])])


@pytest.mark.parametrize('text', ['text', 'caption', 'prompt', 'Caption '])
@pytest.mark.parametrize('file', ['file_name', 'image'])
@pytest.mark.parametrize('kind', ['jsonl', 'csv', 'csv;', 'utf-16'])
def test_lists(tmp_path, kind, file, text):
    rows = [(f'{i}.png', f'a square, "number" {i}; größer') for i in range(4)]
    for name, _ in rows: draw(tmp_path/name)
    if kind == 'jsonl': listed(tmp_path, [{file: a, text: b} for a, b in rows])
    else:
        sep, quoted = ';' if kind == 'csv;' else ',', lambda c: '"'+c.replace('"', '""')+'"'
        lines = '\r\n'.join([sep.join((file, text)), *(sep.join((a, quoted(b))) for a, b in rows)])
        (tmp_path/'metadata.csv').write_bytes(lines.encode('utf-16' if kind == 'utf-16' else 'utf-8-sig'))
    assert texts(load(tmp_path)) == sorted(c for _, c in rows)


@pytest.mark.parametrize('place,said', [
    ('', 'train/{}.png'), ('train', '{}.png'), ('', 'train\\{}.png'), ('', './train/{}.png'), ('train', '.\\{}.png'),
    ('', 'D:\\my\\set\\train\\{}.png'), ('train', '/elsewhere/other/set/train/{}.png'), ('lists/here', '{}.png'),
    ('lists', '../train/{}.png'), ('', 'TRAIN/{}.PNG')])
def test_where_lists_and_pictures_lie(tmp_path, place, said):
    for i in range(4): draw(tmp_path/f'train/{i}.png')
    listed(tmp_path/place, [dict(file_name=said.format(i), text=f'number {i}') for i in range(4)])
    data = load(tmp_path)
    assert len(texts(data)) == 4 and all(name == f'train/{i}.png' for i, (name, _) in enumerate(piles.Pile(tmp_path).captioned()))


def test_a_list_does_not_take_another_picture(tmp_path, capsys):
    "A name that fits two pictures, or one in another folder, fits none"
    captioned(tmp_path/'test')
    for i in range(2): draw(tmp_path/f'a/{i}x.png'), draw(tmp_path/f'b/{i}x.png')
    listed(tmp_path, [dict(file_name=n, text='wrong') for n in ('train/00.png', '/elsewhere/other/train/00.png', '0x.png', '1X.PNG')])
    assert 'wrong' not in texts(load(tmp_path))
    assert 'skipped 4 that could not be read: train/00.png (listed, not there)' in capsys.readouterr().err


def test_pictures_outside_the_folder(tmp_path):
    for i in range(4): draw(tmp_path/f'store/{i}.png', i)
    listed(tmp_path/'mine', [dict(file_name=str(tmp_path/f'store/{i}.png'), text=f'number {i}') for i in range(4)])
    assert len(texts(load(tmp_path/'mine'))) == 4


def test_whole_paths_into_the_folder(links, capsys):
    "The same pictures, linked or not, are not taken for others"
    captioned(links/'store', 2)
    draw(links/'mine/0.png')
    (links/'mine/more').symlink_to(links/'store')
    (links/'way').symlink_to(links/'mine')
    listed(links/'mine', [dict(file_name=str(links/f), text=f) for f in ('mine/0.png', 'way/0.png', 'mine/more/00.png', 'store/01.png')])
    pile = piles.Pile(links/'mine')
    assert dict(pile.captioned()) == {'0.png': ['mine/0.png', 'way/0.png'], 'more/00.png': ['mine/more/00.png'],
                                      'more/01.png': ['a square number 1'], str(links/'store/01.png'): ['store/01.png']}


@pytest.mark.parametrize('rows,sentence', [
    ([dict(file_name='00.png', label=3)], 'metadata.jsonl has no column text, caption or prompt .its columns: file_name, label'),
    ([dict(picture='00.png', text='a')], 'metadata.jsonl has no column file_name .its columns: picture, text')])
def test_a_missing_column_is_named(tmp_path, rows, sentence, capsys):
    for i in range(3): draw(tmp_path/f'0{i}.png')
    listed(tmp_path, rows)
    with pytest.raises(CourseError, match=sentence): load(tmp_path)
    assert 'skipped 3 without a caption: 00.png' in capsys.readouterr().err


def test_damaged_rows_are_named(tmp_path, capsys):
    for i in range(4): draw(tmp_path/f'{i}.png')
    (tmp_path/'metadata.csv').write_text('file_name,text\n0.png,zero\n1.png,a red, big square\n2.png,two\n3.png\n', encoding='utf-8')
    (tmp_path/'sub').mkdir()
    (tmp_path/'sub/metadata.jsonl').write_bytes(b'{"file_name": "3.png", "text": "gr\xfcn"}\n{"file_name": "3.png", "text": "\\ud800"}\n'
                                                b'{"file_name": 3, "text": "x"}\n{"file_name": "3.png", "text": {"a": "b"}}\n[]\n'
                                                b'{"file_name": "3.png", "text": null}\n{"file_name": "3.png"}\n')
    assert texts(load(tmp_path)) == ['two', 'zero']
    err = capsys.readouterr().err
    assert 'skipped 7 that could not be read: metadata.csv line 3, sub/metadata.jsonl line 1, sub/metadata.jsonl line 2' in err
    assert 'skipped 2 without a caption: 1.png, 3.png' in err


def test_parquet(tmp_path, monkeypatch, capsys):
    captioned(tmp_path/'beside', 3)
    for i in range(3): draw(tmp_path/f'{i}.png')
    (tmp_path/'metadata.parquet').write_bytes(b'PAR1')
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    assert len(texts(load(tmp_path))) == 3
    assert 'metadata.parquet needs pyarrow: pip install pyarrow, or write metadata.jsonl' in capsys.readouterr().err
    table = types.SimpleNamespace(to_pylist=lambda: [dict(file_name=f'{i}.png', text=[f'{i} a', f'{i} b']) for i in range(3)])
    def read_table(file):
        assert file.read() == b'PAR1'
        return table
    monkeypatch.setitem(sys.modules, 'pyarrow', types.ModuleType('pyarrow'))
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', types.SimpleNamespace(read_table=read_table))
    assert len(texts(load(tmp_path))) == 9 and capsys.readouterr().err == ''


@pytest.mark.parametrize('layout', ['{c}/{i}.png', 'train/{c}/{i}.png', 'data/{c}/images/{i}.png'])
def test_a_folder_a_class(tmp_path, layout, capsys):
    for c in ('red_cat', 'dog'):
        for i in range(3): draw(tmp_path/layout.format(c=c, i=i))
    (tmp_path/'README.txt').write_text('about these pictures', encoding='utf-8')
    assert texts(load(tmp_path)) == ['dog']*3+['red cat']*3
    assert "no captions: the folders' names are taken for them (dog, red cat)" in capsys.readouterr().err


@pytest.mark.parametrize('case', ['one class', 'splits', 'captions', 'empty captions', 'a list'])
def test_folders_that_are_no_classes(tmp_path, case, capsys):
    for c in dict(splits=('train', 'test')).get(case, ('cat',) if case == 'one class' else ('cat', 'dog')):
        for i in range(3): draw(tmp_path/f'{c}/{i}.png')
    if case == 'captions': captioned(tmp_path/'cat')
    if case == 'empty captions': (tmp_path/'cat/0.txt').write_text(' \n', encoding='utf-8')
    if case == 'a list': listed(tmp_path, [dict(file_name='cat/0.png', label='x')])
    if case == 'captions': assert texts(load(tmp_path)) == [f'a square number {i}' for i in range(6)]
    else:
        with pytest.raises(CourseError, match='usable captioned image'): load(tmp_path)
    assert 'without a caption' in capsys.readouterr().err


def test_train_and_test_folders_stay_apart(tmp_path):
    captioned(tmp_path/'train', 5, 'of training {}')
    captioned(tmp_path/'validation', 3, 'of testing {}')
    data = load(tmp_path)
    assert len(data.texts['train']) == 5 and len(data.texts['test']) == 3 and 'testing' not in data.words


def test_captions_beside(tmp_path, capsys):
    "One .txt for pictures of one name, several lines are one caption, NAME.json, endings in other cases"
    captioned(tmp_path, 2)
    draw(tmp_path/'00.jpg')
    draw(tmp_path/'UP.PNG')
    draw(tmp_path/'UP.png') if not (tmp_path/'up.png').exists() else None
    (tmp_path/'up.TXT').write_text('upper\n  case\n', encoding='utf-8')
    draw(tmp_path/'j.png')
    (tmp_path/'j.json').write_text('{"caption": "from json"}', encoding='utf-8')
    draw(tmp_path/'k.png')
    (tmp_path/'k.json').write_text('{"boxes": [1, 2]}', encoding='utf-8')
    draw(tmp_path/'unseen.png')
    (tmp_path/'unseen.txt').write_text('\ufeff\u200b \u00ad', encoding='utf-8')
    (tmp_path/'lost.txt').write_text('where is my picture?', encoding='utf-8')
    data = load(tmp_path)
    assert {'from json', 'upper case'} <= set(texts(data)) and texts(data).count('a square number 0') == 2
    err = capsys.readouterr().err
    assert 'skipped 2 without a caption: k.png, unseen.png' in err and 'skipped 1 without a picture: lost.txt' in err


def test_long_captions_are_said(tmp_path, capsys):
    captioned(tmp_path)
    (tmp_path/'00.txt').write_text('word '*64, encoding='utf-8')
    assert load(tmp_path) and '1 caption is longer than 63 words' in capsys.readouterr().err


# --- names ---

@pytest.mark.parametrize('file,other', [('NFD', 'NFC'), ('NFC', 'NFD')])
@pytest.mark.parametrize('how', ['list', 'beside'])
def test_composed_and_decomposed_names(tmp_path, file, other, how, capsys):
    names = [unicodedata.normalize('NFC', n) for n in ('Müller', 'Größe', 'café', 'niño', 'été', '빨강')]
    for n in names: draw(tmp_path/(unicodedata.normalize(file, n)+'.png'))
    said = [unicodedata.normalize(other, n) for n in names]
    if how == 'list': listed(tmp_path, [dict(file_name=f'{n}.png', text=f'a picture {i}') for i, n in enumerate(said)])
    else:
        for i, n in enumerate(said): (tmp_path/f'{n}.txt').write_text(f'a picture {i}', encoding='utf-8')
    assert texts(load(tmp_path)) == [f'a picture {i}' for i in range(6)] and capsys.readouterr().err == ''


def latin(folder, name='gr\xfcn'):
    try: (Path(os.fsdecode(os.fsencode(folder)+b'/'+name.encode('latin-1')))).with_suffix('.txt').write_text('a green one', encoding='utf-8')
    except OSError: pytest.skip('this file system wants UTF-8 names')
    return Path(os.fsdecode(os.fsencode(folder)+b'/'+name.encode('latin-1')))


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    captioned(tmp_path, 7)
    draw(latin(tmp_path).with_suffix('.png'))
    data = load(tmp_path)
    assert len(texts(data)) == 8 and 'a green one' in texts(data) and len(data.fingerprint) == 64
    latin(tmp_path, 'br\xfcn').with_suffix('.png').write_bytes(b'no picture')
    strict = io.TextIOWrapper(io.BytesIO(), 'ascii', 'strict')
    monkeypatch.setattr(sys, 'stderr', strict)
    assert len(texts(load(tmp_path))) == 8
    strict.flush()
    assert rb'skipped 1 that could not be read: br\xfcn.png' in strict.buffer.getvalue()


def test_a_folder_whose_own_name_is_not_utf8(tmp_path):
    folder = latin(tmp_path).with_name(os.fsdecode(b'f\xfcnf'))
    captioned(folder)
    with pytest.raises(CourseError, match=r'f\\xfcnf is not UTF-8: rename it'): load(str(folder))


def test_a_locale_that_is_not_utf8(tmp_path):
    "The same words, the same pictures, the same fingerprint"
    captioned(tmp_path, 4, 'grün und größer {}')
    for n in ('Müller', '빨강'): draw(tmp_path/f'{n}.png')
    listed(tmp_path, [dict(file_name=f'{n}.png', text=f'für {n}') for n in ('Müller', '빨강')])
    code = ("import sys, locale; from t2i_course.core.sources import load; d = load(sys.argv[1]); "
            "print(ascii([sorted(d.words), d.fingerprint])); print(locale.getpreferredencoding(False), file=sys.stderr)")
    env = os.environ | dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONIOENCODING='ascii')
    run = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=env, capture_output=True, text=True)
    data = load(tmp_path)
    assert run.stdout.strip() == ascii([sorted(data.words), data.fingerprint]), run.stderr
    if os.name != 'nt': assert 'utf' not in run.stderr.lower()


# --- bit depth and modes ---

def levels(folder, made):
    "caption -> picture, for name.ending -> PIL image"
    for name, im in made.items():
        im.save(folder/name)
        (folder/name).with_suffix('.txt').write_text(name, encoding='utf-8')
    draw(folder/'more.png')
    (folder/'more.txt').write_text('more', encoding='utf-8')
    return by_caption(Folder(folder, 32))


def flat(value, dtype): return Image.fromarray(np.full((32, 32), value, dtype))


def ramp(top, dtype): return Image.fromarray(np.tile(np.linspace(0, top, 32).astype(dtype), (32, 1)))


@pytest.mark.parametrize('name,dtype,half,top', [
    ('png', np.uint16, 32768, 65535), ('tif', np.uint16, 32768, 65535), ('pgm', np.uint16, 32768, 65535),
    ('tif', '>u2', 32768, 65535), ('tif', np.int32, 32768, 65535), ('tif', np.int32, 128, 255), ('tif', np.float32, .5, 1),
    ('tif', np.float32, 128, 255), ('tif', np.float32, 32768, 65535), ('tif', np.uint8, 128, 255)])
def test_gray_of_any_depth(tmp_path, name, dtype, half, top):
    both = np.full((32, 32), half, dtype)
    both[0, 0] = top # so that white is known
    x = levels(tmp_path, {f'half.{name}': Image.fromarray(both), f'ramp.{name}': ramp(top, dtype)})
    assert x[f'half.{name}'][:, 4:, 4:].unique().tolist() == [128]
    r = x[f'ramp.{name}'][0].float()
    assert len(r.unique()) == 32 and (r-torch.linspace(0, 255, 32)).abs().max() <= 1 and torch.equal(r, r[:1].expand(32, 32))


def test_sixteen_bits_know_their_white(tmp_path):
    "A dark picture stays dark: white does not depend on what a picture holds"
    x = levels(tmp_path, {'dark.png': flat(200, np.uint16), 'mid.png': flat(32768, np.uint16)})
    assert x['dark.png'].unique().tolist() == [1] and x['mid.png'].unique().tolist() == [128]


@pytest.mark.parametrize('value,dtype', [(70_000, np.int32), (-3, np.int32), (1e6, np.float32), (float('nan'), np.float32)])
def test_gray_without_a_known_white_is_named(tmp_path, value, dtype, capsys):
    captioned(tmp_path)
    flat(value, dtype).save(tmp_path/'odd.tif')
    (tmp_path/'odd.txt').write_text('odd', encoding='utf-8')
    assert 'odd' not in texts(load(tmp_path))
    assert 'odd.tif (values outside 0..65535)' in capsys.readouterr().err


def test_modes(tmp_path):
    red, half = Image.new('RGB', (32, 32), (255, 0, 0)), Image.new('L', (32, 32), 100)
    clear = Image.new('P', (32, 32), 0)
    clear.putpalette([0, 0, 0, 255, 255, 255])
    first, second = Image.new('P', (32, 32), 0), Image.new('P', (32, 32), 1)
    for im in (first, second): im.putpalette([0, 0, 255, 255, 0, 0])
    clear.info['transparency'] = 0
    ink = Image.new('LA', (32, 32), (0, 0))
    ink.paste((100, 255), (0, 0, 32, 32))
    wide = Image.new('RGB', (96, 32), 'black')
    wide.paste((0, 255, 0), (32, 0, 64, 32))
    turned = Image.new('I;16', (32, 32), 0)
    turned.paste(65535, (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3 # upside down
    first.save(tmp_path/'moving.gif', save_all=True, append_images=[second], duration=100)
    turned.save(tmp_path/'turned.png', exif=exif)
    for n in ('moving.gif', 'turned.png'): (tmp_path/n).with_suffix('.txt').write_text(n, encoding='utf-8')
    x = levels(tmp_path, {'cmyk.jpg': red.convert('CMYK'), 'cmyk.tif': red.convert('CMYK'), 'clear.png': clear, 'la.png': ink,
                          'one.png': Image.new('1', (32, 32), 1), 'l.png': half, 'wide.png': wide})
    def is_flat(name, color): return (x[name].float()-torch.tensor(color).view(3, 1, 1)).abs().max() <= 2
    assert is_flat('clear.png', (255, 255, 255)) and is_flat('la.png', (100, 100, 100)) and is_flat('one.png', (255, 255, 255))
    assert is_flat('l.png', (100, 100, 100)) and is_flat('moving.gif', (0, 0, 255)) and is_flat('wide.png', (0, 255, 0))
    assert is_flat('cmyk.tif', (255, 0, 0))
    assert x['turned.png'][:, :12].max() == 0 and x['turned.png'][:, 20:].min() == 255


# --- the size of pictures ---

def refused(capsys, *args):
    assert cli.main([str(a) for a in args]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize('size', [0, 8, 30, 33, 520, -16])
def test_sizes_that_no_recipe_takes(tmp_path, size, capsys):
    captioned(tmp_path/'mine')
    for command in (['train', 'ddpm', '--data', tmp_path/'mine'], ['prepare', tmp_path/'mine', '--images', 4],
                    ['data', tmp_path/'mine']):
        out = tmp_path/('a.npz' if command[0] == 'data' else 'out')
        assert '--size must be a multiple of 8 from 16 to 512' in refused(capsys, *command, '--size', size, '--out', out)
        assert not out.exists()


def test_size_is_for_folders(tmp_path, capsys):
    assert '--size is for a folder' in refused(capsys, 'train', 'ddpm', '--data', 'digits', '--size', 32, '--out', tmp_path/'r')
    captioned(tmp_path/'mine')
    assert cli.main(['prepare', str(tmp_path/'mine'), '--images', '4', '--size', '16', '--out', str(tmp_path/'shards'), '--quiet']) == 0
    assert 'resized to 16 x 16; --size changes it' in capsys.readouterr().err
    shards = open_data(str(tmp_path/'shards'))
    assert shards.shape == (3, 16, 16) == shards.origin().shape and shards.batch('test', Draws(0, torch.arange(2))).x.shape[-1] == 16
    assert 'give --size to t2i prepare' in refused(capsys, 'train', 'ddpm', '--data', tmp_path/'shards', '--size', 16, '--out', tmp_path/'r')


def test_a_run_keeps_its_size(tmp_path, capsys):
    mine, run = captioned(tmp_path/'mine', 12), tmp_path/'run'
    new = ['train', 'ddpm', '--data', str(mine), '--size', '16', '--scale', 'smoke', '--images', '64', '--quiet', '--out', str(run)]
    assert cli.main(new) == 0
    err = capsys.readouterr().err
    assert err.count('mine: 12 pictures, the central square of each resized to 16 x 16; --size changes it') == 1
    config = json.loads((run/'config.json').read_text(encoding='utf-8'))
    assert config['size'] == 16 and config['shape'] == [3, 16, 16] and config['fingerprint'] == Folder(mine, 16).fingerprint
    assert cli.main(['sample', str(run), '--prompt', 'a square', '--out', str(tmp_path/'a.npz')]) == 0
    assert np.load(tmp_path/'a.npz')['images'].shape == (1, 16, 16, 3)
    assert eval_run(run, n=8, quiet=True)['images'] == 64
    assert cli.main(['train', '--resume', '--out', str(run), '--quiet']) == 0
    assert cli.main(['data', str(mine), '--size', '24', '--n', '3', '--out', str(tmp_path/'b.npz')]) == 0
    assert np.load(tmp_path/'b.npz')['images'].shape == (3, 24, 24, 3)


@pytest.mark.parametrize('recipe', ['flow_matching', 'dit'])
def test_large_pictures_go_without_the_closed_form(tmp_path, recipe, capsys):
    "Its fit takes 0.4 seconds of a core at 32 pixels a side and 4 at 48; at 96 it would take minutes and a table of 340 MB"
    mine = captioned(tmp_path/'mine', 12)
    def config(size): return settings_of(recipe, str(mine), 'smoke', None, 64, 0, 'fp32', size=size)
    assert config(64)['skip'] and 'too large' not in capsys.readouterr().err
    large = config(96)
    assert not large['skip'] and 'pictures of 96 x 96 are too large for the closed-form head start' in capsys.readouterr().err
    tok, den = module_of(recipe).build(large)
    draws = Draws(0, torch.arange(2))
    x, cond = feed(load(mine, 96), tok)(draws)
    loss = den.loss(x, cond, draws)
    assert getattr(den, 'skip', None) is None and loss.isfinite().all()


# --- fingerprints ---

def test_a_fingerprint_knows_the_pictures(tmp_path):
    a, b = captioned(tmp_path/'a'), captioned(tmp_path/'elsewhere/b')
    first = Folder(a).fingerprint
    assert first == Folder(a).fingerprint == Folder(b).fingerprint != Folder(a, 16).fingerprint
    seen = {first}
    def changed(): # each change is a new one
        f = Folder(b).fingerprint
        assert f not in seen
        seen.add(f)
    (b/'00.txt').write_text('another caption', encoding='utf-8'); changed()
    draw(b/'01.png', 5); changed()
    (b/'02.png').rename(b/'2.png'); (b/'02.txt').rename(b/'2.txt'); changed()
    captioned(b, 7); changed()
    (b/'03.png').unlink(); changed()


def test_every_data_set_has_a_fingerprint(tmp_path):
    from t2i_course.core.prepare import prepare
    from t2i_course.core.shards import Shards
    prints = {name: load(name).fingerprint for name in ('digits', 'painted', 'painted2')}
    assert len(set(prints.values())) == 3 and all(name in f for name, f in prints.items())
    for name, seed in (('s', 0), ('same', 0), ('other', 1)): prepare(load('digits'), tmp_path/name, 20, shard_size=10, seed=seed)
    s, same, other = (Shards(tmp_path/name).fingerprint for name in ('s', 'same', 'other'))
    (tmp_path/'s').rename(tmp_path/'moved')
    assert s == same == Shards(tmp_path/'moved').fingerprint != other and s not in prints.values()


# --- tar files ---

def packed(folder, path, order=None):
    with tarfile.open(path, 'w:gz' if str(path).endswith('gz') else 'w') as tar:
        for f in order or sorted(f for f in folder.rglob('*') if f.is_file()): tar.add(f, f.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize('name', ['some.tar', 'some.tar.gz', 'some.tgz'])
@pytest.mark.parametrize('order', ['together', 'pictures first'])
def test_a_tar_file(tmp_path, name, order, monkeypatch):
    captioned(tmp_path/'in', 4, ending='jpg')
    draw(tmp_path/'in/x.png')
    (tmp_path/'in/x.json').write_text('{"caption": "of json", "key": "x"}', encoding='utf-8')
    draw(tmp_path/'in/._x.png')
    files = sorted((f for f in (tmp_path/'in').iterdir()), key=lambda f: f.suffix in ('.txt', '.json') if order != 'together' else f)
    packed(tmp_path/'in', tmp_path/name, files)
    monkeypatch.chdir(tmp_path)
    data = load(name)
    assert texts(data) == sorted([*(f'a square number {i}' for i in range(4)), 'of json'])
    assert data.fingerprint == load(tmp_path/name).fingerprint and data.name == name


def test_a_folder_of_tar_files(tmp_path, capsys):
    captioned(tmp_path/'a', 3, 'a {}'), captioned(tmp_path/'b', 3, 'b {}')
    (tmp_path/'set').mkdir()
    for n in 'ab': packed(tmp_path/n, tmp_path/f'set/{n}.tar')
    assert texts(load(tmp_path/'set')) == [f'{n} {i}' for n in 'ab' for i in range(3)] and capsys.readouterr().err == ''
    captioned(tmp_path/'set', 2)
    assert len(texts(load(tmp_path/'set'))) == 2 and 'tar files beside the pictures are left aside (2)' in capsys.readouterr().err


def test_a_damaged_tar_file(tmp_path, capsys):
    path = packed(captioned(tmp_path/'in', 20), tmp_path/'cut.tar')
    path.write_bytes(path.read_bytes()[:9000])
    data = load(path)
    assert 2 <= len(texts(data)) < 20 and 'cut.tar is damaged' in capsys.readouterr().err
    path.write_bytes(b'not a tar file at all'*100)
    with pytest.raises(CourseError, match='is not a folder: give a folder'): load(path)


def test_a_tar_file_writes_nowhere_else(tmp_path):
    captioned(tmp_path/'in', 3)
    path = tmp_path/'evil.tar'
    with tarfile.open(path, 'w') as tar:
        for f in (tmp_path/'in').iterdir(): tar.add(f, f'../../{f.name}')
        m = tarfile.TarInfo(str(tmp_path/'planted.png'))
        tar.addfile(m)
        m = tarfile.TarInfo('link')
        m.type, m.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(m)
    assert len(texts(load(path))) == 3 and not (tmp_path/'planted.png').exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ['evil.tar', 'in']


def test_two_pictures_can_be_trained_on(tmp_path):
    captioned(tmp_path/'two', 2)
    out = train_run('flow_matching', str(tmp_path/'two'), scale='smoke', images=32, out=tmp_path/'run', quiet=True)
    assert (out/'model.safetensors').exists()


def test_a_new_run_reads_its_folder_once(tmp_path, capsys):
    captioned(tmp_path/'some')
    (tmp_path/'some'/'broken.png').write_bytes(b'no picture')
    train_run('ddpm', str(tmp_path/'some'), scale='smoke', images=32, out=tmp_path/'run', quiet=True)
    assert capsys.readouterr().err.count('skipped 1 ') == 1


def test_two_captions_that_differ_are_told(tmp_path, capsys):
    captioned(tmp_path/'some', 4)
    listed(tmp_path/'some', [dict(file_name='00.png', text='a square from the list'), dict(file_name='01.png', text='a square number 1')])
    assert texts(load(str(tmp_path/'some')))[0] == 'a square from the list'
    assert '1 picture has one caption in the list and another in a file beside' in capsys.readouterr().err
