"""The file of votes: `pairs.jsonl` in the format of `mmalign data import`, with the pictures beside it in `media/`.

One line a vote, appended in one write and flushed to the disk before anybody is told that it counts, so a kill at any moment
loses no confirmed vote. A line that a crash of the machine cut short was never confirmed: it is moved to `torn.jsonl` when the
file is next opened. A vote sent twice (because the answer was lost) counts once. One process at a time writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmalign.arena.catalogue import suffix
from mmalign.data.files import atomic_file, write_text
from mmalign.errors import DataError

VOTES, MEDIA, UNDONE, TORN, LOCK = "pairs.jsonl", "media", "undone.jsonl", "torn.jsonl", ".arena.lock"
CHOICES = ("left", "right", "tie", "skip")


class VoteConflict(Exception):
    """The same vote came with another content."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What one user has done."""

    choices: int = 0
    """Votes for one of the two pictures."""
    ties: int = 0
    skips: int = 0

    def as_dict(self) -> dict[str, int]:
        return {"choices": self.choices, "ties": self.ties, "skips": self.skips}


class VotesFile:
    """Votes of all users. Use as a context manager; threads may call at once.

    Raises:
        DataError: another process has it, or a line in its middle is not a vote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / VOTES
        try:
            (folder / MEDIA).mkdir(parents=True, exist_ok=True)
            self._guard = FileLock(folder / LOCK)
            self._guard.acquire(blocking=False)
        except Timeout as error:
            raise DataError(f"{folder}: another arena writes its votes there; stop that one, or choose another --out") from error
        except OSError as error:
            raise DataError(f"{folder}: cannot be written: {error}") from error
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {}
        self._by_user: dict[str, list[str]] = {}
        self._descriptor = -1
        self.recovered = self._recover()
        """Bytes of an unconfirmed last line that were moved to `torn.jsonl`."""
        self._open()

    def __enter__(self) -> VotesFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._guard.release()

    def __len__(self) -> int:
        return len(self._rows)

    # ------------------------------------------------------------------ reading

    def of(self, user: str) -> list[dict[str, Any]]:
        """The user's rows, oldest first."""
        with self._lock:
            return [self._rows[name] for name in self._by_user.get(user, ())]

    def tally(self, user: str) -> Tally:
        counts = dict.fromkeys(CHOICES, 0)
        for row in self.of(user):
            choice = row["meta"].get("choice")
            counts[choice if choice in counts else "left"] += 1
        return Tally(choices=counts["left"] + counts["right"], ties=counts["tie"], skips=counts["skip"])

    # ------------------------------------------------------------------ writing

    def store(self, data: bytes) -> str:
        """Keep a picture; returns its path relative to the folder. Equal pictures are one file."""
        name = f"{MEDIA}/{hashlib.sha256(data).hexdigest()[:32]}.{suffix(data)}"
        target = self.folder / name
        if not target.is_file():
            with atomic_file(target) as handle:
                handle.write(data)
            _sync_folder(target.parent)
        return name

    def add(self, row: Mapping[str, Any]) -> bool:
        """Write a vote; it is on the disk when this returns. False: it was there already.

        Raises:
            VoteConflict: a vote with this id and another content is there.
        """
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        name = str(row["id"])
        with self._lock:
            known = self._rows.get(name)
            if known is not None:
                if any(known[field] != row[field] for field in ("user", "chosen", "rejected", "p_chosen", "weight")):
                    raise VoteConflict(name)
                return False
            size = os.fstat(self._descriptor).st_size
            try:
                written = os.write(self._descriptor, line)
                if written != len(line):
                    raise OSError(f"{written} of {len(line)} bytes were written")
                os.fsync(self._descriptor)
            except OSError as error:
                os.ftruncate(self._descriptor, size)  # half a line would spoil the file for every later one
                raise DataError(f"{self.path}: cannot be written: {error}") from error
            self._note(dict(row))
        return True

    def undo(self, user: str, name: str) -> dict[str, Any] | None:
        """Take back the user's latest vote if it is this one; it moves to `undone.jsonl`. None: it is not there.

        Raises:
            VoteConflict: it is not the user's latest.
        """
        with self._lock:
            row = self._rows.get(name)
            if row is None or row["user"] != user:
                return None
            if self._by_user[user][-1] != name:
                raise VoteConflict(name)
            with (self.folder / UNDONE).open("ab") as handle:
                handle.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                handle.flush()
                os.fsync(handle.fileno())
            kept = [other for other in self._rows.values() if other["id"] != name]
            write_text(self.path, "".join(json.dumps(other, ensure_ascii=False) + "\n" for other in kept))
            _sync_folder(self.folder)
            os.close(self._descriptor)
            self._open()
            del self._rows[name]
            self._by_user[user].pop()
        return row

    def _note(self, row: dict[str, Any]) -> None:
        self._rows[row["id"]] = row
        self._by_user.setdefault(row["user"], []).append(row["id"])

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o666)
            _sync_folder(self.folder)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error}") from error

    def _recover(self) -> int:
        """Read what is there; the unfinished last line of a crash is moved aside."""
        if not self.path.exists():
            return 0
        data = self.path.read_bytes()
        whole, _, rest = data.rpartition(b"\n")
        whole += b"\n" if whole else b""
        if rest:
            with (self.folder / TORN).open("ab") as handle:
                handle.write(rest + b"\n")
                handle.flush()
                os.fsync(handle.fileno())
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            if line.strip():
                self._note(_read(line, f"{self.path} line {number}"))
        return len(rest)


def _read(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        fine = isinstance(row["id"], str) and isinstance(row["user"], str) and isinstance(row["meta"], dict)
        fine = fine and {"chosen", "rejected", "p_chosen", "weight", "group"} <= set(row)
    except (ValueError, KeyError, TypeError):
        fine = False
    if not fine:
        raise DataError(f"{where}: not a vote of the arena; mend or move the file, or choose another --out")
    return dict(row)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
