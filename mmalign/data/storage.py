"""Where the rows of a table physically are: memory-mapped Arrow, made once from Parquet, or a small JSONL file.

Parquet cannot be read one row at a time, so each part is copied once, batch by batch, to an uncompressed Arrow file in
`.arrow/` beside it (named by the part's content) and mapped from there. Not for what the columns mean.
"""

from __future__ import annotations

import json
import os
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.data.files import MappedFile, atomic_file, canonical_hash, file_hash, write_json
from mmalign.data.progress import progress_bar
from mmalign.data.remote import local_path
from mmalign.errors import DataError

ROWS_PER_BATCH: Final = 128
MAX_JSONL_BYTES: Final = 1 << 30
SMALL_TABLE_BYTES: Final = 64 << 20
"""Tables up to this size are simply read into memory; nothing is written beside them."""
HASHES: Final = "hashes.json"
ABSENT: Final = {"p_chosen": 1.0}
"""What a JSONL line without a key says where other lines have it: as a table without the column; `null` is another thing."""
VOTES: Final = "pairs.jsonl"
"""The table of a folder of pairs, as `mmalign arena` writes it; the folder may be named instead."""


class Part(ABC):
    """One file of rows, mapped into memory."""

    unit = "row"

    def __init__(self, path: Path, schema: pa.Schema, starts: Sequence[int], length: int) -> None:
        self.path = path
        self.schema = schema
        self.length = length
        self._starts = starts

    @abstractmethod
    def batch(self, number: int) -> pa.RecordBatch:
        """One record batch of the file."""

    @property
    def num_batches(self) -> int:
        return len(self._starts)

    def locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        """The record batch that holds a row of this part, and the row's place in it."""
        number = bisect_right(self._starts, row) - 1
        return self.batch(number), row - self._starts[number]

    def number(self, row: int) -> int:
        """What a person finds a row of this part by: its number from 0, or its line from 1."""
        return row

    def where(self, row: int) -> str:
        """How messages name a row of this part."""
        return f"{self.path.name} {self.unit} {self.number(row)}"


class MappedPart(Part):
    """An Arrow file; batches are looked up in its footer when asked for, so nothing grows with the table."""

    def __init__(self, path: Path, arrow: Path) -> None:
        self._mapped = MappedFile(arrow)
        self._reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._mapped.buffer)))
        self._bytes_per_batch = len(self._mapped.buffer) // max(1, self._reader.num_record_batches)
        self._lock = threading.Lock()
        starts, total = [], 0
        for number in range(self._reader.num_record_batches):
            starts.append(total)
            total += self._reader.get_batch(number).num_rows
        super().__init__(path, self._reader.schema, starts, total)

    def batch(self, number: int) -> pa.RecordBatch:
        with self._lock:
            # A batch is seen in whole pages and rarely in full; a small table is never given back at all.
            self._mapped.touched(min(self._bytes_per_batch, 1 << 20))
            return self._reader.get_batch(number)


class LoadedPart(Part):
    """Batches held as objects: an Arrow stream (mapped, as `datasets` saves it) or a parsed JSONL file."""

    def __init__(self, path: Path, table: pa.Table, lines: Sequence[int] | None = None) -> None:
        self._batches = table.to_batches(max_chunksize=None)
        self._lines = lines
        self.unit = "row" if lines is None else "line"
        starts, total = [], 0
        for batch in self._batches:
            starts.append(total)
            total += batch.num_rows
        super().__init__(path, table.schema, starts, total)

    def batch(self, number: int) -> pa.RecordBatch:
        return self._batches[number]

    def number(self, row: int) -> int:
        return row if self._lines is None else self._lines[row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """The parts of a table with the identity of their content."""

    path: Path
    folder: Path
    parts: tuple[Part, ...]
    fingerprint: str

    def __len__(self) -> int:
        return sum(part.length for part in self.parts)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows in order, some columns only."""
        for part in self.parts:
            for number in range(part.num_batches):
                yield part.batch(number).select(list(columns))


def open_storage(path: str | Path, *, progress: bool = True) -> Storage:
    """Open a folder of Parquet or Arrow parts, one such file, a JSONL file, or a folder with a `pairs.jsonl`; also what is at an
    address in a store.

    Raises:
        DataError: nothing there, nothing readable in it, or parts whose columns differ.
    """
    path = local_path(path, progress=progress)
    if (path / VOTES).is_file() and not any(path.glob("*.parquet")):
        path = path / VOTES
    if path.is_file() and path.suffix in (".jsonl", ".ndjson"):
        return _open_jsonl(path)
    files = part_files(path)
    folder = path if path.is_dir() else path.parent
    small = sum(file.stat().st_size for file in files) <= SMALL_TABLE_BYTES
    side = None if small else side_folder(folder)
    hashes = {file.name: file_hash(file) for file in files} if side is None else _hashes(files, side, progress=progress)
    parts = tuple(_open_part(file, side, hashes[file.name], progress=progress) for file in files)
    for part in parts[1:]:
        if difference := _difference(parts[0].schema, part.schema):
            raise DataError(f"{part.path}: its columns differ from those of {parts[0].path.name}: {difference}")
    content = [[file.name, hashes[file.name]] for file in files]
    return Storage(path=path, folder=folder, parts=parts, fingerprint=canonical_hash(content))


def side_folder(folder: Path) -> Path:
    """Where the mapped copies live: in the table's folder, or in the user's cache when that folder is read-only."""
    if os.access(folder, os.W_OK):
        return folder / ".arrow"
    root = Path(os.environ.get("MMALIGN_CACHE") or Path.home() / ".cache" / "mmalign")
    return root / "arrow" / canonical_hash(str(folder.resolve()))[:16]


def part_files(path: Path) -> list[Path]:
    """The data files of a table, in name order.

    Raises:
        DataError: nothing there, or no readable part.
    """
    if not path.exists():
        raise DataError(f"{path}: no such table; 'mmalign data import' makes one from a source")
    if path.is_file():
        if path.suffix not in (".parquet", ".arrow"):
            raise DataError(f"{path}: not a table; expected .parquet, .arrow, .jsonl or a folder of parts")
        return [path]
    for suffix in (".parquet", ".arrow"):
        files = sorted(file for file in path.glob(f"*{suffix}") if not file.name.startswith("."))
        files = files or sorted(path.glob(f"data/*{suffix}"))
        if files:
            return files
    manifests = sorted(path.glob("*.jsonl"))
    hint = f"; give the file itself: {manifests[0]}" if manifests else ""
    raise DataError(f"{path}: holds no Parquet or Arrow part{hint}")


def _open_part(file: Path, side: Path | None, digest: str, *, progress: bool) -> Part:
    try:
        if file.suffix == ".parquet":
            if side is None:
                return LoadedPart(file, pq.ParquetFile(file).read())
            return MappedPart(file, _arrow_copy(file, side, digest, progress=progress))
        with file.open("rb") as handle:
            if handle.read(6) == b"ARROW1":
                return MappedPart(file, file)
        return LoadedPart(file, pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{file}: not a readable {file.suffix[1:]} file: {error}") from error


def _arrow_copy(file: Path, side: Path, digest: str, *, progress: bool) -> Path:
    from filelock import FileLock

    target = side / f"{digest[:32]}-v1.arrow"
    if target.exists():
        return target
    try:
        side.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                _unpack(file, target, progress=progress)
    except OSError as error:
        raise DataError(f"{side}: cannot be written; the table's rows are mapped from there: {error}") from error
    return target


def _unpack(file: Path, target: Path, *, progress: bool) -> None:
    source = pq.ParquetFile(file)
    with (
        progress_bar(f"Unpacking {file.name}", source.metadata.num_rows, enabled=progress) as advance,
        atomic_file(target) as handle,
        pa.ipc.new_file(handle, source.schema_arrow) as writer,
    ):
        for batch in source.iter_batches(batch_size=ROWS_PER_BATCH):
            writer.write_batch(batch)
            advance(batch.num_rows)


def _hashes(files: Sequence[Path], side: Path, *, progress: bool) -> dict[str, str]:
    """SHA-256 by file name. Hashing is repeated only for files whose size or time changed since it was noted."""
    noted_path = side / HASHES
    try:
        noted = json.loads(noted_path.read_text())
    except (OSError, ValueError):
        noted = {}
    noted = noted if isinstance(noted, dict) else {}
    fresh: dict[str, dict[str, Any]] = {}
    pending = []
    for file in files:
        status = file.stat()
        mark = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        old = noted.get(file.name)
        if isinstance(old, dict) and {key: old.get(key) for key in mark} == mark and isinstance(old.get("sha256"), str):
            fresh[file.name] = old
        else:
            fresh[file.name] = mark
            pending.append(file)
    if pending:
        with progress_bar("Hashing", sum(file.stat().st_size for file in pending), enabled=progress) as advance:
            for file in pending:
                fresh[file.name]["sha256"] = file_hash(file, advance)
        write_json(noted_path, fresh)
    return {name: str(entry["sha256"]) for name, entry in fresh.items()}


def _open_jsonl(path: Path) -> Storage:
    size = path.stat().st_size
    if size > MAX_JSONL_BYTES:
        raise DataError(f"{path}: {size} bytes is too large for a JSONL table; convert it with 'mmalign data import'")
    rows, lines = read_jsonl(path)
    columns = sorted({name for row in rows for name in row})
    arrays = []
    for name in columns:
        absent = ABSENT.get(name)
        values = [_as_image(row.get(name)) if name in ("chosen", "rejected") else row.get(name, absent) for row in rows]
        values = [json.dumps(v) if name == "meta" and v is not None and not isinstance(v, str) else v for v in values]
        arrays.append(_column(path, name, values, lines))
    table = pa.table(arrays, names=columns) if columns else pa.table({})
    part = LoadedPart(path, table, lines)
    return Storage(path=path, folder=path.parent, parts=(part,), fingerprint=file_hash(path))


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a JSONL file and their line numbers, from 1. Empty lines and CRLF are fine.

    Raises:
        DataError: a line is not a JSON object in UTF-8, or names a key twice; the line is named.
    """
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, row in jsonl_lines(path):
        if isinstance(row, str):
            raise DataError(f"{path} line {number}: {row}")
        rows.append(row)
        lines.append(number)
    return rows, lines


def jsonl_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number from 1, its object, or in words why it is none) of every line that is not empty."""
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
            except (ValueError, RecursionError) as error:
                yield number, f"not valid JSON: {error}"
                continue
            if not isinstance(row, dict):
                yield number, f"expected an object, got {type(row).__name__}"
            elif b"\\ud" in raw.lower() and not is_unicode(row):
                yield number, "its text is no Unicode: half of a surrogate pair"
            else:
                yield number, row


def is_unicode(value: object) -> bool:
    """Whether all text of a JSON value can be written: JSON's escapes can spell half a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) != len(items):
        names = [name for name, _ in items]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' appears twice")
    return result


def _as_image(value: Any) -> Any:
    return {"bytes": None, "path": value} if isinstance(value, str) else value


def _column(path: Path, name: str, values: list[Any], lines: Sequence[int]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        kinds: dict[str, int] = {}
        for value, line in zip(values, lines, strict=True):
            if value is not None:
                kinds.setdefault(type(value).__name__, line)
        found = ", ".join(f"{kind} (line {line})" for kind, line in kinds.items())
        raise DataError(f"{path}: column '{name}' mixes kinds of values: {found}: {error}") from error


def _difference(first: pa.Schema, second: pa.Schema) -> str:
    words = []
    for name in sorted({*first.names, *second.names}):
        left = str(first.field(name).type) if name in first.names else "absent"
        right = str(second.field(name).type) if name in second.names else "absent"
        if left != right:
            words.append(f"'{name}' is {left} there and {right} here")
    return "; ".join(words)
