"""Bars on standard error for everything that takes longer than two seconds."""

import sys
from contextlib import contextmanager

from t2i_course.core.training import spent


def progress_bar(
    state,  # of a run
    images,  # its clock
    seconds,  # its clock, or its limit
    quiet,  # no bar
):
    "A tqdm bar on standard error: images, seconds, or with two clocks the share of the one that is ahead"
    if quiet:
        return lambda r: None
    from tqdm import tqdm

    count = "progress" if images and seconds else "images" if images else "seconds"
    total = 1 if count == "progress" else images or seconds
    done = spent(state, images, seconds) if count == "progress" else getattr(state, count)
    unit = dict(images="{n:.0f}/{total:.0f} img ", seconds="{n:.0f}/{total:.0f} s ", progress="")[count]
    bar = tqdm(
        total=total,
        initial=min(done, total),  # what is fitted before may take longer than a short clock
        bar_format="{l_bar}{bar}| " + unit + "[{elapsed}<{remaining}{postfix}]",
        mininterval=0.5,
        file=sys.stderr,
    )
    recent = []

    def show(r):
        if r is None:
            return bar.close()
        recent.append(r.loss)
        del recent[:-50]
        seen = f"{r.images:,} images, " if count == "progress" else ""
        bar.set_postfix_str(f"{seen}loss {sum(recent) / len(recent):.3f}", refresh=False)
        bar.update(max(0, min(total, getattr(r, count)) - bar.n))

    return show


@contextmanager
def counting(
    n: int,  # pictures in all
    what: str,  # what is done with them
    quiet=False,  # show nothing
):  # yields each(k): k more are done
    "A bar on standard error for what takes longer than two seconds"
    from tqdm import tqdm

    with tqdm(
        total=n, desc=what, unit="img", delay=2, mininterval=0.5, disable=quiet, file=sys.stderr
    ) as bar:
        yield bar.update
