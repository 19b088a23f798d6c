"""torchcodec as a second decoder of video, for those who have it: the same frames by the same rules.

torchcodec (https://github.com/meta-pytorch/torchcodec) brings no FFmpeg: it needs libavcodec and its sisters as shared
libraries on the system. What it does not tell about a file (packets cut short, transparency, mirroring, damage) is asked of
PyAV, so both give one result for one file; where it would show something else, PyAV decodes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmalign.errors import DataError, MissingExtraError
from mmalign.media.containers import AVI, MATROSKA, MP4, Container

if TYPE_CHECKING:
    from mmalign.media.opening import OpenVideo

DECODERS: Final = ("pyav", "torchcodec")
_AT_ONCE: Final = 16
"""Frames between two looks at the clock: torchcodec cannot be interrupted within a call."""
_NO_FFMPEG: Final = (
    "torchcodec is installed and finds no FFmpeg: it needs the shared libraries libavutil, libavcodec, libavformat, libavdevice,"
    " libavfilter, libswscale and libswresample of FFmpeg 4 or newer (apt install ffmpeg, or conda install ffmpeg), or a folder"
    " of them in LD_LIBRARY_PATH before Python starts; or use PyAV, which brings its own: data.video_decoder: pyav"
)


def require(decoder: str) -> None:
    """Nothing where a decoder can be used.

    Raises:
        MissingExtraError: torchcodec is not installed.
        DataError: an unknown name, or torchcodec cannot be loaded; names what is missing and what to do.
    """
    if decoder not in DECODERS:
        raise DataError(f"video decoder '{decoder}' is not known (known: {', '.join(DECODERS)})")
    if decoder == "torchcodec":
        _loaded()


def fields(decoder: str) -> dict[str, str]:
    """What frames depend on besides PyAV's libraries, for cache fingerprints."""
    if decoder != "torchcodec":
        return {}
    library = _loaded()
    return {"torchcodec": str(library.__version__), "ffmpeg": str(getattr(library, "ffmpeg_major_version", ""))}


def shows(frame: Any, matrix: np.ndarray | None, kind: Container) -> bool:
    """Whether torchcodec shows a file as it is, judged by its first frame.

    It leaves transparency out, turns but does not mirror, and loses frames at the end of transport streams; containers are
    those that it cannot take for another by their first bytes.
    """
    clear = any(component.is_alpha for component in frame.format.components)
    mirrored = matrix is not None and round(float(np.linalg.det(matrix))) != 1
    return kind in (MP4, MATROSKA, AVI) and not clear and not mirrored


def decode(video: OpenVideo, numbers: Sequence[int], times: Sequence[float]) -> dict[int, np.ndarray] | None:
    """Frames by their numbers in the order shown.

    Args:
        numbers: ascending, each once.
        times: when each frame of the file is shown, seconds after the first one. [N]

    Returns:
        [H, W, 3] uint8 of each, upright; None where torchcodec fails or counts other frames or times than the file's packets
        say: what is true of such a file, PyAV finds out.

    Raises:
        MediaError: frame_timeout.
    """
    decoder_type = _loaded("decoders").VideoDecoder
    found: dict[int, np.ndarray] = {}
    try:
        decoder = decoder_type(
            video.origin, stream_index=video.stream.index, dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu",
            seek_mode="exact",
        )  # fmt: skip
        if len(decoder) != len(times):
            return None
        begin = float(decoder.metadata.begin_stream_seconds)
        for start in range(0, len(numbers), _AT_ONCE):
            video.watch()
            wanted = list(numbers[start : start + _AT_ONCE])
            batch = decoder.get_frames_at(wanted)
            for number, picture, moment in zip(wanted, batch.data, batch.pts_seconds.tolist(), strict=True):
                if abs(moment - begin - times[number]) > video.tick:
                    return None
                found[number] = np.ascontiguousarray(picture.numpy())
    except (RuntimeError, ValueError, IndexError):
        return None
    video.watch()
    return found


def _loaded(part: str = "") -> Any:
    try:
        library = importlib.import_module("torchcodec")
        module = importlib.import_module(f"torchcodec.{part}") if part else library
    except ImportError as error:
        if getattr(error, "name", None) == "torchcodec":
            raise MissingExtraError("torchcodec", "torchcodec", "the video decoder torchcodec") from error
        raise DataError(f"{_NO_FFMPEG} ({error})") from error
    except (RuntimeError, OSError) as error:  # releases before 0.14 load FFmpeg when they are imported
        raise DataError(_NO_FFMPEG) from error
    if getattr(library, "ffmpeg_major_version", 0) is None:
        raise DataError(_NO_FFMPEG)
    return module


__all__ = ["DECODERS", "decode", "fields", "require", "shows"]
