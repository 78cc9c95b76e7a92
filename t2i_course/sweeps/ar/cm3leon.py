"Retrieved examples, guidance, and what several tasks cost, all on the codes of one codec."

from functools import cache, lru_cache, partial

import torch

from t2i_course.ar.cm3leon import CM3Leon, Recoloured, build, recipe_for
from t2i_course.ar.dalle import codec_for
from t2i_course.core.data import Draws
from t2i_course.core.experiments import best_precision, fit
from t2i_course.core.metrics import evaluate, judge_for, reference
from t2i_course.core.sources import load


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
    seeds=(0, 1, 2),  # of weights, order and drawings
):  # yields (key, make), and make() gives the value
    "Retrieved examples, guidance, and what several tasks cost, all on the codes of one codec"
    s, data = SWEEP[scale], load("painted")
    config, judge, precision = recipe_for(data, scale), judge_for(data), best_precision()
    tasks = dict(all=config.tasks, draw=[1.0, 0.0, 0.0])

    @cache  # one codec for every arm
    def first():
        return codec_for(config, data, s["codec_images"])

    def setting():
        return dict(
            data=data.name,
            images=s["images"],
            codec_images=s["codec_images"],
            n=s["n"],
            precision=precision,
            tasks=config.tasks,
            grid=list(first().model.codec.grid(config.shape)),
            fd_floor=reference(data, judge, s["n"])["floor"]["fd_floor"],
        )

    def ready(config):  # with its memory
        tok, model = build(config, codec=first())
        model.prepare(data, tok, config)
        return tok, model

    @lru_cache(1)  # all keys of an arm ask for its model
    def trained(arm, seed):
        made = fit(ready, config | dict(tasks=tasks[arm]), data, s["images"], seed, precision)
        made.model.net.eval()
        return made

    def bits(arm, seed):
        made, found = trained(arm, seed), {}
        for split in ("test", "heldout"):
            draws = Draws(5, torch.arange(2 * s["n"]))
            b = data.batch(split, draws)

            def at(k, b=b, draws=draws):
                parts = [
                    made.model.nll(b.x[i], made.tok([b.captions[j] for j in i]), Draws(5, i), k)
                    for i in draws.index.split(200)
                ]
                return torch.cat(parts).mean().item()

            found[split] = [at(k) for k in range(config.max_examples + 1)]
        return found

    def examples(k, seed):
        made = trained("all", seed)
        draw = made.model.painter(made.tok, config | dict(examples=k))
        about = dict(recipe="cm3leon", examples=k, guidance=config.guidance)
        return made.row(data, judge, s["n"], seed, s["n"], draw, **about)

    def guidance(w, seed):
        made = trained("all", seed)
        draw = made.model.painter(made.tok, config | dict(examples=0, guidance=w))
        row = evaluate(draw, data, judge, s["n"], seed, n_heldout=0)
        o = row["obedience"]
        return dict(w=w, obedience=o["all"], digit=o["digit"], fd=row["fd"], recall=row["recall"])

    def scores(seed):
        return task_scores(trained("all", seed).model, data, judge, s["n"], seed)

    yield "setting", setting
    for seed in seeds:
        for arm in tasks:
            yield f"bits.{arm}.{seed}", partial(bits, arm, seed)
            if arm == "draw":
                continue
            for k in range(config.max_examples + 1):
                yield f"examples.{k}.{seed}", partial(examples, k, seed)
            for w in s["guidance"]:
                yield f"guidance.w{round(10 * w)}.{seed}", partial(guidance, w, seed)
            yield f"tasks.{seed}", partial(scores, seed)
