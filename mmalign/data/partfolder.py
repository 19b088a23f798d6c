"""A table made part by part, over interruptions and by several processes; it appears under its name when all is done.

Work is cut into numbered parts. A part is a file that is whole or absent, so what an interrupted run finished is not done
again, and processes that share the folder need no other agreement than who makes which numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.data.files import atomic_file, canonical_hash, write_json, write_text
from mmalign.errors import DataError

DONE: Final = "job.done.json"


class PartFolder:
    """Parts on their way to a table.

    Args:
        out: the table's folder; it must not exist, or be empty.
        job: everything the rows depend on, as plain JSON values. Parts of another job are never mixed in.
        parts: how many there will be.
        shared: several processes make the parts, so that this one may come when the others are done; `done` then says so.

    Raises:
        DataError: `out` is taken, parts of another job lie beside it, or the folder cannot be written.
    """

    def __init__(self, out: str | Path, job: Mapping[str, Any], parts: int, *, shared: bool = False) -> None:
        self.out, self.parts = Path(out), parts
        fingerprint = canonical_hash({"job": dict(job), "parts": parts})
        self.done = shared and self._finished(fingerprint)
        """Whether others have finished the table."""
        self.building = self.out.with_name(f".{self.out.name}.building")
        if self.done:
            return
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise DataError(f"{self.out}: already exists; remove it or choose another name")
        note = self.building / "job.json"
        if note.exists():
            before = json.loads(note.read_text(encoding="utf-8"))
            if before.get("fingerprint") != fingerprint:
                raise DataError(
                    f"{self.building}: holds parts of other settings or another input; finish those, or remove the folder"
                )
        else:
            write_json(note, {"fingerprint": fingerprint, "job": dict(job), "parts": parts})

    def _finished(self, fingerprint: str) -> bool:
        try:
            return bool(json.loads((self.out / DONE).read_text(encoding="utf-8"))["fingerprint"] == fingerprint)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Held by one process at a time; True for the one that finds every part made and nobody before it."""
        from filelock import FileLock

        lock = self.out.with_name(f".{self.out.name}.lock")
        try:
            with FileLock(lock):
                # Whoever finished has renamed the folder, so that there all parts are missing again.
                yield not self.done and not self.missing()
        finally:
            lock.unlink(missing_ok=True)

    def file(self, number: int) -> Path:
        return self.building / f"part-{number:05d}.parquet"

    def missing(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Numbers of parts that are not there yet; of shard (i, n) those with number mod n equal to i."""
        index, count = shard
        if self.done:
            return []
        return [number for number in range(index, self.parts, count) if not self.file(number).exists()]

    def write(
        self, number: int, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, notes: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """One part, with notes about its rows (failures, say). The part is written last: what it says is then complete."""
        write_text(self._notes(number), "".join(json.dumps(dict(note), ensure_ascii=False) + "\n" for note in notes))
        with atomic_file(self.file(number)) as handle:
            pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), handle, row_group_size=128)

    def notes(self) -> list[dict[str, Any]]:
        """The notes of all parts, in order."""
        found = []
        for number in range(self.parts):
            path = self._notes(number)
            if path.exists():
                found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return found

    def rows(self, number: int, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """What a finished part holds, or some of its columns."""
        rows: list[dict[str, Any]] = pq.read_table(self.file(number), columns=columns).to_pylist()
        return rows

    def finish(self, extra: Mapping[str, str]) -> Path:
        """Give the folder its name. `extra`: further text files by relative name.

        Raises:
            DataError: parts are missing, or the folder cannot be renamed.
        """
        if self.missing():
            raise DataError(f"{self.building}: {len(self.missing())} of {self.parts} parts are missing")
        for name, text in extra.items():
            write_text(self.building / name, text)
        for number in range(self.parts):
            self._notes(number).unlink(missing_ok=True)
        try:
            (self.building / "job.json").replace(self.building / DONE)
            if self.out.exists():
                self.out.rmdir()
            self.building.rename(self.out)
        except OSError as error:
            raise DataError(f"{self.out}: cannot be written: {error}") from error
        return self.out

    def discard(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.building, ignore_errors=True)

    def _notes(self, number: int) -> Path:
        return self.building / f"part-{number:05d}.notes.jsonl"
