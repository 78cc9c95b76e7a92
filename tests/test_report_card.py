"""The report card: exact memory, counted multiply-adds, means and ranges, the table, the figure, and the command."""
import json

import pytest
import torch
from t2i_course import cli
from t2i_course.core.register import recipe as module_of, recipes
from t2i_course.run.settings import settings
from t2i_course.capstone import report_card as rc
from t2i_course.codec.vae import lookalikes
from t2i_course.core.sources import load
from t2i_course.core.metrics import load_judge


def row(recipe, obeys, fd, drawing):
    return dict(recipe=recipe, data="painted", obedience=dict(all=obeys, digit=obeys), heldout=dict(all=obeys - .1), fd=fd, fd_floor=2.,
                precision=.9, recall=.8, variety=.7, nearest=.01, images=1000, params=500_000, params_trained=900_000, train_seconds=120., nfe=16,
                seconds_per_1000=drawing, date="2026-01-01")


@pytest.fixture
def folder(tmp_path):
    card = dict(date="2026-01-01", row={name: dict(paradigm=name.upper(), rows=[row(name, o, fd, s), row(name, o + .02, fd + 1, s)],
                memory=dict(total=2**20), multiply_adds=12.5) for name, o, fd, s in (("one", .5, 8., 9.), ("two", .9, 4., 1.))})
    (tmp_path / "report_card.json").write_text(json.dumps(card))
    return tmp_path


@pytest.mark.parametrize("recipe", ["ddpm", "adversarial"])
def test_training_memory_changes_nothing(recipe):
    data = load("digits")
    config = settings(recipe, "digits", "smoke", None, 64, 0, "fp32")
    torch.manual_seed(0)
    tok, model = module_of(recipe).build(config)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    m = rc.training_memory(model, tok, data, 8)
    for k, v in model.net.state_dict().items(): assert torch.equal(v, before[k])
    params = sum(p.numel() for p in model.net.parameters())
    assert m["optimizer"] == 8 * params and m["weights"] >= 4 * params and 0 < m["gradients"] <= 4 * params
    assert m["total"] == sum(v for k, v in m.items() if k != "total") and all(p.requires_grad for p in model.net.parameters())
    assert rc.training_memory(model, tok, data, 16)["activations"] > 1.8 * m["activations"]


def test_variety_is_one_for_real_pictures_and_zero_for_one_picture_a_caption():
    data, judge, said = load("painted"), load_judge("painted"), ["a bold blue zero on white", "a thin red two on white"]
    real = rc.variety(lambda captions, seed: lookalikes(data, captions, seed + 1, chunk=20_000), data, judge, said)
    one = rc.variety(lambda captions, seed: lookalikes(data, captions, 1)[:1].expand(len(captions), -1, -1, -1), data, judge, said)
    assert .7 < real < 1.4 and one < 1e-4


def test_rows_have_means_and_ranges_and_the_most_obedient_first(folder):
    rows = rc.entries(json.loads((folder / "report_card.json").read_text()))
    assert [e["recipe"] for e in rows] == ["two", "one"]
    assert rows[0]["obeys"] == pytest.approx((.91, .02)) and rows[0]["floors"] == pytest.approx((2.25, .5)) and rows[0]["seeds"] == 2
    table = rc.text_table(rc.HEAD, rc.lines(rows)).splitlines()
    assert len(table) == 3 and len({len(line) for line in table}) == 1 and "91.0% (2.0)" in table[1]


def test_the_command_prints_the_table_and_writes_the_figure(folder, capsys):
    assert cli.main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "TWO" in out and "91.0% (2.0)" in out and (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["report", str(folder), "--figure", str(folder / "a" / "b.png")]) == 0
    assert (folder / "a" / "b.png").exists()


def test_a_card_that_cannot_be_read_is_one_sentence(folder, capsys):
    (folder / "report_card.json").write_text("{]")
    assert cli.main(["report", str(folder)]) == 2
    assert "t2i run report_card" in capsys.readouterr().err


def test_every_paradigm_has_a_recipe():
    found = {k: getattr(module_of(k), "PARADIGM", None) for k in recipes()}
    assert {k: v for k, v in found.items() if v} == dict(text_gan="GAN", dalle="VQ + AR", ddpm="DDPM", flow_matching="flow matching")
