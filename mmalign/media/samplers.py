"""Which frames of a video are taken: named rules over frame numbers or times.

Numbers count frames in the order they are shown, from 0. Everything is integer or float64 arithmetic on the CPU, so that a
name and a count mean the same frames everywhere. Not for opening files.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from mmalign.errors import DataError

BY_NUMBER: Final = ("midpoint", "interior", "linspace")
_EPSILON = 1e-6
"""Seconds; a time asked for that is this close before a frame's own means that frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A rule that picks frames. Checked when made.

    - ``midpoint``: floor((i + 1/2) N / n), the middles of n equal pieces;
    - ``interior``: floor(i N / (n + 1)) for i = 1..n, as the released TEMPLE loader (arXiv:2503.16929);
    - ``linspace``: floor(i (N - 1) / (n - 1)), both ends included;
    - ``fps:X``: what is shown at 0, 1/X, 2/X, ... seconds; of more than `count` such frames, `count` of them by ``linspace``;
    - ``at:T1,T2,...``: what is shown at these seconds after the first frame.

    Args:
        name: the rule, with its numbers for the last two.
        count: frames to take; for ``fps:X`` the most; ignored by ``at:``.

    Raises:
        DataError: an unknown rule, or a count or rate with no meaning.
    """

    name: str = "midpoint"
    count: int = 8

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"a video sampler takes at least one frame, got {self.count}")
        if self.name in BY_NUMBER:
            return
        kind = self.name.partition(":")[0]
        if kind == "fps":
            if not self.rate > 0:
                raise DataError(f"'{self.name}': the rate must be above 0 frames a second")
        elif kind == "at":
            if not self.times:
                raise DataError(f"'{self.name}': names no time")
        else:
            known = ", ".join((*BY_NUMBER, "fps:X", "at:T1,T2,..."))
            raise DataError(f"video sampler '{self.name}' is not known (known: {known})")

    @property
    def rate(self) -> Fraction:
        """Frames a second of ``fps:X``; 0 for the others."""
        kind, _, number = self.name.partition(":")
        if kind != "fps":
            return Fraction(0)
        try:
            return Fraction(number)
        except (ValueError, ZeroDivisionError) as error:
            raise DataError(f"video sampler '{self.name}': {number!r} is no number") from error

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds of ``at:...``; empty for the others."""
        kind, _, numbers = self.name.partition(":")
        if kind != "at":
            return ()
        try:
            found = tuple(float(number) for number in numbers.split(",") if number.strip())
        except ValueError as error:
            raise DataError(f"video sampler '{self.name}': not a list of seconds") from error
        if not all(math.isfinite(time) and time >= 0 for time in found):
            raise DataError(f"video sampler '{self.name}': times are seconds from 0 on")
        return found

    def choose(self, times: Sequence[float], duration: float) -> list[int]:
        """Frame numbers to take, in the order of the rule; repeats where the video is shorter.

        Args:
            times: when each frame is shown, seconds after the first one, ascending. [N]
            duration: until when the last one is shown, in seconds.

        Raises:
            DataError: there are no frames.
        """
        total, count = len(times), self.count
        if total == 0:
            raise DataError("a video without frames has none to choose")
        if self.name == "midpoint":
            return [(2 * i + 1) * total // (2 * count) for i in range(count)]
        if self.name == "interior":
            return [i * total // (count + 1) for i in range(1, count + 1)]
        if self.name == "linspace":
            return spread(total, count)
        if self.times:
            return [shown_at(times, time) for time in self.times]
        rate = self.rate
        ticks = max(1, math.ceil(Fraction(max(duration - _EPSILON, 0.0)) * rate))
        taken = range(ticks) if ticks <= count else spread(ticks, count)
        return [shown_at(times, float(Fraction(tick) / rate)) for tick in taken]


def spread(total: int, count: int) -> list[int]:
    """`count` numbers from 0 to total - 1, evenly, both ends included: floor(i (total - 1) / (count - 1))."""
    return [i * (total - 1) // (count - 1) for i in range(count)] if count > 1 else [0]


def shown_at(times: Sequence[float], time: float) -> int:
    """Number of the frame on screen at a time: the last that began by then; the first before all."""
    return max(bisect_right(times, time + _EPSILON) - 1, 0)
