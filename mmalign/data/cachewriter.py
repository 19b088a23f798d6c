"""From batches of encoded entries to shards of a cache, by size or by age. Not for deciding what is encoded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmalign.data.shards import write_shard
from mmalign.errors import DataError


@dataclass(kw_only=True)
class ShardWriter:
    """Collects encoded entries and writes a shard when there is enough."""

    folder: Path
    shard_bytes: int
    shard_seconds: float
    known: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """Name -> dtype and shape of one entry; empty until the first entry."""
    stored: int = 0
    refused: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    pieces: list[dict[str, Tensor]] = field(default_factory=list)
    size: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Keep the finite rows of one batch; the others are refused."""
        plain = {name: value.detach().to("cpu") for name, value in tensors.items()}
        self._check(keys, plain)
        finite = torch.ones(len(keys), dtype=torch.bool)
        for value in plain.values():
            if value.is_floating_point():
                finite &= torch.isfinite(value).reshape(len(keys), -1).all(dim=1)
        self.refused.extend(key for key, good in zip(keys, finite.tolist(), strict=True) if not good)
        kept = [key for key, good in zip(keys, finite.tolist(), strict=True) if good]
        if kept:
            self.keys.extend(kept)
            self.pieces.append({name: value[finite] for name, value in plain.items()})
            self.size += sum(value.nbytes for value in self.pieces[-1].values())
        if self.size >= self.shard_bytes or time.monotonic() - self.started >= self.shard_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        if self.keys:
            joined = {name: torch.cat([piece[name] for piece in self.pieces]) for name in self.pieces[0]}
            write_shard(self.folder, self.keys, joined)
            self.stored += len(self.keys)
        self.keys, self.pieces, self.size = [], [], 0
        self.started = time.monotonic()

    def _check(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        found = {name: (value.dtype, tuple(value.shape[1:])) for name, value in tensors.items()}
        short = [name for name, value in tensors.items() if len(value) != len(keys)]
        if not found or short:
            raise DataError(
                f"the encoder answered with {short or 'no tensors'}: expected one row for each of its inputs"
            )
        if self.known and self.known != found:
            raise DataError(
                f"{self.folder}: entries of a cache must be alike: it holds {self.known}, this gave {found}"
            )
        self.known = found
