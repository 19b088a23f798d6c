"""Numbers as people read them: percent, signed differences, durations. Unknown values become a dash."""

from __future__ import annotations

import math
from typing import Any

from mmalign.report.figures import ALIGNED, BASE, EvaluationFigures
from mmalign.statistics import Interval

NBSP = "\u00a0"
DASH = "–"
MINUS = "\u2212"


def percent(share: float) -> str:
    """0.714 -> ``71 %``; one decimal only where rounding would claim certainty (99.6, 0.4)."""
    if not math.isfinite(share):
        return DASH
    value = 100 * share
    if 0 < value < 1 or 99 < value < 100:
        return f"{value:.1f}{NBSP}%"
    return f"{value:.0f}{NBSP}%"


def percent_range(interval: Interval) -> str:
    """``64–78 %``; where one end needs a decimal both have one, unless it is 0 or 100."""
    if not interval.known:
        return "unknown"
    ends = interval.low, interval.high
    if any("." in percent(end) for end in ends):
        low, high = (f"{100 * end:.1f}" if 0 < end < 1 else f"{100 * end:.0f}" for end in ends)
        return f"{low}{DASH}{high}{NBSP}%"
    return f"{percent(interval.low).removesuffix(NBSP + '%')}{DASH}{percent(interval.high)}"


def number(value: float, *, signed: bool = False) -> str:
    """Three significant digits, with a true minus sign; ``signed`` also writes the plus."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 1e-4:
        mantissa, _, exponent = f"{size:.2e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("e-", f"e{MINUS}")
    else:
        decimals = max(0, 2 - math.floor(math.log10(size)))
        text = f"{size:,.{min(decimals, 6)}f}"
    sign = MINUS if value < 0 else "+" if signed else ""
    return sign + text


def axis(value: float) -> str:
    """A tick: as short as it can be (``0.25``, ``2,000``, ``1e−4``)."""
    size = abs(value)
    if size and (size >= 1e6 or size < 1e-4):
        mantissa, _, exponent = f"{size:.2e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("e-", f"e{MINUS}")
    else:
        text = f"{size:,.6f}".rstrip("0").rstrip(".")
    return MINUS + text if value < 0 else text


def with_interval(interval: Interval) -> tuple[str, str]:
    """A difference and its range, both rounded to two digits of the range's width: more would claim precision.

    ``("+0.16", "+0.08 to +0.24")``; the range is empty where it is not known.
    """
    width = interval.high - interval.low
    if not interval.known or width <= 0:
        return number(interval.mean, signed=True), ""
    largest = max(abs(interval.low), abs(interval.high))
    decimals = min(1 - math.floor(math.log10(width)), 3 - math.floor(math.log10(largest)))  # four digits are enough
    if decimals > 6:
        parts = [number(value, signed=True) for value in (interval.mean, interval.low, interval.high)]
    else:
        parts = [_fixed(value, max(0, decimals)) for value in (interval.mean, interval.low, interval.high)]
    return parts[0], f"{parts[1]} to {parts[2]}"


def _fixed(value: float, decimals: int) -> str:
    text = f"{abs(value):,.{decimals}f}"
    if not text.strip("0.,"):
        return text
    return (MINUS if value < 0 else "+") + text


def signed_interval(interval: Interval) -> str:
    """``+0.49 (+0.31 to +0.66)``."""
    mean, between = with_interval(interval)
    return f"{mean} ({between})" if between else mean


def count(value: Any, noun: str, plural: str | None = None) -> str:
    """``1 prompt``, ``1,280 prompts``."""
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """``48 s``, ``3 min 20 s``, ``5 h 02 min``."""
    if not math.isfinite(seconds):
        return DASH
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NBSP}s" if whole else f"{seconds:.1f}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60:02d}{NBSP}min"


def verdict(interval: Interval) -> str:
    """``better``, ``worse`` or ``open``: whether an interval of a win rate leaves one half out, and on which side."""
    if not interval.known or interval.includes(0.5):
        return "open"
    return "better" if interval.low > 0.5 else "worse"


def headline(figures: EvaluationFigures | None) -> str:
    """The result of a run in one sentence that claims no more than the interval allows."""
    reward = figures.headline() if figures is not None else None
    if figures is None or reward is None:
        return "This run has no evaluation against the base yet."
    rate = reward.against_base[ALIGNED].win_rate
    if rate.prompts == 0:
        return f"No comparison was possible: {reward.name} gave no finite score."
    prompts = count(rate.prompts, "prompt")
    inside = f"95{NBSP}% interval {percent_range(rate)}"
    if figures.images_per_prompt > 1:
        prompts = f"the comparisons on {prompts}"
    found = verdict(rate)
    if found == "better":
        return f"The aligned model wins {percent(rate.mean)} of {prompts} against the {BASE} ({inside})."
    if found == "worse":
        return f"The aligned model is worse than the {BASE}: it wins only {percent(rate.mean)} of {prompts} ({inside})."
    return (
        f"No improvement over the {BASE} was shown: the aligned model wins {percent(rate.mean)} of {prompts}, "
        f"and the {inside} includes 50{NBSP}%."
    )
