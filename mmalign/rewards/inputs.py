"""What callers may pass as images and prompts, made uniform and checked before any model runs."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmalign.media import PLAIN, Colours, Decoded, Limits, MediaError, decode_image, read_bytes
from mmalign.media.decode import strict_decoding
from mmalign.rewards.base import User
from mmalign.rewards.errors import InputError
from mmalign.types import ImageRef

_LOADING = tuple(threading.Lock() for _ in range(61))
"""Of pictures in memory, by their identity."""

SCORED = Limits(max_side=16_384)
"""What is scored. Tables may hold longer pictures, whose shape their own rule judges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture ready to be decoded: its identity is known, its pixels may not be yet."""

    digest: bytes
    """Equal digests, equal pixels."""
    data: bytes | None = None
    """Encoded file."""
    image: Image.Image | None = None
    source: str = ""

    def decode(
        self, limits: Limits, *, keep_stored: bool = False, colours: Colours = PLAIN,
        draft: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
        admit: Callable[[tuple[int, int]], None] | None = None,
    ) -> Decoded:  # fmt: skip
        """RGB, upright, with what had to be done to it; `keep_stored`, `colours`, `draft` and `admit` as in `decode_image`.

        Raises:
            MediaError: it cannot be decoded.
        """
        if self.image is not None:
            return _upright_rgb(self.image, limits, self.source, keep_stored, colours)
        return decode_image(
            self.data or b"", limits, source=self.source, keep_stored=keep_stored, colours=colours, draft=draft, admit=admit
        )


def as_sequence(images: Any, *, clip: bool = False) -> Sequence[Any]:
    """One entry per picture. A single picture is a sequence of one; tensors and arrays are split on the first axis.

    Args:
        clip: floats outside [0, 1] are cut off there instead of refused.

    Raises:
        InputError: a tensor of another shape, or values outside [0, 1] for floats.
    """
    if isinstance(images, Tensor):
        if images.ndim == 3:
            images = images[None]
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InputError(f"an image tensor must be [N, 3, H, W] or [3, H, W], got {tuple(images.shape)}")
        images = clipped(images) if clip else images
        check_range(images)
        return list(images)
    if isinstance(images, np.ndarray) and images.dtype != object:
        if images.ndim not in (3, 4):
            raise InputError(f"an image array must be [N, H, W, 3] or [H, W, 3], got {images.shape}")
        return list(images if images.ndim == 4 else images[None])
    if isinstance(images, str | bytes | Path | ImageRef | Image.Image | Mapping):
        return [images]
    if not isinstance(images, Sequence):
        images = list(images)
    return images


def as_prompts(prompts: str | Sequence[str] | None, count: int) -> list[str]:
    """One prompt per picture; a single text is used for all.

    Raises:
        InputError: another number of prompts, entries that are not text, or prompts that are all existing files.
    """
    if prompts is None:
        return [""] * count
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise InputError(f"{count} images but {len(texts)} prompts; give one prompt per image, or one text for all")
    wrong = next((index for index, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"prompt {wrong} is a {type(texts[wrong]).__name__}, expected text")
    if texts and all(os.path.isfile(text) for text in set(texts)):
        raise InputError(f"every prompt is an existing file ({texts[0]!r}): images come first, then prompts")
    return texts


def as_users(users: Any, count: int) -> list[User]:
    """One user per picture: a name, None, or a mapping from names to shares; a single one is used for all.

    Whole numbers are names too, as Pick-a-Pic has them.

    Raises:
        InputError: another number of users, or entries that are none of these.
    """
    if users is None or isinstance(users, str | Mapping):
        users = [users] * count
    entries = list(users)
    if len(entries) != count:
        raise InputError(f"{count} images but {len(entries)} users; give one user per image, or one for all")
    return [_as_user(entry, row) for row, entry in enumerate(entries)]


def _as_user(entry: Any, row: int) -> User:
    if isinstance(entry, Mapping):
        try:
            return tuple(sorted((str(name), float(share)) for name, share in entry.items()))
        except (TypeError, ValueError) as error:
            raise InputError(f"user {row}: a mixture maps names to numbers, got {entry!r}") from error
    if entry is None or isinstance(entry, str | tuple):  # a tuple is a mixture that was read before
        return entry
    if isinstance(entry, int | np.integer) and not isinstance(entry, bool):
        return str(entry)
    raise InputError(f"user {row} is a {type(entry).__name__}, expected a name, None, or a mapping of names to shares")


def clipped(pixels: Tensor) -> Tensor:
    """Floats cut off at 0 and 1; NaN is left to the row it is in. 8-bit pixels as they are."""
    return pixels.clamp(0, 1) if pixels.is_floating_point() else pixels


def check_range(pixels: Tensor) -> None:
    """Refuse float pixels outside [0, 1], naming the likely cause. NaN is left to the row it is in."""
    if not pixels.is_floating_point() or pixels.numel() == 0:
        if not pixels.is_floating_point() and pixels.dtype != torch.uint8:
            raise InputError(f"image tensors are uint8, or floats in [0, 1]; got {pixels.dtype}")
        return
    finite = torch.nan_to_num(pixels.detach(), nan=0.5, posinf=2.0, neginf=-1.0)
    low, high = float(finite.min()), float(finite.max())
    if high > 1.5:
        raise InputError(f"float pixels must be in [0, 1], the maximum is {high:g}: data in 0-255? divide by 255")
    if low < -0.01 or high > 1.01:
        raise InputError(f"float pixels must be in [0, 1], got [{low:g}, {high:g}]: data in [-1, 1]? map or clamp it")


def read_picture(entry: Any, limits: Limits = SCORED, *, clip: bool = False) -> Picture:
    """Identify one picture without decoding it; `clip` as in `as_sequence`.

    Raises:
        MediaError: the file is not there or too large, or the pixels are not finite.
        InputError: not a kind of picture we know.
    """
    if isinstance(entry, Mapping):
        entry = ImageRef(path=entry.get("path") if entry.get("bytes") is None else None, data=entry.get("bytes"))
    if isinstance(entry, str | bytes | Path | ImageRef):
        data, source = read_bytes(entry, limits)
        return Picture(digest=hashlib.blake2b(data, digest_size=16).digest(), data=data, source=source)
    image = entry if isinstance(entry, Image.Image) else Image.fromarray(_as_array(entry, clip=clip))
    try:
        # A lazily opened picture must not be loaded by two threads at once, and may stand in windows that are read together.
        with strict_decoding(), _LOADING[id(image) % len(_LOADING)]:
            content = image.tobytes()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        source = str(getattr(image, "filename", "") or "a picture in memory")
        raise MediaError(reason="truncated_image", detail=str(error), source=source) from error
    head = f"{image.mode}|{image.size}|{image.getexif().get(0x0112, 1)}|{image.info.get('transparency')!r}|"
    palette = bytes(image.getpalette() or []) if image.mode in ("P", "PA") else b""
    return Picture(digest=hashlib.blake2b(head.encode() + palette + content, digest_size=16).digest(), image=image)


def _as_array(entry: Any, *, clip: bool = False) -> np.ndarray:
    """uint8 [H, W, 3] of an array [H, W, 3] or a tensor [3, H, W]; floats are rounded to 8 bits, as saving would."""
    if isinstance(entry, Tensor):
        if entry.ndim != 3 or entry.shape[0] not in (1, 3):
            raise InputError(f"an image tensor must be [3, H, W], got {tuple(entry.shape)}")
        values = (clipped(entry) if clip else entry).detach().cpu()
        check_range(values)
        if values.is_floating_point():
            if not bool(torch.isfinite(values).all()):
                raise MediaError(reason="undecodable_image", detail="pixels are not finite", source="tensor")
            values = (values.float().clamp(0, 1) * 255).round().to(torch.uint8)
        return np.ascontiguousarray(values.expand(3, -1, -1).permute(1, 2, 0).numpy())
    if isinstance(entry, np.ndarray):
        if entry.dtype != np.uint8 or entry.ndim != 3 or entry.shape[2] != 3:
            raise InputError(f"image arrays are uint8 [H, W, 3], got {entry.dtype} {entry.shape}; tensors may be float")
        return np.ascontiguousarray(entry)
    raise InputError(f"a {type(entry).__name__} is not a picture: give PIL images, paths, bytes, arrays or tensors")


def _upright_rgb(image: Image.Image, limits: Limits, source: str, keep_stored: bool, colours: Colours) -> Decoded:
    """A Pillow image under the same colour and rotation rules as a file."""
    rotated = colours.exif and image.getexif().get(0x0112, 1) != 1
    if image.mode == "RGB" and "transparency" not in image.info:
        # A fresh image: stale metadata must not reach later code.
        plain = ImageOps.exif_transpose(image) if rotated else image
        fresh = Image.frombytes("RGB", plain.size, plain.tobytes())
        flags = ("exif_rotated",) if rotated else ()
        return Decoded(image=fresh, original_size=(fresh.height, fresh.width), flags=flags, mime="")
    # A lossless file in memory goes through the one place that knows the colour rules.
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="TIFF" if image.mode == "CMYK" else "PNG", exif=image.getexif())
    except (OSError, ValueError, KeyError) as error:
        raise MediaError(reason="unsupported_format", detail=f"mode {image.mode}: {error}", source=source) from error
    return decode_image(buffer.getvalue(), limits, source=source, keep_stored=keep_stored, colours=colours)
