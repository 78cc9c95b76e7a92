"The guidance chapter's own models: both kinds of guidance, dropout, nulls, spans, saturation, remedies."

import copy
from functools import cache, lru_cache, partial

from t2i_course.core.data import NUMBERS
from t2i_course.core.sources import load
from t2i_course.core.experiments import best_precision, fit
from t2i_course.core.metrics import judge_for, obedience, reference
from t2i_course.core.training import pick_device
from t2i_course.diffusion.ddpm import guided, recipe_for
from t2i_course.diffusion.guidance import (
    FIXES,
    TS,
    accuracy_by_t,
    by_classifier,
    cost,
    digits_model,
    interval,
    label_reader,
    measured,
    nulls,
    on_gray,
    painted_config,
    painted_model,
    painter,
    saturation,
    train_classifier,
)

SPANS = dict(
    all=(0.0, 1.0), not_early=(0.0, 0.6), not_late=(0.15, 1.0), middle=(0.15, 0.6)
)  # t of `interval`
GRID = dict(
    scales=(0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0),
    classifier_scales=(0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0),
    p_drop=(0.0, 0.05, 0.1, 0.2, 0.5),
    painted_scales=(1.0, 1.25, 1.5, 2.0, 3.0, 5.0),
    fix_scales=(1.0, 1.5, 2.0, 4.0, 8.0),
)
FEW = GRID | dict(
    scales=(1.0, 4.0), classifier_scales=(1.0, 4.0), painted_scales=(1.0, 4.0), fix_scales=(1.0, 8.0)
)
SWEEP = dict(
    smoke=FEW | dict(images=320, classifier=320, painted=64, gray=4, steps=3),
    demo=GRID | dict(images=24_000, classifier=16_000, painted=32_000, gray=86, steps=25),
    full=GRID | dict(images=1_000_000, classifier=500_000, painted=4_000_000, gray=86, steps=50),
)
DRAWN = dict(  # drawings of a data set
    smoke=dict(digits=16, painted=16),
    demo=dict(digits=1_000, painted=400),
    full=dict(digits=5_000, painted=5_000),
)
NULLS = ("text", "learned", "zeros")


def short(
    row: dict,  # as from `measured`
) -> dict:
    "The numbers a sweep keeps"
    kept = ("fd", "fd_floors", "precision", "recall", "diversity", "diversity_real", "nearest")
    return {k: row[k] for k in kept} | dict(obedience=row["obedience"]["all"])


def on_digits(
    s: dict,  # row of SWEEP
    scale: str,  # smoke, demo or full
    seed: int,  # of weights, data and noise
):  # yields (key, make)
    "One base model: both kinds of guidance, spans; then an arm for each dropout rate and each null"
    data = load("digits")
    config = recipe_for(data, scale) | dict(max_len=12)

    @cache  # the base model is asked for again and again
    def arm(p_drop=0.1, null="text"):
        build = partial(digits_model, p_drop=p_drop, null=null, seed=seed)
        made = fit(build, config, data, s["images"], seed)
        return made.tok, made.model, made.about

    def look(guide, den=None):
        tok, base, _ = arm()
        return measured(
            painter(den or base, tok, data.shape, guide, s["steps"]), data, s["n"]["digits"], seed
        )

    def row():
        return look(partial(guided, w=2.0)) | arm()[2] | dict(recipe="guidance", nfe=2 * s["steps"])

    @lru_cache(1)
    def classifier(noisy):
        tok, den, _ = arm()
        return train_classifier(den.process, tok, data, s["classifier"], noisy, seed), label_reader(tok)

    def accuracy(noisy):
        tok, den, _ = arm()
        return accuracy_by_t(classifier(noisy)[0], den.process, tok, data, TS)

    def scaled(noisy):
        return [short(look(by_classifier(*classifier(noisy), k))) for k in s["classifier_scales"]]

    def costs():
        tok, den, _ = arm()
        guides = dict(
            none=interval(1.0), free=interval(2.0), classifier=by_classifier(*classifier(True), 2.0)
        )
        captions = [f"a handwritten {d}" for d in NUMBERS] * (1 if scale == "smoke" else 10)
        draws = {k: painter(den, tok, data.shape, g, s["steps"]) for k, g in guides.items()}
        return {k: cost(draw, captions, s["steps"]) for k, draw in draws.items()}

    def spans():
        return {k: short(look(interval(3.0, *span))) for k, span in SPANS.items()}

    def dropout(p):
        return {f"{w:.0f}": short(look(partial(guided, w=w), arm(p, "text")[1])) for w in (1.0, 3.0)}

    def other_null(trained, name):
        tok, den, _ = arm(0.1, trained)
        one = copy.copy(den)  # the same network
        one.null = nulls(tok)[name].to(pick_device())
        return short(look(partial(guided, w=3.0), one))

    yield f"digits.free.seed{seed}", lambda: [short(look(partial(guided, w=w))) for w in s["scales"]]
    yield f"row.seed{seed}", row
    for name, noisy in dict(noisy=True, clean=False).items():
        yield f"classifier.{name}.seed{seed}", partial(accuracy, noisy)
        yield f"digits.{name}.seed{seed}", partial(scaled, noisy)
        if noisy:
            yield f"cost.seed{seed}", costs
    yield f"spans.seed{seed}", spans
    for p in s["p_drop"]:
        yield f"dropout.{round(100 * p)}.seed{seed}", partial(dropout, p)
    for trained in NULLS:
        for name in NULLS:
            yield f"null.{trained}.{name}.seed{seed}", partial(other_null, trained, name)


def on_painted(
    s: dict,  # row of SWEEP
    scale: str,  # smoke, demo or full
    seed: int,  # of weights, data and noise
    tables,  # tables() -> of the fitted skip, or None: fit it here
):  # yields (key, make)
    "One model: the sweep of w, and saturation with every remedy"
    data = load("painted")
    config, precision = (
        painted_config(data, scale) | dict(max_len=12),
        best_precision(),
    )
    captions, judge = on_gray(data), judge_for(data)
    captions = captions[:: max(1, len(captions) // s["gray"])][: s["gray"]]

    @cache
    def trained():
        build = partial(painted_model, data=data, seed=seed, tables=tables())
        return fit(build, config, data, s["painted"], seed, precision)

    def draw(guide, clamp=1.0):
        return painter(trained().model, trained().tok, data.shape, guide, s["steps"], clamp)

    @cache
    def look(w):
        held = s["n"]["painted"] // 2 if w in (1.0, 2.0) else 0
        return measured(draw(partial(guided, w=w)), data, s["n"]["painted"], seed, held)

    def free():
        rows = [look(w) for w in s["painted_scales"]]
        return [short(row) | dict(heldout=row.get("heldout", {}).get("all")) for row in rows]

    def row():
        row = look(2.0 if 2.0 in s["painted_scales"] else s["painted_scales"][0])
        return row | trained().about | dict(recipe="guidance", nfe=2 * s["steps"])

    def fixes(name):
        (guide, clamp), found = FIXES[name], []
        for w in s["fix_scales"]:
            x = draw(guide(w), clamp)(captions, seed)
            obeyed = obedience(judge, x.clamp(-1, 1), data, captions)["all"]
            found.append(dict(saturation=saturation(x), obedience=obeyed))
        return found

    def fixed(name):
        guide, clamp = FIXES[name]
        return short(measured(draw(guide(2.0), clamp), data, s["n"]["painted"], seed))

    yield f"painted.free.seed{seed}", free
    yield f"painted.row.seed{seed}", row
    for name in FIXES:
        yield f"fixes.{name}.seed{seed}", partial(fixes, name)
        yield f"fixed.{name}.seed{seed}", partial(fixed, name)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "Guidance with and without a classifier, dropout rates, nulls, spans, saturation and its remedies"
    s = SWEEP[scale] | dict(n=DRAWN[scale])
    sets = {k: load(k) for k in ("digits", "painted")}

    @cache
    def tables():
        painted = sets["painted"]
        return painted_model(painted_config(painted, scale) | dict(max_len=12), painted)[1].skip.tables

    def setting():
        floor = {k: reference(d, judge_for(d), s["n"][k])["floor"]["fd_floor"] for k, d in sets.items()}
        about = dict(
            seeds=list(seeds), times=TS, fd_floor=floor, spans={k: list(v) for k, v in SPANS.items()}
        )
        about |= dict(phi=0.7, ratio=0.995, fixed_scale=2.0)
        low = best_precision()
        return s | about | dict(precision=dict(digits="fp32", painted=low))

    yield "setting", setting
    for seed in seeds:
        yield from on_digits(s, scale, seed)
        yield from on_painted(s, scale, seed, tables)
