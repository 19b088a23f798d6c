"""Parts of a check of lists or answers: what looking at some consecutive rows showed, as plain JSON.

As `checkparts` does for pairs: a part is a file that is whole or absent, in a folder named after the table's content and the
limits, so a check that was killed goes on where it was, and processes that share the folder divide the work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.data import checkparts
from mmalign.data.checkfiles import check_folder
from mmalign.data.files import canonical_hash, write_json
from mmalign.data.progress import progress_bar
from mmalign.data.tables import Table
from mmalign.errors import DataError

Look = Callable[[int, int], dict[str, Any]]
"""From (first row, row behind the last) to what they showed."""


class PartsMissing(Exception):
    """A check that other processes have not finished their share of."""

    def __init__(self, missing: int, total: int) -> None:
        self.missing, self.total = missing, total
        super().__init__(f"{missing} of {total} parts are left to other shards")


class LookParts:
    """The parts of one check.

    Args:
        identity: what the parts belong to, as the finished check names it.
    """

    def __init__(self, table: Table, identity: Mapping[str, Any]) -> None:
        self.folder = check_folder(table.path) / f"parts-{canonical_hash(dict(identity))[:16]}"
        self.ranges = checkparts.ranges(len(table))
        self.table = table

    def file(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.json"

    def missing(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Numbers of parts that are not there yet; of shard (i, n) those with number mod n equal to i."""
        return [number for number in range(shard[0], len(self.ranges), shard[1]) if not self.file(number).exists()]

    def make(self, number: int, look: Look) -> int:
        """Look at the rows of one part and store it; returns their number."""
        first, stop = self.ranges[number]
        write_json(self.file(number), look(first, stop))
        return stop - first

    def all(self, look: Look, shard: tuple[int, int], *, progress: bool) -> Iterator[dict[str, Any]]:
        """All parts in the order of rows, once those of this shard that are missing were made.

        Raises:
            PartsMissing: others' parts are not there.
            DataError: a part cannot be read.
        """
        mine = self.missing(shard)
        rows = sum(stop - first for first, stop in (self.ranges[number] for number in mine))
        with progress_bar(f"Checking {self.table.path.name}", rows, enabled=progress) as advance:
            for number in mine:
                advance(self.make(number, look))
        if missing := self.missing():
            raise PartsMissing(len(missing), len(self.ranges))
        for number in range(len(self.ranges)):
            try:
                yield json.loads(self.file(number).read_text())
            except (OSError, ValueError) as error:
                raise DataError(f"{self.file(number)}: not readable: {error}; remove it and check again") from error

    def discard(self) -> None:
        """Remove the parts; the finished check holds what they said."""
        shutil.rmtree(self.folder, ignore_errors=True)
