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
from t2i_course.core.plots import (Live, binned, explorer, in_kernel, loss_by_t, mosaic, plot_lines, rgb, sheet,
                                   show_images)


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
