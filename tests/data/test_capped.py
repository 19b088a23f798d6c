"""No prompt has more than its share of an epoch, and no row is starved; a shuffle by blocks stays near."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmalign.data import order as order_module
from mmalign.data.capped import CappedOrder, prompt_numbers
from mmalign.data.order import BLOCK, WINDOW, Order, Shuffle
from mmalign.data.tables import open_table
from mmalign.errors import DataError
from tests.data.making import make_jsonl

PROMPTS = np.array([7, 7, 7, 2, 7, 7, 2, 9])
"""Five rows of one prompt, two of another, one of a third."""


def capped(cap: int, *, batch: int = 1, seed: int = 0, shuffle: Shuffle = True) -> CappedOrder:
    return CappedOrder(
        table_fingerprint="t", rows=np.arange(100, 108), prompts=PROMPTS, cap=cap, seed=seed, global_batch=batch, shuffle=shuffle
    )


def line(order: Order, count: int) -> list[tuple[int, int]]:
    return [(slot.row, slot.epoch) for step in range(count // order.global_batch) for slot in order.batch(step)]


def test_by_hand_without_shuffle() -> None:
    """The five rows of prompt 7 are 100, 101, 102, 104, 105: two an epoch, in turn."""
    order = capped(2, shuffle=False)
    assert order.length == 5
    assert line(order, 15) == [
        (100, 0), (101, 0), (103, 0), (106, 0), (107, 0),
        (102, 0), (103, 1), (104, 0), (106, 1), (107, 1),
        (100, 1), (103, 2), (105, 0), (106, 2), (107, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("cap", [1, 2, 3, 5, 9])
def test_every_row_in_turn_and_no_prompt_above_its_share(cap: int) -> None:
    order = capped(cap)
    whole = line(order, 10 * order.length)
    for epoch in range(10):
        part = whole[epoch * order.length : (epoch + 1) * order.length]
        shares = Counter(int(PROMPTS[row - 100]) for row, _ in part)
        assert shares == {7: min(cap, 5), 2: min(cap, 2), 9: 1}
    numbers: dict[int, list[int]] = {}
    for row, number in whole:
        numbers.setdefault(row, []).append(number)
    for row, found in numbers.items():
        assert found == list(range(len(found))), f"row {row} counts how often it came"
    of_seven = [len(numbers[row]) for row in (100, 101, 102, 104, 105)]
    assert max(of_seven) - min(of_seven) <= 1


def test_a_cap_nobody_reaches_is_no_cap() -> None:
    order = capped(5)
    assert order.length == 8 and sorted(row for row, _ in line(order, 8)) == list(range(100, 108))


def test_any_step_alone_any_cut_and_another_order_for_other_settings() -> None:
    whole = line(capped(2, batch=4), 40)
    assert [(slot.row, slot.epoch) for slot in capped(2, batch=4).batch(9)] == whole[36:]
    cut = [
        slot for step in range(10) for rank in range(2)
        for slot in capped(2, batch=4).micro_batch(step, 0, batch_size=2, world_size=2, rank=rank)
    ]  # fmt: skip
    assert [(slot.row, slot.epoch) for slot in cut] == whole
    assert len({capped(2).fingerprint, capped(3).fingerprint, capped(2, seed=1).fingerprint, capped(2, batch=4).fingerprint}) == 4
    assert line(capped(2, seed=1), 10) != line(capped(2), 10)
    assert [row for row, _ in line(capped(2), 5)] != sorted(row for row, _ in line(capped(2), 5))


def test_caps_without_meaning() -> None:
    with pytest.raises(DataError, match="at least one row of every prompt, got a cap of 0"):
        capped(0)
    with pytest.raises(DataError, match="at most 1 rows of a prompt has 3 rows, fewer than a global batch of 4; raise the cap"):
        capped(1, batch=4)


def test_prompts_of_a_table(tmp_path: Path) -> None:
    path = make_jsonl(tmp_path, 4)
    path.write_text(path.read_text().replace("prompt 3", "prompt 1"))
    numbers = prompt_numbers(open_table(path), np.array([3, 0, 1]))
    assert numbers[0] == numbers[2] != numbers[1]


def test_blocks_stay_together_and_every_row_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "BLOCK", 8)
    monkeypatch.setattr(order_module, "WINDOW", 3)
    order = Order(table_fingerprint="t", rows=np.arange(100), seed=0, global_batch=10, shuffle="block")
    rows = [slot.row for step in range(10) for slot in order.batch(step)]
    assert sorted(rows) == list(range(100)) and rows != sorted(rows)
    windows = [{row // 8 for row in rows[first : first + 20]} for first in range(0, 100, 24)]
    assert all(len(blocks) <= 3 for blocks in windows[:3]), "20 rows of a window of three blocks"
    # Rows of a window are mixed, and its blocks are no neighbours.
    assert any(abs(left - right) > 1 for left, right in itertools.pairwise(rows[:24]))
    assert len({tuple(sorted(blocks)) for blocks in windows}) == len(windows)
    again = Order(table_fingerprint="t", rows=np.arange(100), seed=0, global_batch=10, shuffle="block")
    assert again.batch(7) == order.batch(7)
    assert [slot.row for step in range(10, 20) for slot in order.batch(step)] != rows
    other = Order(table_fingerprint="t", rows=np.arange(100), seed=0, global_batch=10)
    assert other.fingerprint != order.fingerprint
    with pytest.raises(DataError, match="shuffle must be true, false or 'block', got 'blocks'"):
        Order(table_fingerprint="t", rows=np.arange(100), seed=0, global_batch=10, shuffle="blocks")  # type: ignore[arg-type]


def test_a_small_table_is_one_window() -> None:
    assert BLOCK * WINDOW > 1000
    order = Order(table_fingerprint="t", rows=np.arange(1000), seed=0, global_batch=100, shuffle="block")
    rows = [slot.row for step in range(10) for slot in order.batch(step)]
    assert sorted(rows) == list(range(1000)) and len({row // 100 for row in rows[:100]}) > 5
