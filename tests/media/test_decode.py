"""Every way a picture can be odd or broken, and what becomes of it."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from mmalign.media import Colours, Limits, MediaError, decode_image, open_image, to_array
from mmalign.media.decode import ALPHAS


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reason(data: bytes | Path | str, limits: Limits | None = None) -> str:
    with pytest.raises(MediaError) as caught:
        open_image(data, limits or Limits())
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_is_refused_even_when_pillow_tolerates_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(64, 64), kind)
    assert open_image(data).image.size == (64, 64)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for share in (0.9, 0.5):
        assert reason(data[: int(len(data) * share)]) in ("truncated_image", "undecodable_image")
    if kind in ("JPEG", "PNG", "GIF"):
        assert reason(data[: len(data) // 2]) == "truncated_image"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_tolerance_flag_survives_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(noise(200, 200), "JPEG")
    cut, refused = data[: len(data) // 2], []

    def work() -> None:
        for _ in range(10):
            try:
                open_image(cut)
            except MediaError as error:
                refused.append(error.reason)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == ["truncated_image"] * 40
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_orientations_put_the_marked_corner_where_exif_says() -> None:
    # Red at the top left of the stored picture, 3 wide and 2 high. Where it must appear: (row, column, size).
    expected = {1: (0, 0), 2: (0, 2), 3: (1, 2), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (2, 1), 8: (2, 0)}
    stored = Image.new("RGB", (3, 2), (0, 0, 255))
    stored.putpixel((0, 0), (255, 0, 0))
    for orientation, corner in expected.items():
        for kind in ("PNG", "TIFF"):
            exif = Image.Exif()
            exif[0x0112] = orientation
            decoded = open_image(encoded(stored, kind, exif=exif))
            pixels = to_array(decoded.image)
            assert decoded.original_size == ((2, 3) if orientation < 5 else (3, 2)), (orientation, kind)
            assert tuple(pixels[corner]) == (255, 0, 0), (orientation, kind)
            assert (pixels[..., 0] == 255).sum() == 1
            assert ("exif_rotated" in decoded.flags) == (orientation > 1), (orientation, kind)


def test_broken_exif_does_not_lose_the_picture() -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff garbage")
    assert open_image(data).original_size == (24, 32)


def test_alpha_goes_over_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    decoded = open_image(encoded(rgba, "PNG"))
    assert to_array(decoded.image).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert decoded.flags == ("alpha",)
    half = open_image(encoded(Image.new("LA", (1, 1), (0, 51)), "PNG"))  # 51/255 = 0.2 of black over white = 204
    assert to_array(half.image).tolist() == [[[204, 204, 204]]]
    assert set(half.flags) == {"grey", "alpha"}
    assert open_image(encoded(Image.new("RGBA", (1, 1), (1, 2, 3, 255)), "PNG")).flags == ()


def test_palette_with_and_without_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    plain = open_image(encoded(palette, "PNG"))
    assert to_array(plain.image).tolist() == [[[255, 0, 0], [0, 255, 0]]]
    assert plain.flags == ("palette",)
    clear = open_image(encoded(palette, "PNG", transparency=1))
    assert to_array(clear.image).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert clear.flags == ("palette", "alpha")


def png(colour_type: int, depth: int, width: int, height: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_grey_is_rounded_and_colour_keeps_the_high_byte() -> None:
    values = (0xFFFF, 0x8012, 128, 129, 0x01FF, 0x80FF, 0xFF00)
    grey = open_image(png(0, 16, len(values), 1, b"\x00" + struct.pack(">7H", *values)))
    assert to_array(grey.image)[0, :, 0].tolist() == [round(value / 257) for value in values]
    assert to_array(grey.image)[0, :, 0].tolist() == [255, 128, 0, 1, 2, 128, 254]
    assert set(grey.flags) == {"16bit", "grey"}
    colour = open_image(png(2, 16, 1, 1, b"\x00" + struct.pack(">HHH", 0xFFFF, 0x8012, 0x00FF)))
    assert to_array(colour.image).tolist() == [[[255, 128, 0]]]
    assert colour.flags == ("16bit",)


def test_cmyk_and_one_pixel() -> None:
    decoded = open_image(encoded(Image.new("CMYK", (1, 1), (0, 0, 0, 0)), "JPEG"))
    assert to_array(decoded.image).tolist() == [[[255, 255, 255]]]
    assert decoded.flags == ("cmyk",)
    assert decoded.mime == "image/jpeg"


def test_animation_gives_its_first_frame_flagged() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        decoded = open_image(data)
        assert "animated" in decoded.flags, kind
        assert to_array(decoded.image)[0, 0].tolist() == [255, 0, 0], kind


def test_sizes_are_checked_before_any_pixel_is_decoded() -> None:
    # 20000 x 20000 claimed in the header, no pixel data at all: a decoder would complain of truncation instead.
    assert reason(png(2, 8, 20_000, 20_000, b"")) == "too_large"
    assert reason(png(0, 8, 70_000, 10, b"\x00" * 70_001 * 10)) == "too_large"
    assert reason(png(0, 8, 12_000, 12_000, b"")) == "too_large"
    data = encoded(noise(), "PNG")
    assert reason(data, Limits(max_side=31)) == "too_large"
    assert reason(data, Limits(max_pixels=24 * 32 - 1)) == "too_large"
    assert reason(data, Limits(max_bytes=len(data) - 1)) == "too_large"
    assert open_image(data, Limits(max_side=32, max_pixels=24 * 32)).original_size == (24, 32)


def test_our_limit_rules_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    assert open_image(encoded(noise(), "JPEG")).original_size == (24, 32)


def test_what_is_no_picture(tmp_path: Path) -> None:
    assert reason(b"") == "empty_image"
    page = tmp_path / "photo.jpg"
    page.write_bytes(b"\n<!DOCTYPE html><html><body>404</body></html>")
    with pytest.raises(MediaError, match="HTML") as caught:
        open_image(page)
    assert caught.value.reason == "unsupported_format"
    assert str(page) in str(caught.value)
    assert reason(b"%PDF-1.7 ...") == "unsupported_format"
    assert reason(b"\x00" * 64) == "unsupported_format"
    assert reason(tmp_path / "absent.png") == "missing_image"
    assert reason(tmp_path) == "missing_image"
    assert reason(str(tmp_path / "nul\x00.png")) == "missing_image"


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(MediaError, match="no regular file") as caught:
            open_image(place)
        assert caught.value.reason == "missing_image"


def test_the_name_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "really_png.jpg"
    path.write_bytes(encoded(noise(), "PNG"))
    assert open_image(path).mime == "image/png"


def test_corruption_in_the_middle_is_refused() -> None:
    data = bytearray(encoded(noise(64, 64), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert reason(bytes(data)) == "undecodable_image"


def test_alpha_and_rotation_may_be_treated_otherwise() -> None:
    """One half transparent red pixel beside an opaque blue one, turned by a tag."""
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    picture.putpixel((1, 0), (0, 0, 255, 255))
    found = {
        alpha: [decode_image(encoded(picture, "PNG"), colours=Colours(alpha=alpha)).image.getpixel((x, 0)) for x in (0, 1)]
        for alpha in ALPHAS
    }
    assert found == {"white": [(255, 127, 127), (0, 0, 255)], "black": [(128, 0, 0), (0, 0, 255)],
                     "drop": [(255, 0, 0), (0, 0, 255)]}  # fmt: skip
    declared = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(declared, "PNG", transparency=(255, 0, 0))
    dropped = decode_image(declared.getvalue(), colours=Colours(alpha="drop"))
    assert dropped.image.getpixel((0, 0)) == (255, 0, 0) and dropped.flags == ("alpha",)
    for kind in ("JPEG", "TIFF", "PNG"):
        for orientation in range(1, 9):
            tagged, exif = Image.new("RGB", (4, 2), "black"), Image.Exif()
            tagged.putpixel((0, 0), (255, 255, 255))
            exif[0x0112] = orientation
            left = decode_image(encoded(tagged, kind, exif=exif), colours=Colours(exif=False))
            assert left.image.size == (4, 2) and not left.flags, (kind, orientation)
            assert sum(left.image.getpixel((0, 0))) > 300 > sum(left.image.getpixel((3, 1)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha is one of white, black, drop"):
        Colours(alpha="grey")


def test_a_decoded_picture_carries_no_metadata() -> None:
    """What is handed on without a copy must be as bare as a fresh picture, and must not be turned a second time."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 1
    for kind in ("JPEG", "PNG"):
        found = decode_image(encoded(Image.new("RGB", (4, 2), "red"), kind, exif=exif)).image
        assert found.info == {} and ImageOps.exif_transpose(found).size == (4, 2)
        assert found.copy().tobytes() == found.tobytes()
