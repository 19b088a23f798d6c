"""Video: the frames a rule names, with their times, whatever the file does; or the one reason why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmalign.errors import DataError
from mmalign.media import Limits, MediaError, Sampler, decode_video, inspect_video, perturbed
from tests.data.clips import clip, grey, sound


def greys(frames: np.ndarray) -> list[int]:
    """The frame numbers that the lower right corners show."""
    return [round((int(frame[-1, -1, 0]) - 10) / 5) for frame in frames]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("midpoint", [2, 7, 12, 17]),  # floor((i + 1/2) 20/4)
        ("interior", [4, 8, 12, 16]),  # floor(i 20/5)
        ("linspace", [0, 6, 12, 19]),  # floor(i 19/3)
        ("fps:2", [0, 5, 10, 15]),
        ("fps:10", [0, 6, 12, 19]),  # 20 ticks, of which four
        ("at:0.95,0.05,1.9", [9, 0, 19]),
    ],
)
def test_a_rule_names_the_same_frames_in_every_container(name: str, numbers: list[int]) -> None:
    sampler = Sampler(name=name, count=4)
    for container, codec in (("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("mpegts", "libx264")):
        found = decode_video(clip(20, container=container, codec=codec), sampler)
        assert found.indices.tolist() == numbers, container
        assert greys(found.frames) == numbers, container
        assert found.timestamps == pytest.approx([number / 10 for number in numbers], abs=2e-3)
        assert found.total == 20


def test_times_decide_when_the_rate_varies() -> None:
    data = clip(6, times=[0, 100, 150, 1000, 1010, 3000])
    found = decode_video(data, Sampler(name="fps:1", count=8))
    assert found.indices.tolist() == [0, 3, 4, 5]  # shown at 0, 1, 2 and 3 seconds
    assert found.timestamps.tolist() == pytest.approx([0.0, 1.0, 1.01, 3.0])
    assert greys(found.frames) == [0, 3, 4, 5]
    assert inspect_video(data).flags == ("variable_rate",)
    assert inspect_video(clip(6)).flags == ()


def test_jumps_in_a_long_file_give_what_reading_through_gives() -> None:
    data = clip(200, size=(16, 16), key_every=12)
    sparse = decode_video(data, Sampler(name="linspace", count=3))
    every = decode_video(data, Sampler(name="linspace", count=200))
    assert sparse.indices.tolist() == [0, 99, 199]
    assert every.indices.tolist() == list(range(200))
    assert np.array_equal(sparse.frames, every.frames[[0, 99, 199]])


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_the_rotation_flag_is_applied(rotation: int, turns: int) -> None:
    upright, turned = decode_video(clip(2)), decode_video(clip(2, rotation=rotation))
    assert np.array_equal(turned.frames[0], np.rot90(upright.frames[0], turns))  # counter-clockwise, as the flag means
    assert turned.flags == ("rotated", "short_video")
    assert inspect_video(clip(2, rotation=rotation)).size == turned.frames.shape[1:3]


def test_a_short_video_repeats_frames_and_says_so() -> None:
    found = decode_video(clip(1), Sampler(count=3))
    assert found.indices.tolist() == [0, 0, 0]
    assert found.flags == ("short_video",)
    assert decode_video(clip(3), Sampler(count=3)).flags == ()


def test_odd_sizes_deep_colour_and_transparency() -> None:
    odd = decode_video(clip(2, size=(31, 47), codec="ffv1", container="matroska"), Sampler(count=2))
    assert odd.frames.shape == (2, 31, 47, 3) and greys(odd.frames) == [0, 1]
    deep = decode_video(clip(2, pixels="yuv420p10le"), Sampler(count=2))
    assert deep.flags == ("deep_colour",) and abs(int(deep.frames[1, -1, -1, 0]) - grey(1)) <= 2
    clear = decode_video(clip(2, pixels="yuva420p", codec="ffv1", container="matroska"), Sampler(count=2))
    assert clear.flags == ("alpha",) and greys(clear.frames) == [0, 1]


def test_large_frames_are_reduced_and_small_ones_left() -> None:
    assert decode_video(clip(1), max_side=24).frames.shape[1:] == (16, 24, 3)
    assert decode_video(clip(1), max_side=48).frames.shape[1:] == (32, 48, 3)


def test_what_is_appended_to_a_whole_file_does_not_matter() -> None:
    whole = clip(9)
    for more in (b"junk" * 50, bytes(300), b"\xff" * 77, b"x"):
        assert decode_video(whole + more).total == 9


def damaged() -> bytes:
    data = bytearray(clip(40))
    start = data.find(b"mdat")
    for place in range(start + 400, start + 900):
        data[place] ^= 0x5A
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable_video"),
        (b"<html>not here</html>", "unreadable_video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n" + b"\n" * 200, "unreadable_video"),
        (sound(), "no_video_stream"),
        (b"ID3\x04" + bytes(400), "no_video_stream"),
        (clip(9)[:-300], "unreadable_video"),
        (clip(9, options={"movflags": "faststart"})[:-300], "unreadable_video"),
        (clip(9, container="matroska")[:-300], "unreadable_video"),
        (clip(9, container="avi", codec="mpeg4")[:-300], "unreadable_video"),
        (damaged(), "unreadable_video"),
    ],
)
def test_what_cannot_be_used_has_one_reason(data: bytes, reason: str) -> None:
    for read in (decode_video, inspect_video):
        with pytest.raises(MediaError) as caught:
            read(data)
        assert caught.value.reason == reason


def test_a_file_that_takes_too_long_or_is_too_large_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="frame_timeout"):
        decode_video(clip(3), timeout_seconds=0.0)
    with pytest.raises(MediaError, match="too_large"):
        decode_video(clip(3), limits=Limits(max_side=40))
    with pytest.raises(MediaError, match="unreadable_video.*No such file"):
        decode_video(tmp_path / "none.mp4")
    path = tmp_path / "clip é.mp4"
    path.write_bytes(clip(3))
    assert decode_video(path).total == 3


def test_perturbed_clips_are_the_same_frames_in_another_order() -> None:
    found = decode_video(clip(8), Sampler(count=8))
    assert greys(found.take(perturbed(8, "reverse", seed=0, key="a")).frames) == [7, 6, 5, 4, 3, 2, 1, 0]
    shuffled = perturbed(8, "shuffle", seed=0, key="a")
    assert greys(found.take(shuffled).frames) == shuffled
    assert sorted(shuffled) == list(range(8)) and shuffled != list(range(8))
    assert perturbed(1, "drop", seed=0, key="a") == [0]


@pytest.mark.parametrize("name", ["middle", "fps:", "fps:0", "fps:x", "at:", "at:1,x", "at:-1"])
def test_rules_without_a_meaning_are_refused(name: str) -> None:
    with pytest.raises(DataError):
        Sampler(name=name)
