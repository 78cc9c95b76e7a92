"Pictures from disk and network for `core.data.load`: torchvision's sets and folders of captioned images"
import hashlib
import http.client
import json
import os
import shutil
import socket
import sys
import tempfile
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from t2i_course.core.data import (NUMBERS, Batch, CourseError, Labelled, check_split, in_epochs, n_tokens,
                                  split_words)


def say(text): print(text, file=sys.stderr)


# --- torchvision under T2I_DATA ---

@lru_cache
def _resolved(value): return Path(value).expanduser().resolve()


def data_root():
    "The folder of downloaded data: T2I_DATA, or ~/.cache/t2i_course; a relative path is resolved at first use"
    return _resolved(os.environ.get('T2I_DATA') or '~/.cache/t2i_course')


CLOTHES = ('a t-shirt', 'trousers', 'a pullover', 'a dress', 'a coat', 'a sandal', 'a shirt', 'a sneaker', 'a bag',
           'an ankle boot')
THINGS = ('an airplane', 'an automobile', 'a bird', 'a cat', 'a deer', 'a dog', 'a frog', 'a horse', 'a ship',
          'a truck')
# name -> torchvision's class, its folder, shape, name of the label, captions, caption without the label
SETS = dict(
    mnist=('MNIST', 'MNIST', (1, 28, 28), 'digit', tuple(f'a handwritten {w}' for w in NUMBERS),
           'a handwritten digit'),
    fashion=('FashionMNIST', 'FashionMNIST', (1, 28, 28), 'label', CLOTHES, 'a piece of clothing'),
    cifar10=('CIFAR10', 'cifar-10-batches-py', (3, 32, 32), 'label', THINGS, 'a thing'))


def _bare(caption): # 'an ankle boot' -> 'ankle boot'
    return caption.removeprefix('a ').removeprefix('an ').removeprefix('handwritten ')


def _writable(root):
    "Make the folder and try it; a T2I_DATA that does not exist is more likely a typing error than a wish"
    try:
        if os.environ.get('T2I_DATA') and not root.exists():
            raise CourseError(f'T2I_DATA is {root}, which does not exist: make that folder (mkdir -p "{root}"), '
                              'or unset T2I_DATA to use ~/.cache/t2i_course')
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix='.download-', dir=root)
    except OSError as e:
        raise CourseError(f'cannot write to {root} ({e.strerror}): '
                          'set T2I_DATA to a folder you may write to') from e


def _download(make, root, folder):
    "Into a scratch folder first, so that a broken download leaves nothing behind"
    tmp, wait = _writable(root), socket.getdefaulttimeout()
    say(f'downloading {folder} to {root} (once)')
    try:
        socket.setdefaulttimeout(15)
        make(tmp, download=True)
        if (root/folder).exists(): (root/folder).rename(Path(tmp)/'damaged')
        (Path(tmp)/folder).rename(root/folder)
    except (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException) as e:
        reason = str(getattr(e, 'reason', e)).strip().split('\n')[0].rstrip(':') or type(e).__name__
        raise CourseError(f'{folder} is not in {root} and could not be downloaded ({reason}): check the network, '
                          f'or copy the folder {folder} from another machine into {root}, '
                          'or use --data digits or painted, which need no download') from e
    finally:
        socket.setdefaulttimeout(wait)
        shutil.rmtree(tmp, ignore_errors=True)


class Vision(Labelled):
    "MNIST, FashionMNIST or CIFAR-10 through torchvision, from `data_root()`"

    def __init__(self, name):
        if name not in SETS: raise CourseError(f"torchvision data are {', '.join(SETS)}; got '{name}'")
        try: import torchvision.datasets as tv
        except (ImportError, RuntimeError) as e:
            raise CourseError(f'{name} needs torchvision, which does not import ({e}): '
                              'pip install torchvision') from e
        cls, folder, shape, self.attribute, self.sayings, self.anything = SETS[name]
        self.names, root = tuple(map(_bare, self.sayings)), data_root()

        def make(at, download=False): return [getattr(tv, cls)(str(at), train=t, download=download)
                                              for t in (True, False)]
        try:
            try: pair = make(root)
            except RuntimeError as e:
                if 'Dataset not found' not in str(e): raise
                _download(make, root, folder)
                pair = make(root)
            self.x, labels = {}, {}
            for split, d in zip(('train', 'test'), pair):
                x = torch.as_tensor(np.asarray(d.data))
                self.x[split] = x[:, None] if x.ndim==3 else x.permute(0, 3, 1, 2).contiguous()
                labels[split] = torch.as_tensor(d.targets)
                if tuple(self.x[split].shape[1:])!=shape or len(x)!=len(labels[split]) or not len(x):
                    raise ValueError('unexpected sizes')
        except CourseError: raise
        except PermissionError as e:
            raise CourseError(f'{e.filename or root/folder} cannot be read: change its permissions, '
                              'or set T2I_DATA to another folder') from e
        except Exception as e: # whatever a cut or foreign file makes torchvision's readers raise
            raise CourseError(f'{root/folder} is damaged ({type(e).__name__}: {e}): '
                              f'delete that folder and load {name} again') from e
        where = 'T2I_DATA' if os.environ.get('T2I_DATA') else '~/.cache/t2i_course'
        super().__init__(name, shape, labels, f"{name}, {len(labels['train']):,} training images in {where}")

    def pictures(self, split, i, draws): return self.x[split][i]/127.5-1


# --- a folder of captioned images ---

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')


def _records(path, bad):
    "(file, caption or None) for each image of the folder; metadata.jsonl goes before .txt files"
    captions, meta = {}, path/'metadata.jsonl'
    if meta.is_file():
        for n, line in enumerate(meta.read_bytes().splitlines(), 1):
            if not line.strip(): continue
            try:
                r = json.loads(line.decode('utf-8-sig'))
                file = path/r['file_name']
                if not isinstance(r['text'], str): raise TypeError
            except (ValueError, KeyError, TypeError): bad.append(f'metadata.jsonl line {n}')
            else:
                if file.is_file(): captions[file] = r['text']
                else: bad.append(f"{r['file_name']} (listed, not there)")
    for file in sorted({f for f in path.rglob('*') if f.suffix.lower() in SUFFIXES and f.is_file()}|set(captions)):
        text = captions.get(file)
        if text is None and file.with_suffix('.txt').is_file():
            try: text = file.with_suffix('.txt').read_text('utf-8-sig')
            except (ValueError, OSError):
                bad.append(f'{file.with_suffix(".txt").name} (not UTF-8)')
                continue
        yield file, ' '.join((text or '').split()) or None


def _picture(file, size): # (3 size size) uint8
    "Turned as its camera says, on white where transparent, centre-cropped and resized"
    from PIL import Image, ImageOps
    with Image.open(file) as im:
        im = ImageOps.exif_transpose(im).convert('RGBA')
    im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    return torch.from_numpy(np.array(ImageOps.fit(im, (size, size), Image.Resampling.LANCZOS))).permute(2, 0, 1)


class Folder:
    "Any folder of images with captions: NAME.txt beside NAME.png, or metadata.jsonl with file_name and text"
    attributes = {}

    def __init__(self, path, size=32):
        self.path = Path(path).expanduser().resolve()
        if not self.path.is_dir():
            raise CourseError(f'{path} is not a folder: give a folder of images with captions')
        bad, bare, kept = [], [], []
        for file, caption in _records(self.path, bad):
            if not caption: bare.append(file.name)
            else:
                try: kept.append((os.path.relpath(file, self.path).replace(os.sep, '/'), _picture(file, size), caption))
                except Exception: bad.append(file.name) # a damaged image may raise anything
        for what, names in (('could not be read', bad), ('without a caption', bare)):
            more = ', ...' if len(names)>5 else ''
            if names: say(f"{self.path.name}: skipped {len(names)} {what}: {', '.join(names[:5])}{more}")
        if len(kept)<2:
            raise CourseError(f'{path} has {len(kept) or "no"} usable captioned image{"s"*(len(kept)!=1)}, '
                              'and at least 2 are needed: put NAME.txt with the caption beside each NAME.png or '
                              'NAME.jpg, or write metadata.jsonl with "file_name" and "text"')
        names = [unicodedata.normalize('NFC', name) for name, *_ in kept]
        ranks = [int(hashlib.sha256(name.encode()).hexdigest()[:15], 16) for name in names]
        # about every tenth, whatever else is in the folder
        test = {i for i, r in enumerate(ranks) if r%10==0} or {ranks.index(min(ranks))}
        if len(test)==len(kept): test.discard(ranks.index(max(ranks)))
        part = {'train': [k for i, k in enumerate(kept) if i not in test],
                'test': [k for i, k in enumerate(kept) if i in test]}
        self.x = {s: torch.stack([x for _, x, _ in p]) for s, p in part.items()}
        self.texts = {s: [c for *_, c in p] for s, p in part.items()}
        self.name, self.shape, self.splits = self.path.name, (3, size, size), ('train', 'test')
        self.words = tuple(sorted({w for c in self.texts['train'] for w in split_words(c)}))
        self.size = min(64, max(map(n_tokens, self.texts['train'])))
        n, m = map(len, part.values())
        self.source = f'folder {self.path.name}, {n:,} training images, {m:,} for testing'

    def batch(self, split, draws):
        "Captioned images; every picture once an epoch"
        check_split(self, split)
        i = in_epochs(len(self.texts[split]), draws)
        return Batch(self.x[split][i]/127.5-1, [self.texts[split][k] for k in i.tolist()], {}, {})

    def captions(self, attrs, named):
        raise CourseError(f'the captions of {self.name} are in its files; they cannot be made from attributes')

    def demands(self, caption): return {}


def on_disk(path):
    "What a folder holds: captioned images, or shards made by t2i prepare"
    from t2i_course.scale.recipes import Shards, is_shards # a chapter: only when asked for
    return Shards(path) if is_shards(path) else Folder(path)
