"""How many pairs a second each stage of the way to the model gives, on one table and this machine; the slowest is named.

Stages are measured one after the other on the same rows, each fed from memory by what comes before it, so a rate is what the
stage could give alone. The last line is the loader with all of them together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmalign.data.augment import Augmentation
from mmalign.data.check import CheckResult
from mmalign.data.pair_loader import PairLoader
from mmalign.data.sources import prepare, stack_pixels
from mmalign.data.tables import PairTable
from mmalign.errors import DataError
from mmalign.media import DEFAULT, decode_image, read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage's rate."""

    name: str
    pairs_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Rates of all stages, in the order of the way."""

    stages: tuple[Stage, ...]
    whole: float
    """Pairs a second of the loader as it is."""
    workers: int

    @property
    def slowest(self) -> str:
        """Name of the stage with the lowest rate."""
        return min(self.stages, key=lambda stage: stage.pairs_per_second).name

    def __str__(self) -> str:
        width = max(len(stage.name) for stage in self.stages)
        lines = [f"{stage.name:<{width}}  {stage.pairs_per_second:>12,.0f} pairs/s" for stage in self.stages]
        lines.append(f"{'loader':<{width}}  {self.whole:>12,.0f} pairs/s with {self.workers} workers")
        return "\n".join([*lines, f"slowest stage: {self.slowest}"])


def bench(
    table: PairTable,
    checked: CheckResult,
    *,
    batch_size: int,
    resolution: tuple[int, int],
    workers: int = 2,
    seconds: float = 2.0,
) -> BenchReport:
    """Measure reading, decoding, resizing, collating and copying pixels of a table's usable rows.

    Args:
        seconds: how long each stage is measured.

    Raises:
        DataError: fewer usable rows than a batch, or a picture that cannot be read.
    """
    if len(checked.rows) < batch_size:
        raise DataError(f"{table.path}: {len(checked.rows)} usable rows do not fill a batch of {batch_size}")
    rows = checked.rows[
        np.linspace(0, len(checked.rows) - 1, min(len(checked.rows), 4 * batch_size)).astype(int)
    ].tolist()
    records = [table.record(row) for row in rows]
    encoded = [read_bytes(ref)[0] for record in records for ref in (record.chosen, record.rejected)]
    augmentation = Augmentation(resolution=resolution)
    pictures = [
        prepare(data, source="", resolution=augmentation.resolution, crop="center", flip=False, limits=DEFAULT)
        for data in encoded[: 2 * batch_size]
    ]
    batch = stack_pixels(pictures[:batch_size], resolution)
    stages = [
        Stage(name="read rows", pairs_per_second=_rate(lambda: [table.record(row) for row in rows], len(rows), seconds)),
        Stage(name="decode", pairs_per_second=_rate(lambda: [decode_image(data) for data in _some(encoded)],
                                                    len(_some(encoded)) / 2, seconds)),
        Stage(name="decode, resize, crop", pairs_per_second=_rate(
            lambda: [prepare(data, source="", resolution=resolution, crop="center", flip=False, limits=DEFAULT)
                     for data in _some(encoded)], len(_some(encoded)) / 2, seconds)),
        Stage(name="collate", pairs_per_second=_rate(lambda: stack_pixels(pictures, resolution), len(pictures) / 2, seconds)),
    ]  # fmt: skip
    if torch.cuda.is_available() and batch.pixels is not None:
        pixels = batch.pixels.pin_memory()

        def copy() -> None:
            pixels.to("cuda", non_blocking=True)
            torch.cuda.synchronize()

        stages.append(Stage(name="copy to device", pairs_per_second=_rate(copy, batch_size / 2, seconds)))
    loader = PairLoader(
        table, checked.rows, batch_size=batch_size, resolution=resolution, media=checked.media, workers=workers
    )
    batches = loader.micro_batches()
    next(batches)
    whole = _rate(lambda: next(batches), batch_size, seconds)
    return BenchReport(stages=tuple(stages), whole=whole, workers=workers)


def _some(encoded: Sequence[bytes]) -> Sequence[bytes]:
    return encoded[:16]


def _rate(work: Callable[[], object], pairs: float, seconds: float) -> float:
    """Pairs a second of calls that handle `pairs` each; the first call is not counted."""
    work()
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        work()
        calls += 1
    return calls * pairs / (time.perf_counter() - start)
