"""Radiographs with reports in the layouts of MIMIC-CXR and CheXpert, from copies that the user has: one row per study.

A report's section becomes the answer and ``meta.reference``; pictures become 8-bit, deep ones by a window (``media.windows``,
DICOM files as ``media.dicom`` says). Nothing is downloaded, and access is between the user and the owners of the data. NOT A
MEDICAL DEVICE.

- MIMIC-CXR (arXiv:1901.07042): ``files/pNN/pN/sN.txt`` with pictures in ``sN/``, as DICOM or JPEG; its tables of metadata,
  splits and CheXpert labels beside them, where they are.
- CheXpert (arXiv:1901.07031): ``train.csv`` and ``valid.csv`` with ``Path`` and a column a label; CheXpert Plus' table of
  reports where it is.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from mmalign.data.conversations import ConversationRow, MediaFile
from mmalign.data.formats.base import Reader
from mmalign.data.reasons import Problem
from mmalign.data.tables import inside
from mmalign.data.turns import media_part, say, text_part, turn
from mmalign.errors import DataError
from mmalign.media import MediaError, read_bytes
from mmalign.media.decode import decode_image
from mmalign.media.dicom import decode_dicom, is_dicom
from mmalign.media.windows import Window, to_grey

PICTURES: Final = (".dcm", ".jpg", ".jpeg", ".png")
ASK: Final = "Write the findings of this radiograph."
VIEWS: Final = "PA,AP,LATERAL,LL"
SECTIONS: Final = {"findings": ("findings",), "impression": ("impression",), "both": ("findings", "impression")}
OPTIONS: Final = {"section": "findings", "max_images": "2", "views": VIEWS, "window": "auto", "frame": "", "ask": ASK}
_HEAD: Final = re.compile(r"^[ \t]*(?P<name>[A-Z][A-Z /()&-]{2,40}):", re.MULTILINE)
_INDICATION: Final = ("indication", "history", "clinical history", "clinical information", "reason for exam")


def sections_of(report: str) -> dict[str, str]:
    """Sections of a report by the lower-case words of their headings (capitals and a colon at a line's beginning), blanks
    collapsed."""
    heads = list(_HEAD.finditer(report))
    ends = [*(head.start() for head in heads[1:]), len(report)]
    found: dict[str, str] = {}
    for head, end in zip(heads, ends, strict=False):
        name, text = " ".join(head["name"].lower().split()), " ".join(report[head.end() : end].split())
        if text:
            found[name] = f"{found[name]} {text}" if name in found else text
    return found


class StudiesReader(Reader):
    """What both layouts share: settings, pictures made ready, and a study as a row or a reason."""

    KIND: ClassVar[str] = "single"
    OPTIONS: ClassVar[Mapping[str, str]] = OPTIONS

    def __init__(self, source: Path, split: str | None, **settings: Any) -> None:
        super().__init__(source, split, **settings)
        if self.options["section"] not in SECTIONS:
            raise DataError(f"{source}: section '{self.options['section']}' is not one of {', '.join(SECTIONS)}")
        self.window = None if self.options["window"] == "auto" else Window.parse(self.options["window"])
        self.frame = int(self.number_option("frame")) if self.options["frame"] else None
        self.most = int(self.number_option("max_images"))
        if self.most < 1:
            raise DataError(f"{source}: max_images must be at least 1, got {self.most}")
        self.order = [view.strip().upper() for view in self.options["views"].split(",") if view.strip()]

    def study(
        self, name: str, where: tuple[str, int], sections: Mapping[str, str], pictures: Sequence[tuple[Path, str]],
        meta: Mapping[str, Any],
    ) -> ConversationRow | Problem:  # fmt: skip
        """A row of a study with a report.

        Args:
            where: file and row that a problem names.
            pictures: (file, view) of all its pictures.
        """
        wanted = SECTIONS[self.options["section"]]
        text = " ".join(sections[part] for part in wanted if part in sections)
        if not text:
            return _problem(where, name, "report", "no_report", f"no section '{self.options['section']}'")
        indication = next((sections[part] for part in _INDICATION if part in sections), "")
        asked = f"Indication: {indication} {self.options['ask']}" if indication else self.options["ask"]
        return self.row(name, where, asked, text, pictures, {**meta, "reference": text})

    def row(
        self, name: str, where: tuple[str, int], asked: str, answer: str, pictures: Sequence[tuple[Path, str]],
        meta: Mapping[str, Any],
    ) -> ConversationRow | Problem:  # fmt: skip
        """One question about a study with its answer; a picture that cannot be used is the row's reason."""
        chosen = self._choose(pictures)
        if not chosen:
            return _problem(where, name, "images", "missing_image", f"no picture of the views {', '.join(self.order)}")
        images = []
        for path, _ in chosen:
            try:
                images.append(self.picture(path))
            except MediaError as error:
                return _problem(where, name, "images", error.reason, f"{path.name}: {error.detail}")
        prompt = [turn("user", [*[media_part("image")] * len(images), text_part(asked)])]
        views = [view for _, view in chosen]
        return ConversationRow(
            id=name, prompt=prompt, chosen=[say("assistant", answer)], rejected=None, images=images, meta={**meta, "views": views}
        )

    def _choose(self, pictures: Sequence[tuple[Path, str]]) -> list[tuple[Path, str]]:
        """Up to `max_images`, in the order of `views`; pictures of no known view come last, those of other views not at all."""
        known = [item for item in pictures if item[1] in self.order]
        known.sort(key=lambda item: (self.order.index(item[1]), item[0].name))
        return [*known, *sorted(item for item in pictures if not item[1])][: self.most]

    def picture(self, path: Path) -> MediaFile:
        """A picture as the table keeps it: deep ones windowed to 8 bits, others as they are, none that cannot be decoded.

        Raises:
            MediaError: it cannot be used.
        """
        data, _ = read_bytes(path)
        if is_dicom(data):
            grey = decode_dicom(data, source=path.name, frame=self.frame, window=self.window).grey
            return MediaFile(data=_png(grey), name=f"{path.stem}.png")
        found = decode_image(data, source=path.name, keep_stored=True)
        if "16bit" not in found.flags or found.stored is None:
            return MediaFile(data=data, name=path.name)
        import numpy as np

        values = np.asarray(found.stored)
        low, high = (self.window or Window()).limits(values)
        return MediaFile(data=_png(to_grey(values, low, high)), name=f"{path.stem}.png")


class MimicCxrReader(StudiesReader):
    """MIMIC-CXR's folders; reports below the source, pictures below the source or ``--media``."""

    def __init__(self, source: Path, split: str | None, **settings: Any) -> None:
        super().__init__(source, split, **settings)
        self.reports = sorted(_files_of(source).glob("p*/p*/s*.txt"))
        places = dict.fromkeys((source, self.media))
        self.metadata = _table(places, "-metadata.csv", "dicom_id")
        self.labels = _table(places, "-chexpert.csv", "study_id")
        self.splits = _table(places, "-split.csv", "study_id")
        if split is not None and not self.splits:
            raise DataError(f"{source}: --split needs MIMIC-CXR's table *-split.csv(.gz) beside the folders")
        if split is not None and split not in {row["split"] for row in self.splits.values()}:
            known = ", ".join(sorted({row["split"] for row in self.splits.values()}))
            raise DataError(f"{source}: no split '{split}' (splits: {known})")

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_dir() and next(_files_of(source).glob("p[0-9]*/p[0-9]*/s[0-9]*.txt"), None) is not None

    def total(self) -> int:
        return len(self.reports)

    def rows(self) -> Iterator[ConversationRow | Problem]:
        for number, path in enumerate(self.reports):
            study, subject = path.stem, path.parent.name
            split = self.splits.get(study[1:], {}).get("split")
            where = (f"{subject}/{path.name}", number)
            if self.split is not None and split != self.split:
                yield _problem(where, study, "split", "other_stage", f"its split is '{split}'")
                continue
            try:
                report = path.read_text(encoding="utf-8", errors="strict")
            except (OSError, UnicodeDecodeError) as error:
                yield _problem(where, study, "report", "no_report", f"cannot be read: {error}")
                continue
            labels = {k: v for k, v in self.labels.get(study[1:], {}).items() if k not in ("study_id", "subject_id") and v}
            meta = {"study": study, "subject": subject, "split": split, "labels": labels}
            yield self.study(study, where, sections_of(report), self._pictures(path), meta)

    def _pictures(self, report: Path) -> list[tuple[Path, str]]:
        folder = _files_of(self.media) / report.parent.parent.name / report.parent.name / report.stem
        files = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES) if folder.is_dir() else []
        return [(file, self.metadata.get(file.stem, {}).get("ViewPosition", "").strip().upper()) for file in files]


class ChexpertReader(StudiesReader):
    """CheXpert's tables: reports of CheXpert Plus where its table is there, closed questions about the labels otherwise."""

    def __init__(self, source: Path, split: str | None, **settings: Any) -> None:
        super().__init__(source, split, **settings)
        tables = {name: source / f"{name}.csv" for name in ("train", "valid", "test") if (source / f"{name}.csv").is_file()}
        if split is not None and split not in tables:
            raise DataError(f"{source}: no split '{split}' (splits: {', '.join(tables)})")
        plus = sorted(source.glob("df_chexpert_plus*.csv*"))
        self.reports = {_study_of(row["path_to_image"]): row for row in _rows(plus[0])} if plus else {}
        self.studies: dict[str, list[tuple[str, int, dict[str, str]]]] = {}
        for name, path in tables.items():
            if split in (None, name):
                for number, row in enumerate(_rows(path)):
                    self.studies.setdefault(_study_of(row["Path"]), []).append((path.name, number, row))

    @classmethod
    def recognises(cls, source: Path) -> bool:
        for name in ("train.csv", "valid.csv"):
            path = source / name
            if source.is_dir() and path.is_file():
                first = next(_rows(path), {})
                return {"Path", "Frontal/Lateral"} <= set(first)
        return False

    def total(self) -> int:
        return len(self.studies)

    def rows(self) -> Iterator[ConversationRow | Problem]:
        for study, views in self.studies.items():
            file, number, first = views[0]
            where = (file, number)
            try:
                pictures = [(self._path(row["Path"]), _view(row)) for _, _, row in views]
            except DataError as error:
                yield _problem(where, study, "Path", "missing_image", str(error))
                continue
            meta = {"study": study, "split": Path(file).stem}
            if self.reports:
                found = self.reports.get(study)
                given = {} if found is None else {part: " ".join((found.get(f"section_{part}") or "").split())
                                                  for part in ("findings", "impression", "history")}  # fmt: skip
                sections = {part: text for part, text in given.items() if text}
                yield self.study(study, where, sections, pictures, meta)
                continue
            yield from self._questions(study, where, first, pictures, meta)

    def _questions(
        self, study: str, where: tuple[str, int], row: Mapping[str, str], pictures: Sequence[tuple[Path, str]],
        meta: Mapping[str, Any],
    ) -> Iterator[ConversationRow | Problem]:  # fmt: skip
        """Labels that are 1 or 0; those that are uncertain (-1) or not mentioned (empty) are no questions."""
        asked = {name: value for name, value in row.items() if value in ("1.0", "0.0", "1", "0") and name not in _NO_LABELS}
        if not asked:
            yield _problem(where, study, "labels", "no_label", "no label is certain")
        for name, value in asked.items():
            text = f"Does this radiograph show {name.lower()}?" if name != "No Finding" else "Is this radiograph normal?"
            answer = "Yes." if float(value) else "No."
            yield self.row(f"{study}:{name}", where, text, answer, pictures, {**meta, "kind": name})

    def _path(self, given: str) -> Path:
        """A picture's file: as the table says, or without the name of the data set's own folder in front."""
        root = self.media.resolve()
        whole = Path(inside(root, given, "Path"))
        parts = Path(given).parts
        return whole if whole.is_file() or len(parts) < 2 else Path(inside(root, str(Path(*parts[1:])), "Path"))


_NO_LABELS: Final = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "Support Devices")


def _view(row: Mapping[str, str]) -> str:
    """PA, AP or LATERAL, as CheXpert says in two columns."""
    if (row.get("Frontal/Lateral") or "").strip().lower().startswith("lat"):
        return "LATERAL"
    return (row.get("AP/PA") or "").strip().upper() or "AP"


def _study_of(path: str) -> str:
    """``patient00001/study1`` of a picture's path."""
    parts = Path(path).parts
    return "/".join(parts[-3:-1]) if len(parts) >= 3 else path


def _files_of(source: Path) -> Path:
    return source / "files" if (source / "files").is_dir() else source


def _table(places: Mapping[Path, Any], ending: str, key: str) -> dict[str, dict[str, str]]:
    """The first table of this kind, by a column of ids; empty where there is none."""
    for place in places:
        for path in sorted(place.glob(f"*{ending}*")):
            return {row[key]: row for row in _rows(path) if row.get(key)}
    return {}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file, also a compressed one.

    Raises:
        DataError: it cannot be read.
    """
    unpack = gzip.open if path.suffix == ".gz" else open
    try:
        with unpack(path, "rt", encoding="utf-8", newline="") as handle:
            yield from csv.DictReader(handle)
    except (OSError, UnicodeDecodeError, csv.Error, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _png(grey: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


def _problem(where: tuple[str, int], name: str, column: str, reason: str, detail: str) -> Problem:
    return Problem(file=where[0], row=where[1], id=name, column=column, reason=reason, detail=detail)
