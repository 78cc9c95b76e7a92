"Pictures of runs: they show once, say what they show, and an explorer needs nothing from anywhere."
import base64
import io
import json
import math
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from t2i_course.core import plots
from t2i_course.core.figures import axes, log_axis, plain, round_numbers
from t2i_course.core.plots import (Live, arrow, binned, draw_step, explorer, in_kernel, loss_by_t, mosaic, name_lines, plot_lines,
                                   rgb, sheet, show_images)


def size(png): return Image.open(io.BytesIO(png)).size


def bundle(figure):
    "What a notebook is given."
    data, meta = figure._repr_mimebundle_()
    return base64.b64decode(data["image/png"]), data["text/plain"], meta["image/png"]["alt"]


# --- Grids ---

def test_range_is_fixed():
    x = torch.tensor([-2., -1., 0., 1., 2.]).view(5, 1, 1, 1)
    assert rgb(x).flatten().tolist() == [v for value in (0, 0, 128, 255, 255) for v in [value] * 3]


def test_mosaic_puts_pictures_row_after_row():
    x = torch.arange(5.).view(5, 1, 1, 1).expand(5, 3, 2, 3) / 2.5 - 1
    m = mosaic(x, 3, gap=1)
    assert m.shape == (5, 11, 3) and m.dtype == torch.uint8
    for i in range(5): assert torch.equal(m[3 * (i // 3)::3, 4 * (i % 3)::4][0, 0], rgb(x)[i, 0, 0])
    assert (m[2] == 255).all() and (m[3:, 8:] == 255).all()
    assert mosaic(x, 3, gap=0).shape == (4, 9, 3)


def test_pixels_stay_sharp():
    x = torch.tensor([[-1., 1.], [1., -1.]]).view(1, 1, 2, 2)
    image = Image.open(io.BytesIO(show_images(x, cols=1, size=2).png()))
    colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(100_000)}
    assert colours == {(0, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize("channels", [1, 3])
def test_figures_show_once_and_say_what(channels):
    figure = show_images(torch.zeros(3, channels, 8, 8), ["a red one", "", "a seven"], title="three")
    png, text, alt = bundle(figure)
    assert png[1:4] == b"PNG" and max(size(png)) < 1000
    assert text == alt == "three: a red one; no caption; a seven"
    assert not hasattr(figure, "_repr_html_") and not hasattr(figure, "_ipython_display_")
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize("name", ["damaged", "memory", "MMMMMMMM", "iiii"])
def test_the_name_of_a_row_is_not_cut(name):
    fig = show_images(torch.zeros(2, 1, 8, 8), cols=1, rows=["a", name]).fig
    starts = [text.get_window_extent().x0 for text in fig.texts]
    assert min(starts) == pytest.approx(0.08 * fig.dpi, abs=1)


def test_any_text_is_a_caption(tmp_path):
    "Mathematics, other scripts, emoji, very long words: drawn or boxed, never an error or a warning."
    captions = ["$x_1$ costs 5$", "\ube68\uac04 \uce60", "\U0001f388", "w" * 300, "", "a\nb"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sheet(torch.zeros(6, 3, 8, 8), captions, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_sheet_writes_png_whatever_the_name(tmp_path):
    x = torch.rand(7, 3, 32, 32) * 2 - 1
    sheet(x, ["a bold red seven leaning left on pink"] * 7, tmp_path / "x.part", cols=3, title="t")
    small = size((tmp_path / "x.part").read_bytes())
    buffer = io.BytesIO()
    sheet(x[:3], ["a"] * 3, buffer, cols=3)
    assert small[0] == size(buffer.getvalue())[0] and small[1] > 2 * size(buffer.getvalue())[1]


# --- Curves ---

def test_lines_take_lists_tensors_and_spreads():
    figure = plot_lines({"a": ([1, 2, 4], torch.tensor([1., 2., 3.], requires_grad=True), [.1, .1, .2]),
                         "b": (range(3), [3, 2, 1])}, "images", "loss", log="xy", title="t")
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log") and len(axes.lines) == 2
    assert repr(figure) == "t against images: a, b"


def texts(axis):
    "The numbers that an axis writes inside its limits."
    axis.axes.figure.draw_without_rendering()
    low, high = axis.get_view_interval()
    return [t.get_text() for v, t in zip(axis.get_majorticklocs(), axis.get_majorticklabels()) if low <= v <= high]


@pytest.mark.parametrize("low, high", [(.11, .17), (.03, 4), (1, 32), (9e-4, 2e3), (98, 104), (1e-9, 1e9)])
def test_logarithmic_axes_have_plain_numbers(low, high):
    "Three to eight of them, however short or long the axis is, also after its limits were changed."
    figure = plot_lines({"a": ([1, 2, 3], [1, 2, 3])}, log=True)
    figure.axes[0].set_ylim(low, high)
    said = texts(figure.axes[0].yaxis)
    assert 3 <= len(said) <= 8 and [float(v.replace(",", "")) for v in said] == pytest.approx(round_numbers(low, high))
    assert not re.search(r"[$^e]", "".join(said)) or low < 1e-8


def test_ticks_that_are_asked_for():
    figure = plot_lines({"a": ([1, 4, 16], [.1, .2, 20_000])}, log="xy", ticks=dict(x=[1, 4, 16], y=[.1, 1, 20_000]))
    assert texts(figure.axes[0].xaxis) == ["1", "4", "16"] and texts(figure.axes[0].yaxis) == ["0.1", "1", "20,000"]
    assert [plain(v) for v in (0, -5000, 1e-5, .25, 12345.6)] == ["0", "-5,000", "0.00001", "0.25", "12,346"]


@pytest.mark.parametrize("ends", [(1, 1, 1), (1, 1.01, 5), (0, math.nan, 3), (2, 2.02, 2.04)])
@pytest.mark.parametrize("log", ["", "y"])
def test_names_at_lines_keep_apart_and_stay_near(ends, log):
    lines = {f"line {k}": ([0, 1, 2], [2, 3, end]) for k, end in enumerate(ends)}
    ax = plot_lines(lines, direct=True, log=log).axes[0]
    assert [t.get_text() for t in ax.texts] and ax.get_legend() is None
    ax.figure.draw_without_rendering()
    boxes = sorted((t.get_window_extent() for t in ax.texts), key=lambda box: box.y0)
    assert len(boxes) == 3 and all(a.y1 <= b.y1 - 8 for a, b in zip(boxes, boxes[1:]))
    assert {t.get_color() for t in ax.texts} == {line.get_color() for line in ax.lines}
    for text in ax.texts: assert abs(text.xyann[1]) < 40, "no name wanders far from its line"


def test_names_share_the_shift():
    assert plots._apart([0, 0, 0], 10) == [-10, 0, 10] and plots._apart([0, 100, 104], 10) == [0, 97, 107]
    assert plots._apart([], 10) == []


def test_many_names_stand_outside():
    few, many = (plot_lines({f"{k}": ([0, 1], [0, k]) for k in range(n)}).axes[0].get_legend() for n in (3, 7))
    inside = [legend.get_window_extent().x0 < legend.axes.get_window_extent().x1 - 5 for legend in (few, many)]
    assert inside == [True, False]


# --- Steps ---

def test_an_arrow_lies_inside_its_axes():
    _, ax = axes()
    arrow(ax, torch.tensor([0., 5.]), (8, -3), "there")
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert left <= 0 and right >= 8 and low <= -3 and high >= 5
    assert ax.texts[-1].get_text() == "there" and ax.texts[0].arrow_patch is not None


def test_a_step_is_two_arrows_and_three_points():
    _, ax = axes()
    draw_step(ax, torch.tensor([2., 1.]), torch.zeros(2, requires_grad=True), (1., .5), names=("a", "", "c"))
    arrows = [t.arrow_patch for t in ax.texts if t.arrow_patch is not None]
    assert [a.get_linestyle() for a in arrows] == ["--", "-"] and len(ax.lines) == 3
    assert [t.get_text() for t in ax.texts if t.get_text()] == ["a", "c"]
    ends = [tuple(line.get_xydata()[0]) for line in ax.lines]
    assert ends == [(2, 1), (0, 0), (1, .5)]


def test_lines_without_names_are_not_named():
    _, ax = axes()
    ax.plot([0, 1], [0, 1])
    ax.plot([], [], label="empty")
    log_axis(ax, "y")
    name_lines(ax)
    assert not ax.texts


def test_bins_are_means_with_standard_errors():
    torch.manual_seed(0)
    t, loss = torch.rand(500), torch.rand(500)
    mean, error, count = binned(t, loss, 4)
    for k in range(4):
        mine = loss[(t >= k / 4) & (t < (k + 1) / 4)]
        assert mean[k].item() == pytest.approx(mine.mean().item(), rel=1e-5)
        assert error[k].item() == pytest.approx((mine.std() / len(mine) ** .5).item(), rel=1e-4)
        assert count[k] == len(mine)
    assert (mean * count).sum().item() == pytest.approx(loss.sum().item(), rel=1e-5)
    assert binned(torch.tensor([0., 1.]), torch.tensor([1., 2.]), 4)[2].tolist() == [1, 0, 0, 1]


def test_loss_by_t_one_or_several():
    t, loss = torch.rand(100), torch.rand(100)
    assert len(loss_by_t(t, loss, 5).axes[0].containers) == 1
    several = loss_by_t({"a": (t, loss), "b": (t, 2 * loss)}, bins=5, log=True)
    assert len(several.axes[0].containers) == 2 and several.axes[0].get_yscale() == "log"
    assert "a, b" in repr(several)


# --- Live ---

def records(n):
    for k in range(1, n + 1):
        yield SimpleNamespace(step=k, images=64 * k, seconds=.01 * k, progress=k / n, loss=1 / k)


def test_live_prints_one_line_in_a_terminal(capsys):
    live = Live()
    for r in records(50): live(r)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "3,200 images, 50 steps, 0.5 s" in out
    assert not in_kernel()


def test_live_redraws_one_picture_in_a_notebook(monkeypatch):
    shown, updates = [], []
    handle = SimpleNamespace(update=updates.append)

    def display(figure, display_id):
        shown.append(figure)
        return handle
    monkeypatch.setattr(plots, "in_kernel", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    live = Live(every=0)
    for r in records(20): live(r)
    assert len(shown) == 1 and updates and bundle(updates[-1])[1].startswith("loss")


@pytest.mark.parametrize("n", [1, 2, 19, 301, 2000])
def test_live_draws_runs_of_any_length(n):
    live = Live()
    for r in records(n):
        live.images.append(r.images)
        live.losses.append(r.loss if n != 19 else math.nan)
        live.record = r
    assert size(live.figure().png())[0] > 100


def test_the_running_mean_does_not_lag():
    "On a falling line it is the line; what is not finite does not count; a constant stays."
    y = torch.linspace(5, 1, 101).double()
    mean = plots._running_mean(y, 10)
    assert torch.allclose(mean[:-5], y[:-5]) and (mean[-5:] - y[-5:]).abs().max() < .11
    steep = 1 / torch.arange(1, 200).double()
    assert (plots._running_mean(steep, 10) <= 1.75 * steep).all(), "a mean of earlier steps is up to 2.9 times the loss here"
    broken = torch.ones(50).double()
    broken[7], broken[20] = math.nan, math.inf
    assert torch.equal(plots._running_mean(broken, 5), torch.ones(50).double())


def test_the_title_of_a_curve_has_no_word_alone():
    live = Live(name="loss of the network that starts from its input")
    for r in records(30):
        live.images.append(r.images)
        live.losses.append(r.loss)
        live.record = r
    first, second = live.figure().axes[0].get_title().split("\n")
    assert second.startswith("after 1,920 images") and second.endswith("0.3 s") and first.endswith("(mean of the last tenth)")


# --- Explorer ---

class Reader(HTMLParser):
    "The tags of a block of HTML, which have to close."
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "input"): self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def find(self, tag): return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def block():
    frames = [torch.full((4, 3, 8, 8), v) for v in (-1., 0., 1.)]
    return Reader(explorer(frames, ["t < 1", 'a "b"', "it's"], "A & B", 'pictures <of> "it"').data)


def test_explorer_is_self_contained(block):
    assert not block.open
    [root] = [attrs for attrs in block.find("div") if attrs.get("class") == "t2i-explorer"]
    frames = json.loads(root["data-frames"])
    assert len(frames) == 3 and all(f.startswith("data:image/png;base64,") for f in frames)
    for f in frames: assert size(base64.b64decode(f.partition(",")[2])) == (38, 8)
    assert json.loads(root["data-labels"]) == ["t < 1", 'a "b"', "it's"]
    everything = " ".join(str(v) for _, attrs in block.tags for v in attrs.values())
    assert not re.search(r"https?:|//\w|\bimport\b|fetch|<script", re.sub(r"data:image/\S+", "", everything))


def test_explorer_shows_its_last_frame_without_javascript(block):
    [image], [slider] = block.find("img"), block.find("input")
    [root] = [attrs for attrs in block.find("div") if attrs.get("class") == "t2i-explorer"]
    assert image["src"] == json.loads(root["data-frames"])[2] and image["alt"] == 'pictures <of> "it"'
    assert (slider["min"], slider["max"], slider["value"], slider["type"]) == ("0", "2", "2", "range")
    assert slider["aria-label"] == "A & B"
    assert "closest('.t2i-explorer')" in slider["oninput"] and not [a for _, a in block.tags if "id" in a]


def test_explorer_takes_figures():
    figures = [plot_lines({"a": ([0, 1], [0, k])}) for k in range(2)]
    assert len(explorer(figures, [1, 2], start=0).data) < 60_000


def test_explorer_writes_captions_under_the_pictures_of_every_frame():
    frames, captions = [torch.full((4, 3, 8, 8), v) for v in (-1., 1.)], ["a red two", "", "a seven", "a five"]
    with_them, without = (Reader(explorer(frames, "ab", "t", captions=c, cols=2).data) for c in (captions, None))
    sizes = []
    for block in (with_them, without):
        [root] = [attrs for attrs in block.find("div") if attrs.get("class") == "t2i-explorer"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(f.partition(",")[2]))) for f in json.loads(root["data-frames"])]
        assert len({picture.size for picture in pictures}) == 1 and f"max-width:{18 * 9}px" in root["style"]
        sizes.append(pictures[0].size)
        rows = torch.frombuffer(bytearray(pictures[0].convert("L").tobytes()), dtype=torch.uint8).view(*sizes[-1][::-1])
        assert (rows[:8, :8] == 0).all() and (rows[:8, 8:10] == 255).all() and rows[-1].min() == 255 * (len(sizes) == 1)
    assert sizes[1] == (18, 18) and sizes[0][0] == 18 and sizes[0][1] > 20, "every pixel once, a white band below each row"
    band = sizes[0][1] // 2 - 9
    places = [attrs["style"] for attrs in with_them.find("div") if "absolute" in attrs.get("style", "")]
    assert len(places) == 4 and "left:55.56%" in places[1] and "left:0.00%" in places[2]
    assert f"top:{100 * 9 / sizes[0][1]:.2f}%" in places[0] and f"top:{100 * (10 + band + 9) / sizes[0][1]:.2f}%" in places[2]
    assert not [attrs for attrs in without.find("div") if "absolute" in attrs.get("style", "")]


def test_small_pictures_are_enlarged_to_64_pixels_at_least():
    for w in (4, 8, 16, 28, 32, 64):
        text = explorer([torch.zeros(2, 1, w, w)], ["x"], captions=["a <b>", "c"]).data
        assert int(re.search(r"max-width:(\d+)px", text)[1]) >= 2 * 64 and "a &lt;b&gt;" in text


@pytest.mark.parametrize("frame, captions", [(torch.zeros(3, 3, 4, 4), ["a", "b"]), (plot_lines({"a": ([0, 1], [0, 1])}), ["a"])])
def test_captions_belong_to_pictures(frame, captions):
    with pytest.raises(ValueError): explorer([frame], ["x"], captions=captions)


@pytest.mark.parametrize("frames, labels", [([], []), ([torch.zeros(3, 4, 4)], ["a", "b"])])
def test_explorer_wants_a_label_for_each_frame(frames, labels):
    with pytest.raises(ValueError): explorer(frames, labels)


def test_no_pyplot():
    code = ("import sys, torch; from t2i_course.core.plots import *\n"
            "assert 'matplotlib' not in sys.modules and 'IPython' not in sys.modules\n"
            "show_images(torch.zeros(2, 3, 4, 4), ['a', 'b'])._repr_mimebundle_()\n"
            "plot_lines({'a': ([1, 2], [1, 2])}).png(); loss_by_t(torch.rand(9), torch.rand(9)).png()\n"
            "assert 'matplotlib.pyplot' not in sys.modules")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
