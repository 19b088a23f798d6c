"""Several tables of pairs read as one, each keeping its own folder, rows and facts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.data.check import CheckPolicy, CheckResult, usable_rows
from mmalign.data.files import canonical_hash
from mmalign.data.mediaindex import MediaIndex
from mmalign.data.order import Shuffle
from mmalign.data.orders import MixtureOrder
from mmalign.data.storage import Storage
from mmalign.data.tables import PairTable, open_table
from mmalign.errors import DataError
from mmalign.types import ImageRef


class JoinedTable(PairTable):
    """The rows of several tables behind each other.

    Raises:
        DataError: none, tables with different rewards, or an id that two of them share.
    """

    def __init__(self, tables: Sequence[PairTable]) -> None:
        if not tables:
            raise DataError("a mixture needs at least one table")
        for table in tables[1:]:
            if table.rewards != tables[0].rewards:
                raise DataError(
                    f"{table.path}: its scores ({', '.join(table.rewards) or 'none'}) differ from those of {tables[0].path}"
                    f" ({', '.join(tables[0].rewards) or 'none'})"
                )
        self.tables = tuple(tables)
        self.starts = tuple(np.cumsum([0, *(len(table) for table in tables[:-1])]).tolist())
        first = tables[0]
        parts = tuple(part for table in tables for part in table.storage.parts)
        identity = canonical_hash([table.fingerprint for table in tables])
        super().__init__(Storage(path=first.path, folder=first.folder, parts=parts, fingerprint=identity))

    def image(self, value: Any, row: int, column: str) -> ImageRef:
        number = bisect_right(self.starts, row) - 1
        return self.tables[number].image(value, row - self.starts[number], column)


def open_mixture(paths: Sequence[str | Path], *, progress: bool = True) -> JoinedTable:
    """Open several tables as one.

    Raises:
        DataError: as `open_table`, and tables that do not go together.
    """
    return JoinedTable([open_table(path, progress=progress) for path in paths])


def usable_of_each(
    joined: JoinedTable, *, check: str, policy: CheckPolicy, workers: int | None = None, progress: bool = True
) -> tuple[list[np.ndarray], list[CheckResult], MediaIndex | None]:
    """Usable rows of every table in the joined numbering, the results they come from, and the facts of all rows.

    The facts are None where nothing was checked.

    Raises:
        DataError: as `usable_rows`, for the first table that fails.
    """
    results = [
        usable_rows(table, check=check, policy=policy, workers=workers, progress=progress) for table in joined.tables
    ]
    rows = [result.rows + start for result, start in zip(results, joined.starts, strict=True)]
    facts = [result.media for result in results]
    known = [media for media in facts if media is not None]
    if len(known) < len(facts):
        return rows, results, None
    hashes = np.concatenate([media.hashes for media in known])
    joined_facts = MediaIndex(hashes, np.concatenate([media.sizes for media in known]))
    return rows, results, joined_facts


def mixture_order(
    joined: JoinedTable, rows: Sequence[np.ndarray], weights: Sequence[float], *, seed: int, global_batch: int,
    policy: str = "repeat", shuffle: Shuffle = True,
) -> MixtureOrder:  # fmt: skip
    """The order of a mixture's rows; give it to the loader."""
    return MixtureOrder(
        table_fingerprint=joined.fingerprint, parts=rows, weights=weights, seed=seed, global_batch=global_batch,
        policy=policy, shuffle=shuffle, )  # fmt: skip
