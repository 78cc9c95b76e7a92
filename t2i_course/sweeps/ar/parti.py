"Encoder-decoder against one stream at equal parameters, and four sizes, on the codes of one codec."

import time
from functools import cache, partial

import torch

from t2i_course.ar.dalle import codec_for
from t2i_course.ar.parti import ARMS, coded, held_out_nll, make_prior, recipe_for
from t2i_course.codec.vqvae import OnCodes
from t2i_course.core.conditioning import WordTokenizer
from t2i_course.core.counting import parameters
from t2i_course.core.ema import EMA
from t2i_course.core.experiments import best_precision
from t2i_course.core.metrics import evaluate, judge_for, reference
from t2i_course.core.sources import load
from t2i_course.core.training import State, train


SWEEP = dict(
    smoke=dict(codec_images=640, images=320, n=24, kept=320),
    demo=dict(codec_images=20_000, images=24_000, n=300, kept=8_000),
    full=dict(codec_images=2_000_000, images=4_000_000, n=5_000, kept=200_000),
)


def fit_prior(
    prior,  # fresh; ends with the averaged weights
    feed,  # as from `coded`
    config,  # lr, half_life, batch
    images: int,  # training pictures
    seed: int = 0,  # of the order and of dropped captions
    precision: str = "fp32",
) -> list:  # the records
    "Train a prior on codes that are there already"
    state = State(prior, config.lr, EMA(prior, config.half_life), precision=precision)
    records = list(train(state, prior, feed, images=images, batch=config.batch, seed=seed))
    prior.load_state_dict(state.ema.shadow)
    prior.eval()
    return records


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # of weights, order and drawings
):  # yields (key, make), and make() gives the value
    "Encoder-decoder against one stream at equal parameters, and four sizes, all on the codes of one codec"
    s, data = SWEEP[scale], load("painted")
    config, judge, precision = recipe_for(data, scale), judge_for(data), best_precision()
    tok = WordTokenizer(config.words, config.max_len)

    @cache  # one codec for every arm
    def first():
        return codec_for(config, data, s["codec_images"])

    @cache
    def fed():
        codec = first().model.codec
        return coded(codec, data, tok, s["kept"]), coded(codec, data, tok, 4 * s["n"], "test")

    def setting():
        codec, about = first().model.codec, first().about
        return dict(
            data=data.name,
            images=s["images"],
            codec_images=s["codec_images"],
            codec_loss=about["loss"],
            n=s["n"],
            kept=s["kept"],
            precision=precision,
            codec_seconds=about["train_seconds"],
            n_codes=codec.n_codes,
            grid=list(codec.grid(config.shape)),
            fd_floor=reference(data, judge, s["n"])["floor"]["fd_floor"],
        )

    def row(arm, seed):
        codec, (feed, unseen) = first().model.codec, fed()
        torch.manual_seed(seed)
        prior = make_prior(arm, codec, tok, config)
        start = time.perf_counter()
        records = fit_prior(prior, feed, config, s["images"], seed, precision)
        row = dict(
            params=parameters(prior),
            bits=held_out_nll(prior, unseen, 4 * s["n"]),
            images=s["images"],
            train_seconds=time.perf_counter() - start,
            loss=records[-1].loss,
        )
        if arm in ("encoder_decoder", "one_stream"):
            draw = OnCodes(codec, prior).painter(tok, config)
            row |= evaluate(draw, data, judge, s["n"], seed, n_heldout=s["n"] // 2)
            row |= dict(recipe="dalle" if arm == "one_stream" else "parti")
        return row

    yield "setting", setting
    for seed in seeds:
        for arm in ARMS:
            yield f"arms.{arm}.{seed}", partial(row, arm, seed)
