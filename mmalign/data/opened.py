"""A table as a person opens it: whatever form it is in, with what is left out and whose scores count said in words.

    pairs = mmalign.data.open("data/mine").filter(ties="drop").with_scores("scores.parquet")

`mmalign.data.loader` makes batches of it. Not for training from an experiment file, which says all this itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.data.check import CheckPolicy, CheckResult, usable_rows
from mmalign.data.files import canonical_hash
from mmalign.data.storage import open_storage
from mmalign.data.tables import PairTable, open_table
from mmalign.errors import DataError
from mmalign.types import PairRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """A table of pairs with a policy. Every method gives another one; nothing is read before it is asked for."""

    table: PairTable
    policy: CheckPolicy = field(default_factory=CheckPolicy)
    check: str = "online"
    """As ``data.check``: ``online``, ``required`` or ``off``."""
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Reward -> [rows, 2] float64, of the chosen and the rejected picture of every row of the table."""

    def __len__(self) -> int:
        """Rows of the table, used or not."""
        return len(self.table)

    def __getitem__(self, row: int) -> PairRecord:
        """One row, with the attached scores."""
        record = self.table[row]
        own = {name: (float(values[row, 0]), float(values[row, 1])) for name, values in self.scores.items()}
        return replace(record, scores={**record.scores, **own}) if own else record

    def filter(self, **policy: Any) -> Pairs:
        """Other fields of the policy: ``ties``, ``duplicates``, ``max_aspect``, ``min_side``, ``max_bad_fraction``, ``strict``.

        Raises:
            DataError: no such field, or a value with no meaning.
        """
        known = CheckPolicy.__dataclass_fields__
        unknown = [name for name in policy if name not in known]
        if unknown:
            raise DataError(f"filter: no such field {', '.join(unknown)} (known: {', '.join(known)})")
        return replace(self, policy=replace(self.policy, **policy))

    def with_scores(self, path: str | Path) -> Pairs:
        """Scores from a table: one row an id (or in the table's own order), with columns ``REWARD__chosen`` and
        ``REWARD__rejected``, as `mmalign score` writes them for a table of pairs.

        Raises:
            DataError: no such columns, an id that is not in the table, or rows without a score.
        """
        found = scores_of(Path(path), self.table)
        taken = [name for name in found if name in self.table.rewards]
        if taken:
            raise DataError(f"{path}: the table already holds scores of {', '.join(taken)}; nothing is replaced")
        return replace(self, scores={**self.scores, **found})

    def usable(self, *, progress: bool = False) -> CheckResult:
        """Which rows are used, and what became of the others."""
        return usable_rows(self.table, check=self.check, policy=self.policy, progress=progress)


def open_pairs(
    source: Any, *, format: str | None = None, split: str | None = None, media: str | Path | None = None, check: str = "online"
) -> Pairs:
    """Open pairs of pictures in any form: a table of ours, a source of a known format, or a ``datasets.Dataset``.

    A source of another format is imported once into the user's cache folder (``MMALIGN_CACHE``, by default
    ``~/.cache/mmalign``), named by its content; the format that was found is printed.

    Args:
        format, split, media: as of `import_table`.
        check: as ``data.check``.

    Raises:
        DataError: nothing there, no known format, or a source of something else than pairs.
    """
    if hasattr(source, "to_parquet") and hasattr(source, "column_names"):
        source = _saved(source)
    path = Path(source)
    if format is None and _is_pairs(path):
        return Pairs(table=open_table(path, progress=False), check=check)
    from mmalign.data.importing import import_table

    files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    if not files:
        raise DataError(f"{path}: no such table or source")
    marks = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = canonical_hash([marks, format, split, None if media is None else str(media)])
    out = _cache_folder() / "imported" / key[:32]
    if not out.exists():
        print(import_table(path, out, format=format, split=split, media=media, progress=False))
    if not _is_pairs(out):
        raise DataError(f"{path}: not pairs of pictures; import it with 'mmalign data import' and train on the table")
    return Pairs(table=open_table(out, progress=False), check=check)


def scores_of(path: Path, table: PairTable) -> dict[str, np.ndarray]:
    """Reward -> [rows, 2], as ``Pairs.with_scores`` says."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        found = pq.read_table(path)
    except Exception as error:
        raise DataError(f"{path}: not a readable Parquet file of scores: {error}") from error
    rewards = [name.removesuffix("__chosen") for name in found.column_names if name.endswith("__chosen")]
    rewards = [name for name in rewards if f"{name}__rejected" in found.column_names]
    if not rewards:
        raise DataError(f"{path}: holds no columns REWARD__chosen and REWARD__rejected, got {', '.join(found.column_names)}")
    ids = table.ids()
    named = next((name for name in ("id", "row_id", "key") if name in found.column_names), None)
    places = {str(value): place for place, value in enumerate(found.column(named).to_pylist())} if named else {}
    if places and set(ids) <= set(places):
        order = np.array([places[value] for value in ids], dtype=np.int64)
    elif len(found) == len(ids):
        order = np.arange(len(ids))
    else:
        missing = next(value for value in ids if value not in places)
        raise DataError(f"{path}: {len(found)} rows for a table of {len(ids)}, and none for the row '{missing}'")
    made = {}
    for name in rewards:
        columns = [found.column(f"{name}__{side}").cast("double") for side in ("chosen", "rejected")]
        sides = [pc.fill_null(column, float("nan")).to_numpy() for column in columns]
        values = np.stack(sides, axis=1)[order]
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise DataError(f"{path}: row '{ids[row]}' has no finite score of '{name}'")
        made[name] = values
    return made


def _is_pairs(path: Path) -> bool:
    try:
        names = set(open_storage(path, progress=False).parts[0].schema.names)
    except DataError:
        return False
    return {"id", "prompt", "chosen", "rejected"} <= names


def _saved(dataset: Any) -> Path:
    """A ``datasets.Dataset`` as a Parquet file in the user's cache folder, named by its fingerprint."""
    name = str(getattr(dataset, "_fingerprint", "")) or canonical_hash(dataset.column_names)
    path = _cache_folder() / "datasets" / f"{name}-{len(dataset)}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(".tmp")
        dataset.to_parquet(str(building))
        building.replace(path)
    return path


def _cache_folder() -> Path:
    return Path(os.environ.get("MMALIGN_CACHE") or Path.home() / ".cache" / "mmalign")
