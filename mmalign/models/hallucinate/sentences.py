"""Sentences of an answer, where one ends while it is being written, and where one may be cut.

The paper does not say how it splits; here a sentence ends at ``.``, ``?`` or ``!`` (with closing quotes and brackets) before
white space, at the full stops of Chinese and Japanese, and at a line break. A full stop behind a single letter, a digit before
another digit, or a common abbreviation ends nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

ABBREVIATIONS: Final = frozenset(
    {"mr", "mrs", "ms", "dr", "prof", "st", "no", "vs", "etc", "fig", "approx", "e.g", "i.e", "cf", "inc", "jr", "sr"}
)
_END: Final = re.compile(r"[.?!]+[\"'”’)\]]*(?=\s)|[。？！]+|(?=\n)")
_SWAPS: Final = {"yes": "no", "no": "yes"}
_FIRST: Final = re.compile(r"^(\s*)(yes|no)\b", re.IGNORECASE)


def sentence_end(text: str) -> int | None:
    """Where the first sentence ends, its mark included; None while that cannot be told.

    A mark at the very end of the text is not taken for an end: a digit may follow.
    """
    for found in _END.finditer(text):
        if text[: found.start()].strip() and not _is_abbreviation(text, found):
            return found.end()
    return None


def _is_abbreviation(text: str, found: re.Match[str]) -> bool:
    if found[0] != ".":
        return False
    word = re.split(r"[\s(\[\"']", text[: found.start()])[-1].lower()
    return word in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i")


def split_sentences(text: str) -> list[tuple[int, int]]:
    """[first, end) of every sentence; what lies between them is white space."""
    spans = []
    place = len(text) - len(text.lstrip())
    while place < len(text.rstrip()):
        length = sentence_end(text[place:])
        end = len(text.rstrip()) if length is None else place + length
        spans.append((place, end))
        place = end + len(text[end:]) - len(text[end:].lstrip())
    return spans


def swap_yes_no(sentence: str) -> str | None:
    """The sentence with a leading yes turned into no, or the reverse, in the same case; None where it begins otherwise.

    Whole words alone: the published pattern has no word border and would turn *Note that* into *Yeste that*.
    """
    found = _FIRST.match(sentence)
    if found is None:
        return None
    word = found[2]
    other = _SWAPS[word.lower()]
    shown = other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
    return f"{found[1]}{shown}{sentence[found.end() :]}"


def cut_places(text: str, span: tuple[int, int], tokens: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where a sentence may be cut: (number of tokens kept, number of characters of the text kept), in order, never all of it.

    Cuts lie in front of tokens that begin a word; where a sentence has fewer than two of these, as in scripts without
    blanks, in front of any token in it.

    Args:
        span: the sentence's characters.
        tokens: the characters of every token of the text.
    """
    words, any_place = [], []
    for number, (first, last) in enumerate(tokens):
        inner = text[max(first, 0) : last]
        begin = max(first, 0) + len(inner) - len(inner.lstrip())
        if not inner.strip() or not span[0] <= begin < span[1]:
            continue
        if first == begin or first < 0 or text[first:begin].isspace():
            any_place.append((number, begin))
            if begin == span[0] or text[begin - 1].isspace():
                words.append((number, begin))
    return words if len(words) > 1 else any_place
