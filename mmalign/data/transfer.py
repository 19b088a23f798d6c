"""Batches on the accelerator before they are asked for: a pinned ring, copies on a stream of their own, one way for errors.

A thread takes batches from any loader, puts their tensors into buffers of page-locked memory that are used in turn, and copies
them from there on a side stream while the step before is computed. What is handed over is on the device; all that the consumer's
stream waits for is the event of that batch's copies. Pictures cross the bus as bytes and become numbers on the device, with the
same arithmetic as on the host, so a batch is the same bit for bit.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from mmalign.branches import BranchBatch
from mmalign.data.pair_loader import MaskedRow
from mmalign.data.sources import normalised

BULK: Final = ("chosen", "rejected", "images", "text", "illegal", "innocent")
"""Parts of a batch of pictures that are worth copying ahead. The few numbers beside them (labels, weights, masks) stay on the
host, where steps decide by them without waiting for the device."""
PAUSE: Final = 0.1
"""Seconds between two looks whether the consumer has gone."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A batch on its way."""

    step: int
    micro: int
    batch: Any
    copied: Any  # torch.cuda.Event, or None on the CPU
    masked: int  # rows the loader had masked once it had made this batch


class Ring:
    """Buffers that batches pass through on their way to the device, used in turn.

    Args:
        device: where batches go. On the CPU the buffers are ordinary memory and copies are done when `send` returns.
        slots: batches that may be on their way at once.
    """

    def __init__(self, device: torch.device, slots: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[dict[str, Tensor]] = [{} for _ in range(slots)]
        self._events: list[Any] = [None] * slots
        self._at = 0

    def send(self, batch: Any) -> tuple[Any, Any]:
        """The batch with its tensors on the device, and the event after which they may be read (None on the CPU)."""
        slot = self._at
        self._at = (slot + 1) % len(self._buffers)
        if self._events[slot] is not None:
            self._events[slot].synchronize()  # the copies out of these buffers are done
        buffers = self._buffers[slot]
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            moved = bulk(batch, lambda name, value: self._copy(buffers, name, value))
            if self.stream is not None:
                self._events[slot] = self.stream.record_event()
        return moved, self._events[slot]

    def _copy(self, buffers: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
        size = value.numel() * value.element_size()
        held = buffers.get(name)
        if held is None or held.numel() < size:
            held = buffers[name] = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        staged = held[:size].view(value.dtype).reshape(value.shape) if size else value
        staged.copy_(value)
        there = torch.empty(value.shape, dtype=value.dtype, device=self.device)
        there.copy_(staged, non_blocking=True)
        return normalised(there) if name.endswith(".pixels") and there.dtype is torch.uint8 else there


class DeviceLoader:
    """A loader whose batches are on a device when they come.

    Args:
        loader: makes batches on the CPU. Everything but `micro_batches` and `masked` is asked of it.
        device: where they go.
        slots: batches that may be on their way at once, each with its own page-locked buffers.
    """

    def __init__(self, loader: Any, device: torch.device, *, slots: int = 3) -> None:
        if slots < 1:
            raise ValueError(f"a ring has at least one slot, got {slots}")
        self.loader, self.device, self.slots = loader, device, slots
        self._consumed = 0
        if hasattr(loader, "raw_pixels"):
            loader.raw_pixels = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    @property
    def masked(self) -> list[MaskedRow]:
        """Rows that had weight 0 in a batch that was handed out; the loader may know of more, ahead of it."""
        return list(self.loader.masked[: self._consumed])

    def micro_batches(self, start_step: int = 0) -> Iterator[tuple[int, int, Any]]:
        """Endless (step, micro-batch number, batch), as the loader's, in its order.

        Raises:
            Whatever the loader raises, at the batch it would have raised it for.
        """
        ready: queue.Queue[_Ready | BaseException] = queue.Queue(self.slots)
        gone = threading.Event()
        thread = threading.Thread(
            target=self._send_all, args=(start_step, ready, gone), name="mmalign-copy", daemon=True
        )
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                self._receive(item)
                yield item.step, item.micro, item.batch
        finally:
            gone.set()
            thread.join()

    def _receive(self, item: _Ready) -> None:
        self._consumed = item.masked
        if item.copied is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(item.copied)

        def keep(name: str, value: Tensor) -> Tensor:
            value.record_stream(stream)  # its memory is not handed out again before this stream is done with it
            return value

        bulk(item.batch, keep)

    def _send_all(self, start: int, ready: queue.Queue[Any], gone: threading.Event) -> None:
        """Body of the thread: what happens in it, good or bad, goes through one queue."""

        def hand_over(item: Any) -> bool:
            while not gone.is_set():
                try:
                    ready.put(item, timeout=PAUSE)
                    return True
                except queue.Full:
                    continue
            return False

        stream = self.loader.micro_batches(start)
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                ring = Ring(self.device, self.slots)
                for step, micro, batch in stream:
                    moved, copied = ring.send(batch)
                    if not hand_over(_Ready(step, micro, moved, copied, len(self.loader.masked))):
                        return
        except BaseException as error:
            hand_over(error)
        finally:
            stream.close()


def bulk(batch: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """A batch with its large tensors changed; `change` is told where in the batch a tensor is, e.g. ``chosen.pixels``.

    Of batches of answers that is every tensor, as in their own `to`; other values pass through.
    """
    if isinstance(batch, BranchBatch):
        return _walk("", batch, change)
    if not is_dataclass(batch) or isinstance(batch, type):
        return batch
    names = [item.name for item in fields(batch) if item.name in BULK]
    return replace(batch, **{name: _walk(name, getattr(batch, name), change) for name in names})


def _walk(name: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(name, value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{item.name: _walk(f"{name}.{item.name}", getattr(value, item.name), change) for item in fields(value)}
        )
    if isinstance(value, Mapping):
        return {key: _walk(f"{name}.{key}", item, change) for key, item in value.items()}
    return value


def on_device(loader: Any, device: torch.device, *, slots: int = 3) -> Any:
    """The loader itself where batches are on its device already (the CPU), else with copies made ahead."""
    return DeviceLoader(loader, device, slots=slots) if device.type == "cuda" else loader


__all__ = ["DeviceLoader", "Ring", "bulk", "on_device"]
