"The sweeps of the inversion chapter: pictures to their noise and back, and edited by another caption."

from functools import cache, partial

import torch

from t2i_course.core.data import NUMBERS, Draws
from t2i_course.core.metrics import judge_for
from t2i_course.diffusion.ddpm import guided, sample
from t2i_course.diffusion.inversion import edit_caption, inversion_error
from t2i_course.diffusion.samplers import uniform
from t2i_course.sweeps.diffusion.samplers import OnModel

RUNS = dict(mnist="samplers")  # the run of that sweep
SEEDS = 10  # of noise, on one model
SWEEP = dict(
    smoke=dict(n=16, pictures=4, steps=(3, 5), edit=4),
    demo=dict(n=400, pictures=24, steps=(10, 20, 50, 100), edit=40),
    full=dict(n=5_000, pictures=500, steps=(10, 20, 50, 100, 200), edit=100),
)
WAYS = dict(  # guidance up, rounds, guidance down
    caption=(1.0, 1, 1.0),
    empty=(0.0, 1, 0.0),
    caption_4_rounds=(1.0, 4, 1.0),
    guided=(3.0, 1, 3.0),
    guided_down_only=(1.0, 1, 3.0),
)
EDITS = dict(  # how far up, guidance down
    to_40=(0.4, 1.0), to_60=(0.6, 1.0), to_80=(0.8, 1.0), to_100=(1.0, 1.0), guided=(1.0, 3.0)
)


def next_number(caption: str) -> str:
    "The caption of the next number; after nine comes zero"
    k = next(i for i, word in enumerate(NUMBERS) if word in caption.split())
    return caption.replace(NUMBERS[k], NUMBERS[(k + 1) % 10])


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=tuple(range(10)),  # of the pictures
    mnist=None,  # the run that everything is measured on
):  # yields ('key.path', make), and make() gives the value
    "Up and down again, by steps, rounds and guidance; edits by how far up"
    s = SWEEP[scale]
    on = OnModel(mnist, s["n"])

    @cache
    def test(seed):
        b = on.pictures("test", 3 * s["pictures"], seed)
        named = [i for i, c in enumerate(b.captions) if any(w in c.split() for w in NUMBERS)]
        keep = named[: s["pictures"]]
        return b.x[keep].to(on.device), [b.captions[i] for i in keep]

    def predict(seed, w):
        return guided(mnist.model, mnist.tok(test(seed)[1]), w)

    def inverted(way, n, seed):
        up, rounds, down = WAYS[way]
        back = None if up == down else predict(seed, down)
        process, x = mnist.model.process, test(seed)[0]
        off, std = inversion_error(predict(seed, up), process, x, n, rounds, back)
        return dict(rms=off, noise_std=std)

    def judged(y, seed):
        x, captions = test(seed)
        read = judge_for(on.data).read(y.cpu())[next(iter(judge_for(on.data).attributes))]
        wanted = [next(i for i, w in enumerate(NUMBERS) if w in next_number(c).split()) for c in captions]
        a, b = (v.flatten(1).mean(1).cpu() for v in (x, y))
        ink = torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num().item()
        obeys = (read == torch.tensor(wanted)).double().mean().item()
        return dict(obeys=obeys, distance=(y - x).square().mean().sqrt().item(), ink=ink)

    def edited(arm, seed):
        (x, captions), (far, w) = test(seed), EDITS[arm]
        new = [next_number(c) for c in captions]
        y = edit_caption(mnist.model, mnist.tok(captions), mnist.tok(new), x, s["edit"], far, w)
        return judged(y, seed)

    def fresh(seed):
        x, captions = test(seed)
        noise = Draws(seed, torch.arange(len(x))).normal("start", *x.shape[1:]).to(on.device)
        wanted = guided(mnist.model, mnist.tok([next_number(c) for c in captions]))
        *_, y = sample(wanted, mnist.model.process, noise, uniform(None, s["edit"]))
        return judged(y, seed)

    yield "setting", partial(on.setting, pictures=s["pictures"], steps=list(s["steps"]), edit=s["edit"])
    for seed in seeds:
        for way in WAYS:
            for n in s["steps"]:
                yield f"inversion.{way}.{n}.seed{seed}", partial(inverted, way, n, seed)
        for arm in EDITS:
            yield f"edit.{arm}.seed{seed}", partial(edited, arm, seed)
        yield f"edit.fresh.seed{seed}", partial(fresh, seed)
