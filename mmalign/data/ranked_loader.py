"""Batches of ranked lists for training: the order, augmentation, caches and masking of ``loader``, for K pictures a prompt.

Threads prepare whole micro-batches ahead. A candidate that cannot be read now is absent in that batch and is listed; a list
with fewer than two candidates left keeps its place with weight 0.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mmalign.data.augment import Augmentation, Draw
from mmalign.data.autoworkers import Workers, measured_workers, require_workers
from mmalign.data.cache import Cache
from mmalign.data.mediaindex import Picture
from mmalign.data.order import Order, Shuffle, Slot
from mmalign.data.pair_loader import MAX_MASKED, MaskedRow
from mmalign.data.ranked import RankedTable
from mmalign.data.ranked_index import ListIndex, needed_list_latents
from mmalign.data.sources import (
    Prepared,
    RowFailure,
    crop_corner,
    geometry,
    latent_key,
    prepare,
    stack_pixels,
    text_key,
)
from mmalign.errors import DataError
from mmalign.media import DEFAULT, Limits, MediaError, read_bytes
from mmalign.types import ImageRef, Moments, RankedBatch, RankedRecord, Side

_Made = tuple[int, int, RankedBatch, list[MaskedRow]]


class RankedLoader:
    """Endless micro-batches of one process.

    Args:
        table: where the lists are.
        index: facts about every candidate, and the usable rows.
        augmentation: one draw for all pictures of a list.
        batch_size: lists of one micro-batch of this process.
        latents: a filled cache; sides then hold moments instead of pixels.
        text: a filled cache; batches then hold text-encoder outputs.
        workers: threads; 0 works in the caller's thread; ``auto``: as many as pay (``autoworkers``), measured at the first batch.
        prefetch: micro-batches read ahead.
        max_runtime_failures: more distinct masked lists than this stop the run.

    Raises:
        DataError: settings that do not fit together, fewer lists than a global batch, or a cache that lacks entries.
    """

    def __init__(
        self,
        table: RankedTable,
        index: ListIndex,
        *,
        augmentation: Augmentation,
        batch_size: int,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: Shuffle = True,
        latents: Cache | None = None,
        text: Cache | None = None,
        workers: Workers = 2,
        prefetch: int = 3,
        max_runtime_failures: int = MAX_MASKED,
        limits: Limits = DEFAULT,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} does not exist among {world_size} processes")
        if min(batch_size, accumulate) < 1 or min(prefetch, max_runtime_failures) < 0 or not require_workers(workers):
            raise DataError("batch_size and accumulate must be at least 1; workers, prefetch and limits at least 0")
        self.table, self.index, self.augmentation = table, index, augmentation
        self.batch_size, self.accumulate, self.world_size, self.rank, self.seed = (
            batch_size,
            accumulate,
            world_size,
            rank,
            seed,
        )
        self.global_batch = batch_size * accumulate * world_size
        self.order = Order(
            table_fingerprint=table.fingerprint,
            rows=index.rows,
            seed=seed,
            global_batch=self.global_batch,
            shuffle=shuffle,
        )
        self.width = index.width
        self.latents, self.text = latents, text
        self.workers: Workers = workers
        """As given; a number from the first batch on."""
        self.prefetch, self.max_runtime_failures, self.limits = (
            prefetch,
            max_runtime_failures,
            limits,
        )
        self.raw_pixels = False
        """Whether batches hold pictures as bytes, for a copy to the device that makes numbers of them there."""
        self.masked: list[MaskedRow] = []
        """Candidates that were absent from a batch although they passed the check, in the order they were met."""
        if latents is not None:
            lacking = latents.missing(key for key, _ in needed_list_latents(index, augmentation))
            if lacking:
                raise DataError(
                    f"{latents.folder}: {len(lacking)} latents of this table are not in the cache; fill it again"
                )

    def epoch(self, step: int) -> float:
        """Passes over the usable lists made before a step."""
        return step * self.global_batch / len(self.order.rows)

    def step_ids(self, step: int) -> tuple[str, ...]:
        """Row ids of a whole global batch, over all processes and micro-batches."""
        return tuple(str(self.table.value(slot.row, "id")) for slot in self.order.batch(step))

    def micro_batches(self, start_step: int = 0) -> Iterator[tuple[int, int, RankedBatch]]:
        """Endless (step, micro-batch number, batch), starting at any step at no cost.

        Raises:
            DataError: too many lists had to be masked.
        """
        stop = threading.Event()
        if self.workers == "auto":
            self.workers = measured_workers(lambda number: self._make(start_step, number % self.accumulate, stop))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="mmalign-lists") if self.workers else None
        pending: deque[Future[_Made]] = deque()
        step, micro = start_step, 0
        try:
            while True:
                while len(pending) <= (self.prefetch if pool is not None else 0):
                    pending.append(self._submit(pool, step, micro, stop))
                    step, micro = (step, micro + 1) if micro + 1 < self.accumulate else (step + 1, 0)
                done_step, done_micro, batch, failures = pending.popleft().result()
                self._note(failures)
                yield done_step, done_micro, batch
        finally:
            stop.set()
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor | None, step: int, micro: int, stop: threading.Event) -> Future[_Made]:
        if pool is not None:
            return pool.submit(self._make, step, micro, stop)
        done: Future[_Made] = Future()
        done.set_result(self._make(step, micro, stop))
        return done

    def _make(self, step: int, micro: int, stop: threading.Event) -> _Made:
        slots = self.order.micro_batch(
            step, micro, batch_size=self.batch_size, world_size=self.world_size, rank=self.rank
        )
        records = [self.table[slot.row] for slot in slots]
        draws = [self._draw(slot, record) for slot, record in zip(slots, records, strict=True)]
        found = [self._padded(self.index.pictures[slot.row]) for slot in slots]
        failures: list[MaskedRow] = []
        if self.latents is not None:
            images, present = (
                self._cached(self.latents, found, draws),
                [[item is not None for item in row] for row in found],
            )
        else:
            images, present = self._decoded(step, slots, records, draws, found, failures, stop)
        mask = torch.tensor(present)
        prompts = tuple("" if draw.drop_caption else record.prompt for record, draw in zip(records, draws, strict=True))
        batch = RankedBatch(
            ids=tuple(record.id for record in records), prompts=prompts, images=images, mask=mask,
            weight=(mask.sum(1) >= 2).float(), scores=self._scores(records, mask),
            text=None if self.text is None else self.text.gather([text_key(prompt) for prompt in prompts]),
        )  # fmt: skip
        return step, micro, batch, failures

    def _draw(self, slot: Slot, record: RankedRecord) -> Draw:
        return self.augmentation.draw(seed=self.seed, epoch=slot.epoch, row_id=record.id)

    def _padded(self, pictures: tuple[Picture | None, ...]) -> list[Picture | None]:
        return [*pictures, *([None] * (self.width - len(pictures)))]

    def _scores(self, records: list[RankedRecord], mask: Tensor) -> Mapping[str, Tensor]:
        made = {}
        for name in self.table.rewards:
            values = torch.zeros(mask.shape)
            for row, record in enumerate(records):
                given = (
                    torch.tensor(record.scores[name], dtype=torch.float32) if name in record.scores else torch.zeros(0)
                )
                values[row, : len(given)] = given
            made[name] = torch.where(mask, values, 0.0)
        return made

    def _cached(self, cache: Cache, found: list[list[Picture | None]], draws: list[Draw]) -> Side:
        """Moments of all candidates; zeros where absent."""
        flat = [(picture, draw) for row, draw in zip(found, draws, strict=True) for picture in row]
        there = [number for number, (picture, _) in enumerate(flat) if picture is not None]
        keys = [latent_key(p.sha256, variant=d.variant, flip=d.flip) for p, d in flat if p is not None]
        stored = cache.gather(keys)
        size = self.augmentation.resolution
        moments = {}
        for name in ("mean", "std"):
            moments[name] = torch.zeros(len(flat), *stored[name].shape[1:])
            moments[name][there] = stored[name].float()
        sizes = [size if picture is None else picture.size for picture, _ in flat]
        corners = [
            (0, 0) if picture is None else crop_corner(picture.size, size, draw.crop, flip=draw.flip)
            for picture, draw in flat
        ]
        return Side(geometry=geometry(sizes, corners, size), moments=Moments(mean=moments["mean"], std=moments["std"]))

    def _decoded(
        self, step: int, slots: list[Slot], records: list[RankedRecord], draws: list[Draw],
        found: list[list[Picture | None]], failures: list[MaskedRow], stop: threading.Event,
    ) -> tuple[Side, list[list[bool]]]:  # fmt: skip
        """Pixels of all candidates; zeros where absent or unreadable, which is noted in `failures`."""
        prepared: list[Prepared | None] = []
        for slot, record, draw, row in zip(slots, records, draws, found, strict=True):
            for number, picture in enumerate(row):
                if picture is None or stop.is_set():
                    prepared.append(None)
                    continue
                try:
                    prepared.append(self._read(record.images[number], picture, draw))
                except (MediaError, RowFailure) as error:
                    prepared.append(None)
                    failures.append(
                        MaskedRow(id=record.id, where=self.table.where(slot.row), step=step, column=f"images[{number}]",
                                  reason=error.reason, detail=error.detail)
                    )  # fmt: skip
        width = self.width
        present = [[item is not None for item in prepared[at : at + width]] for at in range(0, len(prepared), width)]
        return stack_pixels(prepared, self.augmentation.resolution, raw=self.raw_pixels), present

    def _read(self, ref: ImageRef, picture: Picture, draw: Draw) -> Prepared:
        data, source = read_bytes(ref, self.limits)
        if picture.sha256 and hashlib.sha256(data).hexdigest() != picture.sha256:
            raise RowFailure(
                column="images", reason="changed_image", detail=f"{source} is not the file that was checked"
            )
        return prepare(
            data,
            source=source,
            resolution=self.augmentation.resolution,
            crop=draw.crop,
            flip=draw.flip,
            limits=self.limits,
            raw=self.raw_pixels,
        )

    def _note(self, failures: list[MaskedRow]) -> None:
        self.masked.extend(failures)
        different = {row.id: row for row in self.masked}
        if len(different) > self.max_runtime_failures:
            listed = "\n".join(
                f"  {r.where} (id {r.id}): {r.column}: {r.reason}: {r.detail}" for r in different.values()
            )
            raise DataError(
                f"{self.table.path}: candidates of {len(different)} lists could not be read while training"
                f" (limit {self.max_runtime_failures}):\n{listed}"
            )
