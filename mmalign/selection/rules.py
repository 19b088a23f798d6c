"""From a survey to a verdict: shots, groups of alike shots, clips, frames, or the named reason why a film is not used.

Pure functions over numbers, each a rule of the release (lscpku/TEMPLE) with its threshold in the settings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmalign.selection.settings import RulesConfig, ShotsConfig
from mmalign.selection.shots import Survey

REASONS = {
    "too_few_shots": "fewer shots than rules.min_shots", "too_many_shots": "more shots than rules.max_shots",
    "long_shot": "a shot longer than rules.max_shot_seconds", "too_few_clips": "fewer clips than rules.min_clips",
    "repetitive": "a group of alike shots comes back too often", "blurred": "the named frames are less sharp than asked for",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """Frames `first` to `last` (both included) and their seconds."""

    first: int
    last: int
    start: float
    end: float

    @property
    def middle(self) -> int:
        return (self.first + self.last) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Consecutive shots of one group."""

    group: int
    first: int
    last: int
    start: float
    end: float


class Refusal(Exception):
    """Why a film is not used: a name of `REASONS`, and the figures."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def shots_of(survey: Survey, settings: ShotsConfig) -> list[Shot]:
    """The shots that are left: long enough, and not of one grey level."""
    ends = [*survey.cuts[1:], len(survey.times)]
    found = []
    for first, stop in zip(survey.cuts, ends, strict=True):
        start = float(survey.times[first])
        end = float(survey.times[stop]) if stop < len(survey.times) else survey.duration
        span = float(survey.high[first:stop].max() - survey.low[first:stop].min())
        if stop - first >= settings.min_frames and end - start >= settings.min_seconds and span >= settings.min_range:
            found.append(Shot(first=first, last=stop - 1, start=start, end=end))
    return found


def refuse_shots(shots: Sequence[Shot], rules: RulesConfig) -> None:
    """Raises Refusal for a film with too few, too many or too long shots."""
    if len(shots) < rules.min_shots:
        raise Refusal("too_few_shots", f"{len(shots)} of at least {rules.min_shots}")
    if len(shots) > rules.max_shots:
        raise Refusal("too_many_shots", f"{len(shots)} of at most {rules.max_shots}")
    longest = max(shot.end - shot.start for shot in shots)
    if longest > rules.max_shot_seconds:
        raise Refusal("long_shot", f"{longest:.1f} s of at most {rules.max_shot_seconds:g}")


def groups_of(features: np.ndarray, threshold: float) -> list[int]:
    """Groups of alike shots: the most alike pair is merged while its cosine is above the threshold.

    Args:
        features: [N, D] of unit length. A merged group is the plain mean of the two, whatever their sizes (as the release), so
            similarities are the means of the two rows.

    Returns:
        per shot, the number of its group, counted in order of first appearance.
    """
    members: list[list[int]] = [[number] for number in range(len(features))]
    rows = np.asarray(features @ features.T, dtype=np.float64)
    while len(members) > 1:
        upper = np.where(np.triu(np.ones_like(rows, dtype=bool), 1), rows, -np.inf)
        a, b = (int(value) for value in np.unravel_index(int(np.argmax(upper)), upper.shape))
        if not upper[a, b] > threshold:
            break
        mean = (rows[a] + rows[b]) / 2
        rows[a], rows[:, a] = mean, mean
        rows = np.delete(np.delete(rows, b, 0), b, 1)
        members[a] += members.pop(b)
    group = {shot: number for number, own in enumerate(members) for shot in own}
    order = {number: place for place, number in enumerate(dict.fromkeys(group[shot] for shot in range(len(features))))}
    return [order[group[shot]] for shot in range(len(features))]


def clips_of(shots: Sequence[Shot], groups: Sequence[int]) -> list[Clip]:
    """Runs of consecutive shots of one group."""
    clips: list[Clip] = []
    for shot, group in zip(shots, groups, strict=True):
        if clips and clips[-1].group == group:
            last = clips.pop()
            clips.append(Clip(group=group, first=last.first, last=shot.last, start=last.start, end=shot.end))
        else:
            clips.append(Clip(group=group, first=shot.first, last=shot.last, start=shot.start, end=shot.end))
    return clips


def refuse_clips(clips: Sequence[Clip], rules: RulesConfig) -> None:
    """Raises Refusal for a film with too few clips, or one that cuts back and forth."""
    if len(clips) < rules.min_clips:
        raise Refusal("too_few_clips", f"{len(clips)} of at least {rules.min_clips}")
    group, times = Counter(clip.group for clip in clips).most_common(1)[0]
    if times > len(clips) // 3 or times > rules.max_repeats:
        raise Refusal("repetitive", f"group {group} in {times} of {len(clips)} clips")


def frames_of(clip: Clip, survey: Survey, count: int) -> list[int]:
    """Frames that stand for a clip: around each of `count` middles, within half an interval, the largest
    sharpness x cos(pi x offset / interval)."""
    interval = (clip.last - clip.first + 1) / (count + 1)
    found = []
    for place in range(1, count + 1):
        middle = clip.first + place * interval
        first = max(clip.first, math.ceil(middle - interval / 2))
        last = min(clip.last, math.floor(middle + interval / 2))
        numbers = np.arange(first, last + 1) if last >= first else np.array([min(clip.last, round(middle))])
        weight = np.cos(np.pi * np.abs(numbers - middle) / max(interval, 1e-9))
        found.append(int(numbers[int(np.argmax(survey.sharpness[numbers] * weight))]))
    return found


def refuse_blur(frames: Sequence[int], survey: Survey, rules: RulesConfig) -> None:
    """Raises Refusal where the named frames are less sharp than asked for."""
    sharp = float(np.median(survey.sharpness[list(frames)]))
    if sharp < rules.min_sharpness:
        raise Refusal("blurred", f"median sharpness {sharp:.2f} of at least {rules.min_sharpness:g}")
