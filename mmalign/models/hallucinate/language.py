"""Answers spoiled by language alone: words exchanged for others that stand between the same neighbours elsewhere. No model, no
picture.

The baseline of everything that looks: what it writes is grammatical and wrong, but wrong in places that no model was ever
tempted by.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Final

import numpy as np

_WORD: Final = re.compile(r"\w+")
_EDGE: Final = ""


class WordSwaps:
    """Exchanges words by what the texts it has read have in the same place.

    Args:
        texts: answers to learn from; case is ignored, and sentences end a neighbourhood.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for text in texts:
            for _, word, between in _places(text):
                self._seen[between][word] += 1

    def spoil(self, text: str, share: float, rng: np.random.Generator) -> tuple[str, int]:
        """The text with a share of the words that can be exchanged exchanged, at least one; and how many were.

        Args:
            share: in (0, 1]. Neighbours are never exchanged both, for each was chosen to fit the other.
        """
        chances = []
        for number, (span, word, between) in enumerate(_places(text)):
            others = {other: count for other, count in sorted(self._seen[between].items()) if other != word}
            if others:
                chances.append((number, span, others))
        wanted = max(1, round(share * len(chances)))
        chosen: dict[int, tuple[tuple[int, int], str]] = {}
        for index in rng.permutation(len(chances)).tolist():
            number, span, others = chances[index]
            if len(chosen) < wanted and number - 1 not in chosen and number + 1 not in chosen:
                weights = np.array(list(others.values()), np.float64)
                chosen[number] = (span, str(rng.choice(list(others), p=weights / weights.sum())))
        out, place = "", 0
        for (first, last), other in (chosen[number] for number in sorted(chosen)):
            out += text[place:first] + (other.capitalize() if text[first].isupper() else other)
            place = last
        return out + text[place:], len(chosen)


def _places(text: str) -> list[tuple[tuple[int, int], str, tuple[str, str]]]:
    """Every word: its characters, itself in lower case, and its neighbours within the sentence."""
    found = list(_WORD.finditer(text))
    made = []
    for number, item in enumerate(found):
        before = found[number - 1] if number else None
        after = found[number + 1] if number + 1 < len(found) else None
        left = _EDGE if before is None or _ends(text[before.end() : item.start()]) else before[0].lower()
        right = _EDGE if after is None or _ends(text[item.end() : after.start()]) else after[0].lower()
        made.append((item.span(), item[0].lower(), (left, right)))
    return made


def _ends(between: str) -> bool:
    return any(mark in between for mark in ".?!\n")
