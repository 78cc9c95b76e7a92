"The guidance chapter on one well-trained model: scales, intervals and remedies, each drawn from ten noises."

from functools import cache, partial

from t2i_course.core.metrics import judge_for, reference
from t2i_course.core.sources import load
from t2i_course.diffusion.ddpm import guided
from t2i_course.diffusion.guidance import FIXES, interval, measured, painter, saturation
from t2i_course.diffusion.samplers import dpmpp_2m

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
    seeds=tuple(range(10)),  # of the start noise: there is one model
    mnist=None,  # a finished run: a model of MNIST that was trained with some captions dropped
):  # yields ('key.path', make), and make() gives the value
    "Obedience, diversity and distance for every guidance scale, interval and remedy"
    s, data = SWEEP[scale], cache(lambda: load("mnist"))

    def row(guide, seed, clamp=1.0):
        drawn = []

        def draw(captions, seed):
            drawn.append(
                painter(mnist.model, mnist.tok, data().shape, guide, s["steps"], clamp, dpmpp_2m)(
                    captions, seed
                )
            )
            return drawn[0]

        found = measured(draw, data(), s["n"], seed)
        light = drawn[0].clamp(-1, 1).mean().item()
        about = dict(
            beyond=saturation(drawn[0], BEYOND), brightness=light, obedience=found["obedience"]["all"]
        )
        return {k: found[k] for k in KEPT} | about

    def setting():
        real = reference(data(), judge_for(data()), s["n"])
        about = dict(
            fd_floor=real["floor"]["fd_floor"], ceiling=real["ceiling"]["all"], chance=real["chance"]
        )
        about |= dict(
            brightness_real=real["real"].x.mean().item(), spans={k: list(v) for k, v in SPANS.items()}
        )
        return (
            s
            | about
            | dict(seeds=list(seeds), sampler="dpmpp_2m", images=mnist.config.images, phi=0.7, ratio=0.995)
        )

    yield "setting", setting
    for seed in seeds:
        for w in s["scales"]:
            yield f"scale.{round(100 * w)}.seed{seed}", partial(row, partial(guided, w=w), seed)
        for name, span in SPANS.items():
            yield f"span.{name}.seed{seed}", partial(row, interval(s["span_scale"], *span), seed)
        for name, (guide, clamp) in FIXES.items():
            if name != "static":  # that is the sampler's own, measured under `scale`
                yield f"fix.{name}.seed{seed}", partial(row, guide(s["fix_scale"]), seed, clamp)
