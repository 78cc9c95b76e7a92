"The guidance chapter on one well-trained model: scales, intervals and remedies, each drawn from ten noises."

from functools import cache, partial

from t2i_course.core.metrics import judge_for, reference
from t2i_course.core.sources import load
from t2i_course.diffusion.ddpm import guided
from t2i_course.diffusion.guidance import FIXES, interval, measured, painter, saturation
from t2i_course.diffusion.samplers import dpmpp_2m

RUNS = dict(mnist="samplers")  # the model of MNIST that the samplers' sweep trains and ships
SEEDS = 10  # of the start noise: there is one model
SPANS = dict(not_early=(0.0, 0.6), not_late=(0.15, 1.0), middle=(0.15, 0.6))  # t of `interval`
GRID = dict(scales=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0), span_scale=3.0, fix_scale=5.0)
SWEEP = dict(  # scales, drawings of a seed, calls of the sampler
    smoke=GRID | dict(scales=(1.0, 3.0), n=16, steps=3),
    demo=GRID | dict(n=300, steps=20),
    full=GRID | dict(n=5000, steps=50),
)
BEYOND = 1.05  # real pictures end at 1; what lies this far out was made by guidance
KEPT = ("fd", "precision", "recall", "diversity", "diversity_real", "nearest")


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=tuple(range(SEEDS)),  # of the start noise
    mnist=None,  # the finished run: trained with some captions dropped
):  # yields ('key.path', make), and make() gives the value
    "Obedience, diversity and distance for every guidance scale, interval and remedy"
    s, data = SWEEP[scale], cache(lambda: load(mnist.config.data))

    def row(guide, seed, clamp=1.0):
        drawn = []

        def draw(captions, seed):
            paint = painter(mnist.model, mnist.tok, data().shape, guide, s["steps"], clamp, dpmpp_2m)
            drawn.append(paint(captions, seed))
            return drawn[0]

        found = measured(draw, data(), s["n"], seed)
        return {k: found[k] for k in KEPT} | dict(
            obedience=found["obedience"]["all"],
            beyond=saturation(drawn[0], BEYOND),
            brightness=drawn[0].clamp(-1, 1).mean().item(),
        )

    def setting():
        real = reference(data(), judge_for(data()), s["n"])
        return s | dict(
            seeds=list(seeds),
            images=mnist.config.images,
            sampler="dpmpp_2m",
            spans={k: list(v) for k, v in SPANS.items()},
            phi=0.7,
            ratio=0.995,
            fd_floor=real["floor"]["fd_floor"],
            ceiling=real["ceiling"]["all"],
            brightness_real=real["real"].x.mean().item(),
        )

    yield "setting", setting
    for seed in seeds:
        for w in s["scales"]:
            yield f"scales.{round(100 * w)}.seed{seed}", partial(row, partial(guided, w=w), seed)
        for name, span in SPANS.items():
            yield f"spans.{name}.seed{seed}", partial(row, interval(s["span_scale"], *span), seed)
        for name, (guide, clamp) in FIXES.items():
            if name != "static":  # that is the sampler's own, measured under `scales`
                yield f"fixes.{name}.seed{seed}", partial(row, guide(s["fix_scale"]), seed, clamp)
