"""Batches of prompts with answers for training, from any optimiser step on, the same at any number of workers.

The order is that of ``order`` and the masking that of ``loader``: a row that passed the check and cannot be encoded now keeps
its place with weight 0 and is listed. What encodes and what makes a batch are functions handed in: nothing here knows a model.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from mmalign.branches import BranchBatch, BranchRecord, EncodedExample
from mmalign.data.autoworkers import Workers, measured_workers, require_workers
from mmalign.data.order import Order, Shuffle, Slot
from mmalign.data.pair_loader import MAX_MASKED, MaskedRow
from mmalign.data.vlm import VlmTable
from mmalign.data.vlm_rows import RowProblem
from mmalign.errors import DataError, MmalignError

Encode = Callable[[BranchRecord, str | None], EncodedExample]
Collate = Callable[[Sequence[EncodedExample]], BranchBatch]
SPARE_TRIES = 64
"""Rows that are tried as a stand-in before a batch without any readable row is given up."""


class RowRefused(Exception):
    """Raised by an encoder for one row: it cannot be used, and why."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    id: str
    example: EncodedExample | None
    failure: MaskedRow | None = None


class VlmLoader:
    """Endless micro-batches of one process.

    Args:
        table: where the rows are.
        rows: usable row numbers, [n] (from a check).
        encode: a record, and another row's answer to put behind its own or None, to an example; safe to call from threads;
            raises `RowRefused` for a row that cannot be used.
        collate: examples to a batch on the CPU.
        batch_size: rows of one micro-batch of this process.
        workers: threads; 0 works in the caller's thread; ``auto``: as many as pay (``autoworkers``), measured at the first batch.
        prefetch: micro-batches read ahead.
        max_runtime_failures: more distinct masked rows than this stop the run.
        mismatched: give every row an answer to another prompt of the same optimiser step.

    Raises:
        DataError: settings that do not fit together, or fewer rows than a global batch.
    """

    def __init__(
        self, table: VlmTable, rows: Sequence[int] | np.ndarray, *, encode: Encode, collate: Collate, batch_size: int,
        accumulate: int = 1, world_size: int = 1, rank: int = 0, seed: int = 0, shuffle: Shuffle = True, workers: Workers = 2,
        prefetch: int = 3, max_runtime_failures: int = MAX_MASKED, mismatched: bool = False,
    ) -> None:  # fmt: skip
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} does not exist among {world_size} processes")
        if min(batch_size, accumulate) < 1 or min(prefetch, max_runtime_failures) < 0 or not require_workers(workers):
            raise DataError("batch_size and accumulate must be at least 1; workers, prefetch and limits at least 0")
        self.table, self.encode, self.collate = table, encode, collate
        self.batch_size, self.accumulate, self.world_size, self.rank = batch_size, accumulate, world_size, rank
        self.global_batch = batch_size * accumulate * world_size
        if mismatched and self.global_batch < 2:
            raise DataError(
                "mismatched answers need two rows or more a step; raise optim.batch_size or optim.accumulate, or use "
                "method.reference_point=zero"
            )
        self.mismatched = mismatched
        self.order = Order(
            table_fingerprint=table.fingerprint, rows=np.asarray(rows, dtype=np.int64), seed=seed,
            global_batch=self.global_batch, shuffle=shuffle,
        )  # fmt: skip
        self.workers: Workers = workers
        """As given; a number from the first batch on."""
        self.prefetch, self.max_runtime_failures = prefetch, max_runtime_failures
        self.masked: list[MaskedRow] = []
        """Rows that had weight 0 in a batch this process was given, in the order they were met."""
        self._spare: EncodedExample | None = None

    def epoch(self, step: int) -> float:
        """Passes over the usable rows made before a step."""
        return step * self.global_batch / len(self.order.rows)

    def step_ids(self, step: int) -> tuple[str, ...]:
        """Row ids of a whole global batch, over all processes and micro-batches."""
        return tuple(self.table.row_id(slot.row) for slot in self.order.batch(step))

    def micro_batches(self, start_step: int = 0) -> Iterator[tuple[int, int, BranchBatch]]:
        """Endless (step, micro-batch number, batch), starting at any step at no cost.

        Raises:
            DataError: too many rows had to be masked.
            RuntimeError: an unexpected failure in a worker, naming the row, with its cause.
        """
        stop = threading.Event()
        if self.workers == "auto":
            whole = self.order.batch(start_step)
            self.workers = measured_workers(lambda number: self._row(whole, number % len(whole), start_step, stop))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="mmalign-vlm") if self.workers else None
        pending: deque[tuple[int, int, list[Future[_Row]]]] = deque()
        step, micro = start_step, 0
        try:
            while True:
                while len(pending) <= (self.prefetch if pool is not None else 0):
                    pending.append((step, micro, self._submit(pool, step, micro, stop)))
                    step, micro = (step, micro + 1) if micro + 1 < self.accumulate else (step + 1, 0)
                ready_step, ready_micro, rows = pending.popleft()
                yield ready_step, ready_micro, self._finish([future.result() for future in rows])
        finally:
            stop.set()
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor | None, step: int, micro: int, stop: threading.Event
    ) -> list[Future[_Row]]:
        whole = self.order.batch(step)
        first = (micro * self.world_size + self.rank) * self.batch_size
        places = range(first, first + self.batch_size)
        if pool is not None:
            return [pool.submit(self._row, whole, place, step, stop) for place in places]
        rows = []
        for place in places:
            done: Future[_Row] = Future()
            done.set_result(self._row(whole, place, step, stop))
            rows.append(done)
        return rows

    def _row(self, whole: list[Slot], place: int, step: int, stop: threading.Event) -> _Row:
        slot = whole[place]
        row_id = self.table.row_id(slot.row)
        if stop.is_set():
            return _Row(id=row_id, example=None)
        where = self.table.where(slot.row)
        try:
            record = self.table.record(slot.row)
            other = self._other_answer(record, whole, place) if self.mismatched else None
            return _Row(id=row_id, example=self.encode(record, other))
        except RowProblem as problem:
            column, reason, detail = problem.column, problem.reason, problem.detail
        except RowRefused as refused:
            column, reason, detail = "media", refused.reason, refused.detail
        except MmalignError:
            raise
        except Exception as error:
            name = f"{where} (row {slot.row} of {self.table.path})"
            raise RuntimeError(f"{name} could not be loaded: {type(error).__name__}: {error}") from error
        failure = MaskedRow(id=row_id, where=where, step=step, column=column, reason=reason, detail=detail)
        return _Row(id=row_id, example=None, failure=failure)

    def _other_answer(self, record: BranchRecord, whole: list[Slot], place: int) -> str | None:
        """An answer of the next row of the optimiser step that has another prompt, whatever the micro-batches are."""
        for distance in range(1, len(whole)):
            at = (place + distance) % len(whole)
            try:
                other = self.table.record(whole[at].row)
            except RowProblem:
                continue
            if (other.messages, other.media) != (record.messages, record.media):
                return other.answers[at % len(other.answers)].text
        return None

    def _finish(self, rows: list[_Row]) -> BranchBatch:
        self._note([row.failure for row in rows if row.failure is not None])
        good = [row.example for row in rows if row.example is not None]
        stand_in = good[0] if good else self._find_spare()
        # A masked row's place is filled with something of weight 0: it counts nowhere, and the batch keeps its size.
        examples = [row.example or replace(stand_in, id=row.id, weight=0.0) for row in rows]
        return self.collate(examples)

    def _find_spare(self) -> EncodedExample:
        """Any row that can be encoded, for a batch of which none could."""
        if self._spare is None:
            for row in self.order.rows[:SPARE_TRIES]:
                try:
                    self._spare = self.encode(self.table.record(int(row)), None)
                    break
                except (RowProblem, RowRefused):
                    continue
            else:
                raise DataError(f"{self.table.path}: none of {SPARE_TRIES} rows can be encoded")
        return self._spare

    def _note(self, failures: list[MaskedRow]) -> None:
        self.masked.extend(failures)
        different = {row.id: row for row in self.masked}
        if len(different) > self.max_runtime_failures:
            listed = "\n".join(
                f"  {r.where} (id {r.id}): {r.column}: {r.reason}: {r.detail}" for r in different.values()
            )
            raise DataError(
                f"{self.table.path}: {len(different)} rows could not be read while training"
                f" (limit {self.max_runtime_failures}):\n{listed}"
            )
