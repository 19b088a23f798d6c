"""Pictures decoded by other processes, into memory that this one shares with them.

Decoding in threads waits for the interpreter between pictures; where pictures are large or many, processes do not. A worker opens
the table by its path, decodes both pictures of a row and writes their pixels into a slot of shared memory; only numbers (the
slot, sizes, corners) travel between the processes. The pixels are those that a thread would have made. Not for cached runs, which
decode nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmalign.data.augment import Draw
from mmalign.data.mediaindex import MediaIndex
from mmalign.data.sources import PixelReader, Prepared, RowFailure, normalised
from mmalign.data.tables import PairTable, open_table
from mmalign.errors import DataError
from mmalign.media import Limits
from mmalign.media.slots import SlotPool


class ProcessReader:
    """As `PixelReader`, with processes behind it. Close it when done.

    Args:
        table: the table; it is opened anew in every process, by its path.
        resolution: (height, width) in pixels.
        media: facts from the check, against which pictures are compared.
        processes: how many.
        slots: rows that may be under way at once.

    Raises:
        DataError: a table that has no path of its own (a mixture).
    """

    def __init__(
        self, table: PairTable, *, resolution: tuple[int, int], media: MediaIndex | None, limits: Limits,
        retry_seconds: Sequence[float], processes: int, slots: int,
    ) -> None:  # fmt: skip
        if not table.path.exists():
            raise DataError(f"{table.path}: decoding in processes opens a table by its path, and this one has none")
        self.media, self.resolution, self.raw = media, resolution, False
        self._shape = (2, 3, *resolution)
        self._slots = SlotPool(
            processes=processes, slots=slots, slot_bytes=int(np.prod(self._shape)), begin=_begin,
            arguments=(str(table.path), self._shape, resolution, limits, tuple(retry_seconds)),
            remedy="resume the run with fewer data.workers, or with data.decode=threads",
        )  # fmt: skip

    def read(self, row: int, record: Any, draw: Draw, stop: threading.Event) -> tuple[Prepared, Prepared]:
        """Both pictures of a row under the same draw; `record` is not looked at.

        Raises:
            RowFailure: either cannot be read, or is not the picture that was checked.
            DataError: a worker was killed.
        """
        slot = self._slots.take(stop)
        if slot is None:
            raise RowFailure(column="chosen", reason="missing_image", detail="the run has ended")
        known = None
        if self.media is not None:
            known = (self.media.picture(row, 0).sha256, self.media.picture(row, 1).sha256)
        try:
            done = self._slots.run(_decode, slot, row, draw, known)
            if isinstance(done, dict):
                raise RowFailure(**done)
            pixels = torch.from_numpy(self._slots.view(slot).reshape(self._shape).copy())
        finally:
            self._slots.give(slot)
        first, second = (
            Prepared(pixels=value if self.raw else normalised(value), original=original, crop=crop)
            for value, (original, crop) in zip(pixels, done, strict=True)
        )
        return first, second

    def close(self) -> None:
        """End the processes and give the memory back."""
        self._slots.close()


_here: dict[str, Any] = {}
"""In a worker: the table, its reader, and the shape of a row's pixels."""


def _begin(
    path: str, shape: tuple[int, ...], resolution: tuple[int, int], limits: Limits, retry: tuple[float, ...]
) -> None:
    torch.set_num_threads(1)
    reader = PixelReader(resolution=resolution, media=None, limits=limits, retry_seconds=retry)
    reader.raw = True
    _here.update(table=open_table(path, progress=False), reader=reader, stop=threading.Event(), shape=shape)


def _decode(
    memory: np.ndarray, row: int, draw: Draw, known: tuple[str, str] | None
) -> dict[str, str] | list[tuple[tuple[int, int], tuple[int, int]]]:
    """Decode a row into a slot: sizes and corners of both pictures, or what is wrong."""
    reader: PixelReader = _here["reader"]
    try:
        both = reader.read(row, _here["table"].record(row), draw, _here["stop"], known=known)
    except RowFailure as failure:
        return {"column": failure.column, "reason": failure.reason, "detail": failure.detail}
    for side, one in enumerate(both):
        memory.reshape(_here["shape"])[side] = one.pixels.numpy()
    return [(one.original, one.crop) for one in both]


__all__ = ["ProcessReader"]
