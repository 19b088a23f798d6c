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
from mmalign.data.remote import RECORD, address, is_remote, mirror, mirror_folder, names_at, publish, remove, text_at
from mmalign.errors import DataError

JOB: Final = "job.json"
DONE: Final = "job.done.json"
MAX_CHANGES: Final = 5
"""So many differences between two jobs are told one by one."""


class PartFolder:
    """Parts on their way to a table.

    Args:
        out: the table's folder, or its address in a store; nothing must be there, or an empty folder.
        job: everything the rows depend on, as plain JSON values. Parts of another job are never mixed in.
        parts: how many there will be.
        shared: several processes make the parts, so that this one may come when the others are done; `done` then says so.

    Raises:
        DataError: `out` is taken, parts of another job lie beside it (says what differs), or the folder cannot be written.
    """

    def __init__(self, out: str | Path, job: Mapping[str, Any], parts: int, *, shared: bool = False) -> None:
        self.parts = parts
        self.store = address(out).rstrip("/") if is_remote(out) else None
        """Where the table goes, when that is an address; parts then meet in a folder beside it there."""
        self.out = Path(out) if self.store is None else mirror_folder(self.store)
        self._meeting = "" if self.store is None else "/".join((self.store.rpartition("/")[0], f".{self.out.name}.building"))
        fingerprint = canonical_hash({"job": dict(job), "parts": parts})
        finished = self._finished(fingerprint)
        self.done = shared and finished
        """Whether others have finished the table."""
        self.building = self.out.with_name(f".{self.out.name}.building") if self.store is None else mirror_folder(self._meeting)
        if self.done:
            return
        before = self._before()
        if self._taken(before is not None and not finished):
            raise DataError(f"{self.place}: already exists; remove it or choose another name")
        if before is not None:
            if before.get("fingerprint") != fingerprint:
                raise DataError(_other_job(self._meeting or str(self.building), before, job, parts))
            return
        if self.store is not None:  # what is left here of a job that is no longer there
            shutil.rmtree(self.building, ignore_errors=True)
        write_json(self.building / JOB, {"fingerprint": fingerprint, "job": dict(job), "parts": parts})
        self._send()

    @property
    def place(self) -> str:
        """Where the table will be, for people."""
        return self.store or str(self.out)

    @property
    def table(self) -> Path | str:
        """The finished table: its folder, or its address."""
        return self.store or self.out

    def _before(self) -> dict[str, Any] | None:
        """The job that parts which are there belong to."""
        if self.store is not None:
            place, text = f"{self._meeting}/{JOB}", text_at(f"{self._meeting}/{JOB}")
        else:
            note = self.building / JOB
            place, text = str(note), note.read_text(encoding="utf-8", errors="replace") if note.exists() else None
        try:
            return None if text is None else dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{place}: does not say what the parts beside it were made of ({error}); remove the folder to begin anew"
            ) from error

    def _taken(self, mine: bool) -> bool:
        """Whether something else is where the table goes; a table of this job that was sent in part is not."""
        if self.store is not None:
            return not mine and bool(names_at(self.store))
        return self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir()))

    def _finished(self, fingerprint: str) -> bool:
        try:
            text = text_at(f"{self.store}/{DONE}") if self.store else (self.out / DONE).read_text(encoding="utf-8")
            return text is not None and bool(json.loads(text)["fingerprint"] == fingerprint)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _send(self) -> None:
        if self.store is not None:
            publish(self.building, self._meeting)

    def fetch(self) -> None:
        """Bring all parts to `building`, where they are in a store."""
        if self.store is not None:
            mirror(self._meeting)

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Held by one process at a time; True for the one that finds every part made and nobody before it."""
        from filelock import FileLock

        lock = self.out.with_name(f".{self.out.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
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
        if self.store is not None:
            there = names_at(self._meeting)
            return [number for number in range(index, self.parts, count) if self.file(number).name not in there]
        return [number for number in range(index, self.parts, count) if not self.file(number).exists()]

    def write(
        self, number: int, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, notes: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """One part, with notes about its rows (failures, say). The part is written last: what it says is then complete."""
        write_text(self._notes(number), "".join(json.dumps(dict(note), ensure_ascii=False) + "\n" for note in notes))
        with atomic_file(self.file(number)) as handle:
            pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), handle, row_group_size=128)
        self._send()

    def notes(self) -> list[dict[str, Any]]:
        """The notes of all parts, in order."""
        self.fetch()
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

    def finish(self, extra: Mapping[str, str]) -> Path | str:
        """Give the folder its name, or send it to its address; returns either. `extra`: further text files by relative name.

        Raises:
            DataError: parts are missing, or the folder cannot be renamed.
        """
        if self.missing():
            raise DataError(f"{self.building}: {len(self.missing())} of {self.parts} parts are missing")
        self.fetch()
        for name, text in extra.items():
            write_text(self.building / name, text)
        for number in range(self.parts):
            self._notes(number).unlink(missing_ok=True)
        try:
            (self.building / JOB).replace(self.building / DONE)
            self.clear()
            self.building.rename(self.out)
        except OSError as error:
            raise DataError(f"{self.out}: cannot be written: {error}") from error
        return self.deliver()

    def clear(self) -> None:
        """Make room for the table: an empty folder is removed, and for an address whatever this machine has kept of it."""
        if self.store is not None:
            shutil.rmtree(self.out, ignore_errors=True)
            (self.building / RECORD).unlink(missing_ok=True)  # what was fetched as parts is to be sent as a table
            self.out.parent.mkdir(parents=True, exist_ok=True)
        elif self.out.exists():
            self.out.rmdir()

    def deliver(self) -> Path | str:
        """Send the named folder to its address, where there is one, and remove the parts there; returns where the table is."""
        if self.store is None:
            return self.out
        done = self.out / DONE
        held = done.with_name(f".{DONE}")
        if done.exists():
            done.replace(held)  # hidden files stay: what says that the table is whole is sent last
        publish(self.out, self.store)
        if held.exists():
            held.replace(done)
            publish(self.out, self.store)
        remove(self._meeting, "")
        return self.store

    def discard(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.building, ignore_errors=True)
        if self.store is not None:
            remove(self._meeting, "")

    def _notes(self, number: int) -> Path:
        return self.building / f"part-{number:05d}.notes.jsonl"


def _other_job(place: str, before: Mapping[str, Any], job: Mapping[str, Any], parts: int) -> str:
    """Why parts that are there are not gone on with: what differs, and what to do."""
    found = list(_changes(before.get("job"), json.loads(json.dumps(dict(job))), ""))
    if before.get("parts") != parts:
        found.append(f"there were {before.get('parts')} parts and are {parts}")
    words = "; ".join(found[:MAX_CHANGES]) + (f"; and {len(found) - MAX_CHANGES} more" if len(found) > MAX_CHANGES else "")
    return (
        f"{place}: holds parts of other settings or another input ({JOB} there): "
        f"{words or 'another version named its settings'}. Finish them as they were begun, with the mmalign that began them "
        f"where it did not know a setting, or remove the folder to begin anew"
    )


def _changes(old: Any, new: Any, name: str) -> Iterator[str]:
    """What differs between two plain values, a phrase each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            inner = f"{name}.{key}" if name else str(key)
            if key not in old:
                yield f"{inner} was not known and is {_brief(new[key])}"
            elif key not in new:
                yield f"{inner} was {_brief(old[key])} and is not known any more"
            else:
                yield from _changes(old[key], new[key], inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _changes(left, right, f"{name}[{number}]")
    elif isinstance(old, list) and isinstance(new, list):
        yield f"{name} had {len(old)} entries and has {len(new)}"
    elif old != new:
        yield f"{name} was {_brief(old)} and is {_brief(new)}"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
