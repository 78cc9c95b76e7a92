"""What is said of a folder's pictures: names, caption files and metadata, as their owner meant them."""

import csv
import io
import json
import mimetypes
import posixpath
import unicodedata
from functools import lru_cache

from t2i_course.core.data import split_words
from t2i_course.core.files import CourseError


FILE = (
    "file_name",
    "file",
    "filename",
    "image",
    "path",
)  # columns that may name the picture, the first that is there


TEXT = ("text", "caption", "prompt", "texts", "captions", "prompts")  # and those that may hold captions


def raw(
    name,
):  # a name inside a folder is text with /; bytes that are no UTF-8 become surrogates, whatever the locale
    return name.encode("utf-8", "surrogateescape")


def shown(name):
    return raw(name).decode("utf-8", "backslashreplace")


def composed(name):
    return unicodedata.normalize("NFC", name)  # a Mac may write an accent as a character of its own


def in_order(name):
    return composed(name).split("/"), name  # the same on every machine


@lru_cache
def readable():
    "The endings of every format that Pillow reads"
    from PIL import Image

    Image.init()
    return {
        e for e, f in Image.registered_extensions().items() if f in Image.OPEN or f == "MPO"
    }  # .mpo opens as .jpg


def is_picture(name):
    kind, _ = mimetypes.guess_type(name)  # one that Pillow cannot read is to be named, not passed over
    return posixpath.splitext(name)[1].lower() in readable() or (kind or "").startswith("image/")


def text_of(data):  # UTF-8, or UTF-16 where the file begins with its mark; wrong bytes become surrogates
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "surrogateescape")


def checked(text):
    "The text, or an error when it holds bytes that were no UTF-8"
    text.encode()
    return text


def rows(name, data):
    "(line, row) of a metadata file; the row is {} where the line is damaged"
    if name.lower().endswith(".parquet"):
        try:
            from pyarrow.parquet import read_table
        except ImportError as e:
            raise CourseError("needs pyarrow: pip install pyarrow, or write metadata.jsonl") from e
        found = enumerate(read_table(io.BytesIO(data)).to_pylist(), 1)
    elif name.lower().endswith(".csv"):
        text = text_of(data)
        table = csv.DictReader(
            io.StringIO(text, newline=""), delimiter=max(",;\t", key=text.split("\n")[0].count)
        )
        # None stands for more cells than columns: a comma inside a caption, without quotes
        found = [(table.line_num, {} if None in row else row) for row in table]
    else:
        found = [
            (n, json_row(line))
            for n, line in enumerate(text_of(data).split("\n"), 1)
            if line.strip("\ufeff \t\r")
        ]
    return [(n, {k.strip().lower(): v for k, v in row.items()}) for n, row in found]


def json_row(text):
    try:
        row = json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def lacking(table):
    "The sentence about a column that no row has; None when there is nothing to say"
    columns = dict.fromkeys(k for _, row in table for k in row)
    for what, names in ("file_name", FILE), ("text, caption or prompt", TEXT):
        if columns and not any(k in columns for k in names):
            return f"has no column {what} (its columns: {', '.join(map(shown, columns))})"


def value_of(row, columns):
    "The first of these columns that holds something"
    values = [row[k] for k in columns if k in row]
    return next(filter(None, values), values[0])


def captions_of(row):
    "One caption, a list of them, or an empty place; an error when it is not text"
    value = value_of(row, TEXT)
    return [checked(t) for t in (value if isinstance(value, list) else [] if value is None else [value])]


def tidy(texts):  # without those in which there is nothing to see
    return list(dict.fromkeys(" ".join(t.split()) for t in texts if split_words(t)))
