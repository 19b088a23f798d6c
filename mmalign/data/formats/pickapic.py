"""Pick-a-Pic v1 and v2 Parquet (Kirstain et al., arXiv:2305.01569; hub: yuvalkirstain/pickapic_v1 and _v2).

Columns: `label_0` is 1 when `jpg_0` was preferred, 0 when `jpg_1` was, 0.5 for a tie; `has_label` says whether anyone
judged; `ranking_id` groups the rows of one ranking; `user_id` is the judge. `best_image_uid` is not used: it means
nothing for ties. Pictures are whatever their bytes say, not what the column names promise.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.data.formats.base import Names, Reader, SourceRow
from mmalign.data.formats.rowfiles import whole_microseconds
from mmalign.data.reasons import Problem
from mmalign.data.schema import check_columns
from mmalign.errors import DataError

LABELS: Final = ("caption", "label_0", "label_1")
PICTURES: Final = ("jpg_0", "jpg_1")
OPTIONAL: Final = ("has_label", "user_id", "ranking_id", "image_0_uid", "image_1_uid", "num_example_per_prompt",
                   "created_at")  # fmt: skip
MAPPED: Final = (*LABELS, *PICTURES, "user_id", "ranking_id")
ROWS_AT_ONCE: Final = 64
_SPLIT = re.compile(r"^(?P<split>.+?)-\d{5}-of-\d{5}")


class PickapicReader(Reader):
    """Reads the rows of one split, some at a time.

    Option `weight`: ``one`` (default), or ``per_prompt``: 1 over the number of judgements of the row's prompt
    (`num_example_per_prompt`), as PickScore weighs its rows, so that a prompt counts once however often it was judged.
    """

    OPTIONS: ClassVar[Mapping[str, str]] = {"weight": "one"}

    def __init__(self, source: Path, split: str | None, **settings: Any) -> None:
        super().__init__(source, split, **settings)
        if self.options["weight"] not in ("one", "per_prompt"):
            raise DataError(f"{source}: the option 'weight' is '{self.options['weight']}', expected one or per_prompt")
        self.files = _choose_split(_parquet_files(source), split, source)
        for file in self.files:
            names = pq.ParquetFile(file).schema_arrow.names
            if all(name not in names for name in PICTURES) and set(LABELS) <= set(names):
                raise DataError(
                    f"{file}: holds no pictures (columns jpg_0, jpg_1); this is the variant without images, whose"
                    " addresses are dead; use the full data set"
                )
            check_columns(names, (*LABELS, *PICTURES), (), source=str(file))
        self._ours = "mmalign_id" in names

    @classmethod
    def recognises(cls, source: Path) -> bool:
        files = _parquet_files(source)
        return bool(files) and set(LABELS) <= set(pq.ParquetFile(files[0]).schema_arrow.names)

    def reward_names(self) -> tuple[str, ...]:
        if not self._ours:
            return ()
        first = next(
            (v for file in self.files for v in pq.read_table(file, columns=["mmalign_scores"])[0].to_pylist()), None
        )
        return tuple(json.loads(first)) if first else ()

    def total(self) -> int:
        return sum(pq.ParquetFile(file).metadata.num_rows for file in self.files)

    def rows(self) -> Iterator[SourceRow | Problem]:
        names = Names("pickapic")
        for file in self.files:
            number = 0
            try:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=ROWS_AT_ONCE):
                    for row in whole_microseconds(batch).to_pylist():
                        yield _own(row) if self._ours else self._weighted(_row(row, names, file.name, number))
                        number += 1
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{file} after row {number}: cannot be read: {error}") from error

    def _weighted(self, row: SourceRow | Problem) -> SourceRow | Problem:
        if isinstance(row, Problem) or self.options["weight"] == "one":
            return row
        share = row.meta.get("prompt_weight")
        if share is None:
            raise DataError(f"{self.source}: weight=per_prompt needs the column num_example_per_prompt; row {row.id} has none")
        return replace(row, weight=share)


def _own(row: dict[str, Any]) -> SourceRow:
    """A row that `mmalign data export` wrote: what the source's columns cannot say stands beside them."""
    side = 0 if (row["label_0"] or 0.0) >= (row["label_1"] or 0.0) else 1
    meta = json.loads(row["mmalign_meta"])
    side = int(meta.get("chosen_side", 0)) if row["label_0"] == row["label_1"] else side
    scores = json.loads(row["mmalign_scores"]) if row["mmalign_scores"] else None
    called = json.loads(row["mmalign_names"] or "{}")
    return SourceRow(
        id=row["mmalign_id"],
        prompt=row["caption"],
        chosen=row[f"jpg_{side}"],
        rejected=row[f"jpg_{1 - side}"],
        p_chosen=row["mmalign_p_chosen"],
        user=_text(row["user_id"]),
        group=_text(row["ranking_id"]),
        weight=row["mmalign_weight"],
        meta=meta,
        chosen_name=called.get("chosen"),
        rejected_name=called.get("rejected"),
        scores=None if scores is None else {name: (pair[0], pair[1]) for name, pair in scores.items()},
    )


def _row(row: dict[str, Any], names: Names, file: str, number: int) -> SourceRow | Problem:
    first, second = row["label_0"], row["label_1"]
    pictures = [row.get(f"image_{side}_uid") or _digest(row[f"jpg_{side}"]) for side in (0, 1)]
    identity = (
        row.get("ranking_id"),
        *pictures,
        row.get("user_id"),
        row.get("created_at"),
        row["caption"],
        first,
        second,
    )
    name = names.name(*identity)
    found = label_problem(row)
    if found is not None:
        column, reason, detail = found
        return Problem(file=file, row=number, id=name, column=column, reason=reason, detail=detail)
    chosen = 0 if first >= second else 1
    rejected = 1 - chosen
    meta = {column: value for column, value in row.items() if column not in MAPPED}
    examples = row.get("num_example_per_prompt")
    if examples:
        meta["prompt_weight"] = 1.0 / examples
    return SourceRow(
        id=name,
        prompt=row["caption"],
        chosen=row[f"jpg_{chosen}"],
        rejected=row[f"jpg_{rejected}"],
        p_chosen=max(first, second),
        user=_text(row.get("user_id")),
        group=_text(row.get("ranking_id")),
        weight=1.0,
        meta={**meta, "chosen_side": chosen},
        chosen_name=row.get(f"image_{chosen}_uid"),
        rejected_name=row.get(f"image_{rejected}_uid"),
    )


def label_problem(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """What is wrong with a row's verdict: (column, reason, detail), or None."""
    if "has_label" in row and not row["has_label"]:
        return "has_label", "no_label", f"has_label is {row['has_label']}"
    labels = [row["label_0"], row["label_1"]]
    if labels == [None, None]:
        return "label_0", "no_label", "both labels are null"
    for side, value in enumerate(labels):
        if value is None or not math.isfinite(value) or not 0.0 <= value <= 1.0:
            return f"label_{side}", "label_out_of_range", f"{value} is not in [0, 1]"
    if abs(sum(labels) - 1.0) > 1e-6:
        return "label_1", "contradictory_label", f"labels {labels[0]:g} and {labels[1]:g} do not sum to 1"
    return None


def _parquet_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix == ".parquet" else []
    return sorted(source.glob("*.parquet")) or sorted(source.glob("data/*.parquet"))


def _choose_split(files: list[Path], split: str | None, source: Path) -> list[Path]:
    if not files:
        raise DataError(f"{source}: no Parquet files there or in its folder 'data'")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT.match(file.name)
        by_split.setdefault(match["split"] if match else "", []).append(file)
    known = ", ".join(sorted(name for name in by_split if name)) or "none named"
    if split is not None:
        if split not in by_split:
            raise DataError(f"{source}: no split '{split}' (splits: {known})")
        return by_split[split]
    if len(by_split) > 1:
        raise DataError(f"{source}: holds several splits ({known}); choose one with --split")
    return files


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
