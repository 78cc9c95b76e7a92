"""Drawings as files: labelled sheets of pictures, and arrays."""

import torch

from t2i_course.core.files import CourseError, write_whole


def to_bytes(
    x,  # (n c h w) in [-1,1]
):  # (n h w c) uint8
    "Pictures as they are stored"
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


SHEET = 256  # pictures that can still be told apart, and read, on one sheet


def fits_sheet(n: int):
    "More pictures than a sheet can show are refused, before they are drawn"
    if n <= SHEET:
        return
    raise CourseError(
        f"{n:,} pictures do not fit on one sheet, which shows at most {SHEET}: "
        "take --out pictures.npz, or draw fewer"
    )


def write_sheet(
    path,  # a .png file
    x,  # (n h w c) uint8
    texts,  # n captions
    title="",  # above the sheet
):
    "A labelled grid of pictures"
    from t2i_course.core.plots import sheet

    fits_sheet(len(x))
    x = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1

    def write(p):
        with open(p, "wb") as f:
            sheet(x, texts, f, title=title)

    write_whole(path, write)
