"""Frames of a video, chosen by a named rule, with the times at which they are shown; or exactly why there are none.

Frames are told apart by their presentation times, so variable frame rates, reordered frames and edit lists give what a
player shows. The display matrix (rotation, mirroring) is applied, deep colour is reduced to 8 bits, transparency is
composited over white.
A file that is cut short or whose wanted frames are damaged is refused, never patched up. Needs PyAV (the extra ``video``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from mmalign.errors import MissingExtraError
from mmalign.media import torchcodec
from mmalign.media.decode import DEFAULT, Limits
from mmalign.media.opening import OpenVideo, opened_video
from mmalign.media.pixels import display_matrix, frame_flags, rgb, shrunk, upright
from mmalign.media.samplers import Sampler

if TYPE_CHECKING:
    from mmalign.types import ImageRef

VIDEO_POLICY: Final = "presentation-time,display-matrix,8bit,alpha-over-white"
"""Name of the colour and geometry policy, for cache fingerprints."""
TIMEOUT_SECONDS: Final = 30.0
_SEEK_AHEAD = 48
"""Frames between two wanted ones beyond which jumping to a key frame pays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """What a video is, after every frame was decoded once."""

    mime: str
    size: tuple[int, int]
    """(height, width) as shown, after rotation."""
    total: int
    """Number of frames that are shown."""
    duration: float
    """Seconds from the first frame's beginning to the last one's end."""
    flags: tuple[str, ...]
    """Any of rotated, deep_colour, alpha, variable_rate, header_differs."""

    @property
    def fps(self) -> float:
        """Mean frames a second."""
        return self.total / self.duration if self.duration > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Chosen frames of one video."""

    frames: np.ndarray  # [n, H, W, 3] uint8 RGB
    timestamps: np.ndarray  # [n] float64, seconds after the first frame of the video
    indices: np.ndarray  # [n] int64, numbers among the frames that are shown, from 0
    total: int
    duration: float
    flags: tuple[str, ...]
    """As `VideoFacts.flags`, and short_video when frames had to be repeated."""

    def take(self, numbers: Sequence[int]) -> Frames:
        """Other frames of the same decode, in the order given (`perturbed` makes such numbers)."""
        chosen = np.asarray(numbers, dtype=np.int64)
        return Frames(
            frames=self.frames[chosen], timestamps=self.timestamps[chosen], indices=self.indices[chosen],
            total=self.total, duration=self.duration, flags=self.flags,
        )  # fmt: skip


def decode_video(
    ref: ImageRef | str | Path | bytes,
    sampler: Sampler | None = None,
    *,
    max_side: int | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    limits: Limits = DEFAULT,
    decoder: str = "pyav",
) -> Frames:
    """Decode the frames that a sampler chooses.

    Args:
        ref: a file, or the bytes of one.
        sampler: by default 8 frames by ``midpoint``.
        max_side: the longer side in pixels; larger frames are reduced (bicubic, antialiased), smaller ones left as they are.
        timeout_seconds: a file that takes longer is given up.
        decoder: ``pyav``, or ``torchcodec``: PyAV says which frames there are, torchcodec decodes them. Files that it does
            not show as they are (see `media.torchcodec`) are decoded by PyAV.

    Raises:
        MediaError: with one of the reasons unreadable_video, no_video_stream, frame_timeout, too_large.
        MissingExtraError: PyAV, or torchcodec where it is asked for, is not installed.
        DataError: an unknown decoder, or a torchcodec that finds no FFmpeg.
    """
    torchcodec.require(decoder)
    sampler = sampler or Sampler()
    with opened_video(ref, limits, timeout_seconds) as video:
        plan = _plan(video)
        if decoder == "torchcodec" and plan.seekable:
            found = _take_elsewhere(video, plan, sampler, max_side)
            if found is not None:
                return found
        try:
            return _take(video, plan, sampler, max_side)
        except _Elsewhere:
            # The file's index promised other frames than the decoder gives: what is decoded is the truth.
            return _take(video, _decoded_plan(video), sampler, max_side)


def all_frames(
    ref: ImageRef | str | Path | bytes, *, max_side: int | None = None, timeout_seconds: float = TIMEOUT_SECONDS,
    limits: Limits = DEFAULT,
) -> Iterator[tuple[float, np.ndarray]]:  # fmt: skip
    """(seconds after the first one, [H, W, 3] uint8) of every frame in the order shown, one at a time.

    Raises:
        MediaError: as `decode_video`; also where the file turns out to be damaged on the way.
    """
    with opened_video(ref, limits, timeout_seconds) as video:
        first: int | None = None
        before = -1
        for number, frame in enumerate(video.decode()):
            if frame.is_corrupt:
                raise video.refuse(f"frame {number} is damaged")
            mark = frame.pts if frame.pts is not None else before + 1
            first = mark if first is None else first
            if mark <= before and number:
                raise video.refuse(f"frame {number} is shown before the one that precedes it")
            before = mark
            yield video.seconds(mark, first), shrunk(upright(rgb(frame), display_matrix(frame)), max_side)
        if first is None:
            raise video.refuse("no frame can be decoded")


def inspect_video(
    ref: ImageRef | str | Path | bytes, *, timeout_seconds: float = TIMEOUT_SECONDS, limits: Limits = DEFAULT
) -> VideoFacts:
    """Decode every frame once, keeping none. Raises as `decode_video` does."""
    with opened_video(ref, limits, timeout_seconds) as video:
        plan = _decoded_plan(video)
        flags = dict.fromkeys(plan.flags)
        if video.stream.frames and video.stream.frames != len(plan.marks):
            flags["header_differs"] = None
        return VideoFacts(
            mime=video.kind.mime, size=plan.size, total=len(plan.marks), duration=plan.duration, flags=tuple(flags)
        )


def video_fields(decoder: str = "pyav") -> dict[str, str]:
    """What decoded frames depend on besides file and sampler, for cache fingerprints.

    Raises:
        MissingExtraError, DataError: as `decode_video`.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video", "reading video") from error
    versions = {name: ".".join(map(str, av.library_versions[name][:2])) for name in ("libavcodec", "libswscale")}
    return {"policy": VIDEO_POLICY, "decoder": decoder, **versions, **torchcodec.fields(decoder)}


class _Elsewhere(Exception):
    """A frame that the index promised did not come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The frames of a video in the order shown."""

    marks: list[int]  # presentation times in the stream's units, ascending
    keys: list[int]  # those of key frames
    duration: float
    seekable: bool
    size: tuple[int, int] = (0, 0)
    flags: tuple[str, ...] = ()


def _plan(video: OpenVideo) -> _Plan:
    """The frames as the file's packets announce them, without decoding; decoded where packets carry no times."""
    shown: list[tuple[int, int]] = []
    keys = []
    for packet in video.container.demux(video.stream):
        video.watch()
        if packet.size == 0 or packet.is_discard:
            continue
        if packet.is_corrupt:
            raise video.refuse("a packet is damaged or cut short")
        if packet.pts is None:
            return _decoded_plan(video)
        shown.append((packet.pts, packet.duration or 0))
        if packet.is_keyframe:
            keys.append(packet.pts)
    if not shown:
        raise video.refuse("it holds no frames")
    shown.sort()
    marks = [mark for mark, _ in shown]
    if len(set(marks)) != len(marks):
        return _decoded_plan(video)
    duration = video.seconds(marks[-1], marks[0]) + video.tail([length for _, length in shown])
    return _Plan(marks=marks, keys=sorted(keys), duration=duration, seekable=True)


def _decoded_plan(video: OpenVideo) -> _Plan:
    """The frames as they come out of the decoder: slower, and always true."""
    marks: list[int] = []
    lengths: list[int] = []
    flags: dict[str, None] = {}
    size = (0, 0)
    for frame in video.decode():
        if frame.is_corrupt:
            raise video.refuse(f"frame {len(marks)} is damaged")
        mark = frame.pts if frame.pts is not None else (marks[-1] + 1 if marks else 0)
        if marks and mark <= marks[-1]:
            raise video.refuse(f"frame {len(marks)} is shown before the one that precedes it")
        marks.append(mark)
        lengths.append(frame.duration or 0)
        if len(marks) == 1:
            matrix = display_matrix(frame)
            size = (
                (frame.width, frame.height) if matrix is not None and matrix[0, 0] == 0 else (frame.height, frame.width)
            )
            flags.update(dict.fromkeys(frame_flags(frame, matrix)))
    if not marks:
        raise video.refuse("no frame can be decoded")
    gaps = np.diff(np.asarray(marks, dtype=np.int64))
    # Containers count in ticks that no frame rate divides evenly: one tick up or down is rounding, not a varying rate.
    if len(gaps) > 1 and int(gaps.max()) - int(gaps.min()) > 1:
        flags["variable_rate"] = None
    duration = video.seconds(marks[-1], marks[0]) + video.tail(lengths)
    return _Plan(marks=marks, keys=[], duration=duration, seekable=False, size=size, flags=tuple(flags))


def _take(video: OpenVideo, plan: _Plan, sampler: Sampler, max_side: int | None) -> Frames:
    first = plan.marks[0]
    times = [video.seconds(mark, first) for mark in plan.marks]
    numbers = sampler.choose(times, plan.duration)
    wanted = sorted(set(numbers))
    pictures: dict[int, np.ndarray] = {}
    flags: dict[str, None] = dict.fromkeys(plan.flags)
    frames = video.decode()
    for place, number in enumerate(wanted):
        before = wanted[place - 1] if place else 0
        key = _jump(plan, before, number)
        if key is not None:
            frames = video.decode(key)
        for frame in frames:
            mark = frame.pts if frame.pts is not None else plan.marks[0] + number
            if mark > plan.marks[number]:
                raise _Elsewhere
            if mark == plan.marks[number]:
                if frame.is_corrupt:
                    raise video.refuse(f"frame {number} is damaged")
                matrix = display_matrix(frame)
                pictures[number] = shrunk(upright(rgb(frame), matrix), max_side)
                flags.update(dict.fromkeys(frame_flags(frame, matrix)))
                break
        if number not in pictures:
            raise _Elsewhere if plan.seekable else video.refuse(f"frame {number} cannot be decoded")
    return _chosen(video, plan, numbers, pictures, flags)


def _take_elsewhere(video: OpenVideo, plan: _Plan, sampler: Sampler, max_side: int | None) -> Frames | None:
    """The same frames decoded by torchcodec; None for a file that PyAV has to decode."""
    first = next(video.decode(), None)
    matrix = None if first is None else display_matrix(first)
    if first is None or first.is_corrupt or not torchcodec.shows(first, matrix, video.kind):
        return None
    times = [video.seconds(mark, plan.marks[0]) for mark in plan.marks]
    numbers = sampler.choose(times, plan.duration)
    found = torchcodec.decode(video, sorted(set(numbers)), times)
    if found is None:
        return None
    pictures = {number: shrunk(picture, max_side) for number, picture in found.items()}
    return _chosen(video, plan, numbers, pictures, dict.fromkeys((*plan.flags, *frame_flags(first, matrix))))


def _chosen(
    video: OpenVideo, plan: _Plan, numbers: Sequence[int], pictures: Mapping[int, np.ndarray], flags: dict[str, None]
) -> Frames:
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise video.refuse("its frames change their size on the way")
    if len(set(numbers)) < len(numbers):
        flags["short_video"] = None
    return Frames(
        frames=np.stack([pictures[number] for number in numbers]),
        timestamps=np.asarray([video.seconds(plan.marks[number], plan.marks[0]) for number in numbers], dtype=np.float64),
        indices=np.asarray(numbers, dtype=np.int64),
        total=len(plan.marks),
        duration=plan.duration,
        flags=tuple(flags),
    )


def _jump(plan: _Plan, before: int, number: int) -> int | None:
    """The key frame to go on from, when it lies well ahead of where decoding is."""
    if not plan.seekable or number - before < _SEEK_AHEAD:
        return None
    ahead = [key for key in plan.keys if plan.marks[before] < key <= plan.marks[number]]
    return ahead[-1] if ahead else None
