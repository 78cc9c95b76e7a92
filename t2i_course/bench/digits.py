"""`t2i bench digits`: MNIST against the clock, beside published recipes."""

import json
import time
from functools import partial
from pathlib import Path

from t2i_course.bench.peers import PEERS, draw_peer, train_peer
from t2i_course.bench.ruler import Ruler
from t2i_course.bench.twins import equal_size, roofline
from t2i_course.core.config import to_json
from t2i_course.core.data import scale
from t2i_course.core.files import write_json
from t2i_course.core.sources import load
from t2i_course.core.runs import open_run
from t2i_course.run.rows import cleared
from t2i_course.run.settings import settings
from t2i_course.run.stamp import alike
from t2i_course.run.train import train_run


BAR = dict(accuracy=0.98, fd_floors=4.4)  # what "good" is, for the time it takes to get there


BUDGETS = dict(ours=(2.5, 5.0, 15.0, 60.0, 240.0), plain=(15.0, 25.0, 60.0))  # seconds


def bar_reached(rows: list) -> bool:
    "The bar, by the mean over seeds"
    mean = lambda k: sum(r[k] for r in rows) / len(rows)
    return mean("accuracy") >= BAR["accuracy"] and mean("fd_floors") <= BAR["fd_floors"]


def time_to_bar(arm: dict) -> dict:
    "The shortest budget that reaches the bar, and the longest shorter one, which does not"
    budgets = sorted(arm, key=float)
    good = [i for i, b in enumerate(budgets) if bar_reached(arm[b]["rows"])]
    if not good:
        return dict(reached="not reached", longest=float(budgets[-1]))
    i = good[0]
    return dict(reached=float(budgets[i]), missed=float(budgets[i - 1]) if i else None)


def summary(rows: list) -> dict:
    "Mean and spread over the seeds"
    keys = (
        "accuracy",
        "fd_floors",
        "recall",
        "precision",
        "broken",
        "train_seconds",
        "cpu_seconds",
        "images",
    )
    return dict(
        rows=rows,
        **{
            k: dict(
                mean=sum(r[k] for r in rows) / len(rows),
                spread=max(r[k] for r in rows) - min(r[k] for r in rows),
            )
            for k in keys
        },
    )


def own_settings(arm: str, seconds: float, seed: int, ruler: Ruler) -> dict:
    "What the run of such a row has in its config"
    return settings(
        "flow_matching", ruler.data.name, scale(), seconds, None, seed, "auto", dict(skip=arm == "ours")
    )


def own_row(arm: str, seconds: float, seed: int, ruler: Ruler, work: Path) -> dict:
    "Train and measure flow matching with (ours) or without (plain) the closed-form skip"
    run = work / f"{arm}-{seconds:g}s-{seed}"
    cleared(run, own_settings(arm, seconds, seed, ruler))
    cpu = time.process_time()
    train_run(
        "flow_matching",
        ruler.data.name,
        seconds=seconds,
        seed=seed,
        out=run,
        quiet=True,
        save_every=1e6,
        resume=(run / "config.json").exists(),
        changes=dict(skip=arm == "ours"),
    )
    cpu, model = time.process_time() - cpu, open_run(run)
    took = json.loads((run / "train.json").read_text(encoding="utf-8"))
    c = model.config
    return ruler.row(model.draw, seed) | dict(
        method="flow matching" + (" with the closed-form skip" if arm == "ours" else ""),
        seed=seed,
        params=took["params"],
        images=took["images"],
        steps=took["steps"],
        train_seconds=took["seconds"],
        cpu_seconds=cpu,
        nfe=model.model.calls(c),
        guidance=c.guidance,
        batch=c.batch,
        widths=c.widths,
        precision_mode=c.precision,
    )


def peer_row(name: str, seconds: float, ruler: Ruler, say, n: int = 200) -> dict:
    "Train and measure a published recipe"
    peer = PEERS[name]()
    took = train_peer(peer, ruler.data, seconds, say=say)
    row = ruler.row(partial(draw_peer, peer, ruler.data), n=n)
    return (
        row
        | took
        | dict(
            method=name, sampler=peer.steps, seed=0, bar="reached" if bar_reached([row]) else "not reached"
        )
    )


def digits(
    stamp: dict,  # chapter, command, date, hardware, versions, seeds
    path: Path,  # results file
    budgets=None,  # arm -> seconds; default BUDGETS
    seeds=(0, 1, 2),  # of ours
    peers=tuple(PEERS),
    peer_seconds: float = 240.0,
    data=None,  # default mnist
    say=print,
):
    "All arms, one after the other in turns; what is finished is kept in runs/bench and reused"
    small = scale() == "smoke"
    ruler, work = Ruler(data or load("mnist"), 40 if small else 1000), Path("runs") / "bench"
    budgets = budgets or BUDGETS
    res = stamp | dict(bar=BAR, protocol=ruler.about())
    same = {k: stamp.get(k) for k in ("scale", "hardware", "versions")} | dict(
        data=ruler.data.name, source=ruler.data.source, n=ruler.n
    )

    def keep(name, make, **made_with):
        "The row of an earlier call of the same scale, settings, version and machine, or a new one"
        file, made_with = work / f"{name}.json", same | made_with
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            old = {}
        if not alike(old.get("made_with") or {}, made_with):
            old = dict(made_with=made_with, row=make())
            work.mkdir(parents=True, exist_ok=True)
            write_json(file, old)
        return old["row"]

    for arm in budgets:
        res[arm] = {}
    for seconds in sorted({s for v in budgets.values() for s in v}):
        for seed in seeds:
            for arm in (a for a, v in budgets.items() if seconds in v):
                row = keep(
                    f"{arm}-{seconds:g}-{seed}",
                    partial(own_row, arm, seconds, seed, ruler, work),
                    config=to_json(own_settings(arm, seconds, seed, ruler)) | dict(versions=None),
                ) | dict(data=ruler.data.name)
                say(
                    f"{arm} {seconds:g} s, seed {seed}: {100 * row['accuracy']:.1f}%, "
                    f"{row['fd_floors']:.2f} floors, "
                    f"recall {row['recall']:.2f}, broken {100 * row['broken']:.1f}%"
                )
                res[arm].setdefault(f"{seconds:g}", []).append(row)
                write_json(path, res)
    for arm in budgets:
        res[arm] = {k: summary(v) for k, v in res[arm].items()}
    res["time_to_bar"] = {k: time_to_bar(res[k]) for k in budgets}
    for name in peers:
        row = keep(
            f"{name}-{peer_seconds:g}",
            partial(peer_row, name, peer_seconds, ruler, say, 20 if small else 200),
            seconds=peer_seconds,
        )
        row["data"] = ruler.data.name
        say(
            f"{name} {peer_seconds:g} s: {100 * row['accuracy']:.1f}%, {row['fd_floors']:.0f} floors, "
            f"after {row['steps']} steps, {row['steps_per_second']:.2f} a second; one seed, "
            f"{row['n']} drawings; bar {row['bar']}"
        )
        res.setdefault("peers", {})[name] = row
        res.setdefault("equal_size", {})[name] = keep(
            f"speed-{name}", partial(equal_size, name, 2 if small else 5)
        )
        write_json(path, res)
    say("share of the convolution peak ...")
    from t2i_course.flow.flow_matching import recipe_for

    config = recipe_for(ruler.data, "smoke" if small else "demo", 60)
    res["roofline"] = keep(
        "roofline", lambda: roofline(config, ruler.data, 4 if small else 30), config=to_json(config)
    )
    write_json(path, res)
    say(f"wrote {path}")
