"""Rows to pixels, ahead of the encoders: files are read, identified, decoded and resized on threads, each distinct one once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from mmalign.media import PLAIN, Colours, Limits, MediaError
from mmalign.rewards.inputs import Picture, read_picture
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.staging import DeviceResize

MOST_WORKERS = 32


def default_workers() -> int:
    """Threads that read, decode and resize: one per core that this process may use, at least 4 and at most `MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(4, cores))


@dataclass(slots=True)
class Loaded:
    """One distinct picture of a window."""

    pixels: dict[str, Tensor] = field(default_factory=dict)  # preprocessing key -> [3, s, s]
    pixel_digests: dict[str, bytes] = field(default_factory=dict)
    """Of `pixels`: two rules that give the same pixels share one encoding."""
    image: Image.Image | None = None
    flags: tuple[str, ...] = ()
    reason: str | None = None
    message: str | None = None


@dataclass(slots=True)
class Window:
    """Some rows, read."""

    start: int
    digests: list[bytes]
    pictures: dict[bytes, Loaded]

    @property
    def decoded(self) -> int:
        """Pictures that could be decoded."""
        return sum(picture.reason is None for picture in self.pictures.values())


class Reader:
    """Reads windows of rows.

    Args:
        rules: preprocessing by key; every picture is made ready for all of them.
        keep_image: keep the decoded picture too, for rewards that read no pixels.
        limits: what is too large to decode.
        stage: resizes on the encoders' device; None: on the threads.
        colours: what becomes of transparency and rotation tags.
    """

    def __init__(
        self,
        rules: Mapping[str, Preprocess],
        *,
        keep_image: bool,
        limits: Limits,
        stage: DeviceResize | None = None,
        colours: Colours = PLAIN,
    ) -> None:
        self.rules, self.keep_image, self.limits, self.stage = dict(rules), keep_image, limits, stage
        self.colours = colours
        self._needs_stored = any(rule.needs_stored for rule in self.rules.values())

    def read(self, images: Sequence[Any], start: int, pool: ThreadPoolExecutor) -> Window:
        """The rows from number `start` on, on the threads of `pool`."""
        # The same object may stand in many rows; a lazily opened picture must not be loaded by two threads at once.
        objects = {id(entry): entry for entry in images}
        known = dict(zip(objects, pool.map(self._identify, objects.values()), strict=True))
        identified = [known[id(entry)] for entry in images]
        digests = [
            picture.digest if isinstance(picture, Picture) else f"failed row {start + row}".encode()
            for row, picture in enumerate(identified)
        ]
        first = dict(reversed(list(zip(digests, identified, strict=True))))
        window = Window(
            start=start, digests=digests, pictures=dict(zip(first, pool.map(self._load, first.values()), strict=True))
        )
        if self.stage is not None:
            self.stage.wait()
        return window

    def _identify(self, entry: Any) -> Picture | MediaError:
        try:
            return read_picture(entry, self.limits)
        except MediaError as error:
            return error

    def _load(self, picture: Picture | MediaError) -> Loaded:
        if isinstance(picture, MediaError):
            return Loaded(reason=picture.reason, message=str(picture))
        try:
            decoded = picture.decode(self.limits, keep_stored=self._needs_stored, colours=self.colours)
        except MediaError as error:
            return Loaded(reason=error.reason, message=str(error))
        image = decoded.image
        kept = image if self.keep_image else None
        staged = None
        if self.stage is not None and decoded.stored is None:
            staged = self.stage(image, self.rules, picture.digest)
        if staged is not None:
            return Loaded(pixels=staged[0], pixel_digests=staged[1], image=kept, flags=decoded.flags)
        pixels = {key: rule.from_image(image, decoded.stored, self.colours) for key, rule in self.rules.items()}
        digests = {key: hashlib.blake2b(value.numpy().data, digest_size=16).digest() for key, value in pixels.items()}
        return Loaded(pixels=pixels, pixel_digests=digests, image=kept, flags=decoded.flags)
