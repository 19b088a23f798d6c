"""Means, paired differences and win rates with bootstrap intervals over prompts.

The unit that is resampled is the prompt, not the picture: pictures of one prompt resemble each other, so counting them
as independent cases would make every interval too narrow (the cluster bootstrap; Davison & Hinkley, "Bootstrap Methods
and their Application", 1997, section 3.8). Pictures are therefore averaged inside their prompt first.

A score that is not finite (a judge that could not answer) is left out and counted; it never becomes a 0 or a loss.
Not for: deciding which models or rewards to compare (``mmalign.evaluation``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 2_000_000
"""Indices drawn at a time: 16 MB, whatever the number of prompts."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An average over prompts and where it may lie; all three are NaN where nothing was known."""

    mean: float
    low: float
    high: float
    prompts: int = 0
    """Prompts that counted."""
    excluded: int = 0
    """Pictures (or values) left out because a score was not finite."""

    @property
    def known(self) -> bool:
        """Whether there is a mean with an interval."""
        return math.isfinite(self.mean) and math.isfinite(self.low) and math.isfinite(self.high)

    def includes(self, value: float) -> bool:
        """Whether `value` cannot be ruled out; an unknown interval rules out nothing."""
        return not self.known or self.low <= value <= self.high

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON; what is unknown becomes None, since NaN is not JSON."""

        def number(value: float) -> float | None:
            return float(value) if math.isfinite(value) else None

        return {
            "mean": number(self.mean),
            "low": number(self.low),
            "high": number(self.high),
            "prompts": self.prompts,
            "excluded": self.excluded,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Interval:
        """Back from `as_dict`."""

        def number(name: str) -> float:
            value = values.get(name)
            return math.nan if value is None else float(value)

        return cls(
            mean=number("mean"),
            low=number("low"),
            high=number("high"),
            prompts=int(values.get("prompts") or 0),
            excluded=int(values.get("excluded") or 0),
        )


def per_prompt(values: ArrayLike, prompts: Sequence[str] | None = None) -> Floats:
    """The average of every prompt over its finite values.

    Args:
        values: ``[N]`` with `prompts`, or ``[P]`` or ``[P, S]`` (S pictures of each prompt) without.
        prompts: the prompt of each value; a prompt that occurs twice is one prompt.

    Returns:
        ``[P]`` float64 in the order of first occurrence; NaN for a prompt without a finite value.
    """
    array = np.asarray(values, dtype=np.float64)
    if prompts is None:
        if array.ndim not in (1, 2):
            raise ValueError(f"expected [P] or [P, S] values, got the shape {array.shape}")
        array = array.reshape(array.shape[0], -1)
        owners = np.repeat(np.arange(array.shape[0]), array.shape[1])
        total, array = array.shape[0], array.reshape(-1)
    else:
        if array.shape != (len(prompts),):
            raise ValueError(f"{len(prompts)} prompts for values of the shape {array.shape}")
        places: dict[str, int] = {}
        owners = np.array([places.setdefault(prompt, len(places)) for prompt in prompts], dtype=np.int64)
        total = len(places)
    finite = np.isfinite(array)
    sums = np.bincount(owners[finite], weights=array[finite], minlength=total)
    counts = np.bincount(owners[finite], minlength=total)
    averages: Floats = np.divide(sums, counts, out=np.full(total, np.nan), where=counts > 0)
    return averages


def mean_interval(
    values: ArrayLike,
    prompts: Sequence[str] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The mean over prompts with its percentile bootstrap interval (Efron & Tibshirani 1993, section 13.3).

    Args:
        values, prompts: as in `per_prompt`.
        seed: of the resampling; equal seeds and equal numbers of prompts use the same resamples.
        level: coverage, 0.95 by default.

    Returns:
        An interval; its ends are NaN with fewer than two prompts, where a bootstrap knows nothing.
    """
    averages = per_prompt(values, prompts)
    excluded = int((~np.isfinite(np.asarray(values, dtype=np.float64))).sum())
    kept = averages[np.isfinite(averages)]
    if kept.size == 0:
        return Interval(mean=math.nan, low=math.nan, high=math.nan, prompts=0, excluded=excluded)
    mean = float(kept.mean())
    if kept.size == 1:
        return Interval(mean=mean, low=math.nan, high=math.nan, prompts=1, excluded=excluded)
    tail = (1 - level) / 2
    low, high = np.quantile(_bootstrap_means(kept, seed=seed, resamples=resamples), [tail, 1 - tail])
    return Interval(mean=mean, low=float(low), high=float(high), prompts=int(kept.size), excluded=excluded)


def ratio_interval(
    parts: Sequence[float], wholes: Sequence[float], *, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Sum of `parts` over sum of `wholes` with its percentile bootstrap interval; rows are what is resampled.

    For rates that are ratios of two sums over rows and not means of ratios, such as CHAIR_i and a micro F1. A resample without
    wholes counts as 0.
    """
    top, bottom = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    mean = float(top.sum() / max(1.0, bottom.sum()))
    drawn = np.random.default_rng(seed).integers(len(top), size=(resamples, len(top)))
    ratios = top[drawn].sum(1) / np.maximum(1.0, bottom[drawn].sum(1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(mean=mean, low=float(low), high=float(high), prompts=len(top))


def paired_difference(
    scores: ArrayLike, baseline: ArrayLike, prompts: Sequence[str] | None = None, *, seed: int = 0
) -> Interval:
    """How much higher `scores` are than `baseline`, picture by picture on the same prompt and noise, in score units.

    Args:
        scores, baseline: equal shapes, as in `per_prompt`. A picture counts only if both are finite.
    """
    return mean_interval(_paired(scores, baseline), prompts, seed=seed)


def win_rate(
    scores: ArrayLike, baseline: ArrayLike, prompts: Sequence[str] | None = None, *, seed: int = 0
) -> Interval:
    """The share of pictures with a higher score than their partner on the same prompt and noise; a tie is one half.

    Outcomes are averaged inside each prompt, then over prompts. Where every prompt was won, or lost, all resamples are
    alike and the bootstrap interval has no width; the exact binomial bound (Clopper & Pearson 1934) is given instead.

    Args:
        scores, baseline: equal shapes, as in `per_prompt`. A picture counts only if both are finite.

    Returns:
        Shares in [0, 1]; 0.5 means no difference.
    """
    difference = _paired(scores, baseline)
    outcome = np.where(np.isfinite(difference), (np.sign(difference) + 1) / 2, np.nan)
    found = mean_interval(outcome, prompts, seed=seed)
    low, high = found.low, found.high
    bound = ((1 - LEVEL) / 2) ** (1 / max(1, found.prompts))
    if found.mean == 1.0:
        low, high = bound, 1.0
    elif found.mean == 0.0:
        low, high = 0.0, 1.0 - bound
    elif found.prompts == 1:
        low, high = 0.0, 1.0
    return Interval(mean=found.mean, low=low, high=high, prompts=found.prompts, excluded=found.excluded)


def _paired(scores: ArrayLike, baseline: ArrayLike) -> Floats:
    first, second = np.asarray(scores, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"scores of the shape {first.shape} cannot be paired with {second.shape}")
    both = np.isfinite(first) & np.isfinite(second)
    difference: Floats = np.subtract(first, second, out=np.full(first.shape, np.nan), where=both)
    return difference


def _bootstrap_means(values: Floats, *, seed: int, resamples: int) -> Floats:
    """Means of `resamples` draws with replacement of all values. [resamples]"""
    generator = np.random.Generator(np.random.Philox(key=seed))
    means = np.empty(resamples)
    rows = max(1, _CHUNK // values.size)
    for start in range(0, resamples, rows):
        stop = min(resamples, start + rows)
        means[start:stop] = values[generator.integers(0, values.size, (stop - start, values.size))].mean(1)
    return means
