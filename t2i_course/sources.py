"Pictures from disk and network for `core.data.load`: torchvision's sets and folders of captioned images"
import hashlib
import http.client
import json
import os
import posixpath
import shutil
import socket
import tarfile
import tempfile
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from t2i_course.core.data import NUMBERS, Batch, CourseError, Labelled, check_split, in_epochs, split_words
from t2i_course.folders import composed, piles, raw, readable, say, say_once as say_once, shown # say_once: for core.data


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

TESTS = {'test', 'val', 'valid', 'validation'} # folders beside train


def eight_bit(im, white=None):
    """Gray of more than 8 bits. White is 65535 where the file says 16 bits; else 1 (floats), 255 or 65535, whichever is
    the first that no value exceeds"""
    v = np.asarray(im).astype(np.float64)
    white = white or next((w for w in ((1, 255, 65535) if im.mode=='F' else (255, 65535)) if v.max()<=w), None)
    if white is None or not v.min()>=0: raise CourseError('values outside 0..65535')
    from PIL import Image
    return Image.fromarray(np.rint(v*255/white).astype(np.uint8))


def picture(file, size): # (3 size size) uint8
    "Turned as its camera says, on white where transparent, cropped to its central square and resized; the first of several"
    from PIL import Image, ImageOps
    with open(file, 'rb') as f, Image.open(f) as im:
        deep = im.mode.startswith('I;16') or im.mode=='I' and im.format in ('PNG', 'PPM')
        im = ImageOps.exif_transpose(im)
        if deep or im.mode in ('I', 'F'): im = eight_bit(im, 65535 if deep else None)
        im = im.convert('RGBA')
    im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    return torch.from_numpy(np.array(ImageOps.fit(im, (size, size), Image.Resampling.LANCZOS))).permute(2, 0, 1)


class Folder:
    "Any folder or tar file of images with captions: NAME.txt beside NAME.png, or metadata with file_name and text"
    attributes = {}

    def __init__(self, path, size=32):
        self.path = Path(path).expanduser().resolve()
        if not self.path.is_dir() and not (self.path.is_file() and tarfile.is_tarfile(self.path)):
            raise CourseError(f'{shown(str(path))} is not a folder: give a folder of images with captions, or a .tar of them')
        try: str(self.path).encode()
        except ValueError as e: raise CourseError(f'the path {shown(str(self.path))} is not UTF-8: rename it') from e
        self.name, self.shape, self.splits = self.path.name, (3, size, size), ('train', 'test')
        kept, notes, left = [], [], defaultdict(list)
        for pile in piles(self.path):
            for name, captions in pile.captioned():
                try: kept.append((pile.prefix+name, picture(pile.at(name), size), captions))
                except Exception as e: # a damaged image may raise anything
                    ending = posixpath.splitext(name)[1].lower()
                    why = e if isinstance(e, CourseError) else f'Pillow does not read {ending}' if ending not in readable() else ''
                    pile.leave('that could not be read', shown(name)+(f' ({why})' if why else ''))
            notes += pile.notes
            for why, names in pile.left.items(): left[why] += names
        for text in notes: say(f'{self.name}: {text}')
        for why, names in left.items():
            say(f"{self.name}: skipped {len(names)} {why}: {', '.join(names[:5])}{', ...' if len(names)>5 else ''}")
        if len(kept)<2:
            raise CourseError(f'{path} has {len(kept) or "no"} usable captioned image{"s"*(len(kept)!=1)}, and at least 2 '
                              f'are needed{"".join(f"; {n}" for n in notes)}: put NAME.txt with the caption beside each '
                              'NAME.png or NAME.jpg, or write metadata.jsonl with "file_name" and "text"')
        self.take(kept)

    def take(self, kept):
        "Divide (name, picture, captions) into splits, for good: by the folders train and test, else by a hash of the name"
        names = [composed(name) for name, *_ in kept]
        ranks = [int(hashlib.sha256(raw(name)).hexdigest()[:15], 16) for name in names]
        tops = [name.lower().split('/')[0] for name in names]
        test = {i for i, t in enumerate(tops) if t in TESTS} if 'train' in tops else set()
        # else about every tenth, whatever else is in the folder
        test = test or {i for i, r in enumerate(ranks) if r%10==0} or {ranks.index(min(ranks))}
        if len(test)==len(kept): test.discard(ranks.index(max(ranks)))
        part = {'train': [k for i, k in enumerate(kept) if i not in test],
                'test': [k for i, k in enumerate(kept) if i in test]}
        self.x = {s: torch.stack([x for _, x, _ in p]) for s, p in part.items()}
        self.texts = {s: [c for *_, cs in p for c in cs] for s, p in part.items()}
        self.which = {s: torch.tensor([k for k, (*_, cs) in enumerate(p) for _ in cs]) for s, p in part.items()} # of x
        words = {s: list(map(split_words, texts)) for s, texts in self.texts.items()}
        self.words = tuple(sorted({w for ws in words['train'] for w in ws}))
        self.size = min(64, 1+max(map(len, words['train']))) # and a token for the start
        long = sum(len(ws)>63 for s in words for ws in words[s])
        if long: say(f"{self.name}: {long} caption{'s are' if long>1 else ' is'} longer than 63 words and read up to there")
        n, m, pairs = len(self.x['train']), len(self.x['test']), sum(map(len, self.texts.values()))
        more = f', {pairs:,} captions' if pairs>n+m else ''
        self.source = f'folder {self.name}, {n:,} training images, {m:,} for testing{more}'
        self.crop = (f'{self.name}: {n+m:,} pictures, the central square of each resized to {self.shape[1]} x {self.shape[2]}; '
                     '--size changes it')
        h = hashlib.sha256()
        for name, (_, x, texts) in sorted(zip(names, kept), key=lambda k: k[0]):
            h.update(json.dumps([name, texts]).encode()+x.contiguous().numpy().tobytes())
        self.fingerprint = h.hexdigest()

    def batch(self, split, draws):
        "Captioned images; every pair of picture and caption once an epoch"
        check_split(self, split)
        i = in_epochs(len(self.texts[split]), draws)
        x = self.x[split][self.which[split][i]]
        return Batch(x/127.5-1, [self.texts[split][k] for k in i.tolist()], {}, {})

    def captions(self, attrs, named):
        raise CourseError(f'the captions of {self.name} are in its files; they cannot be made from attributes')

    def demands(self, caption): return {}


def on_disk(path, size=None):
    "What a folder holds: captioned images, or shards made by t2i prepare"
    from t2i_course.scale.recipes import Shards, is_shards # a chapter: only when asked for
    folder = Path(path).expanduser()
    if not is_shards(folder): return Folder(folder, size or 32)
    if size: raise CourseError(f'{path} holds shards of pictures, which have their size: give --size to t2i prepare')
    return Shards(folder)
