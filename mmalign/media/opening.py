"""An open video file: its container named, its length compared with what it says, its one stream of moving pictures."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmalign.errors import MissingExtraError
from mmalign.media.containers import Container, container_of, cut_short, is_sound
from mmalign.media.decode import Limits
from mmalign.media.errors import MediaError

if TYPE_CHECKING:
    from mmalign.types import ImageRef


class OpenVideo:
    """An open file with its one video stream."""

    def __init__(
        self, container: Any, stream: Any, *, origin: str | bytes, source: str, kind: Container, timeout_seconds: float,
        limits: Limits,
    ) -> None:  # fmt: skip
        self.container, self.stream, self.source, self.kind, self.limits = container, stream, source, kind, limits
        self.origin = origin
        """The path or the bytes, for another decoder of the same file."""
        self.tick = float(stream.time_base)
        self._until = time.monotonic() + timeout_seconds
        self._timeout = timeout_seconds

    def seconds(self, mark: int, first: int) -> float:
        return (mark - first) * self.tick

    def tail(self, durations: Sequence[int]) -> float:
        """How long the last frame is shown, in seconds."""
        if durations and durations[-1]:
            return float(durations[-1] * self.tick)
        return float(1 / self.stream.average_rate) if self.stream.average_rate else 0.0

    def watch(self) -> None:
        if time.monotonic() > self._until:
            raise MediaError(
                reason="frame_timeout", detail=f"not done after {self._timeout:g} seconds", source=self.source
            )

    def refuse(self, detail: str) -> MediaError:
        return MediaError(reason="unreadable_video", detail=detail, source=self.source)

    def decode(self, start: int | None = None) -> Iterator[Any]:
        """Frames in the order shown, from the key frame at or before `start`, or from the beginning."""
        self.rewind(start)
        for packet in self.container.demux(self.stream):
            self.watch()
            for frame in packet.decode():
                self.watch()
                height, width = frame.height, frame.width
                if max(height, width) > self.limits.max_side or height * width > self.limits.max_pixels:
                    raise MediaError(
                        reason="too_large", detail=f"frames of {width}x{height} pixels", source=self.source
                    )
                yield frame

    def rewind(self, start: int | None = None) -> None:
        if start is None and self.stream.start_time is not None:
            start = min(self.stream.start_time, 0)
        self.container.seek(start or 0, stream=self.stream, backward=True)


@contextmanager
def opened_video(ref: ImageRef | str | Path | bytes, limits: Limits, timeout_seconds: float) -> Iterator[OpenVideo]:
    """The one stream of moving pictures of a file, opened with PyAV by the container that its first bytes announce.

    Raises:
        MediaError: no video, cut short or too large; also for what fails in the body of the `with`.
        MissingExtraError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video", "reading video") from error
    handle, size, source, origin = _handle(ref)
    with handle:
        head = handle.read(512)
        if not head:
            raise MediaError(reason="unreadable_video", detail="zero bytes", source=source)
        if size > limits.max_bytes * 16:
            raise MediaError(reason="too_large", detail=f"{size} bytes", source=source)
        container = container_of(head)
        if container is None:
            reason = "no_video_stream" if is_sound(head) else "unreadable_video"
            raise MediaError(
                reason=reason, detail=f"no video container; starts with {head[:8].hex(' ')}", source=source
            )
        missing = cut_short(handle, size, container)
        if missing is not None:
            raise MediaError(reason="unreadable_video", detail=f"cut short: {missing}", source=source)
        handle.seek(0)
        try:
            with av.open(handle, format=container.demuxer, metadata_errors="replace") as opened:
                streams = [stream for stream in opened.streams.video if not stream.disposition & _attached(av)]
                if not streams:
                    raise MediaError(reason="no_video_stream", detail="no moving pictures in it", source=source)
                stream = streams[0]
                stream.codec_context.thread_count = 1  # callers decode many files side by side
                yield OpenVideo(
                    opened, stream, origin=origin, source=source, kind=container, timeout_seconds=timeout_seconds,
                    limits=limits,
                )  # fmt: skip
        except (av.FFmpegError, EOFError) as error:
            raise MediaError(
                reason="unreadable_video", detail=f"{type(error).__name__}: {error}", source=source
            ) from error


def _attached(av: Any) -> int:
    from av.stream import Disposition

    return int(Disposition.attached_pic | Disposition.timed_thumbnails)


def _handle(ref: ImageRef | str | Path | bytes) -> tuple[IO[bytes], int, str, str | bytes]:
    """An open file, its size, how messages name it, and its path or bytes."""
    if isinstance(ref, bytes):
        return io.BytesIO(ref), len(ref), "bytes", ref
    if isinstance(ref, str | Path):
        path, source = Path(ref), str(ref)
    elif ref.data is not None:
        return io.BytesIO(ref.data), len(ref.data), ref.label or "bytes", ref.data
    elif ref.path is not None:
        path, source = Path(ref.path), ref.label or ref.path
    else:
        raise MediaError(reason="unreadable_video", detail="neither a path nor bytes", source=ref.label)
    try:
        return path.open("rb"), path.stat().st_size, source, str(path)
    except OSError as error:
        raise MediaError(reason="unreadable_video", detail=str(error), source=source) from error
