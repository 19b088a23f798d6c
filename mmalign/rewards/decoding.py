"""One picture: decoded and made ready for the encoders, here or in a process of its own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.media import DEFAULT, PLAIN, Colours, Limits, MediaError
from mmalign.media.slots import SlotPool
from mmalign.rewards.inputs import Picture
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.staging import DeviceResize, interleaved

RESIZED_SLOT: Final = 2 << 20
"""Bytes of shared memory for one picture: its file on the way there, its resized pixels on the way back. Larger files are decoded
by a thread."""
WHOLE_SLOT: Final = 8 << 20
"""The same where pictures come back whole, to be resized on the encoders' device: some two million pixels."""
SLOTS_EACH: Final = 3
"""Slots per process: one at work, one to be picked up, one to be emptied."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to become of every picture."""

    rules: Mapping[str, Preprocess]
    """By key."""
    keep_image: bool = False
    limits: Limits = DEFAULT
    colours: Colours = PLAIN

    def decodings(self) -> list[dict[str, Preprocess]]:
        """Rules that read the same decoding: all that read the whole picture, and drafts by what they want of it. That of the
        whole picture comes first, and is there if the picture is to be kept."""
        found: dict[object, dict[str, Preprocess]] = {None: {}} if self.keep_image or not self.rules else {}
        for key, rule in sorted(self.rules.items(), key=lambda item: item[1].draft):
            found.setdefault((rule.id.startswith("hps"), rule.size) if rule.draft else None, {})[key] = rule
        return list(found.values())


def load_picture(picture: Picture, wanted: Wanted, stage: DeviceResize | None = None) -> Loaded:
    """Decode a picture and make it ready for all rules; what is wrong with it where that cannot be."""
    found = Loaded()
    for rules in wanted.decodings():
        draft = next((rule.least for rule in rules.values() if rule.draft), None)
        needs_stored = any(rule.needs_stored for rule in rules.values())
        try:
            decoded = picture.decode(wanted.limits, keep_stored=needs_stored, colours=wanted.colours, draft=draft)
        except MediaError as error:
            return Loaded(reason=error.reason, message=str(error))
        image, staged = decoded.image, None
        if stage is not None and decoded.stored is None:
            staged = stage(image, rules, picture.digest)
        if staged is None:
            staged = {key: rule.from_image(image, decoded.stored, wanted.colours) for key, rule in rules.items()}, {}
            staged[1].update({key: _digest(value) for key, value in staged[0].items()})
        found.pixels.update(staged[0])
        found.pixel_digests.update(staged[1])
        found.flags = found.flags or decoded.flags
        if draft is None and wanted.keep_image:
            found.image = image
    return found


def _digest(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.numpy().data, digest_size=16).digest()


class ProcessDecoders:
    """Decodes and resizes in other processes. They start with the first picture and end with this process or `close`.

    What comes back is what `load_picture` gives here, bit for bit. Encoded files go there through shared memory, so it makes no
    difference whether they were read from a disk or a table.

    Args:
        processes: how many.

    Raises:
        DataError: at the first picture: there is not enough shared memory; later: a process was killed.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: SlotPool | None = None
        self._lock = threading.Lock()

    def load(self, picture: Picture, wanted: Wanted, stage: DeviceResize | None = None) -> Loaded | None:
        """As `load_picture`; None where the picture has to be decoded here: it is no encoded file or too large a one, or it is
        wanted itself. May be called from several threads, which are as many pictures under way."""
        data = picture.data
        if data is None or wanted.keep_image:
            return None
        pool = self._started(wanted, stage)
        if len(data) > pool.slot_bytes:
            return None
        whole = stage.ready(wanted.rules) if stage is not None and len(wanted.decodings()) == 1 else ()
        slot = pool.take()
        assert slot is not None  # only a take that can be ended gives None
        try:
            view = pool.view(slot)
            view[: len(data)] = np.frombuffer(data, np.uint8)
            made: _Made | None = pool.run(_fill, slot, len(data), picture.source, picture.digest, wanted, whole)
            if made is None:
                return None
            if made.whole is None:
                if stage is not None and made.size is not None:
                    stage.met(made.size, wanted.rules)
                return made.unpacked(view)
            height, width = made.whole
            stored = view[: height * width * 4].reshape(height, width, 4)
            staged = stage.resize(stored, wanted.rules, picture.digest) if stage is not None else None
            return None if staged is None else Loaded(pixels=staged[0], pixel_digests=staged[1], flags=made.flags)
        finally:
            pool.give(slot)

    def close(self) -> None:
        """End the processes; the next picture starts them again."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
            self._pool = None

    def _started(self, wanted: Wanted, stage: DeviceResize | None) -> SlotPool:
        needed = sum(3 * rule.size**2 * 4 for rule in wanted.rules.values())
        size = max(needed, RESIZED_SLOT if stage is None else WHOLE_SLOT)
        with self._lock:
            if self._pool is None:
                self._pool = SlotPool(
                    processes=self.processes, slots=SLOTS_EACH * self.processes, slot_bytes=size, begin=_begin,
                    remedy="use fewer decoding processes, or threads alone",
                )  # fmt: skip
            return self._pool


@dataclass(slots=True, kw_only=True)
class _Made:
    """What a process says about the picture in its slot."""

    flags: tuple[str, ...] = ()
    reason: str | None = None
    message: str | None = None
    whole: tuple[int, int] | None = None
    """(height, width) of the picture, which lies there as ``[H, W, 4]``."""
    size: tuple[int, int] | None = None
    """(width, height) of the decoded picture, if there is just one decoding."""
    layout: tuple[tuple[str, int, str, tuple[int, ...]], ...] = ()
    """(rule, offset, type, shape) of resized pixels."""
    digests: dict[str, bytes] = field(default_factory=dict)

    def unpacked(self, view: np.ndarray) -> Loaded:
        """Copies out of the slot."""
        pixels = {}
        for key, offset, kind, shape in self.layout:
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            pixels[key] = torch.from_numpy(view[offset : offset + size].view(kind).reshape(shape).copy())
        return Loaded(
            pixels=pixels, pixel_digests=self.digests, flags=self.flags, reason=self.reason, message=self.message
        )


def _begin() -> None:
    torch.set_num_threads(1)


def _fill(
    memory: np.ndarray, length: int, source: str, digest: bytes, wanted: Wanted, whole: tuple[tuple[int, int], ...]
) -> _Made | None:
    """In a process: the file in a slot becomes its pixels, in the same place."""
    picture = Picture(digest=digest, data=memory[:length].tobytes(), source=source)
    seen = _Whole(memory, whole)
    loaded = load_picture(picture, wanted, seen)  # type: ignore[arg-type]  # the same two questions
    if seen.taken is not None and loaded.reason is None:
        return _Made(flags=loaded.flags, whole=seen.taken)
    layout: list[tuple[str, int, str, tuple[int, ...]]] = []
    offset = 0
    for key, pixels in loaded.pixels.items():
        values = pixels.numpy()
        if offset + values.nbytes > len(memory):
            return None
        memory[offset : offset + values.nbytes] = values.reshape(-1).view(np.uint8)
        layout.append((key, offset, str(values.dtype), values.shape))
        offset += -(-values.nbytes // 64) * 64
    return _Made(flags=loaded.flags, reason=loaded.reason, message=loaded.message, size=seen.size,
                 layout=tuple(layout), digests=loaded.pixel_digests)  # fmt: skip


class _Whole:
    """In a process, in the place of `DeviceResize`: lays pictures of the sizes that are resized on the device into the slot."""

    def __init__(self, memory: np.ndarray, sizes: tuple[tuple[int, int], ...]) -> None:
        self.memory, self.sizes = memory, sizes
        self.size: tuple[int, int] | None = None
        self.taken: tuple[int, int] | None = None

    def __call__(self, image: Image.Image, rules: Any, digest: bytes) -> tuple[dict[str, Tensor], dict[str, bytes]] | None:
        self.size = image.size
        if image.size not in self.sizes or image.width * image.height * 4 > len(self.memory):
            return None
        stored = interleaved(image)
        if stored is None:
            return None
        self.memory[: stored.size].reshape(stored.shape)[...] = stored
        self.taken = stored.shape[:2]
        return {}, {}
