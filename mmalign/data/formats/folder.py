"""A folder with `pairs.csv` or `pairs.jsonl` (prompt, chosen, rejected) and the pictures those name."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from mmalign.data.formats.base import Names, Reader, SourceRow
from mmalign.data.reasons import Problem
from mmalign.data.schema import check_columns
from mmalign.data.storage import read_jsonl
from mmalign.data.tables import inside
from mmalign.errors import DataError
from mmalign.media import MediaError, read_bytes

MANIFESTS: Final = ("pairs.csv", "pairs.jsonl")
REQUIRED: Final = ("prompt", "chosen", "rejected")
OPTIONAL: Final = ("id", "p_chosen", "user", "weight", "group", "scores", "meta")


class FolderReader(Reader):
    """Reads the manifest at once and the pictures row by row."""

    def __init__(self, source: Path, split: str | None, **settings: Any) -> None:
        super().__init__(source, split, **settings)
        if split is not None:
            raise DataError(f"{source}: a folder of pairs has no splits; leave out --split")
        found = [source] if source.is_file() else [source / name for name in MANIFESTS if (source / name).is_file()]
        if not found:
            raise DataError(f"{source}: holds neither {' nor '.join(MANIFESTS)}")
        if len(found) > 1:
            raise DataError(f"{source}: holds both {' and '.join(MANIFESTS)}; name the one to read")
        self.manifest = found[0]
        self._rows, self._lines = (
            read_csv(self.manifest) if self.manifest.suffix == ".csv" else read_jsonl(self.manifest)
        )
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        check_columns(columns, REQUIRED, OPTIONAL, source=str(self.manifest))
        scores = [row["scores"] for row in self._rows if isinstance(row.get("scores"), dict)]
        self._rewards = tuple(dict.fromkeys(name for given in scores for name in given))

    @classmethod
    def recognises(cls, source: Path) -> bool:
        if source.is_file():
            return source.name in MANIFESTS
        return any((source / name).is_file() for name in MANIFESTS)

    def total(self) -> int:
        return len(self._rows)

    def reward_names(self) -> tuple[str, ...]:
        return self._rewards

    def rows(self) -> Iterator[SourceRow | Problem]:
        names = Names("folder")
        given: dict[str, int] = {}
        root = self.manifest.parent.resolve()
        for row, line in zip(self._rows, self._lines, strict=True):
            name = _text(row.get("id")) or names.name(row.get("prompt"), row.get("chosen"), row.get("rejected"))
            if name in given:
                raise DataError(f"{self.manifest} line {line}: id '{name}' is already that of line {given[name]}")
            given[name] = line
            yield self._row(row, line, name, root)

    def _row(self, row: dict[str, Any], line: int, name: str, root: Path) -> SourceRow | Problem:
        pictures: list[bytes] = []
        for side in ("chosen", "rejected"):
            where = f"{self.manifest.name} line {line} column '{side}'"
            if not isinstance(row.get(side), str) or not row[side]:
                return self._problem(line, name, side, "missing_image", "no path")
            try:
                pictures.append(read_bytes(inside(root, row[side], where))[0])
            except MediaError as error:
                return self._problem(line, name, side, error.reason, error.detail)
        prompt = row.get("prompt")
        if prompt is not None and not isinstance(prompt, str):
            raise DataError(
                f"{self.manifest} line {line}: column 'prompt' holds {type(prompt).__name__}, expected text"
            )
        scores, known = self._scores(row, line), (*REQUIRED, *OPTIONAL)
        if self._rewards and scores is None:
            return self._problem(line, name, "scores", "non_finite_score", f"expected two numbers for {self._rewards}")
        return SourceRow(
            id=name,
            prompt=prompt,
            chosen=pictures[0],
            rejected=pictures[1],
            p_chosen=self._number(row, "p_chosen", line),
            user=_text(row.get("user")),
            group=_text(row.get("group")),
            weight=self._number(row, "weight", line),
            meta={**_given(row.get("meta")), **{name: value for name, value in row.items() if name not in known}},
            chosen_name=row["chosen"],
            rejected_name=row["rejected"],
            scores=scores,
        )

    def _number(self, row: dict[str, Any], column: str, line: int) -> float:
        value = row.get(column)
        if value is None or value == "":
            return 1.0
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.manifest} line {line}: column '{column}' holds {value!r}, expected a number"
            ) from error

    def _scores(self, row: dict[str, Any], line: int) -> dict[str, tuple[float, float]] | None:
        given = row.get("scores")
        if isinstance(given, str) and given:
            try:
                given = json.loads(given)
            except ValueError as error:
                raise DataError(f"{self.manifest} line {line}: column 'scores' is not JSON: {error}") from error
        if not isinstance(given, dict):
            return None
        pairs: dict[str, tuple[float, float]] = {}
        for reward in self._rewards:
            pair = given.get(reward)
            if not isinstance(pair, list) or len(pair) != 2 or not all(_finite(value) for value in pair):
                return None
            pairs[reward] = (float(pair[0]), float(pair[1]))
        return pairs

    def _problem(self, line: int, name: str, column: str, reason: str, detail: str) -> Problem:
        return Problem(file=self.manifest.name, row=line, id=name, column=column, reason=reason, detail=detail)


def read_csv(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of a CSV file with a header, and the line each ends on.

    Raises:
        DataError: not UTF-8, no header, a repeated column, or a row with more or fewer fields than the header.
    """
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, strict=True)
            header = next(reader, [])
            repeated = [name for name in header if header.count(name) > 1]
            if not header or repeated:
                raise DataError(f"{path}: {f'column {repeated[0]!r} appears twice' if repeated else 'no header line'}")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise DataError(
                        f"{path} line {reader.line_num}: {len(fields)} fields, the header has {len(header)}"
                    )
                rows.append(dict(zip(header, fields, strict=True)))
                lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} after line {lines[-1] if lines else 0}: not readable CSV in UTF-8: {error}") from error
    return rows, lines


def _given(meta: Any) -> dict[str, Any]:
    """What a row's own `meta` holds: an object, or the text of one; anything else is kept under its name."""
    if isinstance(meta, str) and meta:
        with suppress(ValueError):
            meta = json.loads(meta)
    if isinstance(meta, dict):
        return meta
    return {} if meta is None or meta == "" else {"meta": meta}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)
