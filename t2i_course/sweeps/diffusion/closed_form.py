"The sweep of the closed form chapter: what each arm draws after so many images, until plain catches up."

from functools import cache, lru_cache, partial

import torch

from t2i_course.core.counting import parameters
from t2i_course.core.ema import state_for
from t2i_course.core.experiments import best_precision, setting
from t2i_course.core.files import CourseError
from t2i_course.core.metrics import evaluate, judge_for
from t2i_course.core.sources import load
from t2i_course.core.training import feed, load_trained, pick_device, train
from t2i_course.diffusion.closed_form import CaptionGaussian
from t2i_course.diffusion.ddpm import drawer
from t2i_course.diffusion.preconditioning import ScalarSkip, fit_skip
from t2i_course.flow.flow_matching import LinearPath, build, recipe_for

GAUSSIANS = ("one", "mean", "caption", "all_pairs")
POINTS = dict(  # images after which an arm is measured; 0: the closed form alone
    smoke=dict(
        digits=dict(plain=(64,), scalar=(64,), one=(0,), mean=(0,), caption=(0, 64)),
        painted=dict(plain=(64,), caption=(0, 64), all_pairs=(0,)),
    ),
    demo=dict(
        digits=dict(
            plain=(8_192, 32_768),
            scalar=(8_192,),
            one=(0, 8_192),
            mean=(0, 8_192),
            caption=(0, 2_048, 8_192, 32_768),
        ),
        mnist=dict(plain=(8_192, 32_768, 65_536), caption=(0, 2_048, 8_192, 32_768)),
        painted=dict(
            plain=(8_192, 32_768, 65_536),
            caption=(0, 2_048, 8_192, 32_768),
            all_pairs=(0, 8_192),
        ),
    ),
)
LONG = (0, 8_000, 32_000, 128_000, 512_000, 2_000_000)
POINTS["full"] = {
    name: {arm: LONG if arm in GAUSSIANS else LONG[1:] for arm in arms}
    for name, arms in POINTS["demo"].items()
}
SWEEP = dict(  # pictures to fit on, drawings, drawings of held-out captions, steps of the sampler
    smoke=dict(fit=512, n=dict(digits=16, mnist=16, painted=16), held=4, steps=2),
    demo=dict(fit=8192, n=dict(digits=5_000, mnist=400, painted=400), held=100, steps=12),
    full=dict(fit=65_536, n=dict(digits=10_000, mnist=2_000, painted=2_000), held=1_000, steps=16),
)
HELD = dict(digits=0.5)  # of the recipe's rate: at all of it, held, two of three networks stopped learning
SCALE = dict(digits=1.0, mnist=2.0, painted=2.0)  # of guidance: digits obey without it, and cost half as much


class OneForAll(CaptionGaussian):
    "The same Gaussian whatever the caption says"

    def words(self, ids):
        return super().words(ids[:, :0])


def skip_of(
    arm,  # plain, scalar, or one of GAUSSIANS
    config,  # of flow matching
    tok,  # captions -> Cond
):  # a skip, not fitted; None for plain flow matching
    "From knowing nothing to a Gaussian for every caption"
    path, sizes = LinearPath(), dict(n_terms=config.n_terms, rank=config.rank)
    groups = [[tok.index[w] for w in g] for g in config.groups]
    one = partial(CaptionGaussian, path, len(tok), **sizes)
    makes = dict(
        plain=lambda: None,
        scalar=lambda: ScalarSkip(path),
        one=lambda: OneForAll(path, len(tok), **sizes),
        mean=one,  # no groups: captions share one spatial covariance
        caption=lambda: one(groups=groups, pairs_in_groups=True),
        all_pairs=lambda: one(groups=groups),
    )
    return makes[arm]()


def held(
    f: float,  # share of the budget used
    images: int,  # of the whole training
) -> float:  # factor on the learning rate
    "Up over the first 2,048 images, and never down: a point on the way depends on the images before it alone"
    return min(1.0, (f * images + 64) / 2_048)


def snapshots(
    den,  # a fresh Denoiser, its skip fitted
    tok,  # captions -> Cond
    data,  # captioned pictures
    config,  # of flow matching
    points,  # images, ascending
    seed: int,  # of data and noise
    precision: str,  # fp32 or bf16
) -> dict:  # images -> averaged weights
    "One training, and its average at every point; at 0 the network says 0"
    den.net.to(pick_device())
    den.to(pick_device())
    state = state_for(den, config, precision)
    found = {0: {k: v.clone() for k, v in state.ema.shadow.items()}} if 0 in points else {}
    left = [p for p in points if p]
    peak = HELD.get(data.name, 1.0)
    sizes = dict(images=max(points), batch=config.batch, seed=seed)
    sizes["schedule"] = lambda f: peak * held(f, max(points))
    for r in train(state, den.loss, feed(data, tok), **sizes) if left else ():
        if r.images >= left[0]:
            found[left.pop(0)] = {k: v.clone() for k, v in state.ema.shadow.items()}
        if not left:
            break
    return found


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "Plain flow matching against skips that know more and more, at 0 and more images of training"
    s, precision = SWEEP[scale], best_precision()

    @cache
    def of(name):  # everything of a data set that the arms share
        data = load(name)
        return data, recipe_for(data, scale), judge_for(data)

    @cache  # fitted once, by the seed of the fit alone
    def fitted(name, arm):
        data, config, _ = of(name)
        tok, den = build(config | dict(skip=False))
        den.skip = skip_of(arm, config, tok)
        return fit_skip(den, data, tok, s["fit"]).skip

    def about(name):
        data, config, judge = of(name)
        more = dict(fit=s["fit"], steps=s["steps"], guidance=SCALE[name], held_out=s["held"])
        more["rate"] = HELD.get(name, 1.0)
        points = {arm: list(v) for arm, v in POINTS[scale][name].items()}
        return setting(dict(n=s["n"][name], batch=config.batch), seeds, data, judge, **more, points=points)

    @lru_cache(1)  # the points of an arm follow each other
    def trained(name, arm, seed):
        data, config, _ = of(name)
        torch.manual_seed(seed)
        tok, den = build(config | dict(skip=arm in GAUSSIANS))
        den.skip = fitted(name, arm)
        points = POINTS[scale][name][arm]
        return tok, den, snapshots(den, tok, data, config, points, seed, precision)

    def row(name, arm, images, seed):
        data, _, judge = of(name)
        tok, den, found = trained(name, arm, seed)
        load_trained(den.net, found[images], den.net.state_dict().keys() - found[images].keys())
        line, w = torch.linspace(1, 0, s["steps"] + 1), SCALE[name]
        draw = drawer(den, tok, data.shape, line, w, hold=True, eta=0.0)
        measured = evaluate(draw, data, judge, s["n"][name], seed, s["held"])
        calls = s["steps"] * (1 if w == 1 else 2)
        return measured | dict(recipe=arm, images=images, params=parameters(den.net), nfe=calls)

    for name in POINTS[scale]:
        try:
            load(name)
        except CourseError:
            continue  # MNIST is not on this machine
        yield f"setting.{name}", partial(about, name)
    for seed in seeds:
        for name, arms in POINTS[scale].items():
            try:
                load(name)
            except CourseError:
                continue
            for arm, points in arms.items():
                for images in points:
                    yield f"curve.{name}.{arm}.{images}.seed{seed}", partial(row, name, arm, images, seed)
