"Retrieved examples, guidance, and what several tasks cost, all on the codes of one codec."

import time
from functools import cache, lru_cache, partial

import torch

from t2i_course.ar.cm3leon import CM3Leon, Recoloured, build, recipe_for
from t2i_course.core.data import Draws
from t2i_course.core.sources import load
from t2i_course.core.ema import train_arm
from t2i_course.core.metrics import evaluate, judge_for, reference
from t2i_course.core.training import has_bf16


def task_scores(
    model: CM3Leon,  # trained
    data,  # painted digits
    judge,  # reads pictures
    n: int,  # pictures a task
    seed: int = 0,  # of the drawings
) -> dict:  # shares 0..1
    "Is the new ink there and all else as before; does a caption say of an unseen picture what it shows"
    draws = Draws(900 + seed, torch.arange(n))
    b, twin = data.batch("test", draws), Recoloured().batch("test", draws)
    names = data.attributes
    with torch.no_grad():
        y = model.repainted(b.x, [names["ink"][i] for i in twin.attrs["ink"].tolist()], draws)
    shown = judge.read(y)
    rest = [k for k in names if k != "ink"]
    kept = torch.stack([shown[k] == b.attrs[k] for k in rest]).all(0)
    said = [data.demands(c) for c in model.captions(b.x, draws)]

    def right(k):
        return [d[k] == v for d, v in zip(said, b.attrs[k].tolist()) if k in d]

    share = lambda v: sum(v) / len(v) if len(v) else None
    same = lambda k, of: (shown[k] == of.attrs[k]).float().mean().item()
    return dict(
        recolour=dict(
            ink=same("ink", twin),
            digit=same("digit", b),
            paper=same("paper", b),
            rest=kept.float().mean().item(),
        ),
        read={k: share(right(k)) for k in names}
        | dict(said={k: sum(k in d for d in said) / n for k in names}),
    )


SWEEP = dict(
    smoke=dict(codec_images=640, images=320, n=16, guidance=(1.0, 2.0)),
    demo=dict(codec_images=20_000, images=16_000, n=300, guidance=(1.0, 1.5, 2.0, 3.0, 5.0)),
    full=dict(codec_images=2_000_000, images=4_000_000, n=5_000, guidance=(1.0, 1.5, 2.0, 3.0, 5.0)),
)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1),  # of weights, order and drawings
):  # yields (key, make), and make() gives the value
    "Retrieved examples, guidance, and what several tasks cost, all on the codes of one codec"
    s, data = SWEEP[scale], load("painted")
    config, judge = recipe_for(data, scale), judge_for(data)
    precision = "bf16" if has_bf16() else "fp32"
    tasks = dict(all=config["tasks"], draw=[1.0, 0.0, 0.0])

    @cache  # one codec for every arm
    def first():
        torch.manual_seed(0)
        tok, model = build(config | dict(share=1.0))
        train_arm(model, tok, data, config, s["codec_images"], precision=precision, loss=model.loss[:1])
        return model

    def setting():
        return dict(
            data=data.name,
            images=s["images"],
            codec_images=s["codec_images"],
            n=s["n"],
            precision=precision,
            tasks=config["tasks"],
            grid=list(first().model.layout.grid),
            fd_floor=reference(data, judge, s["n"])["fd_floor"],
        )

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(arm, seed):
        weights = first().codec.state_dict()
        torch.manual_seed(seed)
        tok, model = build(config | dict(share=0.0, tasks=tasks[arm]))
        model.codec.load_state_dict(weights)
        start = time.perf_counter()
        train_arm(model, tok, data, config, s["images"], seed, precision)
        model.net.eval()
        return tok, model, time.perf_counter() - start

    def bits(arm, seed):
        (tok, model, _), found = trained(arm, seed), {}
        for split in ("test", "heldout"):
            draws = Draws(5, torch.arange(2 * s["n"]))
            b = data.batch(split, draws)

            def at(k, b=b, draws=draws):
                parts = [
                    model.nll(b.x[i], tok([b.captions[j] for j in i]), Draws(5, i), k)
                    for i in draws.index.split(200)
                ]
                return torch.cat(parts).mean().item()

            found[split] = [at(k) for k in range(config["max_examples"] + 1)]
        return found

    def examples(k, seed):
        tok, model, took = trained("all", seed)
        row = evaluate(
            model.painter(tok, config | dict(examples=k)), data, judge, s["n"], seed, n_heldout=s["n"]
        )
        about = dict(
            recipe="cm3leon",
            params=sum(p.numel() for p in model.model.parameters()),
            images=s["images"],
            train_seconds=took,
            nfe=model.calls(config),
            examples=k,
            guidance=config["guidance"],
        )
        return row | about

    def guidance(w, seed):
        tok, model, _ = trained("all", seed)
        row = evaluate(
            model.painter(tok, config | dict(examples=0, guidance=w)), data, judge, s["n"], seed, n_heldout=0
        )
        o = row["obedience"]
        return dict(w=w, obedience=o["all"], digit=o["digit"], fd=row["fd"], recall=row["recall"])

    def scores(seed):
        return task_scores(trained("all", seed)[1], data, judge, s["n"], seed)

    yield "setting", setting
    for seed in seeds:
        for arm in tasks:
            yield f"bits.{arm}.{seed}", partial(bits, arm, seed)
            if arm == "draw":
                continue
            for k in range(config["max_examples"] + 1):
                yield f"examples.{k}.{seed}", partial(examples, k, seed)
            for w in s["guidance"]:
                yield f"guidance.w{round(10 * w)}.{seed}", partial(guidance, w, seed)
            yield f"tasks.{seed}", partial(scores, seed)
