"""The order of rows as a pure function of (table, usable rows, seed, position): nothing to save, nothing to replay.

Epochs are permutations laid end to end, and global batches are cut from that endless line. So batches are always full,
the rest of an epoch begins the batch that continues with the next one, no row is starved, and within its epoch no row
comes twice. (A batch across the seam may hold a row twice: once for each of the two epochs.)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from mmalign import rng
from mmalign.errors import DataError

Shuffle = bool | Literal["block"]
BLOCK: Final = 1024
"""Neighbouring rows that stay near each other in a shuffle by blocks."""
WINDOW: Final = 16
"""Blocks whose rows are mixed with each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One place in the order: which row of the table, in which epoch."""

    row: int
    epoch: int


class Order:
    """Which rows make up the global batch of any optimiser step, found in constant time.

    Args:
        table_fingerprint: identity of the table's content.
        rows: usable row indices of the table, [n] int64, all different.
        seed: of the run.
        global_batch: rows per optimiser step, over all ranks and micro-batches.
        shuffle: False keeps the rows' order in every epoch; ``block`` permutes blocks of `BLOCK` neighbouring rows and mixes the
            rows of every `WINDOW` blocks that follow each other: for a while only that many places of a table are read, which is
            for storage that is slow where one jumps.

    Raises:
        DataError: no rows, fewer than one global batch, or an unknown way to shuffle.
    """

    def __init__(
        self, *, table_fingerprint: str, rows: np.ndarray, seed: int, global_batch: int, shuffle: Shuffle = True
    ) -> None:
        if global_batch < 1:
            raise DataError(f"the global batch must hold at least one row, got {global_batch}")
        if len(rows) == 0:
            raise DataError("no usable rows: nothing to train on")
        if len(rows) < global_batch:
            raise DataError(
                f"{len(rows)} usable rows do not fill one global batch of {global_batch}"
                " (batch size x accumulation x processes); make the batch smaller or the table larger"
            )
        if shuffle not in (True, False, "block"):
            raise DataError(f"shuffle must be true, false or 'block', got {shuffle!r}")
        self.rows = np.asarray(rows, dtype=np.int64)
        self.length = len(self.rows)
        """Rows of an epoch."""
        self.seed = seed
        self.global_batch = global_batch
        self.shuffle = shuffle
        identity = hashlib.sha256(f"{table_fingerprint}\x1f{shuffle}\x1f{seed}\x1f{global_batch}\x1f".encode())
        identity.update(self.rows.tobytes())
        self.fingerprint = identity.hexdigest()
        """Equal fingerprints give equal batches; a checkpoint that holds another one cannot be continued exactly."""
        self._table = table_fingerprint
        self._recent: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> list[Slot]:
        """The rows of one optimiser step, in order: rank and micro-batch slices are cut from this list."""
        return self._slots(step * self.global_batch, self.global_batch)

    def micro_batch(self, step: int, micro: int, *, batch_size: int, world_size: int, rank: int) -> list[Slot]:
        """One process's share of one micro-batch.

        Micro-batch m of all ranks together is a contiguous piece, so two processes and two accumulated micro-batches of
        one process cover the same rows in the same order.
        """
        within = (micro * world_size + rank) * batch_size
        return self._slots(step * self.global_batch + within, batch_size)

    def _slots(self, first: int, count: int) -> list[Slot]:
        slots = []
        for position in range(first, first + count):
            epoch, offset = divmod(position, len(self.rows))
            slots.append(Slot(row=int(self._epoch_rows(epoch)[offset]), epoch=epoch))
        return slots

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return self.rows
        if epoch not in self._recent:
            kept = {key: value for key, value in self._recent.items() if abs(key - epoch) <= 1}
            self._recent = {**kept, epoch: self.rows[self._places(epoch, len(self.rows))]}
        return self._recent[epoch]

    def _places(self, epoch: int, count: int) -> np.ndarray:
        """The order of `count` things in an epoch, [count] int64."""
        if not self.shuffle:
            return np.arange(count)
        # Sorting raw generator output is stable across NumPy versions; Generator.permutation promises nothing.
        stream = rng.numpy_stream(self.seed, "data-order", epoch, self._table)
        draws = stream.bit_generator.random_raw(count)
        if self.shuffle != "block":
            return np.argsort(draws, kind="stable")
        blocks = np.arange(count) // BLOCK
        turns = np.argsort(stream.bit_generator.random_raw(blocks[-1] + 1), kind="stable")
        turn = np.empty_like(turns)
        turn[turns] = np.arange(len(turns))
        return np.lexsort((draws, turn[blocks] // WINDOW))
