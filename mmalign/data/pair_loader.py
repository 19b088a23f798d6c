"""Batches of pairs for training, from any optimiser step on, the same at any number of workers and processes.

Threads read ahead a bounded number of micro-batches. A row that passed the check and cannot be read now keeps its place
with weight 0 and is listed; it never becomes another row's picture.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmalign.data.augment import Augmentation, Draw
from mmalign.data.autoworkers import Workers, available_cores, measured_workers, require_workers
from mmalign.data.cache import Cache
from mmalign.data.fill import require_latents, require_text
from mmalign.data.mediaindex import MediaIndex
from mmalign.data.order import Order, Shuffle, Slot
from mmalign.data.references import reference_key, require_facts, require_references
from mmalign.data.sources import LatentReader, PixelReader, Prepared, RowFailure, stack_pixels, text_key
from mmalign.data.tables import PairTable
from mmalign.errors import DataError, MmalignError
from mmalign.media import DEFAULT, Limits
from mmalign.types import PairBatch, PairRecord, Side

if TYPE_CHECKING:
    from mmalign.data.decoders import ProcessReader

T = TypeVar("T")
MAX_MASKED: Final = 10
"""More different rows than this that cannot be read while training stop a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedRow:
    """A row that could not be read while training: it had weight 0 in that step."""

    id: str
    where: str
    step: int
    column: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    record: PairRecord
    draw: Draw
    sides: tuple[Prepared, Prepared] | None  # None: latents come from the cache, or the row failed
    failure: MaskedRow | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    step: int
    micro: int
    slots: list[Slot]
    rows: list[Future[_Row]]
    sides: Future[tuple[Side, Side]] | None
    text: Future[dict[str, Tensor]] | None


class PairLoader:
    """Endless micro-batches of one process.

    Args:
        table: where the rows are.
        rows: usable row numbers, [n] (from a check).
        batch_size: rows of one micro-batch of this process.
        accumulate: micro-batches per optimiser step.
        world_size: number of processes.
        rank: number of this process.
        seed: of the run; order and augmentation depend on it.
        shuffle: False keeps the table's order; ``block``: see ``order``.
        resolution: (height, width) in pixels.
        flip: mirror both pictures of a pair, with probability one half.
        crop: ``center`` or ``random``.
        crop_variants: number of fixed positions for random crops; needed to cache them.
        drop_caption: probability that a prompt becomes ''.
        media: facts from the check; required with `latents`, and without it changed files go unnoticed.
        latents: a filled cache; sides then hold moments instead of pixels.
        text: a filled cache; batches then hold text-encoder outputs.
        draws: each row has so many stored draws of all that chance decides, taken in turn epoch by epoch; 0: a new one at
            every step.
        order: another order of the rows than one table's permutations (a mixture).
        workers: threads; 0 works in the caller's thread; ``auto``: as many as pay (``autoworkers``), measured at the first batch.
        decode: ``threads``, or ``processes`` (as many as `workers`; with ``auto`` one a core) that decode into
            shared memory.
        prefetch: micro-batches read ahead.
        max_runtime_failures: more distinct rows than this, masked by this process, stop the run.
        retry_seconds: pauses before reading a missing file again.

    Raises:
        DataError: settings that do not fit together, a table smaller than a global batch, or a cache that lacks rows.
    """

    def __init__(
        self,
        table: PairTable,
        rows: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: Shuffle = True,
        resolution: tuple[int, int],
        flip: bool = False,
        crop: str = "center",
        crop_variants: int = 0,
        drop_caption: float = 0.0,
        media: MediaIndex | None = None,
        latents: Cache | None = None,
        text: Cache | None = None,
        draws: int = 0,
        order: Order | None = None,
        workers: Workers = 2,
        decode: str = "threads",
        prefetch: int = 3,
        max_runtime_failures: int = MAX_MASKED,
        retry_seconds: Sequence[float] = (0.1, 0.5, 2.0),
        limits: Limits = DEFAULT,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} does not exist among {world_size} processes")
        if min(batch_size, accumulate) < 1 or min(prefetch, max_runtime_failures, draws) < 0 or not require_workers(workers):
            raise DataError(
                "batch_size and accumulate must be at least 1; workers, prefetch, draws and limits at least 0"
            )
        if decode not in ("threads", "processes"):
            raise DataError(f"decode must be 'threads' or 'processes', got '{decode}'")
        self.decode = decode
        self.table = table
        self.seed = seed
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.world_size = world_size
        self.rank = rank
        self.global_batch = batch_size * accumulate * world_size
        self.augmentation = Augmentation(
            resolution=resolution, flip=flip, crop=crop, crop_variants=crop_variants, drop_caption=drop_caption
        )
        if order is not None and order.global_batch != self.global_batch:
            raise DataError(f"the order is for global batches of {order.global_batch}, the loader makes {self.global_batch}")
        self.order = order or Order(
            table_fingerprint=table.fingerprint,
            rows=np.asarray(rows, dtype=np.int64),
            seed=seed,
            global_batch=self.global_batch,
            shuffle=shuffle,
        )
        self.text = text
        self.media = media
        self.draws = draws
        self.reference: Cache | None = None
        """Stored reference scores, once ``with_reference`` was told of them."""
        self.workers: Workers = workers
        """As given; a number from the first batch on."""
        self.prefetch = prefetch
        self.max_runtime_failures = max_runtime_failures
        self.masked: list[MaskedRow] = []
        """Rows that had weight 0 in a batch this process was given, in the order they were met."""
        self._pixels: PixelReader | ProcessReader = PixelReader(
            resolution=resolution, media=media, limits=limits, retry_seconds=retry_seconds
        )
        self._limits, self._retry_seconds = limits, tuple(retry_seconds)
        self._latents: LatentReader | None = None
        if latents is not None:
            facts = require_latents(latents, self.order.rows, media, self.augmentation)
            self._latents = LatentReader(cache=latents, media=facts, resolution=resolution)
        if text is not None:
            require_text(text, table, self.order.rows, drop_caption)

    @property
    def raw_pixels(self) -> bool:
        """Whether batches hold pictures as bytes, for a copy to the device that makes numbers of them there."""
        return self._pixels.raw

    @raw_pixels.setter
    def raw_pixels(self, raw: bool) -> None:
        self._pixels.raw = raw

    def with_reference(self, cache: Cache) -> None:
        """Give every batch the stored reference scores of its rows' draws.

        Raises:
            DataError: no stored draws, or a score is missing.
        """
        require_references(cache, self.table, self.media, self.order.rows, self.draws)
        self.reference = cache

    def read(self, slots: Sequence[Slot], step: int = 0) -> PairBatch:
        """Any rows as a batch, in the caller's thread, the way they come in training."""
        return self._finish(self._submit(None, step, 0, list(slots), threading.Event()))

    def epoch(self, step: int) -> float:
        """Passes over the usable rows made before a step."""
        return step * self.global_batch / self.order.length

    def step_ids(self, step: int) -> tuple[str, ...]:
        """Row ids of a whole global batch, over all processes and micro-batches."""
        return tuple(str(self.table.value(slot.row, "id")) for slot in self.order.batch(step))

    def micro_batches(self, start_step: int = 0) -> Iterator[tuple[int, int, PairBatch]]:
        """Endless (step, micro-batch number, batch), starting at any step at no cost.

        Raises:
            DataError: too many rows had to be masked, or a row of an unchecked table is bad.
            RuntimeError: an unexpected failure in a worker, naming the row, with its cause.
        """
        stop = threading.Event()
        if self.workers == "auto":
            self.workers = self.measured_workers(self.order.batch(start_step), start_step)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="mmalign-data") if self.workers else None
        pending: deque[_Pending] = deque()
        step, micro = start_step, 0
        here, processes = self._pixels, self._processes()
        try:
            while True:
                while len(pending) <= (self.prefetch if pool is not None else 0):
                    slots = self.order.micro_batch(
                        step, micro, batch_size=self.batch_size, world_size=self.world_size, rank=self.rank
                    )
                    pending.append(self._submit(pool, step, micro, slots, stop))
                    step, micro = (step, micro + 1) if micro + 1 < self.accumulate else (step + 1, 0)
                ready = pending.popleft()
                yield ready.step, ready.micro, self._finish(ready)
        finally:
            stop.set()
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
            self._pixels = here
            if processes is not None:
                processes.close()

    def measured_workers(self, slots: Sequence[Slot], step: int) -> int:
        """How many threads pay, by getting some rows ready for at most two seconds; with decoding processes one a core."""
        if self._latents is not None:  # what is prepared side by side is the gathers of batches
            return measured_workers(lambda _: self.read(slots[: self.batch_size], step))
        if self.decode == "processes":
            return available_cores()
        stop = threading.Event()
        return measured_workers(lambda number: self._row(slots[number % len(slots)], step, stop))

    def _processes(self) -> ProcessReader | None:
        """Processes that decode from now on, where they are wanted and anything is to be decoded."""
        if self.decode != "processes" or not isinstance(self.workers, int) or not self.workers or self._latents is not None:
            return None
        from mmalign.data.decoders import ProcessReader

        made = ProcessReader(
            self.table, resolution=self.augmentation.resolution, media=self.media, limits=self._limits,
            retry_seconds=self._retry_seconds, processes=self.workers, slots=2 * self.workers,
        )  # fmt: skip
        made.raw = self._pixels.raw
        self._pixels = made
        return made

    def _submit(
        self, pool: ThreadPoolExecutor | None, step: int, micro: int, slots: list[Slot], stop: threading.Event
    ) -> _Pending:
        latents, text = self._latents, self.text

        def run(work: Callable[[], T]) -> Future[T]:
            if pool is not None:
                return pool.submit(work)
            done: Future[T] = Future()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            return done

        def row(slot: Slot) -> Future[_Row]:
            return run(lambda: self._row(slot, step, stop))

        return _Pending(
            step=step,
            micro=micro,
            slots=slots,
            rows=[row(slot) for slot in slots],
            sides=None
            if latents is None
            else run(lambda: latents.sides([slot.row for slot in slots], self._draws(slots))),
            text=None if text is None else run(lambda: text.gather(self._text_keys(slots))),
        )

    def _number(self, slot: Slot) -> int:
        """What chance is counted by: the epoch, or the stored draw whose turn it is."""
        return slot.epoch % self.draws if self.draws else slot.epoch

    def _draws(self, slots: list[Slot]) -> list[Draw]:
        ids = [str(self.table.value(slot.row, "id")) for slot in slots]
        return [
            self.augmentation.draw(seed=self.seed, epoch=self._number(slot), row_id=name)
            for slot, name in zip(slots, ids, strict=True)
        ]

    def _text_keys(self, slots: list[Slot]) -> list[str]:
        return [
            text_key("" if draw.drop_caption else self.table.prompt(slot.row))
            for slot, draw in zip(slots, self._draws(slots), strict=True)
        ]

    def _row(self, slot: Slot, step: int, stop: threading.Event) -> _Row:
        try:
            here = self._latents is None and isinstance(self._pixels, PixelReader)
            record = self.table.record(slot.row, pictures=here)
            draw = self.augmentation.draw(seed=self.seed, epoch=self._number(slot), row_id=record.id)
            if self._latents is not None:
                return _Row(record=record, draw=draw, sides=None)
            try:
                return _Row(record=record, draw=draw, sides=self._pixels.read(slot.row, record, draw, stop))
            except RowFailure as failure:
                where = self.table.where(slot.row)
                masked = MaskedRow(id=record.id, where=where, step=step, column=failure.column,
                                   reason=failure.reason, detail=failure.detail)  # fmt: skip
                return _Row(record=record, draw=draw, sides=None, failure=masked)
        except MmalignError:
            raise
        except Exception as error:
            name = f"{self.table.where(slot.row)} (row {slot.row} of {self.table.path})"
            raise RuntimeError(f"{name} could not be loaded: {type(error).__name__}: {error}") from error

    def _finish(self, ready: _Pending) -> PairBatch:
        rows = [future.result() for future in ready.rows]
        self._note_failures([row.failure for row in rows if row.failure is not None])
        if ready.sides is not None:
            chosen, rejected = ready.sides.result()
        else:
            chosen, rejected = (
                stack_pixels(
                    [row.sides[which] if row.sides else None for row in rows],
                    self.augmentation.resolution,
                    raw=self.raw_pixels,
                )
                for which in (0, 1)
            )
        records = [row.record for row in rows]
        return PairBatch(
            ids=tuple(record.id for record in records),
            prompts=tuple("" if row.draw.drop_caption else row.record.prompt for row in rows),
            chosen=chosen,
            rejected=rejected,
            p_chosen=torch.tensor([record.p_chosen for record in records], dtype=torch.float32),
            weight=torch.tensor([0.0 if row.failure else row.record.weight for row in rows], dtype=torch.float32),
            users=tuple(record.user for record in records),
            scores={
                reward: torch.tensor([record.scores[reward] for record in records], dtype=torch.float32)
                for reward in self.table.rewards
            },
            text=None if ready.text is None else ready.text.result(),
            draws=tuple(self._number(slot) for slot in ready.slots) if self.draws else None,
            reference=None if self.reference is None else self._references(self.reference, ready.slots),
        )

    def _references(self, cache: Cache, slots: Sequence[Slot]) -> Tensor:
        facts = require_facts(self.media, self.draws)
        keys = [reference_key(self.table, facts, slot.row, self._number(slot)) for slot in slots]
        return cache.gather(keys)["scores"]

    def _note_failures(self, failures: list[MaskedRow]) -> None:
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
