"""Radiographs in DICOM files as grey pictures, with what the file says about its values done in the standard's order.

Stored values -> modality values (modality LUT, or rescale slope and intercept) -> display values (VOI LUT, or window centre and
width with the file's function; DICOM PS3.3 C.11.1 and C.11.2) -> air black (MONOCHROME1 is turned round). Needs pydicom (``pip
install 'mmalign[dicom]'``). Nothing is guessed: a file that lacks what decides its picture is refused with a reason. NOT A
MEDICAL
DEVICE: 256 grey values at a model's resolution are no diagnostic display.
"""

from __future__ import annotations

import importlib.util
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmalign.media.errors import MediaError
from mmalign.media.windows import Window, to_grey

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MIME: Final = "application/dicom"
GREY: Final = ("MONOCHROME1", "MONOCHROME2")
NEEDED: Final = (
    "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation",
)  # fmt: skip
FUNCTIONS: Final = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomPicture:
    """A radiograph as grey values."""

    grey: np.ndarray  # [H, W] uint8, air dark
    flags: tuple[str, ...]
    """``dicom``, and any of inverted, voi_lut, window, full_range, padding, frame."""
    is_deep: bool
    """More than 8 bits are stored."""


def is_dicom(data: bytes) -> bool:
    """Whether these are the bytes of a DICOM file, by its mark behind the preamble."""
    return data[128:132] == b"DICM"


def decode_dicom(
    data: bytes, *, source: str = "", frame: int | None = None, window: Window | None = None, max_pixels: int = 120_000_000
) -> DicomPicture:
    """Decode the bytes of one radiograph.

    Args:
        source: how messages name it.
        frame: which frame of a file with several, from 0; None refuses such files.
        window: instead of what the file says, in modality values; None: the file's VOI LUT or window, else its whole range.
        max_pixels: of a frame.

    Raises:
        MediaError: unsupported_format (no pydicom, or a compression that no installed library reads), undecodable_image,
            truncated_image, too_large, dicom_missing_tag, dicom_photometric, dicom_frames.
    """

    def refuse(reason: str, detail: str) -> MediaError:
        return MediaError(reason=reason, detail=detail, source=source)

    if importlib.util.find_spec("pydicom") is None:
        raise refuse("unsupported_format", "a DICOM file; reading it needs pydicom: pip install 'mmalign[dicom]'")
    dataset = _read(data, refuse)
    _require(dataset, refuse, frame, max_pixels)
    stored = _pixels(dataset, refuse, frame)
    padding = _padding(dataset, stored)
    values = _modality(dataset, stored, refuse)
    flags = ["dicom", *(["frame"] if frame is not None and _frames(dataset) > 1 else [])]
    there = values[~padding] if padding is not None and not padding.all() else values.reshape(-1)
    if window is not None:
        low, high = window.limits(there)
        grey = to_grey(values, low, high)
        flags.append("window")
    else:
        grey, how = _voi(dataset, values, there, refuse)
        flags.append(how)
    if str(dataset.PhotometricInterpretation) == "MONOCHROME1":  # high display values mean dark
        grey = 255 - grey
        flags.append("inverted")
    if padding is not None and padding.any():
        grey = np.where(padding, 0, grey).astype(np.uint8)
        flags.append("padding")
    return DicomPicture(grey=grey, flags=tuple(flags), is_deep=int(dataset.BitsStored) > 8)


def _read(data: bytes, refuse: Any) -> Dataset:
    """All tags of the file; pydicom raises many kinds of error on damaged ones."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        for name in ("PixelData", *NEEDED):  # values are read when they are asked for
            getattr(dataset, name, None)
    except InvalidDicomError as error:
        raise refuse("undecodable_image", str(error)) from error
    except EOFError as error:
        raise refuse("truncated_image", f"the DICOM file ends early: {error}") from error
    except Exception as error:  # a damaged file must be counted, whatever its damage makes pydicom raise
        raise refuse("undecodable_image", f"not readable as DICOM: {type(error).__name__}: {error}") from error
    return dataset


def _frames(dataset: Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _require(dataset: Dataset, refuse: Any, frame: int | None, max_pixels: int) -> None:
    """Refuse what has no grey picture, or not enough said about it."""
    missing = [name for name in NEEDED if dataset.get(name) in (None, "")]
    missing += [] if "PixelData" in dataset else ["PixelData"]
    missing += [] if dataset.file_meta.get("TransferSyntaxUID") else ["TransferSyntaxUID"]
    if missing:
        raise refuse("dicom_missing_tag", f"the file has no {', '.join(missing)}")
    photometric, samples = str(dataset.PhotometricInterpretation), int(dataset.SamplesPerPixel)
    if photometric not in GREY or samples != 1:
        raise refuse(
            "dicom_photometric", f"photometric interpretation '{photometric}' with {samples} samples a pixel; radiographs are "
            "MONOCHROME1 or MONOCHROME2 with one"
        )  # fmt: skip
    if photometric == "MONOCHROME2" and str(dataset.get("PresentationLUTShape") or "") == "INVERSE":
        raise refuse("dicom_photometric", "MONOCHROME2 with the presentation 'INVERSE': a contradiction (PS3.3 C.11.6)")
    rows, columns, frames = int(dataset.Rows), int(dataset.Columns), _frames(dataset)
    if rows < 1 or columns < 1:
        raise refuse("empty_image", f"{columns}x{rows} pixels")
    if rows * columns > max_pixels:
        raise refuse("too_large", f"{columns}x{rows} pixels; limit {max_pixels}")
    if frames > 1 and frame is None:
        raise refuse("dicom_frames", f"{frames} frames and none chosen; a setting 'frame' takes one, counted from 0")
    if frame is not None and not 0 <= frame < frames:
        raise refuse("dicom_frames", f"frame {frame} was asked for, and there are {frames}, counted from 0")
    bits, allocated = int(dataset.BitsStored), int(dataset.BitsAllocated)
    if allocated not in (8, 16, 32) or not 1 <= bits <= allocated:
        raise refuse("undecodable_image", f"{bits} bits stored of {allocated} allocated")


def _pixels(dataset: Dataset, refuse: Any, frame: int | None) -> np.ndarray:
    """Stored values of one frame as int64 ``[H, W]``, with bits that are not stored taken away."""
    from pydicom.pixels import pixel_array

    native = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    try:
        _require_length(dataset, native, refuse)
        values = pixel_array(dataset, index=frame if frame is not None else 0)
    except MediaError:
        raise
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        name = getattr(native, "name", "unknown")
        if "missing dependencies" in str(error) or "decod" in str(error).lower():
            detail = f"its pixels are compressed as '{name}', which no installed library reads (pylibjpeg, python-gdcm): {error}"
            raise refuse("unsupported_format", detail) from error
        raise refuse("undecodable_image", f"{type(error).__name__}: {error}") from error
    except Exception as error:  # decoders of compressed pixels raise what they like
        raise refuse("undecodable_image", f"{type(error).__name__}: {error}") from error
    values = np.asarray(values)
    if values.shape != (int(dataset.Rows), int(dataset.Columns)):
        raise refuse("undecodable_image", f"pixels of shape {values.shape} in a file of {dataset.Columns}x{dataset.Rows}")
    bits = int(dataset.BitsStored)
    whole = values.astype(np.int64) & (2**bits - 1)
    if int(dataset.PixelRepresentation) == 1:
        whole = np.where(whole >= 2 ** (bits - 1), whole - 2**bits, whole)
    return whole


def _require_length(dataset: Dataset, syntax: Any, refuse: Any) -> None:
    """Uncompressed pixels must all be there."""
    if syntax is not None and getattr(syntax, "is_compressed", False):
        return
    wanted = int(dataset.Rows) * int(dataset.Columns) * _frames(dataset) * int(dataset.BitsAllocated) // 8
    found = len(dataset.PixelData)
    if found < wanted:
        raise refuse("truncated_image", f"{found} of {wanted} bytes of pixels are there")


def _padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Where there is no picture, as the file marks it. ``[H, W]`` bool"""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


def _modality(dataset: Dataset, stored: np.ndarray, refuse: Any) -> np.ndarray:
    """Modality values as float64 (PS3.3 C.11.1)."""
    from pydicom.pixels import apply_modality_lut

    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if (slope is None) != (intercept is None):
        lacking = "RescaleSlope" if slope is None else "RescaleIntercept"
        raise refuse("dicom_missing_tag", f"the file has no {lacking}, but its counterpart")
    if slope is not None and not (math.isfinite(float(slope)) and float(slope) != 0 and math.isfinite(float(intercept))):
        raise refuse("undecodable_image", f"rescale slope {slope} and intercept {intercept}")
    try:
        return np.asarray(apply_modality_lut(stored, dataset), np.float64)
    except Exception as error:  # a damaged table
        raise refuse("undecodable_image", f"its modality LUT cannot be applied: {error}") from error


def _voi(dataset: Dataset, values: np.ndarray, there: np.ndarray, refuse: Any) -> tuple[np.ndarray, str]:
    """Display values, and by what: the first table or window of the file, or its whole range (PS3.3 C.11.2)."""
    if dataset.get("VOILUTSequence"):
        from pydicom.pixels import apply_voi

        try:
            bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
            shown = np.asarray(apply_voi(values.astype(np.int64), dataset, index=0), np.float64)
        except Exception as error:  # a damaged table
            raise refuse("undecodable_image", f"its VOI LUT cannot be applied: {error}") from error
        return to_grey(shown, 0.0, float(2**bits - 1)), "voi_lut"
    centre, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if (centre is None) != (width is None):
        lacking = "WindowCenter" if centre is None else "WindowWidth"
        raise refuse("dicom_missing_tag", f"the file has no {lacking}, but its counterpart")
    if centre is None or width is None:
        return to_grey(values, float(there.min()), float(there.max())), "full_range"
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if function not in FUNCTIONS or not math.isfinite(centre) or not width > 0 or (function == "LINEAR" and width < 1):
        raise refuse("undecodable_image", f"a window of centre {centre}, width {width} and function '{function}'")
    return windowed(values, centre, width, function), "window"


def windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Display values uint8 of a window (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    Args:
        values: modality values.
        function: ``LINEAR`` (whose borders are half a unit in, and width 1 a step), ``LINEAR_EXACT`` or ``SIGMOID``.
    """
    if function == "SIGMOID":
        exponent = np.clip(-4 * (values - centre) / width, -700, 700)
        return (255 / (1 + np.exp(exponent)) + 0.5).astype(np.uint8)
    if function == "LINEAR":
        if width == 1:
            return np.where(values <= centre - 0.5, 0, 255).astype(np.uint8)
        return to_grey(values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)
    return to_grey(values, centre - width / 2, centre + width / 2)


def _first(value: Any) -> float | None:
    """The first of one or several numbers."""
    if value is None or value == "":
        return None
    try:
        return float(value if isinstance(value, str) or not hasattr(value, "__iter__") else next(iter(value)))
    except (ValueError, StopIteration, TypeError):
        return math.nan
