"""The protocol in numbers: which pictures and captions, how many, in which order; and the same in words.

`core.metrics` teaches what is measured with them and why."""

import math

import torch
from torch import Tensor

from t2i_course.core.data import Draws

SEED, K = 20, 5  # of the reference pictures; neighbours of precision and recall
N_SPLITS = 300  # cuts of real pictures whose mean is a floor
DRAWINGS = dict(digits=5000)  # of the protocol; small pictures are drawn quickly. All others: 1,000
LEAST = 10  # drawings that a distance needs


# ---- how many ----
def distinct(
    data,  # captioned pictures
    split: str,  # one of its splits
):  # number of different pictures; inf where each index is a new one
    "How many pictures a split has"
    own = getattr(data, "labels", None) or getattr(data, "texts", None)
    return len(own[split]) if own else math.inf


def ends(data) -> bool:
    "Has the test split an end?"
    return math.isfinite(distinct(data, "test"))


def at_most(
    data,  # captioned pictures
    n: int,  # wanted test pictures
    say=print,  # where the sentence goes
) -> int:  # n, or all test pictures where there are fewer
    "Fewer pictures than were asked for are never taken without a word"
    most = distinct(data, "test")
    if n > most:
        say(f"{data.name} has {most:,} test pictures: {most:,} are used, not {n:,}")
    return int(min(n, most))


def n_seen(
    data,  # captioned pictures
    n: int,  # drawings
) -> int:  # training pictures that drawings are compared with: all of a set of at most 10,000
    "Of the copy test"
    most = distinct(data, "train")
    return int(min(most, max(10 * n, 10_000))) if math.isfinite(most) else 10 * n


def n_unseen(
    data,  # captioned pictures
    n: int,  # drawings
) -> int:  # unseen real pictures that say how near to a training picture is too near
    "Of the copy test"
    return int(min(distinct(data, "test"), 4 * n))


def n_real(
    data,  # captioned pictures with attributes
    n: int,  # drawings
) -> tuple:  # reference pictures from the test split, and from the training split where that has too few
    "Of the reference"
    if not ends(data):
        return n, 0
    test, train = (distinct(data, k) for k in ("test", "train"))
    m = min(test + train, 10_000, max(2_000, 10 * n))
    return min(m, test), max(0, m - test)


def cut_at(
    p: int,  # real pictures
    n: int,  # drawings
    m: int,  # reference pictures
) -> tuple:  # two sizes: n and m where p is enough for both, else the nearest that it permits
    "Into which parts real pictures are cut for a floor"
    if n + m <= p:
        return n, m
    k = min(n, p // 2)
    return k, min(m, p - k)


# ---- which, in which order ----
def even_order(
    labels: Tensor,  # (n) int64
    seed: int,  # of the order
) -> Tensor:  # (n) int64, a random order of the pictures
    "Every stretch of this order holds each label in its share, as nearly as whole pictures allow"
    g, place = torch.Generator().manual_seed(seed), torch.empty(len(labels), dtype=torch.float64)
    for k in labels.unique():
        own = (labels == k).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=g)]
        place[own] = (torch.arange(len(own), dtype=torch.float64) + torch.rand(1, generator=g)) / len(own)
    return place.argsort()


def real_side(
    data,  # captioned pictures with attributes
    n: int,  # drawings
) -> tuple:  # reference pictures; their labels (None: left to chance); captions; unseen real pictures to read
    "The pictures of the protocol"

    def take(d, split, i, m):
        return d.batch(split, Draws(SEED, torch.arange(i, i + m)))

    if not ends(data):
        ref, twin = take(data, "test", 0, n), take(data, "test", n, n)
        return ref.x, None, twin.captions, twin
    parts = [take(data.still(), split, 0, m) for split, m in zip(("test", "train"), n_real(data, n)) if m]
    (name,) = data.attributes
    y = torch.cat([b.attrs[name] for b in parts])
    want = torch.cat([y[even_order(y, i)] for i in range(math.ceil(n / len(y)))])[:n]
    want = want[torch.randperm(n, generator=torch.Generator().manual_seed(SEED))]
    captions = data.captions({name: want}, {name: torch.ones(n, dtype=torch.bool)})
    return torch.cat([b.x for b in parts]), y, captions, parts[0]


def paired_gap(
    first,  # n truths
    second,  # n truths of the same cases
) -> dict:  # gap, gap_low, gap_high, in shares of the cases
    "How much more often the first is true; the 95% interval of Agresti and Min (2005), not empty at 0"
    up, down = (sum(a and not b for a, b in zip(*v)) + 0.5 for v in ((first, second), (second, first)))
    n = len(first) + 2
    mean = (up - down) / n
    half = 1.96 * math.sqrt((up + down) / n - mean**2) / math.sqrt(n)
    return dict(gap=(up - down) / len(first), gap_low=mean - half, gap_high=mean + half)


# ---- in words ----
def in_words(
    data,  # captioned pictures
    n: int,  # drawings
    judged: bool,  # is there a judge?
    features: str,  # the network whose features count
    space: str,  # where copies are looked for
) -> dict:
    "How a row is measured, for those who read its file"
    sides = _unjudged if not judged else _of_labels if ends(data) else _of_scenes
    near = f"{space}, {n_seen(data, n):,} training pictures; threshold: first percentile of "
    head = dict(data=data.name, n=n, seed=SEED, features=features, k=K)
    return head | sides(data, n) | dict(nearest=f"{near}{n_unseen(data, n):,} unseen real pictures")


EACH = (
    "KID (polynomial kernel, degree 3, unbiased), precision and recall: "
    "{} drawings against {} reference pictures"
)


def _unjudged(data, n):
    known = f"{n_seen(data, n):,} training" if ends(data) else f"{n:,} test"
    return dict(
        reference=f"{known} pictures",
        captions=f"those of {n} test pictures, one drawing each",
        fd_floor=f"{n} real pictures in place of the drawings, "
        f"mean of {N_SPLITS} random cuts of all real pictures",
    )


def _of_scenes(data, n):
    return dict(
        reference=f"pictures 0..{n - 1} of the test split (seed {SEED}), one set for every method",
        captions=f"those of pictures {n}..{2 * n - 1} of the test split, one drawing each",
        fd_floor=f"mean of {N_SPLITS} random cuts of these {2 * n:,} real pictures into {n:,} and {n:,}",
        fd_train=f"{n} training pictures in place of the drawings",
        each=EACH.format(n, n),
    )


def _of_labels(data, n):
    test, train = n_real(data, n)
    k, m = cut_at(test + train, n, test + train)
    q = min(n, (test + train) // 2)
    seen = f" and {train:,} of the training split, unmoved" if train else ""
    carried = "" if (k, m) == (n, test + train) else f", times (1/{n}+1/{test + train})/(1/{k}+1/{m})"
    cuts = f"mean of {N_SPLITS} random cuts of the reference into {k:,} and {m:,}, each label in its share"
    return dict(
        reference=f"{test:,} pictures of the test split{seen}, one set for every method",
        captions=f"{n:,}, each label in its share among the reference pictures",
        fd_floor=cuts + carried,
        each=EACH.format(q, q),
    )
