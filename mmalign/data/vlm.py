"""The canonical vision-language table: preferences between answers to prompts with pictures and clips.

Columns are those of TRL's conversational form, ``prompt, chosen, rejected, images | videos`` and, of our own, ``p_chosen,
margin, weight, stage, group, scores, rejected_images, rejected_prompt, reference,
meta``; unpaired ``prompt, completion, label``; lists ``prompt, answers,
scores``; questions ``prompt`` alone. A folder of Parquet or Arrow parts (also as `datasets` saves them), one such file, or JSONL.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa

from mmalign.branches import BranchRecord, MediaRef, VideoRef
from mmalign.data.files import file_hash
from mmalign.data.remote import local_path
from mmalign.data.schema import check_columns, check_version
from mmalign.data.storage import ABSENT, MAX_JSONL_BYTES, LoadedPart, Storage, open_storage, part_files, read_jsonl
from mmalign.data.tables import Table, is_list, refuse_repeated_ids
from mmalign.data.vlm_rows import RowProblem, list_record, pair_record, reference_of
from mmalign.errors import DataError

Kind = Literal["pairs", "unpaired", "lists", "questions"]
REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "pairs": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion"),
    "lists": ("prompt", "answers"),
    "questions": ("prompt",),
}
OPTIONAL: Final = (
    "id", "prompt", "rejected_prompt", "images", "image", "videos", "video", "rejected_images", "p_chosen", "margin", "weight",
    "stage", "user", "group", "label", "scores", "reference", "meta",
)  # fmt: skip
MEDIA: Final = frozenset({"images", "image", "videos", "video"})
MESSAGES: Final = ("prompt", "rejected_prompt", "chosen", "rejected", "completion", "answers")


class VlmTable(Table):
    """Rows of a vision-language table: ``table[i]`` is a `BranchRecord`."""

    def __init__(self, storage: Storage, *, as_json: bool = False) -> None:
        super().__init__(storage)
        source = str(storage.path)
        for part in storage.parts:
            check_version(part.schema.metadata, source=str(part.path))
        self.kind = kind_of(self.columns, source)
        required = REQUIRED[self.kind]
        optional = tuple(name for name in (*OPTIONAL, "scores") if name not in required)
        self._extra = check_columns(self.columns, required, optional, source=source)
        self._as_json = as_json
        self._named = "id" in self.columns
        if self._named:
            refuse_repeated_ids(self)
        self.stages: tuple[str, ...] = ()
        """Names of curriculum stages in the order in which they appear; stage numbers count them."""
        self._stage_numbers: dict[str, int] = {}
        if "stage" in self.columns:
            self._number_stages()

    def __getitem__(self, row: int) -> BranchRecord:
        """One row as a checked record.

        Raises:
            DataError: a value that cannot be used, naming file, row, column and reason.
        """
        try:
            return self.record(row)
        except RowProblem as problem:
            raise DataError(f"{self.where(row)} {problem}; 'mmalign data check' lists all such rows") from problem

    def record(self, row: int) -> BranchRecord:
        """One row as a checked record.

        Raises:
            RowProblem: what makes the row unusable.
            DataError: a path that leaves the table's folder.
        """
        values = self.values(row)

        def media(column: str) -> tuple[MediaRef, ...]:
            return tuple(self._media(values, row, column))

        stage = self.stage_number(values.get("stage"))
        if self.kind == "pairs":
            record = pair_record(self.row_id(row), values, media, stage=stage)
        else:
            column = {"unpaired": "completion", "lists": "answers"}.get(self.kind)
            record = list_record(self.row_id(row), values, media, stage=stage, column=column)
        meta, reference = self._meta(values), reference_of(values)
        return replace(record, meta=meta if reference is None else {**meta, "reference": reference})

    def values(self, row: int, *, without: Sequence[str] = ()) -> dict[str, Any]:
        """The columns of one row as Python values."""
        found = super().values(row, without=without)
        if not self._as_json:
            return found
        return {name: value if name == "id" or value is None else json.loads(value) for name, value in found.items()}

    def row_id(self, row: int) -> str:
        """The id of a row; a table without the column counts rows."""
        return str(self.value(row, "id")) if self._named else str(row)

    def stage_number(self, name: Any) -> int:
        """The number of a stage by its name; 0 where there is none."""
        return self._stage_numbers.get(str(name), 0)

    def meta(self, row: int) -> dict[str, Any]:
        """What the source said beyond the known columns."""
        return self._meta(self.values(row))

    def _meta(self, values: Mapping[str, Any]) -> dict[str, Any]:
        kept = values.get("meta")
        try:
            kept = json.loads(kept) if isinstance(kept, str) and kept else kept
        except ValueError as error:
            raise RowProblem("meta", "non_finite_score", f"not JSON: {error}") from error
        return {**(kept or {}), **{name: values[name] for name in self._extra}}

    def _number_stages(self) -> None:
        names: dict[str, None] = {}
        for batch in self.storage.batches(["stage"]):
            for value in batch.column(0).to_pylist():
                plain = json.loads(value) if self._as_json and value is not None else value
                if plain is not None:
                    names[str(plain)] = None
        self.stages = tuple(sorted(names, key=float)) if all(_is_number(name) for name in names) else tuple(names)
        self._stage_numbers = {name: number for number, name in enumerate(self.stages)}

    def _media(self, values: Mapping[str, Any], row: int, column: str) -> Iterator[MediaRef]:
        single = {"images": "image", "videos": "video"}.get(column)
        given = values.get(column)
        if given is None and single is not None and values.get(single) is not None:
            given = [values[single]]
        if isinstance(given, str | bytes | dict):
            given = [given]
        for number, value in enumerate(given or ()):
            label = f"{column}[{number}]"
            yield (
                self._video(value, row, label)
                if column == "videos"
                else self.image(_bytes_of(value, label), row, label)
            )

    def _video(self, value: Any, row: int, column: str) -> VideoRef:
        label = f"{self.where(row)} column '{column}'"
        if isinstance(value, dict) and value.get("frames"):
            frames = tuple(
                self.image(_bytes_of(frame, column), row, f"{column}.frames[{number}]")
                for number, frame in enumerate(value["frames"])
            )
            return VideoRef(frames=frames, fps=value.get("fps"), label=label)
        found = self.image(_bytes_of(value, column), row, column)
        said = value if isinstance(value, dict) else {}
        if found.path is None and found.data is None:
            raise RowProblem(column, "missing_media", "neither a path nor bytes nor frames")
        return VideoRef(path=found.path, data=found.data, label=found.label,
                        fps=said.get("fps"), start=said.get("start"), end=said.get("end"))  # fmt: skip


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _bytes_of(value: Any, column: str) -> Any:
    """Media as JSON can hold them: base64 under 'bytes', or a data URL."""
    text = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(text, str) and (isinstance(value, dict) or text.startswith("data:")):
        try:
            return base64.b64decode(text.rpartition(",")[2], validate=True)
        except binascii.Error as error:
            raise RowProblem(column, "undecodable_media", f"its bytes are not base64: {error}") from error
    return value


def kind_of(columns: Sequence[str], source: str) -> Kind:
    """Which kind of table these columns make.

    Raises:
        DataError: none.
    """
    for kind in ("pairs", "lists", "unpaired", "questions"):
        if set(REQUIRED[kind]) <= set(columns):
            return kind  # type: ignore[return-value]
    raise DataError(
        f"{source}: no vision-language table; expected the columns prompt, chosen, rejected (pairs), prompt, completion, label "
        f"(single answers), prompt, answers, scores (lists) or prompt (questions), got {', '.join(columns) or 'none'}"
    )


def open_vlm(path: str | Path, *, progress: bool = True) -> VlmTable:
    """Open a vision-language table.

    Raises:
        DataError: nothing there, a column missing or misspelt, or an id that appears twice.
    """
    path = local_path(path, progress=progress)
    if path.is_file() and path.suffix in (".jsonl", ".ndjson"):
        return VlmTable(_jsonl(path), as_json=True)
    return VlmTable(open_storage(path, progress=progress))


def is_vlm(path: str | Path) -> bool:
    """Whether the table holds messages rather than pictures to choose between; False also for what is no table.

    Looks at column names and types alone: a JSONL file is recognised by its first row.
    """
    path = local_path(path)
    try:
        if path.is_file() and path.suffix in (".jsonl", ".ndjson"):
            with path.open("rb") as handle:
                first = json.loads(handle.readline().decode("utf-8-sig"))
            columns = set(first)
            typed = isinstance(first.get("chosen"), list) or isinstance(first.get("prompt"), list)
            return bool(columns & {"completion", "answers"}) or typed or bool("chosen" in columns and columns & MEDIA)
        schema = open_storage(path, progress=False).parts[0].schema if part_files(path) else pa.schema([])
    except (DataError, OSError, ValueError, TypeError):
        return False
    names = set(schema.names)
    if names & {"completion", "answers"}:
        return True
    if "prompt" in names and is_list(schema.field("prompt").type):
        return True
    return "chosen" in names and (is_list(schema.field("chosen").type) or bool(names & MEDIA))


def _jsonl(path: Path) -> Storage:
    """A JSONL file as a table of JSON texts: content may be text in one row and parts in the next, as Arrow columns cannot."""
    size = path.stat().st_size
    if size > MAX_JSONL_BYTES:
        raise DataError(
            f"{path}: {size} bytes is too large for a JSONL table; write Parquet with 'mmalign data import'"
        )
    rows, lines = read_jsonl(path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    arrays = []
    for name in columns:
        values = [row.get(name, ABSENT.get(name)) for row in rows]
        texts = [str(value) if name == "id" and value is not None else None if value is None else json.dumps(value)
                 for value in values]  # fmt: skip
        arrays.append(pa.array(texts, type=pa.string()))
    table = pa.table(arrays, names=columns) if columns else pa.table({})
    return Storage(path=path, folder=path.parent, parts=(LoadedPart(path, table, lines),), fingerprint=file_hash(path))


__all__ = ["Kind", "VlmTable", "is_vlm", "kind_of", "open_vlm"]
