"""Orders beyond one table in one shape: mixtures of tables with weights, and batches of one aspect bucket each.

Like ``order``, pure functions of (content, seed, position): nothing to save, nothing to replay, the same for any
number of processes as long as the global batch stays.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mmalign import rng
from mmalign.data.buckets import BucketTable
from mmalign.data.order import Order, Shuffle, Slot
from mmalign.errors import DataError

POLICIES = ("stop", "repeat", "drop")


class MixtureOrder(Order):
    """Rows of several tables in given proportions.

    An epoch has a quota of rows of each table (largest remainder of its weight); they come in a keyed random order.
    Every table has its own endless line of permutations, from which each epoch goes on where the last one stopped, so
    no row is starved.

    Args:
        parts: usable row numbers of each table, in the numbering of the joined table. weights: share of each table in
        the rows; any positive numbers. policy: ``stop``: an epoch ends before any table repeats a row; ``repeat``: it
        ends when every table was seen whole, and small ones repeat; ``drop``: as ``repeat``, but no table gives more
        rows an epoch than it has.

    Raises:
        DataError: weights or a policy with no meaning, an empty table, or an epoch smaller than one global batch.
    """

    def __init__(
        self,
        *,
        table_fingerprint: str,
        parts: Sequence[np.ndarray],
        weights: Sequence[float],
        seed: int,
        global_batch: int,
        policy: str = "repeat",
        shuffle: Shuffle = True,
    ) -> None:
        if policy not in POLICIES:
            raise DataError(f"mixture policy '{policy}' is not known (known: {', '.join(POLICIES)})")
        if len(weights) != len(parts) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise DataError(f"a mixture of {len(parts)} tables needs as many positive weights, got {list(weights)}")
        if any(len(part) == 0 for part in parts):
            raise DataError(f"table {[len(part) for part in parts].index(0)} of the mixture has no usable rows")
        self.parts = [np.asarray(part, dtype=np.int64) for part in parts]
        self.quotas = quotas([len(part) for part in parts], weights, policy)
        super().__init__(
            table_fingerprint=f"{table_fingerprint}\x1f{policy}\x1f{[float(weight) for weight in weights]}",
            rows=np.concatenate(self.parts), seed=seed, global_batch=global_batch, shuffle=shuffle,
        )  # fmt: skip
        self.length = int(self.quotas.sum())
        if self.length < global_batch:
            raise DataError(
                f"an epoch of the mixture has {self.length} rows, fewer than a global batch of {global_batch}"
            )
        self._lines = [
            Order(
                table_fingerprint=f"{table_fingerprint}\x1f{number}",
                rows=part,
                seed=seed,
                global_batch=1,
                shuffle=shuffle,
            )
            for number, part in enumerate(self.parts)
        ]
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _slots(self, first: int, count: int) -> list[Slot]:
        slots = []
        for position in range(first, first + count):
            epoch, offset = divmod(position, self.length)
            tables, ranks = self._plan(epoch)
            table = int(tables[offset])
            place = epoch * int(self.quotas[table]) + int(ranks[offset])
            slots += self._lines[table].batch(place)
        return slots

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Which table each place of an epoch is of, and the how manieth of that table's in the epoch."""
        if epoch not in self._plans:
            tables = np.repeat(np.arange(len(self.quotas)), self.quotas)
            draws = rng.numpy_stream(self.seed, "data-mixture", epoch, self.fingerprint).bit_generator.random_raw(
                len(tables)
            )
            tables = tables[np.argsort(draws, kind="stable")]
            ranks = np.zeros(len(tables), dtype=np.int64)
            for table in range(len(self.quotas)):
                ranks[tables == table] = np.arange(self.quotas[table])
            self._plans = {
                **{key: plan for key, plan in self._plans.items() if abs(key - epoch) <= 1},
                epoch: (tables, ranks),
            }
        return self._plans[epoch]


def quotas(sizes: Sequence[int], weights: Sequence[float], policy: str) -> np.ndarray:
    """Rows of each table in an epoch, by largest remainder. [tables] int64"""
    shares = np.asarray(weights, dtype=np.float64) / math.fsum(weights)
    whole = np.asarray(sizes, dtype=np.float64) / shares
    total = math.floor(whole.min() + 1e-9) if policy == "stop" else math.ceil(whole.max() - 1e-9)
    exact = shares * total
    found = np.floor(exact + 1e-9).astype(np.int64)
    for number in np.argsort(-(exact - found), kind="stable")[: total - int(found.sum())]:
        found[number] += 1
    return np.minimum(found, np.asarray(sizes, dtype=np.int64)) if policy in ("drop", "stop") else found


class BucketedOrder(Order):
    """Global batches of one aspect bucket each, over all processes: their steps take equal time.

    Every bucket has its own endless line of permutations; epoch e takes from it all global batches that end within
    its e + 1 passes, so what is left of a bucket at the end of an epoch begins its share of the next. The batches of
    an epoch come in a keyed random order.

    Args:
        buckets: the bucket of each of `rows`.
        table: the sizes; part of the order's identity.

    Raises:
        DataError: no bucket fills a global batch.
    """

    def __init__(
        self,
        *,
        table_fingerprint: str,
        rows: np.ndarray,
        buckets: np.ndarray,
        table: BucketTable,
        seed: int,
        global_batch: int,
        shuffle: Shuffle = True,
    ) -> None:
        kept, self.merged = merge_small(np.asarray(buckets, dtype=np.int64), table, global_batch)
        identity = hashlib.sha256(f"{table.as_json()}".encode() + kept.tobytes()).hexdigest()
        super().__init__(
            table_fingerprint=f"{table_fingerprint}\x1f{identity}", rows=rows, seed=seed, global_batch=global_batch,
            shuffle=shuffle,
        )  # fmt: skip
        self.table = table
        self.by_bucket: Mapping[int, np.ndarray] = {int(b): self.rows[kept == b] for b in np.unique(kept)}
        """Bucket -> its rows."""
        self._lines = {
            bucket: Order(
                table_fingerprint=f"{table_fingerprint}\x1f{bucket}", rows=some, seed=seed, global_batch=global_batch,
                shuffle=shuffle,
            )
            for bucket, some in self.by_bucket.items()
        }  # fmt: skip
        self._plans: dict[int, list[tuple[int, int]]] = {}

    def bucket(self, step: int) -> int:
        """The bucket of an optimiser step."""
        return self._place(step)[0]

    def size(self, step: int) -> tuple[int, int]:
        """(height, width) of an optimiser step's pictures."""
        return self.table.sizes[self.bucket(step)]

    def _slots(self, first: int, count: int) -> list[Slot]:
        step, within = divmod(first, self.global_batch)
        if within + count > self.global_batch:
            raise ValueError("slots of two global batches asked for at once")
        bucket, batch = self._place(step)
        return self._lines[bucket].batch(batch)[within : within + count]

    def _before(self, epoch: int) -> int:
        """Global batches of all epochs before this one."""
        return sum(epoch * len(rows) // self.global_batch for rows in self.by_bucket.values())

    def _place(self, step: int) -> tuple[int, int]:
        """(bucket, number of the batch in its line) of a step."""
        epoch = step * self.global_batch // len(self.rows)
        while self._before(epoch + 1) <= step:
            epoch += 1
        while self._before(epoch) > step:
            epoch -= 1
        return self._plan(epoch)[step - self._before(epoch)]

    def _plan(self, epoch: int) -> list[tuple[int, int]]:
        if epoch not in self._plans:
            spans = {
                bucket: (epoch * len(rows) // self.global_batch, (epoch + 1) * len(rows) // self.global_batch)
                for bucket, rows in self.by_bucket.items()
            }
            turns = [bucket for bucket, (first, stop) in spans.items() for _ in range(first, stop)]
            if self.shuffle:
                stream = rng.numpy_stream(self.seed, "data-buckets", epoch, self.fingerprint)
                draws = stream.bit_generator.random_raw(len(turns))
                turns = [turns[place] for place in np.argsort(draws, kind="stable")]
            # Chance decides whose turn it is; a bucket's own batches stay in the order of its line.
            following = {bucket: iter(range(first, stop)) for bucket, (first, stop) in spans.items()}
            batches = [(bucket, next(following[bucket])) for bucket in turns]
            self._plans = {**{key: plan for key, plan in self._plans.items() if abs(key - epoch) <= 1}, epoch: batches}
        return self._plans[epoch]


def merge_small(buckets: np.ndarray, table: BucketTable, least: int) -> tuple[np.ndarray, dict[int, int]]:
    """Give the rows of buckets with fewer than `least` to the nearest larger bucket.

    Returns:
        the bucket of every row, and which bucket went where.

    Raises:
        DataError: no bucket has as many.
    """
    counts = np.bincount(buckets, minlength=len(table.sizes))
    large = [number for number in range(len(counts)) if counts[number] >= least]
    if not large:
        raise DataError(
            f"no aspect bucket holds the {least} rows of a global batch (the largest {int(counts.max(initial=0))});"
            " make the batch smaller, or the buckets fewer"
        )
    smaller = BucketTable(sizes=tuple(table.sizes[number] for number in large))
    merged = {
        number: large[smaller.nearest(table.sizes[number])]
        for number in range(len(counts))
        if 0 < counts[number] < least
    }
    return np.array([merged.get(int(bucket), int(bucket)) for bucket in buckets], dtype=np.int64), merged
