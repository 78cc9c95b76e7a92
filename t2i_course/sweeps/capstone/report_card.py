"Modes of stacked digits, and five settings, for diffusion: what the adversarial chapter measures for GANs."

from functools import partial

import torch

from t2i_course.capstone.report_card import training_memory, variety
from t2i_course.core.counting import multiply_adds
from t2i_course.core.sources import load
from t2i_course.core.ema import train_arm
from t2i_course.core.experiments import best_precision
from t2i_course.core.metrics import evaluate, load_judge
from t2i_course.diffusion.ddpm import build, drawer, recipe_for, times, x0
from t2i_course.gan.adversarial import Stacked, modes_of
from t2i_course.sweeps.gan.adversarial import SETTINGS, SWEEP


# ---- diffusion where the adversarial chapter measures GANs ----
def diffusion_arm(
    data,  # captioned digits
    scale: str,  # smoke, demo or full
    images: int,  # training pictures
    seed: int,  # of weights, data and noise
    precision: str,  # fp32 or bf16
    factor: float = 1.0,  # on the recipe's learning rate
    beta: float = 0.9,  # Adam's beta_1
    w: float = 1.0,  # guidance
) -> object:  # draw(captions, seed) -> (n c h w)
    "A DDPM that guesses the clean picture, trained on as many pictures as each GAN it is compared with"
    config = recipe_for(data, scale)
    config |= dict(n_layers=0, lr=factor * config.lr, half_life=images / 10)
    torch.manual_seed(seed)
    tok, den = build(config)
    den.target, den.parts = x0, {"": dict(betas=(beta, 0.95))}
    train_arm(den, tok, data, config, images, seed, precision)
    return drawer(den, tok, data.shape, times(config, 25), w)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and noise
):  # yields ('key.path', make), and make() gives the value
    "Modes of stacked digits, and five settings: what `t2i run adversarial` measures for two GANs"
    s, judge, precision = SWEEP[scale], load_judge("digits"), best_precision()
    stacked, digits = Stacked(), load("digits")

    def modes(seed):
        draw = diffusion_arm(stacked, scale, s["images"], seed, precision)
        return len(modes_of(draw([stacked.caption] * s["stacked"], seed).clamp(-1, 1), judge).unique())

    def setting(factor, beta, seed):
        draw = diffusion_arm(digits, scale, s["few"], seed, precision, factor, beta, w=2.0)
        row = evaluate(draw, digits, judge, s["n"], seed, 0)
        return dict(
            factor=factor,
            beta=beta,
            fd=row["fd"],
            recall=row["recall"],
            obedience_all=row["obedience"]["all"],
        )

    yield (
        "diffusion.setting",
        lambda: dict(images=s["images"], few=s["few"], stacked=s["stacked"], n=s["n"], precision=precision),
    )
    for seed in seeds:
        yield f"diffusion.modes.seed{seed}", partial(modes, seed)
        for i, (factor, beta) in enumerate(SETTINGS[: s["settings"]]):
            yield f"diffusion.settings.{i}.seed{seed}", partial(setting, factor, beta, seed)


# ---- every paradigm with the same clock ----
SECONDS = 120  # training time of a row


def paradigm(
    rows: list,  # measured, one a seed; each gets its variety
    runs: list,  # the finished runs behind them
    data,  # painted digits
    prompts,  # captions that they draw
) -> dict:  # of the first run
    "What a row of the report card says beside the usual: variety, and what drawing and training cost"
    judge, run = load_judge("painted"), runs[0]
    for row, r in zip(rows, runs):
        row["variety"] = variety(r.draw, data, judge, prompts)
    config, draw = run.config, run.model.painter(run.tok, run.config)
    return dict(
        multiply_adds=multiply_adds(lambda: draw(prompts[:4], 0)) / 4 / 1e6,  # millions, for one picture
        memory=training_memory(run.model, run.tok, data, config.batch, config.precision),
        batch=config.batch,
    )
