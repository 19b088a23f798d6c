"""MIMIC-CXR's and CheXpert's layouts, in small made-up folders: rows, views, windows, splits, and every defect counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.data import import_table, open_vlm
from mmalign.data.formats.radiology import sections_of
from mmalign.data.importing import detect_format
from mmalign.errors import DataError
from tests.media.test_dicom import make as dicom

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ with cough // pneumonia?

 FINDINGS:

 The lungs are clear.  No effusion:  none
 is seen.

 IMPRESSION:

 Normal.
"""


def grey_bytes(values: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


JPEG = grey_bytes(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (8, 1)), "JPEG")
DEEP = grey_bytes(np.array([[0, 1000], [2000, 4095]], np.uint16), "PNG")


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    text = buffer.getvalue().encode()
    write(path, gzip.compress(text) if path.suffix == ".gz" else text)


def mimic(root: Path) -> Path:
    """Four studies: two views, a DICOM, a deep PNG, and one without findings."""
    patient = root / "files" / "p10" / "p10000001"
    for study in ("s50000001", "s50000002", "s50000003"):
        write(patient / f"{study}.txt", REPORT)
    write(patient / "s50000004.txt", REPORT.replace("FINDINGS:", "NOTE:"))
    write(patient / "s50000001" / "a-lat.jpg", JPEG)
    write(patient / "s50000001" / "b-pa.jpg", JPEG)
    write(patient / "s50000001" / "c-ap.jpg", JPEG)
    write(patient / "s50000002" / "d.dcm", dicom())
    write(patient / "s50000003" / "e.png", DEEP)
    write(patient / "s50000004" / "f.jpg", JPEG)
    views = {"a-lat": "LATERAL", "b-pa": "PA", "c-ap": "AP", "d": "AP", "e": ""}
    table(root / "mimic-cxr-2.0.0-metadata.csv.gz", [{"dicom_id": name, "ViewPosition": view} for name, view in views.items()])
    splits = {"50000001": "train", "50000002": "train", "50000003": "test", "50000004": "train"}
    table(root / "mimic-cxr-2.0.0-split.csv.gz", [{"dicom_id": "x", "study_id": s, "split": name} for s, name in splits.items()])
    table(root / "mimic-cxr-2.0.0-chexpert.csv.gz",
          [{"subject_id": "10000001", "study_id": "50000001", "Edema": "1.0", "Fracture": ""}])  # fmt: skip
    return root


def picture(record: Any, number: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record.media[number].data)))


def test_sections_of_a_report() -> None:
    found = sections_of(REPORT)
    assert found["findings"] == "The lungs are clear. No effusion: none is seen." and found["impression"] == "Normal."
    assert found["indication"] == "___ with cough // pneumonia?"
    assert sections_of("no headings at all") == {} and sections_of("") == {}


def test_mimic_studies_become_rows(tmp_path: Path) -> None:
    root = mimic(tmp_path / "mimic")
    assert detect_format(root) == "mimic-cxr"
    found = import_table(root, tmp_path / "out", progress=False)
    assert (found.total, found.written, dict(found.counts)) == (4, 3, {"no_report": 1})
    rows = {record.id: record for record in _records(tmp_path / "out")}
    first = rows["s50000001"]
    assert first.answers[0].text == first.meta["reference"] == "The lungs are clear. No effusion: none is seen."
    assert first.meta["views"] == ["PA", "AP"] and len(first.media) == 2, "two pictures in the order of views"
    assert first.media[0].data == JPEG, "8-bit pictures are kept byte for byte"
    assert first.meta["labels"] == {"Edema": "1.0"} and first.meta["split"] == "train"
    asked = "".join(part.text or "" for part in first.messages[0].parts)
    assert asked == "Indication: ___ with cough // pneumonia? Write the findings of this radiograph."
    assert picture(rows["s50000002"]).tolist() == [[0, 62, 125], [187, 249, 255]], "a DICOM, windowed by its range"
    assert picture(rows["s50000003"]).tolist() == [[0, 62], [125, 255]], "16 bits of which 12 are used"


def test_settings_of_the_reader(tmp_path: Path) -> None:
    root = mimic(tmp_path / "mimic")
    options = {"section": "both", "max_images": "1", "views": "LATERAL", "window": "full", "ask": "Report."}
    import_table(root, tmp_path / "out", split="train", options=options, progress=False)
    first, *rest = _records(tmp_path / "out")
    assert first.answers[0].text.endswith("is seen. Normal.") and first.meta["views"] == ["LATERAL"] and len(first.media) == 1
    assert "".join(part.text or "" for part in first.messages[0].parts).endswith("pneumonia? Report.")
    listed = _quarantine(tmp_path / "out")
    assert ("s50000003", "other_stage") in listed and ("s50000002", "missing_image") in listed
    import_table(root, tmp_path / "deep", split="test", options={"window": "bits:13"}, progress=False)
    assert picture(_records(tmp_path / "deep")[0]).tolist() == [[0, 31], [62, 127]]
    for options, message in (({"section": "all"}, "is not one of findings"), ({"max_images": "0"}, "at least 1"),
                             ({"window": "x"}, "expected full"), ({"frame": "x"}, "expected a number"),
                             ({"sections": "x"}, "no option 'sections'")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            import_table(root, tmp_path / "bad", options=options, progress=False)
    with pytest.raises(DataError, match=r"no split 'tset' \(splits: test, train\)"):
        import_table(root, tmp_path / "bad", split="tset", progress=False)
    assert [record.id for record in rest] == ["s50000004"], "an impression alone will do where both are asked for"


def test_reports_and_pictures_in_two_places(tmp_path: Path) -> None:
    root = mimic(tmp_path / "mimic")
    (tmp_path / "jpg").mkdir()
    for study in (root / "files" / "p10" / "p10000001").glob("s*/"):
        target = tmp_path / "jpg" / "files" / "p10" / "p10000001" / study.name
        target.parent.mkdir(parents=True, exist_ok=True)
        study.rename(target)
    found = import_table(root, tmp_path / "out", media=tmp_path / "jpg", progress=False)
    assert found.written == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (dicom(PhotometricInterpretation="RGB", SamplesPerPixel=3), "dicom_photometric"),
        (dicom(np.zeros((2, 2, 3), np.uint16), NumberOfFrames=2), "dicom_frames"),
        (dicom(without=("PhotometricInterpretation",)), "dicom_missing_tag"),
        (dicom(Rows=9), "truncated_image"),
        (b"\0" * 200, "unsupported_format"),
        (b"", "empty_image"),
    ],
)
def test_a_radiograph_that_cannot_be_used_is_counted(tmp_path: Path, data: bytes, reason: str) -> None:
    root = mimic(tmp_path / "mimic")
    write(root / "files" / "p10" / "p10000001" / "s50000002" / "d.dcm", data)
    found = import_table(root, tmp_path / "out", progress=False)
    assert dict(found.counts) == {reason: 1, "no_report": 1} and found.written == 2
    assert ("s50000002", reason) in _quarantine(tmp_path / "out")
    if reason == "dicom_frames":
        chosen = import_table(root, tmp_path / "chosen", options={"frame": "1"}, progress=False)
        assert chosen.written == 3 and dict(chosen.counts) == {"no_report": 1}


def chexpert(root: Path, *, plus: bool) -> Path:
    rows = [
        {"Path": f"CheXpert-v1.0/train/patient00001/study1/{name}.jpg", "Sex": "F", "Age": "60", "Frontal/Lateral": side,
         "AP/PA": view, "No Finding": "", "Edema": "1.0", "Fracture": "0.0", "Lung Lesion": "-1.0", "Support Devices": "1.0"}
        for name, side, view in (("view1_frontal", "Frontal", "PA"), ("view2_lateral", "Lateral", ""))
    ]
    blank = dict.fromkeys(rows[0], "") | {"Path": "CheXpert-v1.0/train/patient00002/study1/view1_frontal.jpg",
                                             "Frontal/Lateral": "Frontal", "AP/PA": "AP"}  # fmt: skip
    table(root / "train.csv", [*rows, blank, {**blank, "Path": "../../etc/passwd/study1/x.jpg"}])
    for row in (*rows, blank):
        write(root / row["Path"].removeprefix("CheXpert-v1.0/"), JPEG)
    if plus:
        table(root / "df_chexpert_plus_240401.csv",
              [{"path_to_image": "train/patient00001/study1/view1_frontal.jpg", "section_findings": "Edema \n here.",
                "section_impression": "", "section_history": "cough"}])  # fmt: skip
    return root


def test_chexpert_labels_become_closed_questions(tmp_path: Path) -> None:
    root = chexpert(tmp_path / "chexpert", plus=False)
    assert detect_format(root) == "chexpert"
    found = import_table(root, tmp_path / "out", options={"views": "AP,PA,LATERAL"}, progress=False)
    rows = _records(tmp_path / "out")
    asked = {"".join(part.text or "" for part in record.messages[0].parts): record.answers[0].text for record in rows}
    assert asked == {"Does this radiograph show edema?": "Yes.", "Does this radiograph show fracture?": "No."}
    assert rows[0].meta["views"] == ["PA", "LATERAL"] and rows[0].meta["kind"] == "Edema"
    assert dict(found.counts) == {"missing_image": 1, "no_label": 1}


def test_chexpert_plus_has_reports(tmp_path: Path) -> None:
    root = chexpert(tmp_path / "chexpert", plus=True)
    found = import_table(root, tmp_path / "out", progress=False)
    (row,) = _records(tmp_path / "out")
    assert row.answers[0].text == row.meta["reference"] == "Edema here." and row.id == "patient00001/study1"
    assert "Indication: cough" in "".join(part.text or "" for part in row.messages[0].parts)
    assert dict(found.counts) == {"missing_image": 1, "no_report": 1}


def _records(path: Path) -> list[Any]:
    opened = open_vlm(path, progress=False)
    return [opened[row] for row in range(len(opened))]


def _quarantine(path: Path) -> set[tuple[str, str]]:
    lines = (path / "import" / "quarantine.jsonl").read_text().splitlines()
    return {(line["id"], line["reason"]) for line in map(json.loads, lines)}
