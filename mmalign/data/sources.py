"""Where one side's numbers come from: pictures decoded now, or latents gathered from a cache."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmalign.data.augment import Augmentation, Draw
from mmalign.data.cache import Cache
from mmalign.data.mediaindex import SIDES, MediaIndex
from mmalign.errors import DataError
from mmalign.media import (
    Crop,
    Limits,
    MediaError,
    cover_geometry,
    decode_image,
    read_bytes,
    resize_crop,
    to_array,
)
from mmalign.types import Geometry, ImageRef, Moments, PairRecord, Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One picture ready for a batch."""

    pixels: Tensor  # [3, H, W] float32 in [-1, 1], or uint8 as decoded
    original: tuple[int, int]  # (height, width)
    crop: tuple[int, int]  # (top, left) in the resized, and if drawn mirrored, picture


class RowFailure(Exception):
    """A row that passed the check and cannot be read now."""

    def __init__(self, *, column: str, reason: str, detail: str) -> None:
        self.column = column
        self.reason = reason
        self.detail = detail
        super().__init__(f"column '{column}': {reason}: {detail}")


class ChangedError(DataError):
    """A picture is not the one that was checked: what is known of it, and cached for it, belongs to another."""


def refuse_changed(data: bytes, known: str, source: str) -> None:
    """Compare a picture with the SHA-256 of what the check saw.

    Raises:
        ChangedError: other bytes.
    """
    if hashlib.sha256(data).hexdigest() != known:
        raise ChangedError(f"{source} is not the file that was checked; run 'mmalign data check' again")


def crop_corner(original: tuple[int, int], resolution: tuple[int, int], crop: Crop, *, flip: bool) -> tuple[int, int]:
    """(top, left) of the crop in the resized picture; in the mirrored one when mirrored, as the model sees it."""
    resized, (top, left) = cover_geometry(original, resolution, crop)
    return top, (resized[1] - resolution[1] - left if flip else left)


def prepare(
    data: bytes, *, source: str, resolution: tuple[int, int], crop: Crop, flip: bool, limits: Limits, raw: bool = False
) -> Prepared:
    """Decode, resize, crop and mirror one picture.

    Args:
        raw: leave the pixels bytes; `normalised` makes of them what they would have been.

    Raises:
        MediaError: it cannot be decoded.
    """
    decoded = decode_image(data, limits, source=source)
    cropped, _ = resize_crop(decoded.image, resolution, crop)
    plain = torch.from_numpy(to_array(cropped)).permute(2, 0, 1)
    # Turned and mirrored while they are bytes: a quarter of the memory of what they become.
    plain = plain.flip(-1).contiguous() if flip else plain.contiguous()
    return Prepared(
        pixels=plain if raw else normalised(plain),
        original=decoded.original_size,
        crop=crop_corner(decoded.original_size, resolution, crop, flip=flip),
    )


def normalised(pixels: Tensor) -> Tensor:
    """Bytes as float32 in [-1, 1], on whatever device they are; the same numbers on all of them."""
    # By a plain number, CUDA multiplies with its reciprocal, which rounds otherwise than the division on a CPU.
    largest = torch.full((), 255.0, device=pixels.device)
    return pixels.to(torch.float32).div_(largest).mul_(2.0).sub_(1.0)


class PixelReader:
    """Reads both pictures of a row, with retries for files that are missing for a moment."""

    def __init__(
        self, *, resolution: tuple[int, int], media: MediaIndex | None, limits: Limits, retry_seconds: Sequence[float]
    ) -> None:
        self.resolution = resolution
        self.media = media
        self.limits = limits
        self.retry_seconds = tuple(retry_seconds)
        self.raw = False
        """Leave pixels bytes."""

    def read(
        self, row: int, record: PairRecord, draw: Draw, stop: threading.Event, *, known: tuple[str, str] | None = None
    ) -> tuple[Prepared, Prepared]:
        """Both pictures under the same draw.

        Args:
            known: SHA-256 of both pictures as they were checked, where this reader has no facts of its own.

        Raises:
            RowFailure: either cannot be read, or is not the picture that was checked.
        """
        if self.media is not None:
            known = (self.media.picture(row, 0).sha256, self.media.picture(row, 1).sha256)
        chosen = self._one(0, record.chosen, draw, stop, known)
        return chosen, self._one(1, record.rejected, draw, stop, known)

    def _one(
        self, side: int, ref: ImageRef, draw: Draw, stop: threading.Event, known: tuple[str, str] | None
    ) -> Prepared:
        try:
            data, source = self._bytes(ref, stop)
            if known is not None:
                refuse_changed(data, known[side], source)
            return prepare(
                data,
                source=source,
                resolution=self.resolution,
                crop=draw.crop,
                flip=draw.flip,
                limits=self.limits,
                raw=self.raw,
            )
        except MediaError as error:
            raise RowFailure(column=SIDES[side], reason=error.reason, detail=error.detail) from error
        except ChangedError as error:
            raise RowFailure(column=SIDES[side], reason="changed_image", detail=str(error)) from error

    def _bytes(self, ref: ImageRef, stop: threading.Event) -> tuple[bytes, str]:
        for pause in self.retry_seconds:
            try:
                return read_bytes(ref, self.limits)
            except MediaError as error:
                # Only storage can recover; bytes that are wrong stay wrong.
                if error.reason != "missing_image" or stop.wait(pause):
                    raise
        return read_bytes(ref, self.limits)


class LatentReader:
    """Gathers both sides of a batch from a filled cache."""

    def __init__(self, *, cache: Cache, media: MediaIndex, resolution: tuple[int, int]) -> None:
        self.cache = cache
        self.media = media
        self.resolution = resolution

    def sides(self, rows: Sequence[int], draws: Sequence[Draw]) -> tuple[Side, Side]:
        """Chosen and rejected of these rows under these draws.

        Raises:
            DataError: a latent is not in the cache.
        """
        return self._side(rows, draws, 0), self._side(rows, draws, 1)

    def _side(self, rows: Sequence[int], draws: Sequence[Draw], which: int) -> Side:
        pictures = [self.media.picture(row, which) for row in rows]
        pairs = list(zip(pictures, draws, strict=True))
        hashes = self.media.hashes[np.asarray(rows, dtype=np.int64), which]
        variants = np.array([draw.variant for draw in draws], dtype=np.int64)
        flips = np.array([draw.flip for draw in draws], dtype=bool)
        found = self.cache.gather_digests(latent_digests(hashes, variants, flips))
        corners = [crop_corner(p.size, self.resolution, d.crop, flip=d.flip) for p, d in pairs]
        return Side(
            geometry=geometry([picture.size for picture in pictures], corners, self.resolution),
            moments=Moments(mean=found["mean"].float(), std=found["std"].float()),
        )


def stack_pixels(pictures: Sequence[Prepared | None], resolution: tuple[int, int], *, raw: bool = False) -> Side:
    """One side of a batch. A masked row (None) holds the lowest value: its weight is 0, and its numbers stay finite.

    Args:
        raw: the pictures are bytes, and so is the batch.
    """
    empty = torch.zeros(3, *resolution, dtype=torch.uint8)
    hollow = Prepared(pixels=empty if raw else normalised(empty), original=resolution, crop=(0, 0))
    solid = [picture or hollow for picture in pictures]
    return Side(
        geometry=geometry([picture.original for picture in solid], [picture.crop for picture in solid], resolution),
        pixels=torch.stack([picture.pixels for picture in solid]),
    )


def geometry(
    originals: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]], target: tuple[int, int]
) -> Geometry:
    """Rows of (height, width) or (top, left) as int64 [B, 2] tensors."""
    return Geometry(
        original=torch.tensor(originals, dtype=torch.int64),
        crop=torch.tensor(crops, dtype=torch.int64),
        target=torch.tensor([target] * len(originals), dtype=torch.int64),
    )


def latent_digests(hashes: np.ndarray, variants: np.ndarray | int, flips: np.ndarray | bool) -> np.ndarray:
    """Cache digests of pictures under geometry variants (variant -1: the centre crop), for whole tables at once.

    Args:
        hashes: SHA-256 of the encoded pictures, [n, 32] uint8.

    Returns:
        [n, 16] uint8: the first half of the hash, its last four bytes combined with variant and flip.
    """
    out = hashes[:, :16].copy()
    code = (np.asarray(variants, dtype=np.int64) + 1) * 2 + np.asarray(flips, dtype=np.int64)
    out[:, 12:] ^= np.broadcast_to(code, len(out)).astype("<u4").reshape(-1, 1).view(np.uint8)
    return np.ascontiguousarray(out)


def latent_key(sha256: str, *, variant: int, flip: bool) -> str:
    """The cache key of one picture under one geometry variant (variant -1: the centre crop)."""
    hashes = np.frombuffer(bytes.fromhex(sha256), dtype=np.uint8).reshape(1, 32)
    return f"#{latent_digests(hashes, variant, flip).tobytes().hex()}"


def text_key(prompt: str) -> str:
    """The cache key of a prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def refuse_uncacheable(augmentation: Augmentation) -> None:
    """Latents can be cached only for a finite set of crops.

    Raises:
        DataError: random crops without a number of variants.
    """
    if augmentation.crop == "random" and augmentation.crop_variants == 0:
        raise DataError(
            "random crops cannot be cached: every epoch would need other latents;"
            " set crop_variants to a small number of fixed crop positions, or crop: center, or cache: off"
        )
