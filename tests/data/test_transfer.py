"""Batches that are copied ahead: the same ones in the same order, with one way for errors and nothing left running.

On the CPU the ring's buffers are ordinary memory and the copies are done at once; everything else is what runs on an accelerator
(tests/gpu has the rest).
"""

from __future__ import annotations

import gc
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.branches import BranchBatch
from mmalign.data import PairLoader, open_table
from mmalign.data.sources import normalised
from mmalign.data.tables import PairTable
from mmalign.data.transfer import DeviceLoader, Ring, bulk, on_device
from mmalign.errors import DataError
from tests.data.making import make_jsonl, make_pairs
from tests.data.test_pair_loader import content, take
from tests.fixtures import tiny_vlm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    return open_table(make_pairs(tmp_path_factory.mktemp("pairs") / "table", 11))


def make_loader(table: PairTable, **settings: Any) -> PairLoader:
    settings = {"batch_size": 4, "resolution": (16, 16), "workers": 2, "flip": True, **settings}
    return PairLoader(table, np.arange(len(table)), **settings)


@pytest.mark.parametrize("slots", [1, 3])
def test_the_same_batches_in_the_same_order(table: PairTable, slots: int) -> None:
    plain = take(make_loader(table, accumulate=2), 9, start=1)
    moved = list(itertools.islice(DeviceLoader(make_loader(table, accumulate=2), CPU, slots=slots).micro_batches(1), 9))
    assert [item[:2] for item in moved] == [item[:2] for item in plain]
    assert content(moved) == content(plain)
    assert all(batch.chosen.pixels.dtype == torch.float32 for _, _, batch in moved)


def test_pictures_cross_as_bytes_and_become_the_same_numbers(table: PairTable) -> None:
    loader = make_loader(table)
    loader.raw_pixels = True
    (_, _, raw), *_ = take(loader, 1)
    (_, _, plain), *_ = take(make_loader(table), 1)
    assert raw.chosen.pixels is not None and raw.chosen.pixels.dtype == torch.uint8
    assert torch.equal(normalised(raw.chosen.pixels), plain.chosen.pixels)
    every = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([np.float32(np.float32(np.float32(v) / np.float32(255)) * np.float32(2)) - np.float32(1)
                             for v in range(256)])  # fmt: skip
    assert torch.equal(normalised(every), expected)


def test_buffers_are_used_in_turn_and_never_shown(table: PairTable) -> None:
    batches = [batch for _, _, batch in take(make_loader(table), 5)]
    ring = Ring(CPU, 2)
    moved = [ring.send(batch)[0] for batch in batches]
    for before, after in zip(batches, moved, strict=True):
        assert torch.equal(before.chosen.pixels, after.chosen.pixels)
        assert before.chosen.pixels.data_ptr() != after.chosen.pixels.data_ptr()
    held = {value.data_ptr() for buffers in ring._buffers for value in buffers.values()}
    assert len(held) == 2 * 8  # two slots, for each side pixels and three tensors of geometry
    assert not held & {batch.chosen.pixels.data_ptr() for batch in moved}


def test_what_is_moved_and_what_stays(table: PairTable) -> None:
    (_, _, batch), *_ = take(make_loader(table), 1)
    seen: list[str] = []

    def note(name: str, value: Tensor) -> Tensor:
        seen.append(name)
        return value

    bulk(batch, note)
    sides = [f"{side}.{name}" for side in ("chosen", "rejected") for name in
             ("geometry.original", "geometry.crop", "geometry.target", "pixels")]  # fmt: skip
    assert seen == sides
    records = [("a", 1)]
    assert bulk(records, note) is records


def test_a_masked_row_is_listed_when_its_batch_is_handed_out(tmp_path: Path) -> None:
    table = open_table(make_jsonl(tmp_path, 8))
    loader = make_loader(table, workers=0, shuffle=False, batch_size=2, flip=False, retry_seconds=())
    _remove(table, 5)
    moved = DeviceLoader(loader, CPU, slots=3)
    stream = moved.micro_batches()
    found = []
    for _ in range(4):
        _, _, batch = next(stream)
        found.append((batch.ids, batch.weight.tolist(), [row.id for row in moved.masked]))
    stream.close()
    weights = [weight for _, values, _ in found for weight in values]
    assert [number for number, weight in enumerate(weights) if weight == 0] == [5]
    assert [masked for *_, masked in found] == [[], [], ["row-5"], ["row-5"]]


def _remove(table: PairTable, row: int) -> None:
    path = table.record(row).chosen.path
    assert path is not None
    Path(path).unlink()


def test_an_error_comes_at_its_batch_and_the_thread_ends(tmp_path: Path) -> None:
    table = open_table(make_jsonl(tmp_path, 8))
    for row in (4, 5):
        _remove(table, row)
    loader = make_loader(
        table, workers=0, shuffle=False, batch_size=2, max_runtime_failures=1, retry_seconds=(), flip=False
    )
    seen = []
    with pytest.raises(DataError, match="2 rows could not be read while training"):
        for step, _, batch in DeviceLoader(loader, CPU).micro_batches():
            seen.append((step, batch.ids))
    assert [step for step, _ in seen] == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name == "mmalign-copy"]


def test_a_consumer_that_leaves_stops_the_thread(table: PairTable) -> None:
    stream = DeviceLoader(make_loader(table), CPU).micro_batches()
    next(stream)
    del stream
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmalign-")]


def test_everything_else_is_the_loaders(table: PairTable) -> None:
    loader = make_loader(table)
    moved = DeviceLoader(loader, CPU)
    assert moved.order is loader.order and moved.epoch(11) == 4.0 and moved.step_ids(2) == loader.step_ids(2)
    assert on_device(loader, CPU) is loader
    with pytest.raises(ValueError, match="at least one slot"):
        DeviceLoader(loader, CPU, slots=0)


def test_batches_of_answers_move_whole(tmp_path: Path) -> None:
    family = tiny_vlm.load("llava", tiny_vlm.build("llava", tmp_path / "llava"))
    batch = family.collate([family.encode(tiny_vlm.record(media=[tiny_vlm.picture(1, (24, 24))]))])
    moved, copied = Ring(CPU, 1).send(batch)
    assert copied is None and moved.ids == batch.ids and moved.media.image_digests == batch.media.image_digests
    assert moved.media.image.keys() == batch.media.image.keys()
    for name, value in vars_of(batch):
        other = dict(vars_of(moved))[name]
        assert torch.equal(value, other) and value.data_ptr() != other.data_ptr(), name


def vars_of(batch: BranchBatch) -> list[tuple[str, Tensor]]:
    """Every tensor of a batch with its name."""
    found = [(name, value) for name in batch.__dataclass_fields__ if isinstance(value := getattr(batch, name), Tensor)]
    return [*found, *batch.media.image.items(), *batch.scores.items()]
