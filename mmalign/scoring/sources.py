"""Where rows to score come from: picture folders, Parquet, JSONL and CSV tables, and `datasets` folders.

A source knows its number of rows and a fingerprint, and reads any range of rows, so memory stays bounded and an
interrupted run finds its place again. Paths in a table never lead outside its root.
"""

from __future__ import annotations

import csv
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.errors import DataError
from mmalign.registry import did_you_mean
from mmalign.types import ImageRef

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
OUTSIDE_ROOT = "outside_root"
NO_PROMPT = "no_prompt"
MISSING = "missing_image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row to score. An image that is a text is the reason why there is none."""

    key: str
    images: Mapping[str, ImageRef | str]
    prompt: str | None
    user: str | None = None
    """Whose reward to ask for, where a reward differs between people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a table hold what."""

    images: tuple[str, ...] = ()
    """Empty: the first of the usual names that exists."""
    prompt: str | None = None
    key: str | None = None
    fixed_prompt: str | None = None
    """One text for all rows, instead of a column."""
    user: str | None = None
    """Column with users; by default `user` where there is one."""
    fixed_user: str | None = None
    """One user for all rows, instead of a column."""
    prompt_file: str | None = None
    """For picture folders: a JSON file that maps file names to prompts; ``prompts.json`` in the folder by default."""

    def __post_init__(self) -> None:
        if self.user is not None and self.fixed_user is not None:
            raise DataError("one user for all rows (--user) and a column of users (--user-col) exclude each other")


class Source(ABC):
    """Rows in a fixed order."""

    columns: tuple[str, ...]
    """Names of the image columns."""
    fingerprint: str
    """Changes when the rows or their order might have changed."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows ``start`` to ``stop - 1``."""


def open_source(path: Path, columns: Columns, root: Path | None = None) -> Source:
    """The source behind a path.

    Args:
        path: a picture folder, a ``.parquet``, ``.jsonl`` or ``.csv`` file, or a folder saved by `datasets`.
        columns: which columns to read.
        root: folder that paths in a table are relative to and may not leave; the table's own folder by default.

    Raises:
        DataError: nothing there, an unknown kind, or columns that are not in the table.
    """
    if columns.prompt_file and (not path.is_dir() or columns.fixed_prompt is not None):
        raise DataError("a prompt file goes with a folder of pictures, and not with one prompt for all")
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "state.json").is_file():
            return DatasetSource(path, columns, root or path)
        parquet = sorted(path.rglob("*.parquet"))
        has_pictures = any(item.suffix.lower() in PICTURES for item in path.rglob("*"))
        if parquet and not has_pictures:
            return ParquetSource(parquet, columns, root or path)
        return ListSource.from_folder(path, columns)
    if not path.is_file():
        raise DataError(f"there is nothing at {path}")
    if path.suffix == ".parquet":
        return ParquetSource([path], columns, root or path.parent)
    if path.suffix in (".jsonl", ".csv"):
        return ListSource.from_table(path, columns, root or path.parent)
    raise DataError(f"{path}: expected a folder, .parquet, .jsonl or .csv")


class ListSource(Source):
    """Rows that fit in memory as references: folders and text tables."""

    def __init__(self, rows: list[Row], columns: tuple[str, ...], fingerprint: str) -> None:
        self._rows, self.columns, self.fingerprint = rows, columns, fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, start: int, stop: int) -> list[Row]:
        return self._rows[start:stop]

    @classmethod
    def from_folder(cls, folder: Path, columns: Columns) -> ListSource:
        """Every picture of a folder, in name order, with prompts from a metadata file or ``<stem>.txt``."""
        for name in ("metadata.jsonl", "metadata.csv"):
            if columns.prompt_file is None and (folder / name).is_file():
                return cls.from_table(folder / name, columns, folder)
        files = sorted(item for item in folder.rglob("*") if item.suffix.lower() in PICTURES and item.is_file())
        if not files:
            raise DataError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
        stated = Path(columns.prompt_file) if columns.prompt_file else folder / "prompts.json"
        prompts = _prompt_file(stated) if columns.prompt_file or stated.is_file() else {}
        digest = hashlib.blake2b(digest_size=12)
        rows = []
        for file in files:
            name = file.relative_to(folder).as_posix()
            sidecar = file.with_suffix(".txt")
            prompt = columns.fixed_prompt
            if prompt is None and name in prompts:
                prompt = prompts[name]
            if prompt is None and sidecar.is_file():
                prompt = sidecar.read_text(encoding="utf-8").strip()
            inside = _inside(name, folder)
            rows.append(Row(key=name, images={"image": inside}, prompt=prompt, user=columns.fixed_user))
            status = file.stat()
            digest.update(f"{name}|{status.st_size}|{status.st_mtime_ns}|{prompt}|{columns.fixed_user}\n".encode())
        return cls(rows, ("image",), digest.hexdigest())

    @classmethod
    def from_table(cls, file: Path, columns: Columns, root: Path) -> ListSource:
        """A JSONL or CSV table whose image columns hold paths."""
        records = list(_read_jsonl(file) if file.suffix == ".jsonl" else _read_csv(file))
        if not records:
            raise DataError(f"{file} has no rows")
        chosen = _choose(list(records[0]), columns, file)
        rows = [_row(record, index, chosen, columns.fixed_prompt, root) for index, record in enumerate(records)]
        digest = hashlib.blake2b(file.read_bytes(), digest_size=12)
        digest.update(repr(chosen).encode() + str(columns.fixed_prompt).encode())
        return cls(rows, chosen.images, digest.hexdigest())


class ParquetSource(Source):
    """Parquet files read one row group at a time; images are bytes, ``{bytes, path}`` or paths."""

    def __init__(self, files: Sequence[Path], columns: Columns, root: Path) -> None:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException

        self._root, self._fixed = root, columns.fixed_prompt
        try:
            opened = [pq.ParquetFile(file) for file in files]
        except (ArrowException, OSError) as error:
            raise DataError(f"cannot read {files[0].parent}: {error}") from error
        self._chosen = _choose(opened[0].schema_arrow.names, columns, files[0])
        self.columns = self._chosen.images
        self._groups: list[tuple[Any, int, int]] = []
        count = 0
        digest = hashlib.blake2b(repr(self._chosen).encode() + str(self._fixed).encode(), digest_size=12)
        for file, handle in zip(files, opened, strict=True):
            status = file.stat()
            digest.update(f"{file.name}|{status.st_size}|{status.st_mtime_ns}\n".encode())
            for group in range(handle.num_row_groups):
                self._groups.append((handle, group, count))
                count += handle.metadata.row_group(group).num_rows
        self._count, self.fingerprint = count, digest.hexdigest()
        self._held: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._count

    def rows(self, start: int, stop: int) -> list[Row]:
        out: list[Row] = []
        for number, (handle, group, first) in enumerate(self._groups):
            length = handle.metadata.row_group(group).num_rows
            low, high = max(start, first), min(stop, first + length)
            if low >= high:
                continue
            if self._held is None or self._held[0] != number:
                self._held = (number, handle.read_row_group(group, columns=self._chosen.needed()))
            records = self._held[1].slice(low - first, high - low).to_pylist()
            out.extend(_row(item, low + i, self._chosen, self._fixed, self._root) for i, item in enumerate(records))
        return out


class DatasetSource(Source):
    """A folder written by ``datasets.Dataset.save_to_disk``."""

    def __init__(self, folder: Path, columns: Columns, root: Path) -> None:
        import datasets

        table = datasets.load_from_disk(str(folder))
        if not isinstance(table, datasets.Dataset):
            raise DataError(f"{folder} holds several splits: name one of {sorted(table)} as {folder}/SPLIT")
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        self._table, self._root, self._fixed = table, root, columns.fixed_prompt
        self._chosen = _choose(table.column_names, columns, folder)
        self.columns = self._chosen.images
        seed = f"{table._fingerprint}|{len(table)}|{self._chosen!r}|{self._fixed}"
        self.fingerprint = hashlib.blake2b(seed.encode(), digest_size=12).hexdigest()

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, start: int, stop: int) -> list[Row]:
        part = self._table.select(range(start, stop)).select_columns(self._chosen.needed())
        return [_row(dict(item), start + i, self._chosen, self._fixed, self._root) for i, item in enumerate(part)]


# ---------------------------------------------------------------------- columns and cells


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    images: tuple[str, ...]
    prompt: str | None
    key: str | None
    user: str | None = None
    fixed_user: str | None = None

    def needed(self) -> list[str]:
        return [*self.images, *(name for name in (self.prompt, self.key, self.user) if name is not None)]


def _choose(available: Sequence[str], wanted: Columns, source: Path) -> _Chosen:
    for name in (*wanted.images, wanted.prompt, wanted.key, wanted.user):
        if name is not None and name not in available:
            raise DataError(f"{source} has no column '{name}'{did_you_mean(name, available)}")
    images = wanted.images
    if not images:
        if "jpg_0" in available and "jpg_1" in available:
            images = ("jpg_0", "jpg_1")
        else:
            usual = [name for name in ("image", "file_name", "path", "image_path", "chosen") if name in available]
            if not usual:
                raise DataError(f"{source}: which column holds the images? --image-col one of {', '.join(available)}")
            images = ("chosen", "rejected") if usual[0] == "chosen" and "rejected" in available else (usual[0],)
    prompt = wanted.prompt or next((name for name in ("prompt", "caption", "text") if name in available), None)
    key = wanted.key or next((name for name in ("id", "row_id", "key") if name in available), None)
    user = wanted.user or ("user" if "user" in available and wanted.fixed_user is None else None)
    prompt = None if wanted.fixed_prompt is not None else prompt
    return _Chosen(images=images, prompt=prompt, key=key, user=user, fixed_user=wanted.fixed_user)


def _row(record: Mapping[str, Any], index: int, chosen: _Chosen, fixed: str | None, root: Path) -> Row:
    key = record.get(chosen.key) if chosen.key else None
    prompt = record.get(chosen.prompt) if chosen.prompt else fixed
    images = {name: _cell(record.get(name), root, f"row {index}, {name}") for name in chosen.images}
    if key is None:
        first = record.get(chosen.images[0])
        key = first if isinstance(first, str) and len(chosen.images) == 1 else index
    user = record.get(chosen.user) if chosen.user else chosen.fixed_user
    return Row(key=str(key), images=images, prompt=None if prompt is None else str(prompt),
               user=None if user is None else str(user))  # fmt: skip


def _cell(value: Any, root: Path, label: str) -> ImageRef | str:
    """A picture reference, or the reason why the cell holds none."""
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return ImageRef(data=value, label=label)
    if isinstance(value, str) and value:
        return _inside(value, root)
    return MISSING


def _inside(name: str, root: Path) -> ImageRef | str:
    """The file of that name below `root`, or a reason; symbolic links may not lead out either."""
    try:
        base = root.resolve()
        file = (base / name).resolve()
    except (OSError, ValueError, RuntimeError):
        return MISSING
    if not file.is_relative_to(base):
        return OUTSIDE_ROOT
    return ImageRef(path=str(file), label=name)


def _prompt_file(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} must map file names to prompts")
    return {str(name): str(prompt) for name, prompt in found.items()}


def _read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{file}, line {number}: expected an object")
            yield record


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream)
