"""An order in which no prompt has more than its share of an epoch."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow.compute as pc

from mmalign import rng
from mmalign.data.order import Order, Shuffle, Slot
from mmalign.data.tables import PairTable, prompts_of
from mmalign.errors import DataError


class CappedOrder(Order):
    """At most `cap` rows of one prompt in an epoch.

    A prompt with more rows goes on in the next epoch where it stopped, so all of its rows come equally often; a slot's epoch is
    then how often its row has come before. Like every order a pure function of (content, seed, position).

    Args:
        prompts: number of each row's prompt, [n] int64.
        cap: rows of a prompt in an epoch, at least 1.

    Raises:
        DataError: an epoch smaller than one global batch, or a cap with no meaning.
    """

    def __init__(
        self, *, table_fingerprint: str, rows: np.ndarray, prompts: np.ndarray, cap: int, seed: int, global_batch: int,
        shuffle: Shuffle = True,
    ) -> None:  # fmt: skip
        if cap < 1:
            raise DataError(f"an epoch must hold at least one row of every prompt, got a cap of {cap}")
        groups = hashlib.sha256(np.ascontiguousarray(prompts, dtype=np.int64).tobytes()).hexdigest()
        super().__init__(
            table_fingerprint=f"{table_fingerprint}\x1f{cap}\x1f{groups}", rows=rows, seed=seed, global_batch=global_batch,
            shuffle=shuffle,
        )  # fmt: skip
        self.cap = cap
        _, self._prompt = np.unique(prompts, return_inverse=True)
        self._sizes = np.bincount(self._prompt)
        self._first = np.cumsum(self._sizes) - self._sizes
        self.length = int(np.minimum(self._sizes, cap).sum())
        if self.length < global_batch:
            raise DataError(
                f"an epoch of at most {cap} rows of a prompt has {self.length} rows, fewer than a global batch of {global_batch};"
                f" raise the cap or make the batch smaller"
            )
        self._made: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _slots(self, first: int, count: int) -> list[Slot]:
        slots = []
        for position in range(first, first + count):
            epoch, offset = divmod(position, self.length)
            rows, passes = self._epoch(epoch)
            slots.append(Slot(row=int(rows[offset]), epoch=int(passes[offset])))
        return slots

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch in their order, and how often each has come before. [length] each"""
        if epoch not in self._made:
            quotas = np.minimum(self._sizes, self.cap)
            prompt = np.repeat(np.arange(len(quotas)), quotas)
            turn = np.arange(self.length) - np.repeat(np.cumsum(quotas) - quotas, quotas)
            passes, offsets = np.divmod(epoch * quotas[prompt] + turn, self._sizes[prompt])
            places = np.empty(self.length, dtype=np.int64)
            for number in np.unique(passes):
                here = passes == number
                places[here] = self._line(int(number))[self._first[prompt[here]] + offsets[here]]
            arranged = np.argsort(places, kind="stable")[self._places(epoch, self.length)]
            kept = {key: made for key, made in self._made.items() if abs(key - epoch) <= 1}
            self._made = {**kept, epoch: (self.rows[places[arranged]], passes[arranged])}
        return self._made[epoch]

    def _line(self, number: int) -> np.ndarray:
        """Places of all rows, prompt after prompt, each prompt's in the order of one pass over them. [n]"""
        if not self.shuffle:
            return np.argsort(self._prompt, kind="stable")
        stream = rng.numpy_stream(self.seed, "data-capped", number, self._table)
        return np.lexsort((stream.bit_generator.random_raw(len(self.rows)), self._prompt))


def prompt_numbers(table: PairTable, rows: np.ndarray) -> np.ndarray:
    """Equal numbers for rows with equal prompts, [n] int64."""
    found = pc.dictionary_encode(prompts_of(table, rows).combine_chunks())
    return np.asarray(found.indices.to_numpy(), dtype=np.int64)
