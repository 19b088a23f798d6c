"""Writing files so that each is whole or absent, and hashing them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from mmalign.errors import DataError


class MappedFile:
    """A file mapped for reading, whose pages this process gives back now and then.

    What was read once stays in the system's cache, but no longer counts as this process's memory: a pass over a table of any size
    leaves no more than `KEEP_BYTES` mapped in.

    Raises:
        OSError, ValueError: it cannot be mapped, or is empty.
    """

    KEEP_BYTES = 32 << 20

    def __init__(self, path: Path) -> None:
        with path.open("rb") as handle:
            self.buffer = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self._touched = 0

    def touched(self, size: int) -> None:
        """Say that about so many bytes were read."""
        self._touched += size
        if self._touched >= self.KEEP_BYTES:
            self._touched = 0
            self.buffer.madvise(mmap.MADV_DONTNEED)


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write to a temporary file beside `path`, flush it to disk, then rename it into place.

    Raises:
        DataError: the folder cannot be written or the disk is full; nothing half-written stays behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are private to the user, and ours should have an ordinary new file's permissions.
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as handle:
            _hold(handle)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _hold(handle: IO[Any]) -> bool:
    """Lock an open file for as long as it is open; False where somebody else holds it or the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers had begun in a folder: temporary files of `atomic_file` that nobody holds any more.

    A writer holds its file before the first byte is in it, so a file that is empty or held may be somebody's and is left.
    """
    for path in folder.glob(".*.tmp"):
        try:
            with path.open("rb") as handle:
                if os.fstat(handle.fileno()).st_size and _hold(handle):
                    path.unlink(missing_ok=True)
        except OSError:  # finished or removed by another process a moment ago, or not ours to remove
            continue


def write_text(path: Path, text: str) -> None:
    """Atomically write UTF-8 text."""
    with atomic_file(path) as handle:
        handle.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Atomically write indented JSON. NaN is refused: no other reader would accept it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def canonical_hash(value: object) -> str:
    """SHA-256 of the canonical JSON of a value: key order and spacing do not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


HEAD_BYTES: Final = 64


def head_hash(data: bytes | None, path: str | Path | None) -> str:
    """SHA-256 of the first 64 bytes of a picture or clip, which tell what kind of file it is; '' where it cannot be read."""
    if data is None:
        try:
            with Path(path or "").open("rb") as handle:
                data = handle.read(HEAD_BYTES)
        except (OSError, ValueError):
            return ""
    return hashlib.sha256(data[:HEAD_BYTES]).hexdigest()


def file_hash(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, read in blocks; `advance` is told the number of bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(4 << 20):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()
