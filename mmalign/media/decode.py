"""Open a picture completely, or say exactly why it cannot be used.

The header's size is checked before any pixel is decoded. Colour policy: alpha is composited over white, 16-bit grey values
are divided by 257 and rounded, 16-bit colours are what Pillow makes of them (the high byte), CMYK and palettes are converted,
EXIF rotation is applied (`Colours` has other ways for alpha and rotation); embedded colour profiles are not. DICOM files are
shown as they say (``media.dicom``). Each of these is recorded as a flag. Not for video.
"""

from __future__ import annotations

import io
import stat
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from mmalign.media.dicom import MIME, decode_dicom, is_dicom
from mmalign.media.errors import MediaError
from mmalign.media.sniff import JPEG, PNG, TIFF, Kind, describe_foreign, image_kind, looks_cut

if TYPE_CHECKING:
    from mmalign.types import ImageRef

ALPHAS: Final = ("white", "black", "drop")
"""Composited over white or black, or left out (what plain RGB conversion does: colours of transparent pixels appear)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Colours:
    """What becomes of transparency and of rotation tags; everything else is fixed."""

    alpha: str = "white"
    """One of `ALPHAS`."""
    exif: bool = True
    """Whether the rotation that a camera wrote is applied."""
    clip: bool = False
    """Whether numbers outside [0, 1] (floating-point files and tensors) are cut off there; otherwise they are an error."""

    def __post_init__(self) -> None:
        if self.alpha not in ALPHAS:
            raise ValueError(f"alpha is one of {', '.join(ALPHAS)}; got {self.alpha!r}")

    @property
    def name(self) -> str:
        """For cache fingerprints and records."""
        alpha = "alpha-dropped" if self.alpha == "drop" else f"alpha-over-{self.alpha}"
        exif = "exif-applied" if self.exif else "exif-ignored"
        clip = ",clipped" if self.clip else ""
        return f"{alpha},16bit-grey-rounded,16bit-colour-high-byte,cmyk-naive,{exif},icc-ignored{clip}"


PLAIN: Final = Colours()
COLOUR_POLICY: Final = PLAIN.name
"""Of everything that does not ask for another."""

ORIENTATION_TAG: Final = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}
"""What undoes a turn; the others undo themselves."""
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
                  RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is too large to decode. A compressed file of a few kilobytes can claim gigabytes of pixels."""

    max_pixels: int = 120_000_000
    max_side: int = 65_535
    """Pixels."""
    max_bytes: int = 512 * 1024 * 1024
    """Size of the encoded file."""


DEFAULT: Final = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A decoded picture with what had to be done to it."""

    image: Image.Image
    """RGB, rotated upright."""
    original_size: tuple[int, int]
    """(height, width) in pixels, after rotation."""
    flags: tuple[str, ...]
    """Any of alpha, 16bit, float, clipped, cmyk, palette, grey, exif_rotated, exif_unreadable, animated, multipage; of DICOM
    files those of ``media.dicom`` too."""
    mime: str
    """From the bytes, never from the name."""
    stored: Image.Image | None = None
    """If asked for and another picture than `image`: upright, in the file's own colours, for `stored_to_rgb`."""


def open_image(ref: ImageRef | str | Path | bytes, limits: Limits = DEFAULT) -> Decoded:
    """Read and fully decode one picture.

    Raises:
        MediaError: with one of the reasons missing_image, empty_image, unsupported_format, too_large, truncated_image,
            undecodable_image.
    """
    data, source = read_bytes(ref, limits)
    return decode_image(data, limits, source=source)


def read_bytes(ref: ImageRef | str | Path | bytes, limits: Limits = DEFAULT) -> tuple[bytes, str]:
    """The encoded bytes of a picture and the name messages give it.

    Raises:
        MediaError: missing_image or too_large.
    """
    if isinstance(ref, bytes):
        return _within(ref, limits, "bytes"), "bytes"
    if isinstance(ref, str | Path):
        return _read_file(Path(ref), limits, str(ref)), str(ref)
    if ref.data is not None:
        return _within(ref.data, limits, ref.label or "bytes"), ref.label or "bytes"
    if ref.path is None:
        raise MediaError(reason="missing_image", detail="neither a path nor bytes", source=ref.label)
    source = ref.label or ref.path
    return _read_file(Path(ref.path), limits, source), source


def decode_image(
    data: bytes, limits: Limits = DEFAULT, *, source: str = "", keep_stored: bool = False, colours: Colours = PLAIN,
    draft: Callable[[tuple[int, int]], tuple[int, int]] | None = None, admit: Callable[[tuple[int, int]], None] | None = None,
) -> Decoded:  # fmt: skip
    """Fully decode the bytes of one picture. Raises as `open_image` does.

    Args:
        keep_stored: also return the picture before colour conversion, for preprocessing that resizes first.
        colours: what becomes of transparency, rotation tags and numbers outside [0, 1].
        draft: from the (width, height) of a JPEG to the least that is wanted of it: it is then decoded at a half, a quarter or an
            eighth, whichever is the smallest that is no smaller. Cheap, and other pixels than decoding and resizing.
        admit: called with (width, height) before memory is taken for the pixels; it may wait, or raise what it likes.
    """
    if not data:
        raise MediaError(reason="empty_image", detail="zero bytes", source=source)
    kind = image_kind(data)
    if kind is None and is_dicom(data):
        return _radiograph(data, limits, source)
    if kind is None:
        raise MediaError(reason="unsupported_format", detail=describe_foreign(data), source=source)
    with strict_decoding():
        try:
            with _open_header(data, kind) as image:
                _check_size(image.size, limits, source)
                if admit is not None:
                    admit(image.size)
                rotated = _stored_rotation(image)
                if draft is not None and kind is JPEG:
                    image.draft(None, draft(image.size))  # type: ignore[arg-type]  # None keeps the colours
                image.load()
                undone = rotated if not colours.exif else None
                flags = ["exif_rotated"] if rotated is not None and colours.exif else []
                return _finish(image, data, kind, flags, keep_stored, colours, undone)
        except (MediaError, MemoryError):
            raise
        except _Unsupported as error:
            raise MediaError(reason="unsupported_format", detail=str(error), source=source) from error
        except _DECODE_ERRORS as error:
            raise MediaError(reason=_classify(error, data, kind), detail=_words(error), source=source) from error


def _radiograph(data: bytes, limits: Limits, source: str) -> Decoded:
    """A DICOM file as the file itself says it should be shown, in 256 grey values."""
    found = decode_dicom(data, source=source, max_pixels=limits.max_pixels)
    height, width = found.grey.shape
    _check_size((width, height), limits, source)
    flags = (*found.flags, "grey", *(["16bit"] if found.is_deep else []))
    return Decoded(image=Image.fromarray(found.grey).convert("RGB"), original_size=(height, width), flags=flags, mime=MIME)


def claimed_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that an encoded picture says it has, without decoding it; None where that cannot be read."""
    try:
        with _open_header(data, image_kind(data)) as image:
            return image.size
    except (_Unsupported, *_DECODE_ERRORS):
        return None


def stored_to_rgb(image: Image.Image, colours: Colours = PLAIN) -> Image.Image:
    """`Decoded.stored`, resized or cropped meanwhile, to RGB under the same policy."""
    return _colours(image, [], colours)


class _Unsupported(Exception):
    """Decodable, but its values have no agreed meaning as colours."""


def _read_file(path: Path, limits: Limits, source: str) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe never ends its wait, a device never its bytes
            raise MediaError(reason="missing_image", detail="this is no regular file", source=source)
        size = found.st_size
        if size > limits.max_bytes:
            raise MediaError(reason="too_large", detail=f"{size} bytes, limit {limits.max_bytes}", source=source)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise MediaError(reason="missing_image", detail=_words(error), source=source) from error


def _within(data: bytes, limits: Limits, source: str) -> bytes:
    if len(data) > limits.max_bytes:
        raise MediaError(reason="too_large", detail=f"{len(data)} bytes, limit {limits.max_bytes}", source=source)
    return data


def _check_size(size: tuple[int, int], limits: Limits, source: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(reason="empty_image", detail=f"{width}x{height} pixels", source=source)
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        detail = f"{width}x{height} pixels; limits: side {limits.max_side}, area {limits.max_pixels}"
        raise MediaError(reason="too_large", detail=detail, source=source)


def _open_header(data: bytes, kind: Kind | None) -> Image.Image:
    # The plug-in is called directly: Image.open would apply Pillow's own process-wide pixel limit instead of ours.
    Image.init()
    if kind is None or kind.pillow not in Image.OPEN:
        raise _Unsupported(f"this Pillow was built without {kind.pillow if kind else 'a reader of it'}")
    factory, _ = Image.OPEN[kind.pillow]
    image: Image.Image = factory(io.BytesIO(data), "")
    return image


_strict_lock = threading.Lock()
_strict_users = 0
_tolerance_saved = False


@contextmanager
def strict_decoding() -> Iterator[None]:
    """While any caller is inside, Pillow refuses truncated files whatever the process-wide flag says.

    The flag belongs to the whole process, so callers are counted and the value found is restored by the last to leave.
    """
    global _strict_users, _tolerance_saved
    with _strict_lock:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            _tolerance_saved = True
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _strict_users += 1
    try:
        yield
    finally:
        with _strict_lock:
            _strict_users -= 1
            if _strict_users == 0 and _tolerance_saved:
                ImageFile.LOAD_TRUNCATED_IMAGES = True
                _tolerance_saved = False


def _stored_rotation(image: Image.Image) -> Image.Transpose | None:
    """How Pillow will turn a TIFF while loading it, after which it forgets the tag; all other formats are left to `_finish`."""
    return _TRANSPOSE.get(image.tag_v2.get(ORIENTATION_TAG, 1)) if isinstance(image, TiffImageFile) else None


def _finish(
    image: Image.Image, data: bytes, kind: Kind, flags: list[str], keep_stored: bool, colours: Colours,
    undone: Image.Transpose | None,
) -> Decoded:  # fmt: skip
    if kind is PNG and data[24:25] == b"\x10":
        flags.append("16bit")
    plain = image.mode == "RGB" and kind in (JPEG, PNG) and "transparency" not in image.info
    # Copying holds Python's lock for longer than decoding takes a thread, so what is RGB already is handed on as it is.
    rgb = image if plain else _colours(image, flags, colours)
    stored = _stored(image, colours) if keep_stored else None
    method = _rotation(image, flags) if colours.exif else _BACK.get(undone, undone) if undone is not None else None
    if method is not None:
        rgb, stored = rgb.transpose(method), None if stored is None else stored.transpose(method)
    elif plain:
        image.info = {}
    # Asked last: looking for a second frame moves the file away from the first. Only some plug-ins define it.
    if kind is not JPEG and getattr(image, "is_animated", False):
        flags.append("multipage" if kind is TIFF else "animated")
    return Decoded(image=rgb, original_size=(rgb.height, rgb.width), flags=tuple(flags), mime=kind.mime,
                   stored=stored)  # fmt: skip


def _stored(image: Image.Image, colours: Colours) -> Image.Image | None:
    """A copy that can be resized in its own colours; None where that is the RGB picture itself."""
    mode = image.mode
    if mode.startswith("I"):  # `_colours` has checked the range
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if mode in ("P", "1"):
        return image.copy()
    if mode in ("La", "RGBa"):
        return image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    # A colour that stands for transparency must become alpha before resizing mixes it with others; not so if it is dropped.
    if mode == "PA" or ("transparency" in image.info and colours.alpha != "drop"):
        return image.convert("RGBA")
    return None if mode in ("RGB", "F") else image.copy()  # floats that resizing overshoots would be out of range


def _colours(image: Image.Image, flags: list[str], colours: Colours) -> Image.Image:
    mode = image.mode
    if mode == "F":
        return _from_floats(image, flags, colours.clip)
    if mode.startswith("I"):
        return _from_integers(image, flags)
    if mode in ("LAB", "HSV"):
        raise _Unsupported(f"colour mode {mode} has no agreed conversion to RGB")
    if mode in ("P", "PA"):
        flags.append("palette")
    elif mode in ("L", "LA", "La", "1"):
        flags.append("grey")
    elif mode == "CMYK":
        flags.append("cmyk")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _without_alpha(image, flags, colours.alpha)
    return image.copy() if mode == "RGB" else image.convert("RGB")


def _without_alpha(image: Image.Image, flags: list[str], alpha: str) -> Image.Image:
    # Pillow converts premultiplied modes only to their plain twin.
    plain = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode]) if image.mode in ("La", "RGBa") else image
    rgba = plain if plain.mode == "RGBA" else plain.convert("RGBA")
    if rgba.getchannel("A").getextrema() != (255, 255):
        flags.append("alpha")
    if alpha == "drop":
        # Alpha is taken off by hand: converting would let transparency that is only declared paint over pixels.
        return Image.merge("RGB", rgba.split()[:3])
    ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255) if alpha == "white" else (0, 0, 0, 255))
    return Image.alpha_composite(ground, rgba).convert("RGB")


def _from_floats(image: Image.Image, flags: list[str], clip: bool) -> Image.Image:
    """Grey numbers in [0, 1] onto 0 to 255, rounded."""
    values = np.asarray(image)
    if not bool(np.isfinite(values).all()):
        raise _Unsupported("floating-point pixels are not finite")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        if not clip:
            raise _Unsupported(
                f"floating-point pixels must be in [0, 1], got [{low:g}, {high:g}]; to cut them off there: clip=True, --clip"
            )
        flags.append("clipped")
    flags.extend(("float", "grey"))
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def _from_integers(image: Image.Image, flags: list[str]) -> Image.Image:
    values = np.asarray(image)
    if values.size and (int(values.min()) < 0 or int(values.max()) > 0xFFFF):
        raise _Unsupported("32-bit integer pixels have no agreed range")
    flags.extend(flag for flag in ("16bit", "grey") if flag not in flags)
    # 0 to 65535 onto 0 to 255: v / 257, rounded. Pillow's own conversion saturates at 255 instead.
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")


def _rotation(image: Image.Image, flags: list[str]) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except _DECODE_ERRORS:
        flags.append("exif_unreadable")
        return None
    method = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    if method is not None:
        flags.append("exif_rotated")
    return method


def _classify(error: Exception, data: bytes, kind: Kind) -> str:
    words = str(error).lower()
    if isinstance(error, Image.DecompressionBombError) or "too large" in words:
        return "too_large"
    if isinstance(error, EOFError) or "truncated" in words or looks_cut(data, kind):
        return "truncated_image"
    return "undecodable_image"


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
