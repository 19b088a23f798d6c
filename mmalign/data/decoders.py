"""Pictures decoded by other processes, into memory that this one shares with them.

Decoding in threads waits for the interpreter between pictures; where pictures are large or many, processes do not. A worker opens
the table by its path, decodes both pictures of a row and writes their pixels into a slot of shared memory; only numbers (the
slot, sizes, corners) travel between the processes. The pixels are those that a thread would have made. Not for cached runs, which
decode nothing.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import torch

from mmalign.data.augment import Draw
from mmalign.data.mediaindex import MediaIndex
from mmalign.data.sources import PixelReader, Prepared, RowFailure, normalised
from mmalign.data.tables import PairTable, open_table
from mmalign.errors import DataError
from mmalign.media import Limits

PAUSE = 0.1
"""Seconds between two looks whether the run has ended."""


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
        height, width = resolution
        self._shape = (slots, 2, 3, height, width)
        self._memory = SharedMemory(create=True, size=int(np.prod(self._shape)))
        self._pixels: np.ndarray = np.ndarray(self._shape, dtype=np.uint8, buffer=self._memory.buf)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        # Not fork: this process has threads (Arrow's, torch's), and a fork of them may hang.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            processes, mp_context=context, initializer=_begin,
            initargs=(str(table.path), self._memory.name, self._shape, resolution, limits, tuple(retry_seconds)),
        )  # fmt: skip

    def read(self, row: int, record: Any, draw: Draw, stop: threading.Event) -> tuple[Prepared, Prepared]:
        """Both pictures of a row under the same draw; `record` is not looked at.

        Raises:
            RowFailure: either cannot be read, or is not the picture that was checked.
            DataError: a worker was killed.
        """
        slot = self._slot(stop)
        known = None
        if self.media is not None:
            known = (self.media.picture(row, 0).sha256, self.media.picture(row, 1).sha256)
        try:
            done = self._pool.submit(_decode, slot, row, draw, known).result()
            if isinstance(done, dict):
                raise RowFailure(**done)
            pixels = torch.from_numpy(self._pixels[slot].copy())
        except BrokenProcessPool as error:
            raise DataError(
                "a decoding process was killed, perhaps for want of memory; resume the run with fewer data.workers, or with"
                " data.decode=threads"
            ) from error
        finally:
            self._free.put(slot)
        first, second = (
            Prepared(pixels=value if self.raw else normalised(value), original=original, crop=crop)
            for value, (original, crop) in zip(pixels, done, strict=True)
        )
        return first, second

    def close(self) -> None:
        """End the processes and give the memory back."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        del self._pixels
        self._memory.close()
        self._memory.unlink()

    def _slot(self, stop: threading.Event) -> int:
        while True:
            try:
                return self._free.get(timeout=PAUSE)
            except queue.Empty:
                if stop.is_set():
                    raise RowFailure(column="chosen", reason="missing_image", detail="the run has ended") from None


_here: dict[str, Any] = {}
"""In a worker: the table, its reader, and the shared memory."""


def _begin(
    path: str, memory: str, shape: tuple[int, ...], resolution: tuple[int, int], limits: Limits, retry: tuple[float, ...]
) -> None:
    torch.set_num_threads(1)
    shared = SharedMemory(name=memory)
    reader = PixelReader(resolution=resolution, media=None, limits=limits, retry_seconds=retry)
    reader.raw = True
    _here.update(
        table=open_table(path, progress=False), reader=reader, shared=shared, stop=threading.Event(),
        pixels=np.ndarray(shape, dtype=np.uint8, buffer=shared.buf),
    )  # fmt: skip


def _decode(
    slot: int, row: int, draw: Draw, known: tuple[str, str] | None
) -> dict[str, str] | list[tuple[tuple[int, int], tuple[int, int]]]:
    """Decode a row into a slot: sizes and corners of both pictures, or what is wrong."""
    reader: PixelReader = _here["reader"]
    try:
        both = reader.read(row, _here["table"].record(row), draw, _here["stop"], known=known)
    except RowFailure as failure:
        return {"column": failure.column, "reason": failure.reason, "detail": failure.detail}
    for side, one in enumerate(both):
        _here["pixels"][slot, side] = one.pixels.numpy()
    return [(one.original, one.crop) for one in both]


__all__ = ["ProcessReader"]
