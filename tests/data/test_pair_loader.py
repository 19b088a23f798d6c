"""Batches: what is in them, that any cut gives the same ones, and what happens when a file goes away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.data import PairLoader, open_table
from mmalign.data.check import CheckPolicy, usable_rows
from mmalign.data.pair_loader import MaskedRow
from mmalign.data.tables import PairTable
from mmalign.errors import DataError
from mmalign.types import PairBatch
from tests.data.making import make_jsonl, make_pairs, number_of

SOFT = CheckPolicy(ties="soft")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    return open_table(make_pairs(tmp_path_factory.mktemp("pairs") / "table", 11, ties=[4]))


def make_loader(table: PairTable, **settings: Any) -> PairLoader:
    settings = {"batch_size": 4, "resolution": (16, 16), "workers": 2, **settings}
    return PairLoader(table, np.arange(len(table)), **settings)


def take(loader: PairLoader, count: int, start: int = 0) -> list[tuple[int, int, PairBatch]]:
    batches: Iterator[tuple[int, int, PairBatch]] = loader.micro_batches(start)
    return list(itertools.islice(batches, count))


def content(batches: list[tuple[int, int, PairBatch]]) -> list[tuple[Any, ...]]:
    """One comparable line per row."""
    lines = []
    for _, _, batch in batches:
        for row in range(len(batch)):
            assert batch.chosen.pixels is not None and batch.rejected.pixels is not None
            lines.append(
                (
                    batch.ids[row],
                    batch.prompts[row],
                    batch.chosen.pixels[row].numpy().tobytes(),
                    batch.rejected.pixels[row].numpy().tobytes(),
                    batch.chosen.geometry.crop[row].tolist(),
                    float(batch.weight[row]),
                )
            )
    return lines


def test_every_field_belongs_to_its_row(table: PairTable) -> None:
    seen = set()
    for _, _, batch in take(make_loader(table), 3):
        assert batch.chosen.pixels is not None and batch.rejected.pixels is not None
        assert batch.chosen.pixels.shape == (4, 3, 16, 16)
        assert batch.chosen.pixels.dtype == torch.float32
        for place, name in enumerate(batch.ids):
            row = int(name.removeprefix("row-"))
            seen.add(row)
            assert batch.prompts[place] == f"prompt {row}"
            assert number_of(batch.chosen.pixels[place]) == 2 * row
            assert number_of(batch.rejected.pixels[place]) == 2 * row + 1
            assert batch.p_chosen[place] == (0.5 if row == 4 else 1.0)
            assert batch.users[place] == f"user-{row % 3}"
            assert batch.weight[place] == 1.0 + row % 2
            assert batch.scores["taste"][place].tolist() == [row + 0.5, row - 0.5]
            assert batch.chosen.geometry.original[place].tolist() == [16, 16]
            assert batch.chosen.geometry.target[place].tolist() == [16, 16]
    assert seen == set(range(11))


def test_same_content_for_any_workers_ranks_and_accumulation(table: PairTable) -> None:
    augmented = {"flip": True, "crop": "random", "resolution": (8, 12), "drop_caption": 0.3, "seed": 3}
    expected = content(take(make_loader(table, batch_size=4, workers=0, **augmented), 6))
    for workers, prefetch in ((1, 0), (3, 5)):
        assert content(take(make_loader(table, workers=workers, prefetch=prefetch, **augmented), 6)) == expected
    two = make_loader(table, batch_size=2, accumulate=2, **augmented)
    assert content(take(two, 12)) == expected
    assert [(step, micro) for step, micro, _ in take(two, 4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ranks = [take(make_loader(table, batch_size=2, world_size=2, rank=rank, **augmented), 6) for rank in (0, 1)]
    assert content([batch for pair in zip(*ranks, strict=True) for batch in pair]) == expected


def test_resume_at_every_step_continues_exactly(table: PairTable) -> None:
    settings = {"flip": True, "seed": 1}
    whole = content(take(make_loader(table, **settings), 8))
    for start in range(8):
        rest = content(take(make_loader(table, **settings), 8 - start, start))
        assert rest == whole[4 * start :]
    loader = make_loader(table, **settings)
    assert loader.step_ids(2) == tuple(line[0] for line in whole[8:12])
    assert loader.epoch(11) == 4.0


def test_both_pictures_are_flipped_and_cropped_alike(tmp_path: Path) -> None:
    table = open_table(make_pairs(tmp_path / "wide", 12, size=(8, 24)))
    loader = make_loader(table, flip=True, crop="random", resolution=(8, 8), batch_size=12)
    corners, flipped = [], 0
    for _, _, batch in take(loader, 6):
        assert batch.chosen.pixels is not None and batch.rejected.pixels is not None
        assert torch.equal(batch.chosen.geometry.crop, batch.rejected.geometry.crop)
        for place, name in enumerate(batch.ids):
            row = int(name.removeprefix("row-"))
            left = int(batch.chosen.geometry.crop[place, 1])
            corners.append(left)
            for side, pixels in enumerate((batch.chosen.pixels[place], batch.rejected.pixels[place])):
                stored = np.random.default_rng(2 * row + side).integers(0, 256, (8, 24, 3), dtype=np.uint8)
                stored[0, 0] = (0, 2 * row + side, 7)
                levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
                straight = np.array_equal(levels, stored[:, left : left + 8])
                mirrored = np.array_equal(levels, stored[:, ::-1][:, left : left + 8])
                assert straight != mirrored
                if side == 0:
                    first = mirrored
                assert mirrored == first  # the partner agrees
            flipped += first
    assert 20 < flipped < 52  # of 72 fair coins
    assert len(set(corners)) > 10
    assert set(corners) <= set(range(17))


def test_dropped_captions_are_a_share_and_keyed(table: PairTable) -> None:
    loader = make_loader(table, drop_caption=0.5, batch_size=11)
    batches = take(loader, 20)
    dropped = [prompt == "" for _, _, batch in batches for prompt in batch.prompts]
    assert 80 < sum(dropped) < 140  # of 220
    assert all(p != "" for _, _, b in take(make_loader(table), 3) for p in b.prompts)
    assert all(p == "" for _, _, b in take(make_loader(table, drop_caption=1.0), 3) for p in b.prompts)


def test_a_vanished_file_is_masked_and_counted(tmp_path: Path) -> None:
    path = make_jsonl(tmp_path, 6)
    table = open_table(path)
    checked = usable_rows(table, check="online")
    (tmp_path / "images" / "5.png").unlink()  # rejected of row 2
    (tmp_path / "images" / "8.png").write_bytes(b"other")  # chosen of row 4
    loader = PairLoader(
        table, checked.rows, batch_size=3, resolution=(16, 16), media=checked.media, retry_seconds=(0.0,), seed=5
    )
    weights: dict[str, float] = {}
    for _, _, batch in take(loader, 2):
        assert batch.chosen.pixels is not None and batch.rejected.pixels is not None
        for place, name in enumerate(batch.ids):
            weights[name] = float(batch.weight[place])
            if weights[name]:
                assert number_of(batch.rejected.pixels[place]) == number_of(batch.chosen.pixels[place]) + 1
            assert torch.isfinite(batch.chosen.pixels[place]).all()
    assert weights == {**{f"row-{row}": 1.0 for row in range(6)}, "row-2": 0.0, "row-4": 0.0}
    found = {row.id: (row.column, row.reason) for row in loader.masked}
    assert found == {"row-2": ("rejected", "missing_image"), "row-4": ("chosen", "changed_image")}
    assert isinstance(loader.masked[0], MaskedRow) and "pairs.jsonl line" in loader.masked[0].where


def test_a_file_that_comes_back_is_not_lost(tmp_path: Path) -> None:
    import threading

    table = open_table(make_jsonl(tmp_path, 2))
    away, home = tmp_path / "away.png", tmp_path / "images" / "0.png"
    home.rename(away)
    timer = threading.Timer(0.15, lambda: away.rename(home))
    timer.start()
    loader = PairLoader(table, [0, 1], batch_size=2, resolution=(16, 16), retry_seconds=(0.1, 0.5, 1.0))
    _, _, batch = take(loader, 1)[0]
    timer.join()
    assert batch.weight.tolist() == [1.0, 1.0]
    assert loader.masked == []


def test_too_many_failures_stop_with_the_list(tmp_path: Path) -> None:
    table = open_table(make_jsonl(tmp_path, 6))
    for number in (0, 2, 4):
        (tmp_path / "images" / f"{number}.png").unlink()
    loader = PairLoader(
        table, range(6), batch_size=6, resolution=(16, 16), max_runtime_failures=2, retry_seconds=(0.0,)
    )
    with pytest.raises(DataError, match=r"3 rows could not be read.*limit 2") as caught:
        take(loader, 1)
    assert "pairs.jsonl line 1" in str(caught.value)


def test_an_unexpected_failure_names_the_row(table: PairTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("mmalign.data.sources.resize_crop", broken)
    with pytest.raises(RuntimeError, match=r"part-00000.parquet row \d+ .*ZeroDivisionError: boom"):
        take(make_loader(table), 1)


def test_closing_early_leaves_no_threads(table: PairTable) -> None:
    import threading

    before = threading.active_count()
    batches = make_loader(table, workers=3).micro_batches()
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 12}, "11 usable rows do not fill one global batch of 12"),
        ({"rank": 1}, "rank 1 does not exist"),
        ({"crop": "middle"}, "crop must be"),
        ({"drop_caption": 1.5}, "probability"),
        ({"crop_variants": 2}, "no effect"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(table: PairTable, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_loader(table, **settings)
