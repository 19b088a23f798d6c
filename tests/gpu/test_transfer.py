"""Copies ahead of the step: same numbers as on the host, page-locked buffers, overlap with compute, no hidden waits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.data import PairLoader, open_table
from mmalign.data.transfer import DeviceLoader, Ring
from tests.data.making import make_pairs

pytestmark = pytest.mark.gpu


def make_loader(folder: Path, rows: int = 24, side: int = 64, **settings: Any) -> PairLoader:
    table = open_table(make_pairs(folder / "table", rows, size=(side, side)))
    settings = {"batch_size": 8, "resolution": (side, side), "workers": 2, "flip": True, **settings}
    return PairLoader(table, np.arange(rows), **settings)


def test_a_device_batch_equals_the_host_batch(tmp_path: Path) -> None:
    host = list(itertools.islice(make_loader(tmp_path / "a").micro_batches(), 12))
    device = torch.device("cuda", torch.cuda.current_device())
    moved = itertools.islice(DeviceLoader(make_loader(tmp_path / "b"), device).micro_batches(), 12)
    for (step, micro, before), (there, sub, after) in zip(host, moved, strict=True):
        assert (step, micro) == (there, sub) and before.ids == after.ids
        for side in ("chosen", "rejected"):
            left, right = getattr(before, side), getattr(after, side)
            assert right.pixels.device == device and right.pixels.dtype == torch.float32
            assert torch.equal(left.pixels, right.pixels.cpu())
            assert torch.equal(left.geometry.crop, right.geometry.crop.cpu())
        assert after.weight.device.type == "cpu"


def test_buffers_are_page_locked_and_copies_overlap_with_compute(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    loader = make_loader(tmp_path, side=256)
    (_, _, first), (_, _, batch) = itertools.islice(loader.micro_batches(), 2)
    ring = Ring(device, 2)
    ring.send(first)[1].synchronize()
    ring.send(first)[1].synchronize()
    assert all(value.is_pinned() for buffers in ring._buffers for value in buffers.values())
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second of the compute stream
    busy.record()
    moved, copied = ring.send(batch)
    copied.synchronize()
    assert not busy.query(), "the copy waited for the compute stream"
    busy.synchronize()
    assert torch.equal(moved.chosen.pixels.cpu(), batch.chosen.pixels)


def test_the_consumer_waits_for_nothing_but_the_event(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    stream = DeviceLoader(make_loader(tmp_path), device).micro_batches()
    next(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            _, _, batch = next(stream)
            batch.chosen.pixels.mul(2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stream.close()


def test_memory_is_reused_and_never_while_it_is_read(tmp_path: Path) -> None:
    """A long kernel reads each batch while later ones arrive: sums taken late are those of the host."""
    device = torch.device("cuda", torch.cuda.current_device())
    plain = itertools.islice(make_loader(tmp_path / "a").micro_batches(), 20)
    host = [batch.chosen.pixels.double().sum().item() for _, _, batch in plain]
    sums, before = [], torch.cuda.memory_allocated(device)
    for _, _, batch in itertools.islice(DeviceLoader(make_loader(tmp_path / "b"), device, slots=2).micro_batches(), 20):
        torch.cuda._sleep(20_000_000)
        sums.append(batch.chosen.pixels.double().sum())
        del batch
    assert [value.item() for value in sums] == pytest.approx(host, rel=1e-12)
    assert torch.cuda.memory_allocated(device) - before < 64 << 20
