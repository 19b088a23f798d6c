"""Radiographs in DICOM files, written here with pydicom: values worked by hand, and every defect with its reason."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.errors import DataError
from mmalign.media import MediaError, decode_image, open_image
from mmalign.media import dicom as module
from mmalign.media.dicom import decode_dicom, is_dicom, windowed
from mmalign.media.windows import Window, to_grey

pydicom = pytest.importorskip("pydicom")
VALUES = np.array([[0, 1000, 2000], [3000, 4000, 4095]], np.uint16)


def make(values: np.ndarray = VALUES, *, without: tuple[str, ...] = (), bits: int = 12, **tags: Any) -> bytes:
    """A radiograph as a file; `tags` over the defaults, `without` some of them."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * values.dtype.itemsize, bits, bits - 1
    dataset.PixelRepresentation = 0
    dataset.PixelData = values.tobytes()
    dataset["PixelData"].VR = "OW"
    for name, value in tags.items():
        setattr(dataset, name, value)
    for name in without:
        delattr(dataset, name)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def grey(data: bytes, **settings: Any) -> list[list[int]]:
    return decode_dicom(data, **settings).grey.tolist()


def test_without_a_window_the_picture_s_own_range_is_shown() -> None:
    found = decode_dicom(make())
    assert found.grey.tolist() == [[0, 62, 125], [187, 249, 255]] and found.flags == ("dicom", "full_range")


def test_a_window_is_applied_after_slope_and_intercept() -> None:
    """LINEAR, centre 1001.5 and width 1001: black up to 501, white from 1501 on (the borders are half a unit in)."""
    data = make(RescaleSlope=0.5, RescaleIntercept=1.0, WindowCenter=1001.5, WindowWidth=1001)
    # modality values: 1, 501, 1001, 1501, 2001, 2048.5
    assert grey(data) == [[0, 0, 128], [255, 255, 255]]
    assert decode_dicom(data).flags == ("dicom", "window")
    several = make(RescaleSlope=0.5, RescaleIntercept=1.0, WindowCenter=[1001.5, 10], WindowWidth=[1001, 2])
    assert grey(several) == grey(data), "the first of several windows"


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_agree_with_pydicom(function: str) -> None:
    from pydicom.pixels import apply_windowing

    values = (7 * np.arange(585, dtype=np.uint16)).reshape(9, 65)
    data = make(values, WindowCenter=1500, WindowWidth=900, VOILUTFunction=function)
    theirs = apply_windowing(values, pydicom.dcmread(io.BytesIO(data)))
    ours = windowed(values.astype(np.float64), 1500, 900, function)
    assert np.abs(ours / 255 - theirs / 4095).max() < 0.5 / 255 + 1e-9
    assert np.array_equal(decode_dicom(data).grey, ours)


def test_monochrome1_is_turned_round_so_that_air_is_black() -> None:
    plain = decode_dicom(make())
    turned = decode_dicom(make(PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE"))
    assert np.array_equal(turned.grey, 255 - plain.grey) and "inverted" in turned.flags


def test_padding_is_black_and_no_part_of_the_range() -> None:
    values = np.array([[0, 1000, 2000], [3000, 4095, 4095]], np.uint16)
    found = decode_dicom(make(values, PixelPaddingValue=4095))
    assert found.grey.tolist() == [[0, 85, 170], [255, 0, 0]] and "padding" in found.flags
    turned = decode_dicom(make(values, PixelPaddingValue=4095, PhotometricInterpretation="MONOCHROME1"))
    assert turned.grey.tolist() == [[255, 170, 85], [0, 0, 0]]


def test_a_voi_lut_goes_before_a_window() -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor = [4, 1, 8]  # four entries from value 1 on, 8 bits
    table.LUTData = [0, 255, 100, 200]
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    data = make(np.array([[0, 1, 2], [3, 4, 9]], np.uint16), VOILUTSequence=[table], WindowCenter=2, WindowWidth=2)
    found = decode_dicom(data)
    assert found.grey.tolist() == [[0, 0, 255], [100, 200, 200]] and found.flags == ("dicom", "voi_lut")


def test_signed_values_and_bits_that_are_not_stored() -> None:
    signed = np.array([[-2048, -1024, 0], [1024, 2047, 2047]], np.int16)
    assert grey(make(signed, PixelRepresentation=1)) == [[0, 64, 128], [191, 255, 255]]
    dirty = VALUES | 0xF000  # above the 12 bits that are stored
    assert grey(make(dirty)) == grey(make())


def test_one_frame_of_several_by_setting() -> None:
    data = make(np.stack([VALUES, VALUES[::-1]]), NumberOfFrames=2)
    assert grey(data, frame=1) == grey(make(VALUES[::-1])) and "frame" in decode_dicom(data, frame=1).flags
    assert grey(make(), frame=0) == grey(make())


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (lambda: make(PhotometricInterpretation="RGB", SamplesPerPixel=3), "dicom_photometric", "'RGB' with 3 samples"),
        (lambda: make(PhotometricInterpretation="PALETTE COLOR"), "dicom_photometric", "PALETTE COLOR"),
        (lambda: make(SamplesPerPixel=3), "dicom_photometric", "with 3 samples"),
        (lambda: make(PresentationLUTShape="INVERSE"), "dicom_photometric", "contradict"),
        (lambda: make(np.stack([VALUES] * 3), NumberOfFrames=3), "dicom_frames", "3 frames and none chosen"),
        (lambda: make(without=("PhotometricInterpretation",)), "dicom_missing_tag", "no PhotometricInterpretation"),
        (lambda: make(without=("Rows", "BitsStored")), "dicom_missing_tag", "no Rows, BitsStored"),
        (lambda: make(without=("PixelData",)), "dicom_missing_tag", "no PixelData"),
        (lambda: make(RescaleSlope=2), "dicom_missing_tag", "no RescaleIntercept"),
        (lambda: make(WindowCenter=2), "dicom_missing_tag", "no WindowWidth"),
        (lambda: make(WindowCenter=2, WindowWidth=0), "undecodable_image", "width 0"),
        (lambda: make(WindowCenter=2, WindowWidth=9, VOILUTFunction="CUBIC"), "undecodable_image", "CUBIC"),
        (lambda: make(RescaleSlope=0, RescaleIntercept=0), "undecodable_image", "rescale slope"),
        (lambda: make(BitsStored=20), "undecodable_image", "20 bits stored"),
        (lambda: make(Rows=4), "truncated_image", "12 of 24 bytes"),
        (lambda: make(Rows=0), "empty_image", "pixels"),
        (lambda: make(Rows=60000, Columns=60000), "too_large", "60000x60000"),
        (lambda: make()[:-8], "truncated_image", ""),
        (lambda: make()[:300], "dicom_missing_tag", ""),
        (lambda: make()[:140], "dicom_missing_tag", ""),
        (lambda: b"\0" * 128 + b"DICM" + bytes(range(256)) * 4, None, ""),
    ],
)  # fmt: skip
def test_every_defect_has_its_reason(data: Callable[[], bytes], reason: str | None, words: str) -> None:
    with pytest.raises(MediaError) as found:
        decode_dicom(data(), source="x.dcm")
    assert reason is None or found.value.reason == reason, found.value
    assert words in found.value.detail and found.value.source == "x.dcm"


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's own remarks on what it reads
def test_no_damage_makes_anything_but_a_reason() -> None:
    """Bytes changed and files cut at many places: a picture or a `MediaError`, and nothing else."""
    whole, rng = make(WindowCenter=1000, WindowWidth=500), np.random.default_rng(3)
    for _ in range(150):
        broken = bytearray(whole[: int(rng.integers(132, len(whole) + 1))])
        for place in rng.integers(132, len(broken) + 1, 4):
            if place < len(broken):
                broken[place] = int(rng.integers(256))
        try:
            decode_dicom(bytes(broken))
        except MediaError as error:
            assert error.reason


def test_a_frame_that_is_not_there() -> None:
    with pytest.raises(MediaError, match="frame 5 was asked for, and there are 1"):
        decode_dicom(make(), frame=5)


def test_compressed_pixels_without_a_reader_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.encaps import encapsulate

    data = pydicom.dcmread(io.BytesIO(make()))
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70"  # JPEG lossless
    data.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    data["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    data.save_as(buffer)
    with pytest.raises(MediaError) as found:
        decode_dicom(buffer.getvalue())
    assert found.value.reason in ("unsupported_format", "undecodable_image")
    if found.value.reason == "unsupported_format":
        assert "JPEG Lossless" in found.value.detail and "pylibjpeg" in found.value.detail


def test_without_pydicom_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MediaError, match=r"pip install 'mmalign\[dicom\]'"):
        decode_dicom(make())


def test_a_radiograph_is_opened_like_any_picture(tmp_path: Path) -> None:
    (tmp_path / "x.dcm").write_bytes(make())
    found = open_image(tmp_path / "x.dcm")
    assert is_dicom(make()) and found.mime == "application/dicom" and found.image.mode == "RGB"
    assert np.asarray(found.image)[..., 0].tolist() == grey(make()) and found.original_size == (2, 3)
    assert {"dicom", "grey", "16bit"} <= set(found.flags)
    with pytest.raises(MediaError, match="dicom_frames"):
        decode_image(make(np.stack([VALUES] * 2), NumberOfFrames=2))


@pytest.mark.parametrize(
    ("text", "limits"),
    [("full", (0, 65535)), ("range", (10, 4095)), ("bits:12", (0, 4095)), ("2000,1000", (1500, 2500)), ("-5,10", (-10, 0)),
     ("percentile:25,75", (257.5, 2297.5))],
)  # fmt: skip
def test_windows_by_name(text: str, limits: tuple[float, float]) -> None:
    values = np.array([10, 175, 340, 1340, 2000, 2595, 4095], np.float64)
    assert Window.parse(text).limits(values) == pytest.approx(limits)


@pytest.mark.parametrize("text", ["", "12", "bits:0", "bits:17", "percentile:9,3", "percentile:0,101", "5,0", "5,-2", "nan,1"])
def test_windows_that_make_no_sense(text: str) -> None:
    with pytest.raises(DataError, match="expected full, range"):
        Window.parse(text)


def test_a_flat_picture_is_black_and_the_ends_are_clipped() -> None:
    assert to_grey(np.full((2, 2), 7), 7, 7).tolist() == [[0, 0], [0, 0]]
    assert to_grey(np.array([-5, 0, 5, 10, 15]), 0, 10).tolist() == [0, 0, 128, 255, 255]
