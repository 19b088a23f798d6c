"""Deep grey values to the 256 of a picture: which of them are black and which white. For radiographs, whose 16-bit files use
12 bits or less."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from mmalign.errors import DataError

KINDS: Final = ("full", "range", "percentile", "bits", "centre")
_NUMBER: Final = r"-?\d+(?:\.\d+)?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A rule for what is black and what is white.

    ``full``: 0 and 65535. ``range``: the picture's lowest and highest value. ``percentile``: two percentiles of its values.
    ``bits``: 0 and ``2 ** bits - 1``. ``centre``: a centre and a width, as radiologists set them.
    """

    kind: Literal["full", "range", "percentile", "bits", "centre"] = "range"
    first: float = 0.0
    """Lower percentile, number of bits, or centre."""
    second: float = 100.0
    """Upper percentile, or width."""

    @classmethod
    def parse(cls, text: str) -> Window:
        """From ``full``, ``range``, ``percentile:LOW,HIGH``, ``bits:N`` or ``CENTRE,WIDTH``.

        Raises:
            DataError: none of these, or numbers out of range.
        """
        words = text.strip()
        if words in ("full", "range"):
            return cls(kind=words)  # type: ignore[arg-type]
        found = re.fullmatch(rf"percentile:({_NUMBER}),({_NUMBER})", words)
        if found and 0 <= float(found[1]) < float(found[2]) <= 100:
            return cls(kind="percentile", first=float(found[1]), second=float(found[2]))
        found = re.fullmatch(r"bits:(\d+)", words)
        if found and 1 <= int(found[1]) <= 16:
            return cls(kind="bits", first=float(found[1]))
        found = re.fullmatch(rf"({_NUMBER}),({_NUMBER})", words)
        if found and float(found[2]) > 0:
            return cls(kind="centre", first=float(found[1]), second=float(found[2]))
        raise DataError(
            f"window '{text}': expected full, range, percentile:LOW,HIGH (0 to 100), bits:N (1 to 16) or CENTRE,WIDTH (a width "
            "above 0)"
        )

    def limits(self, values: np.ndarray) -> tuple[float, float]:
        """The values that become black and white.

        Args:
            values: numbers of one picture, any shape, at least one.
        """
        if self.kind == "full":
            return 0.0, 65535.0
        if self.kind == "bits":
            return 0.0, float(2 ** int(self.first) - 1)
        if self.kind == "centre":
            return self.first - self.second / 2, self.first + self.second / 2
        if self.kind == "percentile":
            low, high = np.percentile(values, [self.first, self.second])
            return float(low), float(high)
        return float(values.min()), float(values.max())


def to_grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of the same shape: `low` and below become 0, `high` and above 255, rounded between. A flat picture becomes black."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return np.zeros(values.shape, np.uint8)
    share = (values.astype(np.float64) - low) / (high - low)
    return (255 * np.clip(share, 0, 1) + 0.5).astype(np.uint8)
