"""The resize rule: sizes and corners by hand, pixels by regions of one colour."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmalign.media import cover_geometry, resize_crop, to_array


def test_geometry_by_hand() -> None:
    assert cover_geometry((100, 200), (50, 50), "center") == ((50, 100), (0, 25))
    assert cover_geometry((200, 100), (50, 50), (1.0, 0.3)) == ((100, 50), (50, 0))
    assert cover_geometry((10, 10), (10, 10), "center") == ((10, 10), (0, 0))
    assert cover_geometry((33, 32), (64, 64), (0.0, 0.0)) == ((66, 64), (0, 0))


@pytest.mark.parametrize("crop", ["middle", (1.5, 0.0), (-0.1, 0.0)])
def test_bad_crops_are_errors(crop: object) -> None:
    with pytest.raises(ValueError, match="crop"):
        cover_geometry((10, 20), (5, 5), crop)  # type: ignore[arg-type]


def test_crop_takes_the_named_region() -> None:
    # Left third red, middle green, right blue; cropping a square shows one colour (the filter never reads outside).
    strip = np.zeros((20, 60, 3), dtype=np.uint8)
    for index in range(3):
        strip[:, index * 20 : (index + 1) * 20, index] = 255
    image = Image.fromarray(strip)
    for fraction, colour in ((0.0, 0), (0.5, 1), (1.0, 2)):
        for side in (20, 10, 40):
            cropped, (top, left) = resize_crop(image, (side, side), (0.0, fraction))
            assert cropped.size == (side, side)
            assert (top, left) == (0, int(fraction * 2 * side))
            assert to_array(cropped).reshape(-1, 3).mean(0).argmax() == colour
            assert to_array(cropped)[side // 2, side // 2, colour] == 255


def test_a_very_long_picture_makes_no_huge_intermediate() -> None:
    cropped, (_, left) = resize_crop(Image.new("RGB", (16_000, 2)), (512, 512))
    assert cropped.size == (512, 512)
    assert left == (16_000 * 256 - 512) // 2


def test_equal_size_copies_pixels_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    cropped, _ = resize_crop(Image.fromarray(pixels), (8, 9))
    assert np.array_equal(to_array(cropped), pixels)
