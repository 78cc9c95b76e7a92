"Encoder-decoder against one stream at equal parameters, and four sizes, on the codes of one codec."

import time
from functools import cache, partial

import torch

from t2i_course.ar.parti import ARMS, build, coded, held_out_nll, make_prior, recipe_for
from t2i_course.codec.vqvae import TwoStage
from t2i_course.core.sources import load
from t2i_course.core.ema import EMA, train_arm
from t2i_course.core.metrics import evaluate, judge_for, reference
from t2i_course.core.training import State, has_bf16, train

SWEEP = dict(
    smoke=dict(codec_images=640, images=320, n=24, kept=320),
    demo=dict(codec_images=20_000, images=24_000, n=300, kept=8_000),
    full=dict(codec_images=2_000_000, images=4_000_000, n=5_000, kept=200_000),
)


def fit_prior(
    prior,  # fresh; ends with the averaged weights
    feed,  # as from `coded`
    config: dict,  # lr, half_life, batch
    images: int,  # training pictures
    seed: int = 0,  # of the order and of dropped captions
    precision: str = "fp32",
) -> list:  # the records
    "Train a prior on codes that are there already"
    state = State(prior, config["lr"], EMA(prior, config["half_life"]), precision=precision)
    records = list(train(state, prior.loss, feed, images=images, batch=config["batch"], seed=seed))
    prior.load_state_dict(state.ema.shadow)
    prior.eval()
    return records


class OneStage:
    "A codec alone, as `train_arm` wants it"

    def __init__(self, codec):
        self.net = codec

    def to(self, device):
        return self

    def loss(self, x0, cond, draws):
        return self.net.loss(x0, draws)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1),  # of weights, order and drawings
):  # yields (key, make), and make() gives the value
    "Encoder-decoder against one stream at equal parameters, and four sizes, all on the codes of one codec"
    s, data = SWEEP[scale], load("painted")
    config, judge = recipe_for(data, scale), judge_for(data)
    precision = "bf16" if has_bf16() else "fp32"

    @cache  # one codec for every arm
    def first():
        torch.manual_seed(0)
        tok, model = build(config)
        start = time.perf_counter()
        loss = train_arm(
            OneStage(model.codec),
            tok,
            data,
            config | dict(lr=config["codec_lr"]),
            s["codec_images"],
            precision=precision,
        )
        return tok, model.codec.eval(), loss, time.perf_counter() - start

    @cache
    def fed():
        tok, codec, _, _ = first()
        return coded(codec, data, tok, s["kept"]), coded(codec, data, tok, 4 * s["n"], "test")

    def setting():
        _, codec, loss, took = first()
        return dict(
            data=data.name,
            images=s["images"],
            codec_images=s["codec_images"],
            codec_loss=loss,
            n=s["n"],
            kept=s["kept"],
            precision=precision,
            codec_seconds=took,
            n_codes=codec.n_codes,
            grid=list(codec.grid(config["shape"])),
            fd_floor=reference(data, judge, s["n"])["fd_floor"],
        )

    def row(arm, seed):
        (tok, codec, _, _), (feed, unseen) = first(), fed()
        torch.manual_seed(seed)
        prior = make_prior(arm, codec, tok, config)
        start = time.perf_counter()
        records = fit_prior(prior, feed, config, s["images"], seed, precision)
        row = dict(
            params=sum(p.numel() for p in prior.parameters()),
            bits=held_out_nll(prior, unseen, 4 * s["n"]),
            images=s["images"],
            train_seconds=time.perf_counter() - start,
            loss=records[-1].loss,
        )
        if arm in ("encoder_decoder", "one_stream"):
            draw = TwoStage(codec, prior).painter(tok, config)
            row |= evaluate(draw, data, judge, s["n"], seed, n_heldout=s["n"] // 2) | dict(
                recipe="parti" if arm != "one_stream" else "dalle"
            )
        return row

    yield "setting", setting
    for seed in seeds:
        for arm in ARMS:
            yield f"arms.{arm}.{seed}", partial(row, arm, seed)
