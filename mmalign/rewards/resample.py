"""Pillow's bicubic resize as two matrix products, equal to it bit for bit, so that a GPU can do it.

Pillow resizes 8-bit pictures in integers: weights are rounded to 22 binary places, each pass adds one half, shifts and clips.
Every number on the way is an integer below 2**53, so float64 products give the same result in any order of summation. Which
pass comes first depends on Pillow's version and on the size, so it is found by asking Pillow once per size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign import rng

_BITS = 22
_SUPPORT = 2.0


@lru_cache(maxsize=64)
def weights(length: int, resized: int, first: int, count: int, device: torch.device) -> Tensor:
    """Integer weights of `count` outputs from `first` on, for a line of `length` resized to `resized`: float64 [length, count].

    The filter is the cubic with a = -0.5, widened by the scale when a line shrinks.
    """
    scale = length / resized
    widened = max(scale, 1.0)
    support = _SUPPORT * widened
    out = np.zeros((count, length))
    for row in range(count):
        centre = (first + row + 0.5) * scale
        low, high = max(0, int(centre - support + 0.5)), min(length, int(centre + support + 0.5))
        found = _cubic((np.arange(low, high) - centre + 0.5) * (1.0 / widened))
        # Summed one after the other, as Pillow does: another order could round another weight.
        shares = found / float(np.cumsum(found)[-1])
        out[row, low:high] = np.trunc(shares * (1 << _BITS) + np.where(shares < 0, -0.5, 0.5))
    return torch.from_numpy(out).T.contiguous().to(device)


def _cubic(places: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(places)
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def resize_crop_exact(
    pixels: Tensor, resized: tuple[int, int], offset: tuple[int, int], size: int, *, vertical_first: bool = False
) -> Tensor:
    """The square at `offset` of a picture resized to `resized`, equal to Pillow's ``resize(resized, BICUBIC)`` and ``crop``.

    Args:
        pixels: uint8 ``[planes, H, W]`` on any device.
        resized: (width, height) of the whole resized picture.
        offset: (left, top) of the square in it.
        size: its side.
        vertical_first: the order of the passes, from `pass_order`.

    Returns:
        uint8 ``[planes, size, size]`` on the same device.
    """
    (width, height), (left, top) = resized, offset
    for vertical in (vertical_first, not vertical_first):
        if vertical:
            pixels = _pass(pixels.transpose(1, 2), height, top, size).transpose(1, 2)
        else:
            pixels = _pass(pixels, width, left, size)
    return pixels.to(torch.uint8).contiguous()


def _pass(planes: Tensor, resized: int, first: int, size: int) -> Tensor:
    """Resize along the last axis, keeping `size` places from `first` on."""
    length = planes.shape[-1]
    if length == resized:
        return planes[..., first : first + size]
    sums = planes.double() @ weights(length, resized, first, size, planes.device)
    # Integers throughout: one half is added, 22 binary places are dropped, and what overshoots is clipped.
    return sums.add_(1 << (_BITS - 1)).mul_(2.0**-_BITS).floor_().clamp_(0, 255)


@lru_cache(maxsize=4096)
def pass_order(stored: tuple[int, int], resized: tuple[int, int], offset: tuple[int, int], size: int) -> bool | None:
    """Whether this Pillow resizes pictures of the size `stored` (width, height) vertically first, seen on a random one.

    None: neither order gives what Pillow gives, and Pillow has to be asked for every picture.
    """
    (width, height), (left, top) = stored, offset
    noise = rng.numpy_stream(0, f"resize/{width}x{height}").integers(0, 256, (height, width), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(resized, Image.Resampling.BICUBIC)
    wanted = np.asarray(picture.crop((left, top, left + size, top + size)))
    for vertical_first in (False, True):
        found = resize_crop_exact(torch.from_numpy(noise)[None], resized, offset, size, vertical_first=vertical_first)
        if np.array_equal(found[0].numpy(), wanted):
            return vertical_first
    return None
