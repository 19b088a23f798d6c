"""Batches of pairs in several shapes, one shape a step: a pair loader for every bucket behind one order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from mmalign.data.autoworkers import Workers
from mmalign.data.buckets import BucketTable
from mmalign.data.cache import Cache
from mmalign.data.mediaindex import MediaIndex
from mmalign.data.orders import BucketedOrder
from mmalign.data.pair_loader import MAX_MASKED, MaskedRow, PairLoader
from mmalign.data.reasons import Problem
from mmalign.data.tables import PairTable
from mmalign.errors import DataError
from mmalign.types import PairBatch


def assign_buckets(
    table: PairTable, rows: np.ndarray, media: MediaIndex, buckets: BucketTable
) -> tuple[np.ndarray, np.ndarray, tuple[Problem, ...]]:
    """The bucket of every row, by both pictures' sizes.

    Returns:
        the rows that are kept, their buckets, and a problem for each row that is not: `aspect_mismatch` where a
        picture would lose more than the table's `max_loss`, `upscale` where one would be enlarged beyond
        `max_upscale`.
    """
    rows = np.asarray(rows, dtype=np.int64)
    chosen, loss, scale = buckets.choose(media.sizes[rows])
    problems = []
    keep = np.ones(len(rows), dtype=bool)
    for place in np.flatnonzero((loss > buckets.max_loss + 1e-9) | (scale > buckets.max_upscale + 1e-9)).tolist():
        keep[place] = False
        lossy = loss[place] > buckets.max_loss + 1e-9
        height, width = buckets.sizes[int(chosen[place])]
        detail = (
            f"{loss[place]:.0%} of a picture would be cropped for {width}x{height}"
            if lossy
            else f"a picture would be enlarged {scale[place]:.2f} times for {width}x{height}"
        )
        problems.append(
            Problem.at(
                table,
                int(rows[place]),
                column="chosen",
                reason="aspect_mismatch" if lossy else "upscale",
                detail=detail,
            )
        )
    return rows[keep], chosen[keep], tuple(problems)


class BucketedLoader:
    """Endless micro-batches of one process, every step in one shape.

    Args:
        table: where the rows are. order: of rows and buckets. latents: per bucket, a filled cache for its size; None
        decodes. settings: of the pair loaders (`batch_size`, `accumulate`, `world_size`, `rank`, `seed`, `flip`,
        `media`, `text`, ...).

    Raises:
        DataError: settings that do not fit the order, or a cache that lacks rows.
    """

    def __init__(
        self,
        table: PairTable,
        order: BucketedOrder,
        *,
        latents: Mapping[int, Cache] | None = None,
        workers: Workers = 2,
        prefetch: int = 3,
        max_runtime_failures: int = MAX_MASKED,
        **settings: Any,
    ) -> None:
        self.order, self.table, self.prefetch = order, table, prefetch
        self.workers: Workers = workers
        """As given; a number from the first batch on."""
        self.max_runtime_failures = max_runtime_failures
        self._loaders = {
            bucket: PairLoader(
                table, rows, resolution=order.table.sizes[bucket], latents=None if latents is None else latents[bucket],
                workers=0, max_runtime_failures=max_runtime_failures, **settings,
            )
            for bucket, rows in order.by_bucket.items()
        }  # fmt: skip
        one = next(iter(self._loaders.values()))
        self.batch_size, self.accumulate, self.world_size, self.rank = (
            one.batch_size,
            one.accumulate,
            one.world_size,
            one.rank,
        )
        self.global_batch = one.global_batch
        if self.global_batch != order.global_batch:
            raise DataError(
                f"the order is for global batches of {order.global_batch}, the loader makes {self.global_batch}"
            )

    @property
    def raw_pixels(self) -> bool:
        """As of a pair loader."""
        return all(loader.raw_pixels for loader in self._loaders.values())

    @raw_pixels.setter
    def raw_pixels(self, raw: bool) -> None:
        for loader in self._loaders.values():
            loader.raw_pixels = raw

    @property
    def masked(self) -> list[MaskedRow]:
        """Rows that had weight 0 in a batch this process was given."""
        return [row for loader in self._loaders.values() for row in loader.masked]

    def epoch(self, step: int) -> float:
        """Passes over the usable rows made before a step."""
        return step * self.global_batch / len(self.order.rows)

    def step_ids(self, step: int) -> tuple[str, ...]:
        """Row ids of a whole global batch, over all processes and micro-batches."""
        return tuple(str(self.table.value(slot.row, "id")) for slot in self.order.batch(step))

    def micro_batches(self, start_step: int = 0) -> Iterator[tuple[int, int, PairBatch]]:
        """Endless (step, micro-batch number, batch), starting at any step at no cost.

        Raises:
            DataError: too many rows had to be masked, or a row of an unchecked table is bad.
        """
        if self.workers == "auto":
            one = self._loaders[self.order.bucket(start_step)]
            self.workers = one.measured_workers(self.order.batch(start_step), start_step)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="mmalign-buckets") if self.workers else None
        pending: deque[tuple[int, int, Future[PairBatch]]] = deque()
        step, micro = start_step, 0
        try:
            while True:
                while len(pending) <= (self.prefetch if pool is not None else 0):
                    pending.append((step, micro, self._submit(pool, step, micro)))
                    step, micro = (step, micro + 1) if micro + 1 < self.accumulate else (step + 1, 0)
                done_step, done_micro, future = pending.popleft()
                batch = future.result()
                if len({row.id for row in self.masked}) > self.max_runtime_failures:
                    raise DataError(f"{self.table.path}: more than {self.max_runtime_failures} rows could not be read")
                yield done_step, done_micro, batch
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor | None, step: int, micro: int) -> Future[PairBatch]:
        loader = self._loaders[self.order.bucket(step)]
        slots = self.order.micro_batch(
            step, micro, batch_size=self.batch_size, world_size=self.world_size, rank=self.rank
        )
        if pool is not None:
            return pool.submit(loader.read, slots, step)
        done: Future[PairBatch] = Future()
        done.set_result(loader.read(slots, step))
        return done
