"""The second decoder: frame for frame what PyAV gives, on odd films too; where it cannot be loaded, exactly why."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.data import FrameCache
from mmalign.errors import DataError, MissingExtraError, MmalignError
from mmalign.media import MediaError, Sampler, decode_video, require_decoder
from mmalign.media import torchcodec as backend
from tests.data.clips import clip, sound
from tests.media.test_odd_videos import ODD, SAMPLERS
from tests.media.test_video import damaged


def why_not() -> str:
    try:
        require_decoder("torchcodec")
    except MmalignError as error:
        return f"torchcodec cannot be used here: {str(error)[:90]}"
    return ""


WHY_NOT = why_not()
loads = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
MORE = {
    **ODD, "half a turn": clip(3, rotation=180), "three quarters": clip(3, rotation=-90), "long": clip(130, size=(16, 16)),
    "avi": clip(9, container="avi", codec="mpeg4"),
}  # fmt: skip
ELSEWHERE = {
    "transparent": clip(3, pixels="yuva420p", codec="ffv1", container="matroska"),
    "transport stream": clip(20, container="mpegts"),
}


@loads
@pytest.mark.parametrize("odd", MORE)
def test_the_same_frames_at_the_same_times(odd: str) -> None:
    for name in SAMPLERS:
        for side in (None, 24):
            sampler = Sampler(name=name, count=40 if odd == "long" else 5)
            left = decode_video(MORE[odd], sampler, max_side=side)
            right = decode_video(MORE[odd], sampler, max_side=side, decoder="torchcodec")
            assert np.array_equal(left.frames, right.frames), name
            assert left.indices.tolist() == right.indices.tolist()
            assert right.timestamps == pytest.approx(left.timestamps, abs=1e-9)
            assert (left.total, left.duration, set(left.flags)) == (right.total, right.duration, set(right.flags))


@loads
@pytest.mark.parametrize("odd", MORE)
def test_it_is_torchcodec_that_decodes(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the test above would also pass where everything is left to PyAV."""
    seen: list[int] = []
    decode = backend.decode

    def counted(*given: object) -> object:
        found = decode(*given)  # type: ignore[arg-type]
        seen.append(len(found or {}))
        return found

    monkeypatch.setattr(backend, "decode", counted)
    found = decode_video(MORE[odd], Sampler(count=3), decoder="torchcodec")
    assert seen == [len(set(found.indices.tolist()))]


@loads
@pytest.mark.parametrize("odd", ELSEWHERE)
def test_what_it_would_not_show_as_it_is_pyav_decodes(odd: str) -> None:
    left, right = (decode_video(ELSEWHERE[odd], decoder=name) for name in ("pyav", "torchcodec"))
    assert np.array_equal(left.frames, right.frames) and left.flags == right.flags


@loads
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable_video"),
        (b"<html>not here</html>", "unreadable_video"),
        (sound(), "no_video_stream"),
        (clip(9)[:-300], "unreadable_video"),
        (clip(9, container="matroska")[:-300], "unreadable_video"),
        (damaged(), "unreadable_video"),
    ],
)
def test_what_cannot_be_used_has_the_same_reason(data: bytes, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        decode_video(data, decoder="torchcodec")
    assert caught.value.reason == reason
    with pytest.raises(MediaError, match="frame_timeout"):
        decode_video(clip(3), decoder="torchcodec", timeout_seconds=0.0)


@loads
def test_stored_frames_of_the_two_are_told_apart(tmp_path: Path) -> None:
    stores = [FrameCache(tmp_path, decoder=name) for name in ("pyav", "torchcodec")]
    for store in stores:
        store.fill([clip(9)])
    assert [store.decoded for store in stores] == [1, 1]
    assert len(list((tmp_path / "frames").glob("*/manifest.json"))) == 2


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(MissingExtraError, match=r"mmalign\[torchcodec\]"):
        decode_video(clip(1), decoder="torchcodec")
    with pytest.raises(DataError, match="'decord' is not known"):
        decode_video(clip(1), decoder="decord")


def test_ffmpeg_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Releases from 0.14 on can be imported without FFmpeg and say so in an attribute."""
    library = types.ModuleType("torchcodec")
    library.__dict__.update(__version__="0.17.0", ffmpeg_major_version=None)
    monkeypatch.setitem(sys.modules, "torchcodec", library)
    for use in (lambda: decode_video(clip(1), decoder="torchcodec"), lambda: FrameCache(tmp_path, decoder="torchcodec")):
        with pytest.raises(DataError, match=r"finds no FFmpeg.*LD_LIBRARY_PATH.*data.video_decoder: pyav"):
            use()


def test_a_run_that_asks_for_it_is_stopped_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.experiment.assembly import assemble
    from mmalign.experiment.settings import load_experiment

    monkeypatch.setitem(sys.modules, "torchcodec", None)
    overrides = ["model.path=nowhere", "data.video_decoder=torchcodec"]
    config = load_experiment(Path(__file__).parents[2] / "configs/tiny/vlm_dpo.yaml", overrides).config
    with pytest.raises(MissingExtraError, match=r"mmalign\[torchcodec\]"):
        assemble(config, torch.device("cpu"))
