"""A measured row in words."""

import math


def margin(
    share,  # 0..1, of n independent pictures
    n,  # pictures
) -> float:  # half the width of the 95% interval
    "How far a share can be off by the luck of the draw: Wilson's interval, which is not empty at 0 or 1"
    z = 1.96
    return z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)


# unseen real pictures come so near in one case of a hundred; twenty times that is no chance with 40 drawings
COPIES = 0.2


def pc(share) -> str:
    return f"{100 * share:.1f}%"


def counted(o: dict) -> str:
    "A share, with its margin where it says how many captions it is of"
    if "n" not in o:
        return pc(o["all"])
    return f"{pc(o['all'])} +- {100 * margin(o['all'], o['n']):.1f} ({o['n']:,} captions)"


def matched_text(
    held: dict,  # `heldout` of a row
) -> str:
    "Held-out captions beside the seen ones that name the same"
    low, high = (f"{100 * held[k]:+.1f}" for k in ("gap_low", "gap_high"))
    return (
        f"  trained pairs, in captions that name the same digits, inks and attributes: "
        f"{counted(held['seen_matched'])}; unseen minus trained {100 * held['gap']:+.1f} points "
        f"(95% interval {low} to {high})"
    )


def distance_text(row: dict) -> list:
    "The Frechet distance with its n and its floor at that n"
    floor, std = row["fd_floor"], row.get("fd_floor_std")
    digits = 2 if floor >= 0.5 else 4
    spread = f" +- {std:.{digits}f}, mean of {row['splits']} cuts of real pictures" if std is not None else ""
    first = (
        f"Frechet distance {row['fd']:.{digits}f} = {row['fd'] / floor:.1f} times that of real pictures "
        f"({floor:.{digits}f}{spread}); precision {row['precision']:.2f}, recall {row['recall']:.2f}"
    )
    sizes = f"  {row['n']:,} drawings of test captions"
    if "n_reference" in row:
        kind = "training" if "features" in row else "real"
        sizes += f" against {row['n_reference']:,} {kind} pictures"
    if "features" in row:
        sizes += f"; features: {row['features']}"
    if "fd_unseen" in row:
        sizes += (
            f"; against the {row['n_unseen']:,} that nobody trained on {row['fd_unseen']:.{digits}f} = "
            f"{row['fd_unseen'] / row['fd_unseen_floor']:.1f} times that of real ones"
        )
    return [first, sizes] + ([f"  {row['n_note']}"] if "n_note" in row else [])


def row_text(row: dict) -> str:
    "A row for people"
    out = []
    if "obedience" in row:
        o = row["obedience"]
        parts = {
            k: v for k, v in o.items() if k not in ("all", "ceiling", "chance", "n") and isinstance(v, float)
        }
        out += [
            f"pictures that show all their caption demands: {counted(o)}   "
            f"(judge on unseen real pictures {pc(o['ceiling'])}, on shuffled captions {pc(o['chance'])})",
            "  by attribute: " + "  ".join(f"{k} {pc(v)}" for k, v in parts.items()),
        ]
    if "heldout" in row:
        out += [f"  digit x ink pairs never seen in training: {counted(row['heldout'])}"]
        if "seen_matched" in row["heldout"]:
            out += [matched_text(row["heldout"])]
    if "fd" in row:
        out += distance_text(row)
    elif "note" in row:
        out += [f"no Frechet distance: {row['note']}"]
    out += [
        f"nearest-training-picture rate {pc(row['nearest'])} of {row['n']:,} drawings of test captions "
        f"(unseen real pictures {pc(row['nearest_real'])}); "
        f"{row['seconds_per_1000']:.0f} s per 1,000 pictures"
    ]
    if "nearest_train_captions" in row:
        rate = row["nearest_train_captions"]
        told = ": copies. It has learned its pictures by heart" if rate >= COPIES else ""
        out += [f"  {pc(rate)} of {row['n_train_captions']:,} drawings of training captions{told}"]
    return "\n".join(out)
