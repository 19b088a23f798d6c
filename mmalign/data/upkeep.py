"""Caches looked after: what there is, whether it is sound, and what may go. Nothing is removed that was not listed first."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mmalign.data.cache import MANIFEST
from mmalign.data.files import file_hash
from mmalign.data.progress import progress_bar
from mmalign.data.shards import Shard
from mmalign.errors import DataError

UNUSABLE: Final = ".unusable-"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """One cache folder."""

    folder: Path
    kind: str
    fields: dict[str, Any]
    """What its numbers depend on; empty where the manifest cannot be read."""
    entries: int
    size: int
    """Bytes of all its files."""
    used: float
    """When a file of it was last changed, seconds since the epoch."""
    problems: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """One line for people."""
        age = max(0.0, time.time() - self.used) / 86400
        size = f"{self.entries:>10,} entries  {self.size / 1e6:>10,.1f} MB"
        words = f"{self.kind:<8} {self.folder.name[:16]}  {size}  {age:,.0f} days"
        return words + "".join(f"\n    {problem}" for problem in self.problems)


def cache_root(path: str | Path) -> Path:
    """The folder of all caches: the one given, or `cache` inside a table's folder.

    Raises:
        DataError: there is none.
    """
    path = Path(path)
    for root in (path / "cache", path):
        if root.is_dir() and (any(root.glob(f"*/*/{MANIFEST}")) or any(root.glob(f"*/*{UNUSABLE}*"))):
            return root
    raise DataError(f"{path}: no caches there, nor in its folder 'cache'; 'mmalign data cache' fills them")


def list_caches(root: Path) -> Iterator[CacheInfo]:
    """Every cache below a root, with what is wrong with it at a glance."""
    for folder in sorted(path for path in root.glob("*/*") if path.is_dir()):
        problems = []
        fields: dict[str, Any] = {}
        try:
            fields = dict(json.loads((folder / MANIFEST).read_text())["fields"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"its manifest cannot be read: {error}")
        if UNUSABLE in folder.name:
            problems = ["set aside, not used"]
        entries = 0
        for path in sorted(folder.glob("shard-*.safetensors")):
            try:
                entries += len(Shard(path))
            except DataError as error:
                problems.append(str(error))
        # Lock files come and go with the writers that hold them.
        files = [path for path in folder.rglob("*") if path.suffix != ".lock" and path.is_file()]
        problems += [f"{path.name}: left by a writer that was killed" for path in files if path.suffix == ".tmp"]
        stats = [path.stat() for path in files]
        yield CacheInfo(
            folder=folder, kind=folder.parent.name, fields=fields, entries=entries, problems=problems,
            size=sum(stat.st_size for stat in stats), used=max((stat.st_mtime for stat in stats), default=0.0),
        )  # fmt: skip


def verify(root: Path, *, progress: bool = True) -> list[str]:
    """Compare every shard with the checksum in its name; returns what is wrong, a line each. Nothing is changed."""
    shards = sorted(root.glob("*/*/shard-*.safetensors"))
    wrong = [f"{info.folder}: {problem}" for info in list_caches(root) for problem in info.problems]
    with progress_bar("Comparing checksums", sum(path.stat().st_size for path in shards), enabled=progress) as advance:
        for path in shards:
            if file_hash(path, advance) != path.stem.removeprefix("shard-"):
                wrong.append(f"{path}: its content does not match its checksum; its entries will be computed again")
    return wrong


def to_prune(root: Path, *, kind: str | None = None, older_than_days: float | None = None) -> list[CacheInfo]:
    """The caches that a pruning would remove: set aside ones, and with a kind or an age, those of it."""
    chosen = []
    for info in list_caches(root):
        aside = UNUSABLE in info.folder.name
        if kind is not None and info.kind != kind:
            continue
        old = older_than_days is not None and time.time() - info.used > older_than_days * 86400
        if aside or old or (kind is not None and older_than_days is None):
            chosen.append(info)
    return chosen


def prune(chosen: list[CacheInfo]) -> int:
    """Remove caches; returns the bytes that became free.

    Raises:
        DataError: a folder cannot be removed.
    """
    for info in chosen:
        try:
            shutil.rmtree(info.folder)
        except OSError as error:
            raise DataError(f"{info.folder}: cannot be removed: {error}") from error
    return sum(info.size for info in chosen)
