"""Resize so that the target is covered, then crop: one rule for training, caches and previews."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image

RESIZE_RULE: Final = "cover-bicubic-box"
"""Name of the rule, for cache fingerprints; it changes whenever the pixels would."""

Crop = str | tuple[float, float]
"""``"center"``, or the (vertical, horizontal) position of the crop as fractions in [0, 1] of the room there is."""


def cover_geometry(
    source: tuple[int, int], target: tuple[int, int], crop: Crop
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size of the resized picture that just covers `target`, and the crop's (top, left) in it. All (height, width).

    Raises:
        ValueError: a size below one pixel, or a fraction outside [0, 1].
    """
    if min(*source, *target) < 1:
        raise ValueError(f"sizes must be at least one pixel, got source {source} and target {target}")
    fractions = (0.5, 0.5) if crop == "center" else crop
    if isinstance(fractions, str) or not all(0.0 <= value <= 1.0 for value in fractions):
        raise ValueError(f"crop must be 'center' or two fractions in [0, 1], got {crop!r}")
    scale = max(target[0] / source[0], target[1] / source[1])
    resized = (max(target[0], round(source[0] * scale)), max(target[1], round(source[1] * scale)))
    room = (resized[0] - target[0], resized[1] - target[1])
    # floor(f * (room + 1)) makes every offset equally likely for a uniform f, and the middle one for f = 1/2.
    top, left = (min(int(f * (r + 1)), r) if crop != "center" else r // 2 for f, r in zip(fractions, room, strict=True))
    return resized, (top, left)


def resize_crop(
    image: Image.Image, size: tuple[int, int], crop: Crop = "center"
) -> tuple[Image.Image, tuple[int, int]]:
    """Resize a picture to cover `size` (height, width) and crop it.

    Only the region that survives is resampled (bicubic, antialiased), so a very long picture never becomes a huge
    intermediate one.

    Returns:
        the cropped picture, and the crop's (top, left) in the resized picture.
    """
    height, width = image.height, image.width
    resized, (top, left) = cover_geometry((height, width), size, crop)
    if resized == (height, width):
        return image.crop((left, top, left + size[1], top + size[0])), (top, left)
    vertical, horizontal = height / resized[0], width / resized[1]
    box = (
        left * horizontal,
        top * vertical,
        min((left + size[1]) * horizontal, float(width)),
        min((top + size[0]) * vertical, float(height)),
    )
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box), (top, left)


def to_array(image: Image.Image) -> np.ndarray:
    """RGB picture to uint8 ``[H, W, 3]``."""
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)
