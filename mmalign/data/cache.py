"""Content-addressed caches of what frozen encoders say: latents of pictures, embeddings of prompts.

A cache is a folder ``<root>/<kind>/<fingerprint>/``: the fingerprint is the hash of everything the numbers depend on,
so any difference is another folder. It holds a manifest and shards; a shard is complete or absent, and verifies itself.
The encoder is a function handed in: nothing here knows a model.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmalign.data.cachewriter import ShardWriter
from mmalign.data.files import canonical_hash, file_hash, remove_abandoned, write_json
from mmalign.data.progress import progress_bar
from mmalign.data.shards import DIGEST_BYTES, Layout, Shard, key_digest, kinds_of, write_shard
from mmalign.errors import DataError

CACHE_VERSION: Final = 2
MANIFEST: Final = "manifest.json"
VERIFIED: Final = "verified.json"
Input = TypeVar("Input")


class CacheWarning(UserWarning):
    """A cache file that cannot be trusted was left out; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FillReport:
    """What a fill did."""

    stored: int
    refused: tuple[str, ...]
    """Keys whose encoding held NaN or infinity; they are not in the cache."""


class Cache:
    """One open cache. Use `open_or_create`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: list[Shard] = []
        self._looked = 0
        self._marks = _read_marks(folder / VERIFIED)
        self._keys = np.zeros(0, dtype=f"V{DIGEST_BYTES}")
        self._place = np.zeros((0, 2), dtype=np.int32)
        self.refresh()

    @classmethod
    def open_or_create(cls, root: str | Path, kind: str, fields: Mapping[str, Any]) -> Cache:
        """The cache of one kind for exactly these fields.

        Args:
            root: folder of all caches.
            kind: for example ``vae`` or ``text``.
            fields: everything the stored numbers depend on, as plain JSON values.

        Raises:
            DataError: the folder cannot be written, or the fields are not JSON.
        """
        content = {"version": CACHE_VERSION, "kind": kind, "fields": dict(fields)}
        try:
            fingerprint = canonical_hash(content)
        except (TypeError, ValueError) as error:
            raise DataError(f"the fields of the cache '{kind}' are not plain JSON values: {error}") from error
        folder = Path(root) / kind / fingerprint
        manifest = folder / MANIFEST
        problem = _manifest_problem(manifest, content)
        if problem is not None:
            aside = folder.with_name(f"{fingerprint}.unusable-{time.time_ns()}")
            _rename(folder, aside)
            warnings.warn(f"{manifest}: {problem}; this cache is not used and was set aside as {aside.name}",
                          CacheWarning, stacklevel=2)  # fmt: skip
        if not manifest.exists():
            write_json(manifest, content)
        return cls(folder)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """Tensors of one entry by name; empty while the cache is."""
        return self._shards[0].layouts if self._shards else {}

    @property
    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of one entry, -1 for axes that differ; empty while the cache is."""
        return self._shards[0].kinds if self._shards else {}

    def refresh(self, *, changed: bool = False) -> None:
        """See what other processes have added since. Shards that fail verification are left out with a warning.

        Args:
            changed: look only where files came or went since the last look.
        """
        mark = self.folder.stat().st_mtime_ns
        if changed and mark == self._looked:
            return
        self._looked = mark
        before = dict(self._marks)
        paths = sorted(self.folder.glob("shard-*.safetensors"))
        shards: list[Shard] = []
        for path in paths:
            shard = self._open(path, like=shards[0] if shards else None)
            if shard is not None:
                shards.append(shard)
        self._shards = shards
        if self._marks != before:
            write_json(self.folder / VERIFIED, self._marks)
        digests = [shard.digests for shard in self._shards]
        flat = np.concatenate(digests) if digests else np.zeros((0, DIGEST_BYTES), dtype=np.uint8)
        keys = np.ascontiguousarray(flat).view(f"V{DIGEST_BYTES}").reshape(-1)
        lengths = np.array([len(shard) for shard in self._shards], dtype=np.int64)
        shard_of = np.repeat(np.arange(len(lengths)), lengths)
        row_of = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        place = np.stack([shard_of, row_of], axis=1).astype(np.int32)
        # Two processes may have stored the same key; either copy will do, so the first is taken.
        self._keys, first = np.unique(keys, return_index=True)
        self._place = place[first]

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The distinct keys that are not stored, in their order."""
        absent: dict[str, None] = {}
        for some in _batched(iter(keys), 65_536):
            absent.update((key, None) for key, number in zip(some, self._find(some), strict=True) if number < 0)
        return list(absent)

    def note_complete(self, demand: str) -> None:
        """Write down that everything a run demands is stored, so that the next start need not look for each entry.

        Args:
            demand: hash of what is demanded.
        """
        write_json(self.folder / f"complete-{demand[:32]}.json", {"demand": demand, "shards": self._names()})

    def is_complete(self, demand: str) -> bool:
        """Whether `note_complete` was called for this demand, and all the shards it saw are here and verified."""
        try:
            noted = json.loads((self.folder / f"complete-{demand[:32]}.json").read_text())
            return bool(noted["demand"] == demand and set(noted["shards"]) <= set(self._names()))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _names(self) -> list[str]:
        return [shard.path.name for shard in self._shards]

    def holds(self, digests: np.ndarray) -> np.ndarray:
        """Which digests ([n, 16] uint8) are stored. [n] bool"""
        return np.asarray(self._places(digests) >= 0)

    def gather(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Stored tensors of some keys, stacked: [len(keys), ...] each, in the stored dtype, on the CPU.

        Raises:
            DataError: a key is not stored.
        """
        return self._gather(digests_of(keys), lambda number: repr(keys[number]))

    def entry(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of one key, each in the shape it was stored with; None when it is not stored."""
        number = int(self._find([key])[0])
        if number < 0:
            return None
        shard, row = self._place[number].tolist()
        return self._shards[shard].entry(row)

    def store(self, keys: Sequence[str], tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        """Add entries as one shard, at once. Several processes may: what two of them store is found once.

        Args:
            tensors: [n, ...] each, or n tensors where entries differ in size (`entry` reads those); on the CPU.

        Raises:
            DataError: entries unlike those that are there, or the disk is full.
        """
        if not keys:
            return
        kinds = kinds_of(tensors)
        if self.kinds and self.kinds != kinds:
            raise DataError(
                f"{self.folder}: entries of a cache must be alike: it holds {self.kinds}, this gave {kinds}"
            )
        write_shard(self.folder, keys, tensors)
        self.refresh()

    def gather_digests(self, digests: np.ndarray) -> dict[str, Tensor]:
        """As `gather`, for keys as digests, [n, 16] uint8."""
        return self._gather(digests, lambda number: digests[number].tobytes().hex())

    def _gather(self, digests: np.ndarray, name: Callable[[int], str]) -> dict[str, Tensor]:
        numbers = self._places(digests)
        if (numbers < 0).any():
            first = name(int(np.flatnonzero(numbers < 0)[0]))
            raise DataError(
                f"{self.folder}: {int((numbers < 0).sum())} of {len(digests)} entries are not in the cache, first {first};"
                " fill it with 'mmalign data cache'"
            )
        return self._rows(numbers)

    def _rows(self, numbers: np.ndarray) -> dict[str, Tensor]:
        place = self._place[numbers]
        result = {}
        for name, layout in self.layouts.items():
            if layout.shapes is not None:
                raise DataError(f"{self.folder}: entries of '{name}' differ in size; they are read one by one (entry)")
            out = np.empty((len(numbers), layout.row_bytes), dtype=np.uint8)
            for shard in np.unique(place[:, 0]):
                here = np.flatnonzero(place[:, 0] == shard)
                self._shards[shard].rows(name, place[here, 1], out, here)
            result[name] = torch.from_numpy(out.reshape(-1)).view(layout.dtype).reshape(len(numbers), *layout.shape)
        return result

    def fill(
        self,
        items: Iterable[tuple[str, Input]],
        encode: Callable[[list[Input]], Mapping[str, Tensor]],
        *,
        batch_size: int,
        progress: bool = False,
        total: int | None = None,
        shard: tuple[int, int] = (0, 1),
        shard_bytes: int = 256 << 20,
        shard_seconds: float = 120.0,
    ) -> FillReport:
        """Encode and store the items that are not stored yet.

        Every call of `encode` gets exactly `batch_size` inputs (the last batch repeats its last input, and the answers
        to the repeats are thrown away): results must not depend on where a fill was interrupted. A shard is written
        when it is large or old enough, so that a killed fill loses little. Only one process fills a share of the work at a time;
        others wait, and then find it done.

        Args:
            shard: (i, n): these items are the i-th of n shares, which different processes fill at once, each behind its own lock.

        Raises:
            DataError: two entries differ in names, shapes or dtypes, or the disk is full.
        """
        from filelock import FileLock

        lock = "fill.lock" if shard[1] == 1 else f"fill-{shard[0]}-of-{shard[1]}.lock"
        with FileLock(self.folder / lock), progress_bar("Encoding", total, enabled=progress) as advance:
            remove_abandoned(self.folder)
            self.refresh()
            writer = ShardWriter(
                folder=self.folder, shard_bytes=shard_bytes, shard_seconds=shard_seconds, known=self.kinds
            )
            for batch in _batched(self._new(items, advance), batch_size):
                keys = [key for key, _ in batch]
                inputs = [value for _, value in batch]
                answers = encode(inputs + inputs[-1:] * (batch_size - len(inputs)))
                writer.add(keys, {name: value[: len(keys)] for name, value in answers.items()})
                advance(len(keys))
            writer.flush()
            self.refresh()
        return FillReport(stored=writer.stored, refused=tuple(writer.refused))

    def _new(self, items: Iterable[tuple[str, Input]], advance: Callable[[int], None]) -> Iterator[tuple[str, Input]]:
        seen: set[bytes] = set()
        for key, value in items:
            digest = key_digest(key)
            if digest in seen or self._find([key])[0] >= 0:
                advance(1)
                continue
            seen.add(digest)
            yield key, value

    def _find(self, keys: Sequence[str]) -> np.ndarray:
        """Positions in the index, -1 for what is not stored. [n] int64."""
        return self._places(digests_of(keys))

    def _places(self, digests: np.ndarray) -> np.ndarray:
        if not len(self._keys) or not len(digests):
            return np.full(len(digests), -1, dtype=np.int64)
        wanted = np.ascontiguousarray(digests).view(self._keys.dtype).reshape(-1)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, at, -1)

    def _open(self, path: Path, like: Shard | None) -> Shard | None:
        try:
            status = path.stat()
            mark = [status.st_size, status.st_mtime_ns]
            if self._marks.get(path.name) != mark:
                if file_hash(path) != path.stem.removeprefix("shard-"):
                    raise DataError(f"{path}: its content does not match its checksum")
                self._marks[path.name] = mark
            shard = Shard(path)
            if like is not None and not shard.is_like(like):
                raise DataError(f"{path}: its tensors differ from those of the other shards")
            return shard
        except (DataError, OSError) as error:
            self._marks.pop(path.name, None)
            warnings.warn(f"{error}; its entries will be computed again", CacheWarning, stacklevel=3)
            return None


def digests_of(keys: Sequence[str]) -> np.ndarray:
    """The digests that stand for some keys, [n, 16] uint8."""
    joined = b"".join(key_digest(key) for key in keys)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(keys), DIGEST_BYTES)


def _batched(items: Iterator[Input], size: int) -> Iterator[list[Input]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _read_marks(path: Path) -> dict[str, list[int]]:
    """Size and time of each shard when its checksum was last compared; a lost file only means comparing again."""
    try:
        marks = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return marks if isinstance(marks, dict) else {}


def _manifest_problem(manifest: Path, content: Mapping[str, Any]) -> str | None:
    try:
        found = json.loads(manifest.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    return None if found == content else "does not describe the settings its folder is named after"


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        raise DataError(f"{source}: cannot be set aside: {error}") from error
