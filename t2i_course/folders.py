"Which pictures a folder or tar file holds and what is said of them, as its owner meant it; `sources.Folder` reads them"
import csv
import io
import json
import mimetypes
import os
import posixpath
import re
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from t2i_course.core.data import CourseError, split_words

METADATA = ('metadata.jsonl', 'metadata.csv', 'metadata.parquet')
FILE = ('file_name', 'file', 'filename', 'image', 'path') # columns that may name the picture, the first that is there
TEXT = ('text', 'caption', 'prompt', 'texts', 'captions', 'prompts') # and those that may hold captions
TARS = ('.tar', '.tar.gz', '.tgz')
# folders that say nothing of what their pictures show
PLACES = {'train', 'training', 'test', 'testing', 'val', 'valid', 'validation', 'dev', 'data', 'dataset', 'image', 'images',
          'img', 'imgs', 'photo', 'photos', 'picture', 'pictures'}


def say(text):
    "A line on standard error, of one process; what it cannot show is written as a code"
    code = getattr(sys.stderr, 'encoding', None) or 'utf-8'
    if not int(os.environ.get('RANK', 0)): print(text.encode(code, 'backslashreplace').decode(code), file=sys.stderr)


@lru_cache(1000)
def say_once(text): say(text)


def raw(name): # a name inside a folder is text with /; bytes that are no UTF-8 are kept as surrogates, whatever the locale
    return name.encode('utf-8', 'surrogateescape')


def shown(name): return raw(name).decode('utf-8', 'backslashreplace')


def composed(name): return unicodedata.normalize('NFC', name) # a Mac may write an accent as a character of its own


def in_order(name): return composed(name).split('/'), name # the same on every machine


@lru_cache
def readable():
    "The endings of every format that Pillow reads"
    from PIL import Image
    Image.init()
    return {e for e, f in Image.registered_extensions().items() if f in Image.OPEN or f=='MPO'} # .mpo opens as .jpg


def is_picture(name):
    kind, _ = mimetypes.guess_type(name) # one that Pillow cannot read is to be named, not passed over
    return posixpath.splitext(name)[1].lower() in readable() or (kind or '').startswith('image/')


# --- what is said of pictures ---

def text_of(data): # UTF-8, or UTF-16 where the file begins with its mark; wrong bytes become surrogates
    return data.decode('utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig', 'surrogateescape')


def checked(text):
    "The text, or an error when it holds bytes that were no UTF-8"
    text.encode()
    return text


def rows(name, data):
    "(line, row) of a metadata file; the row is {} where the line is damaged"
    if name.lower().endswith('.parquet'):
        try: from pyarrow.parquet import read_table
        except ImportError as e: raise CourseError('needs pyarrow: pip install pyarrow, or write metadata.jsonl') from e
        found = enumerate(read_table(io.BytesIO(data)).to_pylist(), 1)
    elif name.lower().endswith('.csv'):
        text = text_of(data)
        table = csv.DictReader(io.StringIO(text, newline=''), delimiter=max(',;\t', key=text.split('\n')[0].count))
        # None stands for more cells than columns: a comma inside a caption, without quotes
        found = [(table.line_num, {} if None in row else row) for row in table]
    else: found = [(n, json_row(line)) for n, line in enumerate(text_of(data).split('\n'), 1) if line.strip('\ufeff \t\r')]
    return [(n, {k.strip().lower(): v for k, v in row.items()}) for n, row in found]


def json_row(text):
    try: row = json.loads(text.lstrip('\ufeff'))
    except (ValueError, RecursionError): return {}
    return row if isinstance(row, dict) else {}


def lacking(table):
    "The sentence about a column that no row has; None when there is nothing to say"
    columns = dict.fromkeys(k for _, row in table for k in row)
    for what, names in ('file_name', FILE), ('text, caption or prompt', TEXT):
        if columns and not any(k in columns for k in names):
            return f'has no column {what} (its columns: {", ".join(map(shown, columns))})'


def value_of(row, columns):
    "The first of these columns that holds something"
    values = [row[k] for k in columns if k in row]
    return next(filter(None, values), values[0])


def captions_of(row):
    "One caption, a list of them, or an empty place; an error when it is not text"
    value = value_of(row, TEXT)
    return [checked(t) for t in (value if isinstance(value, list) else [] if value is None else [value])]


def tidy(texts): # without those in which there is nothing to see
    return list(dict.fromkeys(' '.join(t.split()) for t in texts if split_words(t)))


class Pile:
    "The captioned pictures of one folder, and what was left out of it"

    def __init__(self, root, prefix=''):
        self.root, self.prefix, self.notes, self.used = os.path.realpath(os.fsencode(root)), prefix, [], set()
        self.left = defaultdict(list) # why -> names
        self.names = sorted(self.walk(), key=in_order)
        self.known, self.near, self.last = set(self.names), defaultdict(list), defaultdict(list)
        for n in self.names:
            self.near[composed(n).casefold()].append(n)
            self.last[composed(posixpath.basename(n)).casefold()].append(n)

    def at(self, name): return os.path.join(self.root, raw(name))

    def leave(self, why, name): self.left[why].append(shown(self.prefix)+name)

    def walk(self):
        "Every file; links are followed, no folder is read twice, hidden ones are left out"
        seen = set(map(os.fsencode, Path(os.fsdecode(self.root)).parents)) # a link upwards would lead in a circle
        todo, links = [''], []
        while todo or links:
            folder = todo.pop() if todo else links.pop(0) # links last: a folder has its own name where it has one
            real = os.path.realpath(self.at(folder))
            if real in seen: continue
            seen.add(real)
            try: inside = sorted(os.listdir(real))
            except OSError as e:
                self.leave('that could not be read', f'{shown(folder)} ({e.strerror})')
                continue
            for file in inside:
                name, path = file.decode('utf-8', 'surrogateescape'), os.path.join(real, file)
                if name.startswith('.') or name=='__MACOSX': continue # left by editors, file managers, archives
                name = posixpath.join(folder, name)
                if os.path.isdir(path): (links if os.path.islink(path) else todo).append(name)
                elif os.path.isfile(path): yield name
                elif os.path.islink(path): self.leave('that could not be read', f'{shown(name)} (a link that leads nowhere)')

    def here(self, name):
        "A name letter for letter, else with its accents written otherwise, else in another case; None when none is meant"
        if name in self.known: return name
        near = self.near.get(composed(name).casefold(), ())
        same = [n for n in near if composed(n)==composed(name)] or near
        return same[0] if len(same)==1 else None

    def inside(self, path):
        "The name of a file that is given by its whole path"
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        try: names = [os.path.relpath(p, os.fsdecode(self.root)).replace(os.sep, '/') for p in (path, real)]
        except ValueError: return None # on another drive
        return next(filter(None, map(self.here, names)), None)

    def find(self, said, folder):
        "The file that a list in `folder` means; the list may come from Windows, or name a place that is no more"
        for name in dict.fromkeys((said, said.replace('\\', '/'))):
            if re.match(r'/|\w:/', name):
                if os.path.isfile(self.at(name)): return self.inside(name) or name
                tails = [name.split('/', i)[-1] for i in range(1, name.count('/')+1)]
            else: tails = [name]
            for tail in tails:
                for place in folder, '':
                    path = posixpath.normpath(posixpath.join(place, tail))
                    if self.here(path): return self.here(path)
                    if os.path.isfile(self.at(path)): return path
            alone = self.last.get(composed(name).casefold(), ()) # a bare name, and one picture of that name in the folders below
            if len(alone)==1: return alone[0]

    def listed(self):
        "name -> captions, from every metadata file"
        found = {}
        for meta in (n for n in self.names if posixpath.basename(n).lower() in METADATA):
            self.used.add(meta)
            try:
                table = rows(meta, Path(os.fsdecode(self.at(meta))).read_bytes())
                lack = lacking(table)
            except CourseError as e: lack = str(e)
            except Exception as e: lack = f'cannot be read ({e})' # csv and pyarrow have errors of their own
            if lack: self.notes.append(f'{shown(self.prefix+meta)} {lack}')
            for n, row in () if lack else table:
                try:
                    texts, name = captions_of(row), value_of(row, FILE)
                    file = self.find(name, posixpath.dirname(meta))
                except (LookupError, AttributeError, TypeError, ValueError):
                    self.leave('that could not be read', f'{shown(meta)} line {n}')
                    continue
                if file: found.setdefault(file, []).extend(texts)
                else: self.leave('that could not be read', f'{shown(name)} (listed, not there)')
        return found

    def beside(self, picture):
        "Captions from NAME.txt, whose lines are one caption, or from NAME.json"
        stem = posixpath.splitext(picture)[0]
        for file in filter(None, map(self.here, (f'{stem}.txt', f'{stem}.json'))):
            with open(self.at(file), 'rb') as f: data = f.read()
            if file.lower().endswith('.json'):
                try: texts = captions_of(json_row(text_of(data)))
                except (LookupError, AttributeError, TypeError, ValueError): continue # of another kind
            self.used.add(file)
            if file.lower().endswith('.txt'): texts = [checked(text_of(data))]
            if tidy(texts): return texts
        return []

    def captioned(self):
        "(picture, its captions); what has none is noted, unless no caption is there at all and the folders are classes"
        said, bare, both = self.listed(), [], []
        pictures = sorted({*filter(is_picture, self.names), *said}, key=in_order)
        for p in pictures:
            try: listed, beside = tidy(said.get(p, ())), tidy(self.beside(p))
            except (ValueError, OSError) as e:
                why = 'not UTF-8' if isinstance(e, ValueError) else e.strerror
                self.leave('that could not be read', f'{shown(posixpath.splitext(p)[0])}.txt ({why})')
                said[p] = tidy(said.get(p, ()))
            else:
                said[p] = listed or beside
                if listed and beside and listed!=beside: both.append(p)
                if not said[p]: bare.append(p)
        if both:
            self.notes.append(f"{len(both)} picture{'s have' if len(both)>1 else ' has'} one caption in the list and another in a file beside: "
                              'the list counts')
        if not self.used: said |= self.classes(bare)
        for p in bare:
            if not said[p]: self.leave('without a caption', shown(p))
        def stem(name): return composed(posixpath.splitext(name)[0]).casefold()
        stems, texts = set(map(stem, pictures)), [n for n in self.names if n.lower().endswith('.txt')]
        alone = [n for n in texts if stem(n) not in stems]
        if len(alone)<len(texts): # where captions lie beside pictures, one that lies alone has lost its picture
            for n in alone: self.leave('without a picture', shown(n))
        return [(p, said[p]) for p in pictures if said.get(p)]

    def classes(self, pictures):
        "name -> caption: the folder that a picture lies in, where there are at least two such folders"
        said = {p: [c.replace('_', ' ') for c in p.split('/')[:-1] if c.lower() not in PLACES][-1:] for p in pictures}
        names = sorted({c for texts in said.values() for c in texts})
        if len(names)<2: return {}
        self.notes.append(f"no captions: the folders' names are taken for them ({shown(', '.join(names[:5]))}"
                          f"{', ...' if len(names)>5 else ''})")
        return {p: tidy(texts) for p, texts in said.items()}


def unpacked(tar, to):
    "Every plain file of an archive, wherever it says it wants to be, into the folder `to`; the reason why it ended early"
    to = os.path.realpath(os.fsencode(to))
    try:
        with tarfile.open(tar) as archive:
            for m in archive:
                file = archive.extractfile(m) if m.isfile() or m.islnk() else None
                path = os.path.realpath(os.path.join(to, raw(posixpath.normpath('/'+m.name).lstrip('/'))))
                if file is None or not path.startswith(os.path.join(to, b'')): continue # Windows has more ways out
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, 'wb') as f: f.write(file.read())
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError) as e: return e


def piles(path):
    "The folder, or its tar files when it has no pictures of its own, each unpacked for as long as it is read"
    pile, tars = None if path.is_file() else Pile(path), [path.name]
    if pile:
        tars = [n for n in pile.names if n.lower().endswith(TARS)]
        if not tars or any(map(is_picture, pile.names)):
            if tars: pile.notes.append(f'the tar files beside the pictures are left aside ({len(tars)}): name them one by one')
            return (yield pile)
    for tar in tars:
        with tempfile.TemporaryDirectory(prefix='t2i-') as to:
            damage = unpacked(pile.at(tar) if pile else path, to)
            inside = Pile(to, f'{tar}/')
            if damage: inside.notes.append(f'{shown(tar)} is damaged ({damage}): what lies before that place is used')
            yield inside
