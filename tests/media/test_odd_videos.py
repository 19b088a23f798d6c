"""Every sampler on every odd film that can be read: the frames are those that reading through shows at the sampler's times."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import pytest

from mmalign.media import MediaError, Sampler, all_frames, decode_video, perturb
from tests.data.clips import clip

ODD = {
    "variable rate": clip(12, times=[0, 40, 50, 400, 410, 1000, 1500, 1510, 1520, 2500, 2900, 4000]),
    "late start": clip(7, times=[500 + 130 * number for number in range(7)], container="matroska"),
    "rotated": clip(9, rotation=90),
    "one frame": clip(1),
    "two frames": clip(2),
    "ten bits": clip(9, pixels="yuv420p10le"),
    "odd sizes": clip(9, size=(31, 47), codec="ffv1", container="matroska"),
    "reordered": clip(30, options={"bf": "3", "b-adapt": "0"}, key_every=30),
}
SAMPLERS = ("midpoint", "interior", "linspace", "fps:2", "fps:1/3", "at:0,0.045,0.41,9")


@pytest.mark.parametrize("odd", ODD)
def test_right_frames_by_time(odd: str) -> None:
    through = list(all_frames(ODD[odd]))
    times = [time for time, _ in through]
    assert times[0] == 0.0 and times == sorted(times)
    for name in SAMPLERS:
        found = decode_video(ODD[odd], Sampler(name=name, count=5))
        assert found.total == len(through)
        for frame, index, time in zip(found.frames, found.indices, found.timestamps, strict=True):
            assert np.array_equal(frame, through[index][1]), name
            assert time == pytest.approx(times[index], abs=1e-9)
        if name.startswith("at:"):
            wanted = [bisect_right(times, moment + 1e-6) - 1 for moment in (0, 0.045, 0.41, 9)]
            assert found.indices.tolist() == wanted
        if len(through) > 1:
            for kind in ("reverse", "shuffle"):
                order = perturb(len(found.frames), kind, seed=1, key=odd, rate=16).numbers if len(found.frames) > 1 else (0,)
                shown = found.take(order).frames
                assert sorted(frame.tobytes() for frame in shown) == sorted(frame.tobytes() for frame in found.frames)


@pytest.mark.parametrize("cut", [400, 900, 2000])
def test_truncated_films_have_a_reason_and_no_frames(cut: int) -> None:
    data = clip(40, size=(64, 64))[:cut]
    with pytest.raises(MediaError) as caught:
        list(all_frames(data))
    assert caught.value.reason == "unreadable_video"
