"""From references to what a processor takes: decoded pictures, sampled frames; and the digest of what came out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.branches import MediaRef, VideoRef
from mmalign.media import Frames, MediaError, Sampler, inspect_video, open_image
from mmalign.models.vlm.errors import VlmDataError
from mmalign.types import ImageRef

MOST_FRAMES: Final = 768
"""Frames taken from one clip where `max_frames` does not say."""


ReadClip = Callable[[ImageRef, Sampler], Frames]
"""What gives the frames of a clip: the decoder, or a store of decoded frames in front of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Sampled frames of a clip."""

    frames: np.ndarray  # [T, H, W, 3] uint8
    indices: tuple[int, ...]
    """Their numbers in the source."""
    fps: float
    """Frames per second of the source."""
    total: int
    """Frames of the source."""


def open_media(
    record: str, reference: MediaRef, *, fps: float | None, max_frames: int | None, read_clip: ReadClip
) -> Image.Image | Clip:
    """Decode one picture or clip; clips in files through `read_clip`.

    Raises:
        VlmDataError: missing_media or undecodable_media, with the media layer's own words.
        MissingExtraError: a video file without the library that reads it (the extra ``video``).
    """
    try:
        if isinstance(reference, ImageRef):
            return open_image(reference).image
        if reference.frames:
            clip = _given_frames(reference)
        else:
            clip = _sampled(reference, read_clip, fps=reference.fps or fps or 2.0, max_frames=max_frames)
        return _ordered(record, clip, reference.order)
    except MediaError as error:
        gone = error.reason == "missing_image" or (reference.path is not None and not Path(reference.path).exists())
        reason = "missing_media" if gone else "undecodable_media"
        raise VlmDataError(record, reason, str(error)) from error


def _given_frames(reference: VideoRef) -> Clip:
    pictures = [open_image(frame).image for frame in reference.frames]
    size = pictures[0].size
    frames = np.stack([np.asarray(picture if picture.size == size else picture.resize(size)) for picture in pictures])
    return Clip(frames=frames, indices=tuple(range(len(pictures))), fps=reference.fps or 1.0, total=len(pictures))


def _ordered(record: str, clip: Clip, order: tuple[int, ...]) -> Clip:
    """The frames in the order asked for, at the times at which the first so many stood before."""
    if not order:
        return clip
    if min(order) < 0 or max(order) >= len(clip.frames):
        detail = f"frame {max(order)} was asked for, {len(clip.frames)} frames are sampled"
        raise VlmDataError(record, "undecodable_media", detail)
    return replace(clip, frames=clip.frames[list(order)], indices=clip.indices[: len(order)])


def _sampled(reference: VideoRef, read_clip: ReadClip, *, fps: float, max_frames: int | None) -> Clip:
    """Frames of a file at a rate, evenly thinned to `max_frames`; of a stretch of it where start or end is given."""
    source = ImageRef(path=reference.path, data=reference.data, label=reference.label)
    most = max_frames or MOST_FRAMES
    if reference.start is None and reference.end is None:
        found = read_clip(source, Sampler(name=f"fps:{fps}", count=most))
    else:
        first, last = reference.start or 0.0, reference.end
        if last is None:
            last = inspect_video(source).duration
        times = np.arange(first, last, 1.0 / fps)
        if not len(times):
            reason = f"no frame between second {first:g} and {last:g}"
            raise MediaError(reason="unreadable_video", detail=reason, source=reference.label)
        if len(times) > most:
            times = times[np.linspace(0, len(times) - 1, most).round().astype(int)]
        found = read_clip(source, Sampler(name="at:" + ",".join(f"{value:.6f}" for value in times)))
    rate = found.total / found.duration if found.duration > 0 else fps
    return Clip(frames=found.frames, indices=tuple(int(n) for n in found.indices), fps=rate, total=found.total)


def digest(kind: str, tensors: Mapping[str, Tensor]) -> str:
    """Equal for equal content, whatever file it came from."""
    made = hashlib.blake2b(kind.encode(), digest_size=16)
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        made.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        made.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()
