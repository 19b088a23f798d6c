"""How much of what a caption names is not in the picture: CHAIR-like measures against the scene.

CHAIR (arXiv:1809.02156) counts objects of a fixed list that a caption names and the picture does not have: per object named
(CHAIR_i) and per caption (CHAIR_s). Here an object is a colour with a shape, and numbers count: who says two red circles where
there is one has named one that is not there. Recall and the number of objects named stand beside them, because a caption that
says less hallucinates less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmalign.statistics import ratio_interval as ratio_interval
from mmalign.world.captions import Reading, read_caption
from mmalign.world.scenes import BoardScene


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionCheck:
    """Counts for one caption. ``misplaced`` is how many rightly named objects are said to be where none like them is."""

    named: int
    hallucinated: int
    found: int
    there: int
    misplaced: int
    words: int
    unread: int

    @property
    def has_hallucination(self) -> bool:
        return self.hallucinated > 0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall of the objects named, in [0, 1]; 0 where nothing is right."""
        return 2 * self.found / (self.named + self.there) if self.found else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HallucinationRates:
    """Over a set of captions, each in [0, 1] except the last two, which are per caption.

    ``chair_i`` is hallucinated objects per named object, ``chair_s`` the share of captions with at least one, ``recall`` the
    share of the pictures' objects that are named, ``misplaced`` the share of the rightly named ones that are said to be where
    none like them is, ``unread`` the share of captions with a sentence that could not be read.
    """

    chair_i: float
    chair_s: float
    recall: float
    misplaced: float
    unread: float
    objects: float
    words: float


def check_caption(text: str, scene: BoardScene) -> CaptionCheck:
    """Compare what a caption names with what the scene has."""
    reading = read_caption(text)
    there = scene.objects
    named: Counter[tuple[str, str]] = Counter()
    for mention in reading.mentions:
        named[mention.colour, mention.shape] += mention.count
    found = sum((named & there).values())
    total = sum(named.values())
    return CaptionCheck(
        named=total,
        hallucinated=total - found,
        found=found,
        there=sum(there.values()),
        misplaced=_misplaced(reading, scene),
        words=len(text.split()),
        unread=len(reading.unread),
    )


def _misplaced(reading: Reading, scene: BoardScene) -> int:
    at = {(item.colour, item.shape, item.place) for item in scene.items}
    return sum(
        mention.place is not None
        and (mention.colour, mention.shape) in scene.objects
        and (mention.colour, mention.shape, mention.place) not in at
        for mention in reading.mentions
    )


def rates(checks: Sequence[CaptionCheck]) -> HallucinationRates:
    """Rates over captions.

    Raises:
        ValueError: there are no captions.
    """
    if not checks:
        raise ValueError("no captions to take rates of")
    named = sum(check.named for check in checks)
    found = sum(check.found for check in checks)
    return HallucinationRates(
        chair_i=sum(check.hallucinated for check in checks) / max(1, named),
        chair_s=float(np.mean([check.has_hallucination for check in checks])),
        recall=found / sum(check.there for check in checks),
        misplaced=sum(check.misplaced for check in checks) / max(1, found),
        unread=float(np.mean([check.unread > 0 for check in checks])),
        objects=named / len(checks),
        words=float(np.mean([check.words for check in checks])),
    )


def hallucination_rates(texts: Sequence[str], scenes: Sequence[BoardScene]) -> HallucinationRates:
    """Rates of captions, each against its own scene."""
    return rates([check_caption(text, scene) for text, scene in zip(texts, scenes, strict=True)])
