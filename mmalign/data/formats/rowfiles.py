"""Rows of JSON, JSONL, CSV and Parquet files, whatever they mean: what most source formats are made of."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.data.storage import is_unicode, jsonl_lines
from mmalign.errors import DataError

SUFFIXES: Final = (".parquet", ".jsonl", ".ndjson", ".json", ".csv")
_SPLIT: Final = re.compile(r"^(?P<split>.+?)-\d{5}-of-\d{5}")
_OURS: Final = ("metadata", "dataset_info", "dataset_infos", "state", "report", "stamp")
"""JSON files that describe a data set and hold none of it."""
HEAD_BYTES: Final = 1 << 20
SAMPLE_ROWS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a source."""

    file: Path
    number: int
    """From 0; for JSONL and CSV the line, from 1."""
    values: Mapping[str, Any]
    broken: str = ""
    """Why the row has no values; empty where it has."""

    @property
    def where(self) -> str:
        unit = "line" if self.file.suffix in (".jsonl", ".ndjson", ".csv") else "row"
        return f"{self.file.name} {unit} {self.number}"


def row_files(source: Path) -> list[Path]:
    """Files that can hold rows: the source itself, or those of a folder (or of its folder `data`), one kind only."""
    if source.is_file():
        return [source] if source.suffix in SUFFIXES else []
    for folder in (source, source / "data"):
        for suffix in SUFFIXES:
            found = sorted(
                file for file in folder.glob(f"*{suffix}") if file.stem not in _OURS and not file.name.startswith(".")
            )
            if found:
                return found
    return []


def choose_split(files: list[Path], split: str | None, source: Path) -> list[Path]:
    """The files of one split, which is the part of a name before ``-00000-of-00001``, or the whole stem.

    Raises:
        DataError: no such split, or several and none named.
    """
    if not files:
        raise DataError(f"{source}: holds no Parquet, JSON, JSONL or CSV file, nor does its folder 'data'")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT.match(file.name)
        by_split.setdefault(match["split"] if match else file.stem, []).append(file)
    known = ", ".join(sorted(by_split))
    if split is not None:
        if split not in by_split:
            raise DataError(f"{source}: no split '{split}' (splits: {known})")
        return by_split[split]
    if len(by_split) > 1 and {"train", "test", "validation", "val", "dev"} & set(by_split):
        raise DataError(f"{source}: holds several splits ({known}); choose one with --split")
    return files


def first_row(source: Path) -> dict[str, Any] | None:
    """What a row looks like: the columns of the first `SAMPLE_ROWS` rows, each with its first value that is not null, read
    without the rest; None where there is none. A defect of the very first row must not hide what the file is.
    """
    files = row_files(source)
    if not files:
        return None
    file = files[0]
    try:
        if file.suffix == ".parquet":
            table = pq.ParquetFile(file)
            batch = next(table.iter_batches(batch_size=SAMPLE_ROWS), None)
            if batch is None or not batch.num_rows:
                return dict.fromkeys(table.schema_arrow.names)
            return _together(whole_microseconds(batch).to_pylist())
        if file.suffix == ".csv":
            return _first_of_csv(file)
        return _first_of_json(file)
    except (OSError, ValueError, DataError, pa.ArrowInvalid, StopIteration):
        return None


def _first_of_csv(file: Path) -> dict[str, Any] | None:
    from mmalign.data.formats.folder import read_csv

    rows, _ = read_csv(file)
    return _together(rows[:SAMPLE_ROWS])


def _first_of_json(file: Path) -> dict[str, Any] | None:
    if file.suffix != ".json" or not _is_list(file):
        lines = (row for _, row in jsonl_lines(file) if isinstance(row, dict))
        return _together(itertools.islice(lines, SAMPLE_ROWS))
    size = HEAD_BYTES
    while True:
        with file.open("rb") as handle:
            head = handle.read(size).decode("utf-8-sig", errors="ignore")
        found = _together(_items(head))
        if found is not None or size >= file.stat().st_size:
            return found
        size *= 16  # the first row alone is larger


def _items(head: str) -> Iterator[dict[str, Any]]:
    """The whole objects at the beginning of a JSON list."""
    decoder, at = json.JSONDecoder(), head.index("[") + 1
    for _ in range(SAMPLE_ROWS):
        at += len(head[at:]) - len(head[at:].lstrip(" \t\r\n,"))
        try:
            value, at = decoder.raw_decode(head, at)
        except ValueError:
            return
        if isinstance(value, dict):
            yield value


def _together(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """All columns of some rows, each with its first value that is not null; None where there are no rows."""
    found: dict[str, Any] | None = None
    for row in rows:
        found = {} if found is None else found
        for name, value in row.items():
            if found.get(name) is None:
                found[name] = value
    return found


class RowFiles:
    """The rows of a source's files, in order.

    Args:
        keep_broken: give lines that are no JSON object as rows with `broken`, rather than stopping at the first.

    Raises:
        DataError: no files, an unknown split, or a file that is not what its name says.
    """

    def __init__(self, source: Path, split: str | None, *, keep_broken: bool = False) -> None:
        self._keep_broken = keep_broken
        self.files = choose_split(row_files(source), split, source)
        self.folder = source if source.is_dir() else source.parent
        self._read: dict[Path, list[Row]] = {}

    def total(self) -> int:
        return sum(
            pq.ParquetFile(file).metadata.num_rows if file.suffix == ".parquet" else len(self._rows(file))
            for file in self.files
        )

    def __iter__(self) -> Iterator[Row]:
        for file in self.files:
            if file.suffix == ".parquet":
                yield from _parquet_rows(file)
            else:
                yield from self._rows(file)

    def _rows(self, file: Path) -> list[Row]:
        if file not in self._read:
            self._read[file] = list(_text_rows(file, self._keep_broken))
        return self._read[file]


def _text_rows(file: Path, keep_broken: bool) -> Iterator[Row]:
    if file.suffix == ".json" and _is_list(file):
        yield from _list_rows(file, keep_broken)
    elif file.suffix == ".csv":
        from mmalign.data.formats.folder import read_csv

        for values, number in zip(*read_csv(file), strict=True):
            yield Row(file=file, number=number, values=values)
    else:
        for number, row in jsonl_lines(file):
            if isinstance(row, str):
                yield _broken(file, number, row, keep_broken)
            else:
                yield Row(file=file, number=number, values=row)


def _broken(file: Path, number: int, why: str, keep: bool) -> Row:
    row = Row(file=file, number=number, values={}, broken=why)
    if not keep:
        raise DataError(f"{file.parent / row.where}: {why}")
    return row


def _is_list(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _list_rows(file: Path, keep_broken: bool) -> Iterator[Row]:
    """The items of a JSON file that is a list.

    Raises:
        DataError: not JSON.
    """
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not readable JSON: {error}") from error
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            yield _broken(file, number, f"expected an object, got {type(item).__name__}", keep_broken)
        elif not is_unicode(item):
            yield _broken(file, number, "its text is no Unicode: half of a surrogate pair", keep_broken)
        else:
            yield Row(file=file, number=number, values=item)


def _parquet_rows(file: Path, at_once: int = 64) -> Iterator[Row]:
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=at_once):
            for values in whole_microseconds(batch).to_pylist():
                yield Row(file=file, number=number, values=values)
                number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} after row {number}: cannot be read: {error}") from error


def whole_microseconds(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times in nanoseconds, which Python's datetime cannot hold, as microseconds."""
    columns = [
        column.cast(pa.timestamp("us"), safe=False) if pa.types.is_timestamp(column.type) else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
