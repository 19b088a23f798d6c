"""Tables of image pairs as map-style, lazy sequences of records.

A row is read when asked for; pictures stay encoded. Nothing is repaired: a value that cannot be used is an error that
names file, row and column. Judging whole tables is `check.py`'s work, which uses `raw` to see bad values too.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from mmalign.data.schema import (
    PAIR_OPTIONAL,
    PAIR_REQUIRED,
    check_columns,
    check_version,
)
from mmalign.data.storage import Part, Storage, open_storage
from mmalign.errors import DataError
from mmalign.types import ImageRef, PairRecord


class Table:
    """Rows of a storage, found by their number in the whole table."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.path = storage.path
        self.folder = storage.folder
        self.fingerprint = storage.fingerprint
        """Identity of the content: the same wherever the table lies."""
        self._starts: list[int] = []
        total = 0
        for part in storage.parts:
            self._starts.append(total)
            total += part.length
        self._length = total
        self._root = storage.folder.resolve()

    def __len__(self) -> int:
        return self._length

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.storage.parts[0].schema.names)

    def type_of(self, column: str) -> pa.DataType:
        return self.storage.parts[0].schema.field(column).type

    def where(self, row: int) -> str:
        """How messages name a row: its file and its place in that file."""
        part, local = self._part(row)
        return part.where(local)

    def file_and_number(self, row: int) -> tuple[str, int]:
        """A row's file, and its number (JSONL: line) there."""
        part, local = self._part(row)
        return part.path.name, part.number(local)

    def ids(self) -> list[str]:
        """All row ids in table order."""
        return [str(value) for batch in self.storage.batches(["id"]) for value in batch.column(0).to_pylist()]

    def values(self, row: int, *, without: Sequence[str] = ()) -> dict[str, Any]:
        """The columns of one row as Python values; those in `without` are not even read from disk."""
        part, local = self._part(row)
        batch, offset = part.locate(local)
        return {name: batch.column(name)[offset].as_py() for name in batch.schema.names if name not in without}

    def value(self, row: int, column: str) -> Any:
        """One column of one row."""
        part, local = self._part(row)
        batch, offset = part.locate(local)
        return batch.column(column)[offset].as_py()

    def image(self, value: Any, row: int, column: str) -> ImageRef:
        """A picture column's value as a reference; a null one refers to nothing and is `missing_image` when opened.

        Raises:
            DataError: the path leaves the table's folder.
        """
        label = f"{self.where(row)} column '{column}'"
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return ImageRef(data=value, label=label)
        if value is None:
            return ImageRef(label=label)
        return ImageRef(path=str(inside(self._root, value, label)), label=f"{label} ({value})")

    def _part(self, row: int) -> tuple[Part, int]:
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of a table of {self._length} rows")
        number = bisect_right(self._starts, row) - 1
        return self.storage.parts[number], row - self._starts[number]


def inside(root: Path, relative: str, label: str) -> Path:
    """A manifest's path below `root`, refused when it leaves it: a manifest from elsewhere must not name your files.

    Raises:
        DataError: absolute, climbing out with '..', or a link that points out.
    """
    pure = PurePosixPath(relative.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or (pure.parts and pure.parts[0].endswith(":")) or "\x00" in relative:
        raise DataError(
            f"{label}: the path {relative!r} leaves the manifest's folder {root}; paths must be relative to it"
        )
    path = root.joinpath(*pure.parts)
    if not path.resolve().is_relative_to(root):
        raise DataError(
            f"{label}: {relative!r} is a link out of the manifest's folder {root}; put the files themselves there"
        )
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class RawPair:
    """A row as it is, before anything is demanded of it. None means null."""

    id: str | None
    prompt: str | None
    chosen: ImageRef
    rejected: ImageRef
    p_chosen: float | None
    user: str | None = None
    weight: float | None = 1.0
    group: str | None = None
    scores: Mapping[str, Sequence[float | None] | None] = field(default_factory=dict)


class PairTable(Table):
    """Preferences between two pictures of the same prompt: `table[i]` is a `PairRecord`."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        source = str(storage.path)
        for part in storage.parts:
            check_version(part.schema.metadata, source=str(part.path))
        self._extra = check_columns(self.columns, PAIR_REQUIRED, PAIR_OPTIONAL, source=source)
        _check_types(self, source)
        kind = self.type_of("scores") if "scores" in self.columns else None
        self.rewards: tuple[str, ...] = () if kind is None or pa.types.is_null(kind) else field_names(kind)
        """Names in the `scores` column."""
        refuse_repeated_ids(self)

    def raw(self, row: int, *, pictures: bool = True) -> RawPair:
        """One row without demands on its values. Raises DataError only for a path that leaves the folder.

        Args:
            pictures: False leaves the pictures' bytes untouched; their references then refer to nothing.
        """
        values = self.values(row, without=() if pictures else ("chosen", "rejected"))
        scores = values.get("scores") or {}
        return RawPair(
            id=None if values["id"] is None else str(values["id"]),
            prompt=values["prompt"],
            chosen=self.image(values.get("chosen"), row, "chosen"),
            rejected=self.image(values.get("rejected"), row, "rejected"),
            p_chosen=_number(values["p_chosen"]) if "p_chosen" in values else 1.0,
            user=None if values.get("user") is None else str(values["user"]),
            weight=_number(values["weight"]) if values.get("weight") is not None else 1.0,
            group=None if values.get("group") is None else str(values["group"]),
            scores={name: scores.get(name) for name in self.rewards},
        )

    def __getitem__(self, row: int) -> PairRecord:
        return self.record(row)

    def record(self, row: int, *, pictures: bool = True) -> PairRecord:
        """One row as a checked record; `pictures` as in `raw`.

        Raises:
            DataError: a value that cannot be used, naming file, row, column and reason.
        """
        raw = self.raw(row, pictures=pictures)
        problem = row_problem(raw)
        if problem is not None:
            column, reason, detail = problem
            raise DataError(
                f"{self.where(row)} column '{column}': {reason}: {detail}; 'mmalign data check' lists all such rows"
            )
        return PairRecord(
            id=str(raw.id),
            prompt=str(raw.prompt),
            chosen=raw.chosen,
            rejected=raw.rejected,
            p_chosen=float(raw.p_chosen),  # type: ignore[arg-type]
            user=raw.user,
            scores={name: (float(pair[0]), float(pair[1])) for name, pair in raw.scores.items() if pair},  # type: ignore[arg-type]
            weight=float(raw.weight),  # type: ignore[arg-type]
            group=raw.group,
        )

    def prompt(self, row: int) -> str:
        """The prompt alone, without touching the pictures' bytes."""
        return str(self.value(row, "prompt"))

    def meta(self, row: int) -> dict[str, Any]:
        """The source's other columns: what an import kept, and columns this table has beyond the known ones."""
        text = self.value(row, "meta") if "meta" in self.columns else None
        kept = json.loads(text) if text else {}
        return {**kept, **{name: self.value(row, name) for name in self._extra}}


def open_table(path: str | Path, *, progress: bool = True) -> PairTable:
    """Open a table of image pairs: a folder of Parquet or Arrow parts, one such file, or a small JSONL file.

    Raises:
        DataError: nothing there, a column missing, misspelt or of the wrong type, or an id that appears twice.
    """
    return PairTable(open_storage(path, progress=progress))


def row_problem(raw: RawPair) -> tuple[str, str, str] | None:
    """What makes a row unusable whatever its pictures are: (column, reason, detail), or None."""
    if raw.prompt is None or not raw.prompt.strip():
        return "prompt", "empty_prompt", "no text"
    if raw.p_chosen is None:
        return "p_chosen", "no_label", "null"
    if not 0.5 <= raw.p_chosen <= 1.0:
        return "p_chosen", "label_out_of_range", f"{raw.p_chosen} is not in [0.5, 1]; swap chosen and rejected for less"
    if raw.weight is None or not math.isfinite(raw.weight) or raw.weight < 0:
        return "weight", "non_finite_score", f"{raw.weight} is not a weight"
    for name, pair in raw.scores.items():
        if pair is None or len(pair) != 2 or any(value is None or not math.isfinite(value) for value in pair):
            return f"scores.{name}", "non_finite_score", f"expected two finite numbers (chosen, rejected), got {pair}"
    return None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def field_names(kind: pa.DataType) -> tuple[str, ...]:
    return tuple(kind.field(index).name for index in range(kind.num_fields))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _is_image(kind: pa.DataType) -> bool:
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return bool(binary or _is_text(kind) or (pa.types.is_struct(kind) and set(field_names(kind)) >= {"bytes", "path"}))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def is_scores(kind: pa.DataType) -> bool:
    if pa.types.is_null(kind):
        return True
    if not pa.types.is_struct(kind):
        return False
    fields = [kind.field(index).type for index in range(kind.num_fields)]
    return all(pa.types.is_null(f) or (is_list(f) and _is_number(f.value_type)) for f in fields)


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _check_types(table: Table, source: str) -> None:
    expected = {
        "id": (lambda kind: _is_text(kind) or pa.types.is_integer(kind), "text"),
        "prompt": (_is_text, "text"),
        "chosen": (_is_image, "a path, bytes, or {bytes, path}"),
        "rejected": (_is_image, "a path, bytes, or {bytes, path}"),
        "p_chosen": (_is_number, "a number in [0.5, 1]"),
        "weight": (_is_number, "a number"),
        "user": (lambda kind: _is_text(kind) or pa.types.is_integer(kind), "text"),
        "group": (lambda kind: _is_text(kind) or pa.types.is_integer(kind), "text"),
        "scores": (is_scores, "{reward: [chosen, rejected]}"),
        "meta": (_is_text, "JSON text"),
    }
    problems = [
        f"{source}: column '{name}' holds {table.type_of(name)}; expected {words}"
        for name, (accepts, words) in expected.items()
        if name in table.columns and not accepts(table.type_of(name))
    ]
    if "prompt" in table.columns and is_list(table.type_of("prompt")):
        problems = [f"{source}: its prompts are messages, so it is a table of answers; methods on pictures read text prompts and "
                    "two pictures a row (methods on answers: vlm_dpo and others, see 'mmalign list methods')"]  # fmt: skip
    if problems:
        raise DataError("\n".join(problems))


def prompts_of(table: PairTable, rows: Any) -> pa.ChunkedArray:
    """The prompts of some rows, integers [n], in their order, without touching pictures."""
    import numpy as np

    chunks = [batch.column(0) for batch in table.storage.batches(["prompt"])]
    column = pa.chunked_array(chunks) if chunks else pa.chunked_array([], type=pa.string())
    return column.take(pa.array(np.asarray(rows, dtype=np.int64)))


def refuse_repeated_ids(table: Table) -> None:
    import numpy as np
    import pyarrow.compute as pc

    chunks = [batch.column(0) for batch in table.storage.batches(["id"])]
    if not chunks:
        return
    column = pa.chunked_array(chunks)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{table.where(row)} column 'id': null; every row needs an id")
    if pc.count_distinct(column).as_py() == len(column):
        return
    counts = pc.value_counts(column).to_pylist()
    repeated = next(entry["values"] for entry in counts if entry["counts"] > 1)
    rows = np.flatnonzero(pc.equal(column, pa.scalar(repeated, column.type)).to_numpy())[:2]
    places = " and ".join(table.where(int(row)) for row in rows)
    raise DataError(f"{table.path}: id {repeated!r} appears twice: {places}; ids must be unique")
