"""A stranger's folder, made offline: small drawings of symbols in coloured ink, one short caption each.

python tests/drawings.py FOLDER writes it; python tests/drawings.py FOLDER 24000 closed without trains on it, too,
with the closed form and without, and measures both on combinations of ink and thing that the folder lacks."""
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

INKS = dict(red=(200, 40, 40), orange=(230, 130, 30), green=(40, 140, 60), blue=(40, 80, 200), purple=(130, 60, 160),
            brown=(120, 80, 50), pink=(225, 90, 150), black=(30, 30, 30))
PAPER = (250, 246, 235)
# arrows, mathematical and technical signs, shapes, symbols, dingbats: what DejaVu Sans draws well
BLOCKS = ((0x2190, 0x21FF), (0x2200, 0x22FF), (0x2300, 0x23FF), (0x25A0, 0x25FF), (0x2600, 0x26FF), (0x2701, 0x27BF),
          (0x2B00, 0x2B4F))
DULL = set("black white heavy sign symbol with and of the a to containing double ballot operator medium".split()) | set(INKS)


@lru_cache
def font(size):
    "DejaVu Sans as matplotlib bundles it"
    import matplotlib
    from PIL import ImageFont
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def stencil(char, side):
    "(side, side) share of ink, the glyph as large as it fits; None where it is all but empty"
    from PIL import Image, ImageDraw
    big = Image.new("L", (8 * side, 8 * side))
    ImageDraw.Draw(big).text((4 * side, 4 * side), char, 255, font(4 * side), anchor="mm")
    box = big.getbbox()
    if box is None: return None
    cut = big.crop(box)
    scale = .8 * side / max(cut.size)
    cut = cut.resize([max(1, round(v * scale)) for v in cut.size], Image.Resampling.LANCZOS)
    page = Image.new("L", (side, side))
    page.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    ink = np.asarray(page, dtype=np.float32) / 255
    return ink if ink.mean() > .02 else None


@lru_cache
def things(side=32):
    "name -> (side, side) share of ink; names of one to four words, no two drawings alike"
    from fontTools.ttLib import TTFont
    there = TTFont(font(16).path).getBestCmap()
    found, seen = {}, set()
    for low, high in BLOCKS:
        for code in range(low, high + 1):
            if code not in there: continue
            words = [w for w in unicodedata.name(chr(code), "").lower().replace("-", " ").split() if w not in DULL]
            name, ink = " ".join(words), stencil(chr(code), side)
            if not 1 <= len(words) <= 4 or name in found or ink is None or ink.tobytes() in seen: continue
            seen.add(ink.tobytes())
            found[name] = ink
    return found


def picture(ink, colour, rng):
    "(3, side, side) uint8: the thing in its ink on light paper, moved by up to two pixels"
    shift = tuple(rng.integers(-2, 3, 2))
    ink = np.roll(ink, shift, (0, 1))[None]
    paper, pen = (np.array(v, dtype=np.float32)[:, None, None] for v in (PAPER, INKS[colour]))
    paper = paper + rng.normal(0, 3, (3, 1, 1)).astype(np.float32)
    return (paper * (1 - ink) + pen * ink).clip(0, 255).round().astype(np.uint8)


def plan(n, seed=0):
    "n seen (ink, thing) pairs, one or two inks a thing; and one more ink for things whose words and ink were all seen"
    rng, names = np.random.default_rng(seed), list(things())
    inks = {name: list(rng.permutation(list(INKS))) for name in names}
    order = [(inks[name][k], name) for k in range(2) for name in rng.permutation(names)]
    seen = order[:n]
    unseen = [(inks[name][2], name) for name in dict.fromkeys(name for _, name in seen)]
    return seen, [unseen[i] for i in rng.permutation(len(unseen))]


def drawn(pairs, seed):
    "(n, 3, 32, 32) uint8 pictures and n captions"
    rng = np.random.default_rng(seed)
    return np.stack([picture(things()[name], ink, rng) for ink, name in pairs]), [f"{ink} {name}" for ink, name in pairs]


def write(folder, n=849, seed=0):
    "The stranger's folder: NAME.png beside NAME.txt"
    from PIL import Image
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (x, caption) in enumerate(zip(*drawn(plan(n, seed)[0], seed))):
        Image.fromarray(x.transpose(1, 2, 0)).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(caption, encoding="utf-8")
    return folder


def unseen(data, n=849, seed=0):
    "Pictures in [-1,1] and captions of combinations that the folder lacks, of words that its training part has"
    x, captions = drawn(plan(n, seed)[1], seed + 1)
    fine = [i for i, c in enumerate(captions) if set(c.split()) <= set(data.words) and c not in data.texts["train"]]
    return torch.from_numpy(x[fine]) / 127.5 - 1, [captions[i] for i in fine]


def trial(data, images, scale="demo", skip=True, seed=0, n=200):
    "Train flow matching as `t2i train` does; losses of all steps, drawings of training captions and of unseen ones"
    import time

    from t2i_course.core.ema import state_for
    from t2i_course.core.metrics import evaluate
    from t2i_course.core.training import feed, train
    from t2i_course.diffusion.preconditioning import fit_skip
    from t2i_course.flow import flow_matching
    config = flow_matching.recipe_for(data, scale) | dict(skip=skip)
    torch.manual_seed(seed)
    tok, den = flow_matching.build(config)
    start = time.perf_counter()
    fit_skip(den, data, tok, config["fit_images"])
    out = dict(fit_seconds=time.perf_counter() - start)
    state = state_for(den, config, "fp32")
    out["losses"] = [r.loss for r in train(state, den.loss, feed(data, tok), images=images, batch=config["batch"],
                                           seed=seed)]
    out["seconds"] = time.perf_counter() - start
    den.net.load_state_dict(state.ema.shadow)
    draw = den.painter(tok, config)
    x, captions = unseen(data)
    out["unseen"] = agreement(draw(captions[:n], seed), x[:n])
    x, captions = data.x["train"][:n] / 127.5 - 1, data.texts["train"][:n]
    out["trained"] = agreement(draw(captions, seed), x)
    out["guess"] = guess_error(den, tok, *unseen(data))
    row = evaluate(draw, data, n=n, seed=seed, n_trained=n)
    out["row"] = {k: row[k] for k in ("n", "fd", "fd_floor", "nearest", "nearest_real", "nearest_train_captions",
                                      "n_train_captions")}
    return out


def agreement(drawn, real):
    "How far drawings are from the pictures of their captions, and how often theirs is the nearest of all"
    a, b = (torch.nn.functional.avg_pool2d(v.float(), 2).flatten(1) for v in (drawn, real))
    rms = (drawn - real).square().mean().sqrt().item()
    return dict(rms=rms, found=(torch.cdist(a, b).argmin(1) == torch.arange(len(a))).float().mean().item())


@torch.no_grad()
def guess_error(den, tok, x, captions):
    "Root mean square error of the guessed picture at five times"
    out = []
    for t in (.1, .3, .5, .7, .9):
        time = torch.full((len(x),), t)
        c = den.coefs(time, x)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        x0_hat, _ = den.predict(c.alpha * x + c.sigma * noise, time, tok(captions))
        out.append((x0_hat - x).square().mean().sqrt().item())
    return out


def jumps(losses, window=50):
    "The largest loss of a step over the mean of the `window` steps before it, the first `window` steps left out"
    v = torch.tensor(losses)
    return max((v[i] / v[i - window:i].mean()).item() for i in range(window, len(v)))


def main(folder, images=None, *arms):
    "Write the folder; train on it with the closed form and without, and print what came out"
    from t2i_course.core.sources import load
    write(folder)
    for arm in (arms or ("closed", "without")) if images else ():
        r = trial(load(str(folder)), int(images), skip=arm == "closed")
        v = r.pop("losses")
        print(arm, r, f"loss: last tenth {sum(v[-len(v) // 10:]) / (len(v) // 10):.3f}, largest {max(v):.2f},",
              f"largest over the mean of the 50 steps before {jumps(v):.2f}", flush=True)


if __name__ == "__main__":
    import sys
    main(*sys.argv[1:])
