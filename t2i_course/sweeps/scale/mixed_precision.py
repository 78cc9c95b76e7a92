"fp32, bf16 and fp16 on painted digits; weights kept in bf16; warm-up and divergence."

import copy
from functools import cache, lru_cache, partial

import torch

from t2i_course.core.sources import load
from t2i_course.core.counting import parameters
from t2i_course.core.ema import train_arm
from t2i_course.core.metrics import evaluate, load_judge, reference
from t2i_course.core.training import has_bf16, pick_device
from t2i_course.scale.mixed_precision import (
    FORMATS,
    diverged,
    fresh,
    go_on,
    recipe_here,
    simulated,
    warmups,
)
from t2i_course.transformer.dit import unseen_loss

SWEEP = dict(
    smoke=dict(images=128, n=8, base=320, more=160, steps=12, members=1),
    demo=dict(images=5_000, n=400, base=8_000, more=6_400, steps=600, members=2),
    full=dict(images=2_000_000, n=5_000, base=200_000, more=200_000, steps=4_000, members=8),
)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, data and start noise
):  # yields ('key.path', make), and make() gives the value
    "fp32, bf16 and fp16 on painted digits; weights kept in bf16; warm-up and divergence"
    s, data, digits = SWEEP[scale], load("painted"), load("digits")
    config, small, judge = (
        recipe_here(data, scale),
        recipe_here(digits, scale) | dict(skip=False),
        load_judge("painted"),
    )
    cuda, units = pick_device() == "cuda", has_bf16(pick_device())
    lrs, ups = (1e-3, 1e-2), (0, 100, 500)

    def setting():
        return dict(
            images=s["images"],
            n=s["n"],
            base=s["base"],
            more=s["more"],
            seeds=list(seeds),
            batch=config.batch,
            fp16="autocast" if cuda else "simulated: float32 arithmetic, every product rounded to float16",
            bf16="autocast" if units else "simulated: float32 arithmetic, every product rounded to bfloat16",
            fd_floor=reference(data, judge, s["n"])["floor"]["fd_floor"],
        )

    @cache
    def skip():
        return fresh(config, data)[1].skip

    def row(arm, seed):
        tok, den = fresh(config, data, seed, skip())
        real = dict(fp32=True, bf16=units, fp16=cuda)[arm]
        loss = None if real else simulated(den.loss, FORMATS[arm])
        end = train_arm(den, tok, data, config, s["images"], seed, arm, loss)
        row = evaluate(den.painter(tok, config), data, judge, s["n"], seed, 0)
        about = dict(
            recipe="flow_matching",
            precision=arm,
            params=parameters(den.net),
            images=s["images"],
        )
        return (
            row
            | about
            | dict(
                nfe=den.calls(config),
                loss=end,
                unseen_loss=unseen_loss(den, tok, data, 256, 7),
            )
        )

    @lru_cache(1)  # every way of keeping weights goes on from here
    def start(seed):
        tok, base = fresh(small, digits, seed)
        train_arm(base, tok, digits, small, s["base"], seed)
        return tok, base, copy.deepcopy(base.net.state_dict())

    def storage(how, seed):
        tok, base, weights = start(seed)
        base.net.load_state_dict(weights)
        torch.manual_seed(seed)
        if how != "start":
            go_on(base, tok, digits, how, images=s["more"], seed=seed)
        return unseen_loss(base, tok, digits, 256, 7)

    def warmup(name, rates, lengths, seed):
        members = [100 * seed + k for k in range(s["members"])]
        losses, blank = warmups(rates, lengths, members, name == "post", s["steps"])
        return dict(
            diverged=diverged(losses, blank).double().mean(2).tolist(),
            blank=blank,
            end=losses[-50:].mean(0).tolist(),
            curve=losses[:: max(1, s["steps"] // 60), -1, :, 0].tolist(),
        )

    yield "setting", setting
    for seed in seeds:
        for arm in ("fp32", "bf16", "fp16"):
            yield f"precision.{arm}.{seed}", partial(row, arm, seed)
        for how in ("start", "fp32", "masters", "bf16", "stochastic"):
            yield f"storage.{how}.{seed}", partial(storage, how, seed)
    yield (
        "warmup.setting",
        lambda: dict(lrs=list(lrs), warmups=list(ups), steps=s["steps"], members=s["members"]),
    )
    for seed in seeds:
        for name, rates, lengths in (("post", lrs, ups), ("pre", lrs[-1:], ups[:1])):
            yield f"warmup.{name}.{seed}", partial(warmup, name, rates, lengths, seed)
