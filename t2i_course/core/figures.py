"""What the course draws on: figures without a window, pictures as bytes, axes with plain numbers.

`core.plots` is the chapter about what to draw."""

import base64
import io
import math
import os
import sys
import textwrap
import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

DPI = 96  # pixels an inch
COLOURS = ("#2266aa", "#dd7711", "#2a9d55", "#aa3377", "#777777", "#b8960b", "#44aacc", "#553311")


# ---- figures ----
def canvas(
    figsize: tuple,  # inches, width and height
    **options,  # of a matplotlib figure: dpi, layout
):  # a matplotlib.figure.Figure
    "An empty figure. It needs no window: it can be drawn whatever MPLBACKEND says, even nonsense"
    try:
        from matplotlib.figure import Figure as Fig
    except ValueError:  # an unknown backend: what was half imported goes, then once more without it
        for name in [k for k in sys.modules if k.split(".")[0] == "matplotlib"]:
            del sys.modules[name]
        named = os.environ.pop("MPLBACKEND", None)
        try:
            from matplotlib.figure import Figure as Fig
        finally:
            if named is not None:
                os.environ["MPLBACKEND"] = named
    return Fig(figsize=figsize, **options)


class Figure:
    "A matplotlib figure that shows itself once, as a picture with a text for those who cannot see it"

    def __init__(
        self,
        fig,  # matplotlib.figure.Figure
        alt: str = "",  # what there is to see, in words
    ):
        self.fig, self.alt = fig, alt

    def __getattr__(self, name):
        if name.startswith("_") or name == "fig":
            raise AttributeError(name)
        return getattr(self.fig, name)

    def __repr__(self):
        return self.alt or "a figure"

    def png(
        self,
        dpi: int = DPI,  # pixels an inch
    ) -> bytes:  # a PNG file
        "The picture as bytes"
        from PIL import Image

        buf, small = io.BytesIO(), io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that no font has is drawn as a box
            self.fig.savefig(buf, format="png", dpi=dpi)
        Image.open(buf).convert("RGB").save(small, "png", optimize=True)  # nothing on a page is transparent
        return small.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None):
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": repr(self)}
        return data, {"image/png": dict(alt=self.alt)}


@lru_cache(1)
def fonts() -> list:
    "Families for any script a caption may be written in, as far as they are installed"
    from matplotlib.font_manager import fontManager

    more = "Noto Sans CJK KR, Noto Sans CJK JP, Noto Sans KR, NanumGothic, Malgun Gothic, Apple SD Gothic Neo"
    have = {f.name for f in fontManager.ttflist}
    return ["DejaVu Sans", *(f for f in (*more.split(", "), "Noto Emoji", "Segoe UI Emoji") if f in have)]


# ---- pictures ----
def rgb(
    x: Tensor,  # (... c h w) in [-1,1], c 1 or 3; what is outside is cut
) -> Tensor:  # (... h w 3) uint8
    "Pictures as bytes"
    x = (x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    if x.shape[-3] == 1:
        x = x.expand(*x.shape[:-3], 3, *x.shape[-2:])
    return x.round().to(torch.uint8).movedim(-3, -1)


def mosaic(
    x: Tensor,  # (n c h w) in [-1,1]
    cols: int,  # pictures a row
    gap: int = 1,  # white pixels between them
    below: int = 0,  # white pixels below each row, for captions
) -> Tensor:  # (H W 3) uint8
    "All pictures of a batch side by side, row after row"
    p, cols = rgb(x), max(1, min(cols, len(x)))
    rows = math.ceil(len(p) / cols)
    p = torch.cat([p, p.new_full((rows * cols - len(p), *p.shape[1:]), 255)])
    p = F.pad(p.movedim(-1, 1), (0, gap, 0, gap + below), value=255)
    p = p.view(rows, cols, *p.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return p[: p.shape[0] - gap, : p.shape[1] - gap] if gap else p


def png_of(
    pixels: Tensor,  # (H W 3) uint8
) -> bytes:  # a PNG file
    "Each pixel once: a browser enlarges it"
    from PIL import Image

    buf = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buf, "png", optimize=True)
    return buf.getvalue()


class Grid:
    "Places for n pictures, captions under them, row names at the left, a title above; all in inches"

    def __init__(
        self,
        n: int,  # pictures
        cols: int,  # pictures a row
        size: float,  # inches a picture is wide
        tall: float,  # height over width
        captions: list,  # n texts, or none
        rows: list,  # a name for each row, or none
        title: str,
    ):
        self.font = 8.5 if size < 1.5 else 9.5
        wide = max(6, int(size * 125 / self.font))
        self.captions = [textwrap.wrap(str(c).strip() or "(no caption)", wide) for c in captions]
        lines = max(map(len, self.captions), default=0)
        self.cols, self.size, self.height = max(1, min(cols, n)), size, size * tall
        self.step = self.height + 0.08 + (lines * self.font * 1.25 / 72 + 0.12 if lines else 0)
        self.left = 0.08 + max(map(self.width, rows), default=0) + (0.08 if rows else 0)
        self.top = 0.35 if title else 0.08
        self.w = self.left + self.cols * (size + 0.08)
        self.h = self.top + math.ceil(n / self.cols) * self.step
        self.fig = canvas((self.w, self.h), dpi=DPI)
        if title:
            self.write(self.w / 2, self.h - 0.06, title, ha="center", va="top", size=10.5, weight="bold")
        for r, name in enumerate(map(str, rows)):
            middle = self.corner(r * self.cols)[1] + self.height / 2
            self.write(self.left - 0.08, middle, name, ha="right", va="center", size=9)

    def width(self, name) -> float:
        "Of a row's name, in inches"
        text = canvas((1, 1), dpi=DPI).text(0, 0, str(name), family=fonts(), parse_math=False, size=9)
        return text.get_window_extent().width / DPI

    def corner(self, i) -> tuple:
        "Where the lower left corner of picture i is"
        r, c = divmod(i, self.cols)
        return self.left + c * (self.size + 0.08), self.h - self.top - r * self.step - self.height

    def write(self, x, y, text, **kw):
        self.fig.text(x / self.w, y / self.h, text, family=fonts(), parse_math=False, **kw)

    def put(self, i, pixels):
        "Picture i, every pixel a sharp square, with its caption"
        x, y = self.corner(i)
        ax = self.fig.add_axes([x / self.w, y / self.h, self.size / self.w, self.height / self.h])
        ax.imshow(pixels, interpolation="nearest")
        ax.axis("off")
        if self.captions:
            text = "\n".join(self.captions[i])
            self.write(x + self.size / 2, y - 0.05, text, ha="center", va="top", size=self.font)


# ---- axes ----
def whole_thousands():
    "A formatter for the numbers of an axis: matplotlib's own, but 20,000 in place of 20000 or 2e4"
    from matplotlib.ticker import ScalarFormatter

    class Thousands(ScalarFormatter):
        def __call__(self, v, pos=None):
            return f"{v:,.0f}" if v >= 1000 else super().__call__(v, pos)

    found = Thousands(useOffset=False)
    found.set_scientific(False)
    return found


def axes(width=5.6, height=3.2, title="", xlabel="", ylabel="") -> tuple:
    "A figure with one pair of axes"
    fig = canvas((width, height), dpi=DPI, layout="constrained")
    ax = fig.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(whole_thousands())
    ax.xaxis.get_major_locator().set_params(nbins=6)  # as many as there is room for
    return fig, ax


def plain(v, _=None) -> str:
    "A number as it is said: 0.01, 4, 20,000"
    if abs(v) >= 1000:
        return f"{v:,.0f}"
    return f"{v:g}" if abs(v) >= 1e-4 or not v else f"{v:.9f}".rstrip("0").rstrip(".")


def round_numbers(low: float, high: float) -> list:
    "Between three and eight numbers that are easily read and fit a logarithmic axis from low to high"
    from matplotlib.ticker import MaxNLocator

    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for first in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        found = [k * 10.0**p for p in powers for k in first if low <= k * 10.0**p <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 8)]
    return [v for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high]


def log_axis(ax, way: str, at=None):
    "'x' or 'y' gets a logarithmic scale with plain numbers: those of `at`, or round ones"
    from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, NullFormatter

    class Round(Locator):
        def __call__(self):
            return round_numbers(*sorted(self.axis.get_view_interval()))

    getattr(ax, f"set_{way}scale")("log")
    axis = getattr(ax, f"{way}axis")
    axis.set_major_locator(Round() if at is None else FixedLocator([float(v) for v in at]))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())
