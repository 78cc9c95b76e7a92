"""Measuring as a command: the row of a run, in numbers and in words."""

import json
import math
from datetime import date

from t2i_course.core.files import say, write_json
from t2i_course.core.training import has_bf16, pick_device
from t2i_course.run.data import run_data
from t2i_course.run.model import KEYS, Model
from t2i_course.run.progress import counting
from t2i_course.run.stamp import command, hardware, versions


def eval_run(
    run,  # run folder
    n=1000,  # drawings
    seed=0,  # of captions and noise
    quiet=False,  # print nothing, show no progress
    data=None,  # where its pictures lie now, if their folder was moved
) -> dict:  # the row
    "The measured row of a run; written to metrics.json in its folder"
    from t2i_course.core.metrics import evaluate

    m, call = Model(run, data), f"eval_run({str(run)!r}, n={n}, seed={seed})"
    c, t = m.config, json.loads((m.run / "train.json").read_text(encoding="utf-8"))
    data, same = run_data(m.run, c)
    if not same:
        say(
            f"the pictures or captions in {c['data']} are not those that {run} was trained on: compared "
            f"with what is there now"
        )
    if not quiet:
        say(f"measuring {m.run}: reading real pictures to compare with ...")

    def draw(captions, seed):
        with counting(len(captions), "drawing", quiet) as each:
            return m.draw(captions, seed, each=each)

    row = evaluate(
        draw, data.whole() if hasattr(data, "whole") else data, n=n, seed=seed, n_trained=n // 5
    ) | dict(
        recipe=c["recipe"],
        params=t["params"],
        params_trained=t.get("params_trained", t["params"]),
        images=t["images"],
        train_seconds=t["seconds"],
        steps=t["steps"],
        train_seed=c["seed"],
        nfe=m.den.calls(c),
        **{k: c[KEYS.get(k, k)] for k in m.den.options if k != "steps"},
        precision_mode=c["precision"],
        source=c["source"],
        hardware=hardware(),
        bf16_units=has_bf16(pick_device()),
        versions=versions(),
        date=str(date.today()),
        command=command(call),
    )
    write_json(m.run / "metrics.json", row)
    if not quiet:
        print(row_text(row))
    return row


def margin(
    share,  # 0..1, of n independent pictures
    n,  # pictures
) -> float:  # half the width of the 95% interval
    "How far a share can be off by the luck of the draw: Wilson's interval, which is not empty at 0 or 1"
    z = 1.96
    return z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)


# unseen real pictures come so near in one case of a hundred; twenty times that is no chance with 40 drawings
COPIES = 0.2


def row_text(row: dict) -> str:
    "A row for people"
    pc = lambda v: f"{100 * v:.1f}%"

    def counted(o):
        return (
            f"{pc(o['all'])} +- {100 * margin(o['all'], o['n']):.1f} ({o['n']:,} captions)"
            if "n" in o
            else pc(o["all"])
        )

    out = []
    if "obedience" in row:
        o = row["obedience"]
        parts = {
            k: v for k, v in o.items() if k not in ("all", "ceiling", "chance", "n") and isinstance(v, float)
        }
        out += [
            f"pictures that show all their caption demands: {counted(o)}   "
            f"(judge on unseen real pictures {pc(o['ceiling'])}, on shuffled captions {pc(o['chance'])})",
            "  by attribute: " + "  ".join(f"{k} {pc(v)}" for k, v in parts.items()),
        ]
    if "heldout" in row:
        out += [f"  digit x ink pairs never seen in training: {counted(row['heldout'])}"]
    if "fd" in row:
        out += [
            f"Frechet distance {row['fd']:.2f} = {row['fd'] / row['fd_floor']:.1f} times the distance "
            f"between two real sets; precision {row['precision']:.2f}, recall {row['recall']:.2f}"
        ]
        sizes = f"{row['n']:,} drawings of test captions"
        if "n_reference" in row:
            sizes += f" against {row['n_reference']:,} training pictures; features: {row['features']}"
        out += [f"  {sizes}"]
    elif "note" in row:
        out += [f"no Frechet distance: {row['note']}"]
    out += [
        f"nearest-training-picture rate {pc(row['nearest'])} of {row['n']:,} drawings of test captions "
        f"(unseen real pictures {pc(row['nearest_real'])}); "
        f"{row['seconds_per_1000']:.0f} s per 1,000 pictures"
    ]
    if "nearest_train_captions" in row:
        rate = row["nearest_train_captions"]
        told = ": copies. It has learned its pictures by heart" if rate >= COPIES else ""
        out += [f"  {pc(rate)} of {row['n_train_captions']:,} drawings of training captions{told}"]
    return "\n".join(out)
