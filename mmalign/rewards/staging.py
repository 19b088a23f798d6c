"""Resizing on the GPU: decoded pictures go there whole, so that the processor has only to decode.

On many cores and a fast GPU the resize is more than half of what a picture costs the processor. The pixels are those of
`Preprocess.from_image`: crops bit for bit (`resample`), letterboxes to the rounding of float32.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.rewards.preprocess import Preprocess

BEFORE = 4
"""Pictures of one size that go the ordinary way before it is worth comparing both ways on it."""

_PORTABLE = 1
"""cudaHostRegisterPortable: for all devices."""

MOST_SIZES = 32
"""Of which decoding processes are told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """What came of one picture."""

    keys: frozenset[str]
    """Rules that need no more work of the processor."""
    pixels: Mapping[str, Tensor]
    names: Mapping[str, bytes]
    """Equal for equal pixels."""


class DeviceResize:
    """Resizes on one device, one picture or some of one size at a time, on a stream of its own.

    Args:
        device: where the encoders are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Ahead of the encoders: its kernels are short, and what waits for them is a reader.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._seen: Counter[tuple[int, int]] = Counter()
        self._ready: dict[tuple[str, ...], dict[tuple[int, int], None]] = {}
        self._lock = threading.Lock()

    def lock_pages(self, memory: np.ndarray) -> Callable[[], None] | None:
        """Lock the pages of memory from which pictures will come, so that they go to the device without a copy on the way.

        Returns:
            what undoes it, to be called before the memory is given back; None where they are not locked: on a CPU, and where
            there is a limit on locked memory.
        """
        if self.stream is None:
            return None
        begin, runtime = memory.ctypes.data, torch.cuda.cudart()
        with torch.cuda.device(self.device):
            if int(runtime.cudaHostRegister(begin, memory.nbytes, _PORTABLE)):
                return None
        return lambda: runtime.cudaHostUnregister(begin)

    def __call__(
        self, image: Image.Image, rules: Mapping[str, Preprocess], digest: bytes
    ) -> Staged | None:
        """Pixels on the device, of some rules or all; None where the ordinary way is to be gone.

        Args:
            image: RGB.
            rules: by key.
            digest: of the picture.
        """
        crops = {key: rule for key, rule in rules.items() if not rule.is_letterbox}
        fits = bool(crops) and self._worth_it(image.size) and all(rule.fits_device(image.size) for rule in crops.values())
        chosen = always_staged(image.size, rules) | (crops.keys() if fits else frozenset())
        stored = interleaved(image) if chosen else None
        several = None if stored is None else self.resize(stored[None], {key: rules[key] for key in chosen}, [digest])
        if several is None:
            return None
        pixels, names = several
        return Staged(keys=chosen, pixels={key: pixels[key][0] for key in chosen}, names={key: names[key][0] for key in chosen})

    def resize(
        self, stored: np.ndarray, rules: Mapping[str, Preprocess], digests: Sequence[bytes], *, locked: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, list[bytes]]] | None:
        """The same of several pictures of one size that fits: ``[N, H, W, 4]``, each as `interleaved` gives it. They have been
        copied when this returns. `locked`: they lie in memory of `lock_pages`."""
        size = (stored.shape[2], stored.shape[1])
        names = {
            key: [hashlib.blake2b(digest + rule.geometry(size), digest_size=16).digest() for digest in digests]
            for key, rule in rules.items()
        }
        try:
            if self.stream is None:
                return self._resized(torch.tensor(stored), rules), names
            if locked:
                held = torch.from_numpy(stored)
            else:
                held = torch.empty(stored.shape, dtype=torch.uint8, pin_memory=True)
                held.numpy()[...] = stored
            copied = torch.cuda.Event(blocking=True)
            # One at a time: the float64 copy of a large picture takes memory that the encoders want.
            with self._lock, torch.cuda.stream(self.stream):
                there = held.to(self.device, non_blocking=True)
                copied.record(self.stream)
                pixels = self._resized(there, rules)
            if locked:  # the memory is the caller's again when this returns
                copied.synchronize()
            return pixels, names
        except torch.OutOfMemoryError:
            return None

    def met(self, size: tuple[int, int], rules: Mapping[str, Preprocess]) -> None:
        """A picture of this (width, height) was decoded elsewhere, and its crops were cut there."""
        crops = [rule for rule in rules.values() if not rule.is_letterbox]
        if crops and self._worth_it(size) and all(rule.fits_device(size) for rule in crops):
            with self._lock:
                sizes = self._ready.setdefault(tuple(rules), {})
                sizes[size] = None
                while len(sizes) > MOST_SIZES:
                    del sizes[next(iter(sizes))]

    def ready(self, rules: Mapping[str, Preprocess]) -> tuple[tuple[int, int], ...]:
        """Sizes of which pictures may come whole to be cropped here."""
        with self._lock:
            return tuple(self._ready.get(tuple(rules), ()))

    def wait(self) -> None:
        """Until all pixels handed out are there. Sleeps: the cores are wanted for decoding."""
        if self.stream is not None:
            done = torch.cuda.Event(blocking=True)
            done.record(self.stream)
            done.synchronize()

    @torch.inference_mode()
    def _resized(self, stored: Tensor, rules: Mapping[str, Preprocess]) -> dict[str, Tensor]:
        planes = stored[..., :3].permute(0, 3, 1, 2)
        return {key: rule.from_planes(planes) for key, rule in rules.items()}

    def _worth_it(self, size: tuple[int, int]) -> bool:
        with self._lock:
            self._seen[size] += 1
            return self._seen[size] > BEFORE


def always_staged(size: tuple[int, int], rules: Mapping[str, Preprocess]) -> frozenset[str]:
    """Keys of the rules whose pixels are made on the device from the first picture of a (width, height) on: the processor rounds
    letterboxes otherwise, and a score must not depend on what was scored before. Crops are equal bit for bit."""
    return frozenset(key for key, rule in rules.items() if rule.is_letterbox and rule.fits_device(size))


def interleaved(image: Image.Image) -> np.ndarray | None:
    """The memory of an RGB picture without a copy, uint8 ``[H, W, 4]`` with an unused fourth byte; valid while `image` lives.

    None where Pillow keeps the picture in several blocks (more than some four million pixels).
    """
    import pyarrow as pa

    try:
        values = pa.array(image).flatten().to_numpy(zero_copy_only=True)  # type: ignore[call-overload]
    except (ValueError, TypeError, pa.ArrowInvalid):
        return None
    return values.reshape(image.height, image.width, 4) if values.size == image.height * image.width * 4 else None
