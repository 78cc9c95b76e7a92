"""How the course cuts a text into words, in any script, and what it says of words that a model never saw."""

import re
import unicodedata
from functools import lru_cache

_UNSEEN = re.compile("VARIATION SELECTOR|GRAPHEME JOINER|HANGUL.* FILLER")  # letters by kind, but no shape
_ALONE = re.compile("(CJK|TANGUT).* IDEOGRAPH|IDEOGRAPHIC|(HALFWIDTH )?(HIRAGANA|KATAKANA|HENTAIGANA)")


@lru_cache(10_000)
def kind_of(
    sign: str,  # one character
) -> str:  # letter, mark, other (a word by itself), a space, or '' for what is not seen
    "What a character is to the words around it, by the first letter"
    name, kind = unicodedata.name(sign, ""), unicodedata.category(sign)
    if sign.isspace() or sign in "_\u200b":
        return " "
    if kind in ("Cf", "Cs") or _UNSEEN.search(name):
        return ""
    if kind in ("Mn", "Mc") or name.endswith("SOUND MARK"):
        return "m"  # also the long vowel of kana
    return "l" if sign.isalnum() and not _ALONE.match(name) else "o"


def split_words(
    caption: str,  # any text
) -> list:  # its words in lower case; each sign is a word of its own
    "Letters and digits of any script hold together with their marks, everything else stands alone"
    if caption.isascii():
        return re.findall(r"[a-z0-9]+|[^\w\s]", caption.lower())  # the same, but faster
    text = unicodedata.normalize("NFC", "".join(filter(kind_of, caption))).lower()
    return [text[slice(*m.span())] for m in re.finditer("l[lm]*|[om]m*", "".join(map(kind_of, text)))]


def n_tokens(
    caption: str,  # any text
) -> int:
    "Words of a caption and one token for its start"
    return 1 + len(split_words(caption))


def unread(
    caption: str,  # one text
    known,  # the words that a model knows
    max_len: int,  # tokens that it reads, the start included
) -> list:  # sentences, empty when all is well
    "What a model will not see of a caption"
    words = split_words(caption)
    unseen = list(dict.fromkeys(w for w in words if w not in known))
    out = [f"'{caption}': the model never saw {', '.join(unseen)}; read as 'unknown word'"] if unseen else []
    if len(words) >= max_len:
        out.append(f"'{caption}': cut after '{words[max_len - 2]}' ({max_len - 1} words at most)")
    return out
