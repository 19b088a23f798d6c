"""The rules at their borders, on hand-made surveys."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.selection.rules import (
    Refusal,
    Shot,
    clips_of,
    frames_of,
    groups_of,
    refuse_blur,
    refuse_clips,
    refuse_shots,
    shots_of,
)
from mmalign.selection.settings import RulesConfig, ShotsConfig
from mmalign.selection.shots import Survey, sharpness


def seen(cuts: list[int], total: int, *, step: float = 0.1, span: float = 100.0) -> Survey:
    high = np.full(total, span, dtype=np.float32)
    return Survey(
        times=np.arange(total) * step, sharpness=np.ones(total, dtype=np.float32), low=np.zeros(total, dtype=np.float32),
        high=high, cuts=tuple(cuts),
    )  # fmt: skip


def shots(count: int, seconds: float = 1.0) -> list[Shot]:
    return [Shot(first=10 * n, last=10 * n + 9, start=n * seconds, end=(n + 1) * seconds) for n in range(count)]


def reason(call: object, *arguments: object) -> str | None:
    try:
        call(*arguments)  # type: ignore[operator]
    except Refusal as refusal:
        return refusal.reason
    return None


def test_short_and_static_shots_go() -> None:
    found = shots_of(seen([0, 7, 15], 30), ShotsConfig())
    assert [(shot.first, shot.last) for shot in found] == [(7, 14), (15, 29)]  # seven frames are one too few
    assert found[-1].end == pytest.approx(3.0) and found[0].middle == 10
    assert shots_of(seen([0], 30, span=9.9), ShotsConfig()) == []
    assert len(shots_of(seen([0], 30, span=10.0), ShotsConfig())) == 1
    assert shots_of(seen([0], 8, step=0.02), ShotsConfig()) == []  # 0.16 seconds
    dark_to_bright = seen([0], 20, span=5.0)
    dark_to_bright.high[10:] = 200
    assert len(shots_of(dark_to_bright, ShotsConfig())) == 1  # the range is that of all frames of the shot


@pytest.mark.parametrize(("count", "wanted"), [(3, "too_few_shots"), (4, None), (32, None), (33, "too_many_shots")])
def test_number_of_shots(count: int, wanted: str | None) -> None:
    assert reason(refuse_shots, shots(count), RulesConfig()) == wanted


@pytest.mark.parametrize(("seconds", "wanted"), [(16.0, None), (16.1, "long_shot")])
def test_length_of_shots(seconds: float, wanted: str | None) -> None:
    assert reason(refuse_shots, shots(4, seconds), RulesConfig()) == wanted


def unit(*degrees: float) -> np.ndarray:
    return np.array([[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees], dtype=np.float32)


def test_groups_by_likeness_above_the_threshold() -> None:
    assert groups_of(unit(0, 90, 10, 80), 0.8) == [0, 1, 0, 1]
    assert groups_of(unit(0, 36.8), 0.8) == [0, 0]  # cosine just above 0.8
    assert groups_of(unit(0, 37.0), 0.8) == [0, 1]  # just below
    # A plain mean of rows, whatever the sizes: 0 and 20 merge first; their mean cosine to 50 is (0.643 + 0.866) / 2 = 0.754.
    assert groups_of(unit(0, 20, 50), 0.8) == [0, 0, 1]
    assert groups_of(unit(0, 20, 50), 0.75) == [0, 0, 0]
    assert groups_of(unit(5), 0.8) == [0]


def test_runs_of_a_group_are_one_clip() -> None:
    clips = clips_of(shots(5), [0, 0, 1, 0, 0])
    assert [(clip.group, clip.start, clip.end) for clip in clips] == [(0, 0.0, 2.0), (1, 2.0, 3.0), (0, 3.0, 5.0)]


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ([0, 1, 2], "too_few_clips"),
        ([0, 1, 2, 3], None),
        ([0, 1, 0, 2], "repetitive"),  # twice in four clips is more than a third
        ([0, 1, 0, 2, 3, 4], None),  # twice in six is not
        ([0, 1, 0, 2, 0, 3, 0, 4, 5, 6, 7, 8], "repetitive"),  # four times is too often in any film
        ([0, 1, 0, 2, 0, 3, 4, 5, 6], None),
    ],
)
def test_films_that_cut_back_and_forth(groups: list[int], wanted: str | None) -> None:
    assert reason(refuse_clips, clips_of(shots(len(groups)), groups), RulesConfig()) == wanted


def test_frames_are_near_the_thirds_and_sharp() -> None:
    survey = seen([0], 30)
    clip = clips_of([Shot(first=0, last=29, start=0, end=3)], [0])[0]
    assert frames_of(clip, survey, 2) == [10, 20]
    survey.sharpness[12] = 1.6  # sharper, a little off: 1.6 cos(pi 2 / 10) = 1.29
    survey.sharpness[24] = 3.0  # sharper still, but 3 cos(pi 4 / 10) = 0.93
    assert frames_of(clip, survey, 2) == [12, 20]
    assert reason(refuse_blur, [12, 20], survey, RulesConfig(min_sharpness=1.4)) == "blurred"
    assert reason(refuse_blur, [12, 20], survey, RulesConfig(min_sharpness=1.2)) is None


def test_sharpness_by_hand() -> None:
    assert sharpness(np.full((5, 5), 80.0)) == 0.0
    point = np.zeros((7, 7))
    point[3, 3] = 16.0
    # Blurred: 4 in the middle, 2 beside it, 1 at the corners. |Laplacian|: 8 in the middle, 0 beside it, 0 at the corners,
    # 2 two steps straight away (4 of them), 2 beside those (8 of them, each next to one corner and one side: 1 + 0).
    blurred = np.zeros((7, 7))
    blurred[2:5, 2:5] = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]])
    total = 0.0
    for row in range(1, 6):
        for column in range(1, 6):
            around = (
                blurred[row - 1, column]
                + blurred[row + 1, column]
                + blurred[row, column - 1]
                + blurred[row, column + 1]
            )
            total += abs(around - 4 * blurred[row, column])
    assert sharpness(point) == pytest.approx(total / 49)
    noise = np.random.default_rng(0).uniform(0, 255, (32, 32))
    smooth = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(np.roll(noise, 1, 0), 1, 1)) / 4
    assert sharpness(noise) > 1.5 * sharpness(smooth)
