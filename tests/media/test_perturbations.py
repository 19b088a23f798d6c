"""Perturbed orders: documented counts, permutations of the same items, levels that differ, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mmalign.errors import DataError
from mmalign.media import RATES, distinct_rates, perturb
from mmalign.media.perturbations import PERTURBATIONS, kendall


@pytest.mark.parametrize("total", [2, 3, 4, 5, 8, 17, 32])
@pytest.mark.parametrize("rate", RATES)
def test_order_kinds_are_permutations_in_groups_and_never_the_original(total: int, rate: int) -> None:
    size = max(1, total // rate)
    for kind in ("shuffle", "reverse"):
        for seed in range(6):
            found = perturb(total, kind, seed=seed, key="clip", rate=rate)
            assert sorted(found.numbers) == list(range(total)) != list(found.numbers)
            assert found.kept == 1.0 and found.strength == found.distance > 0
            pieces = [found.numbers[start : start + size] for start in range(0, total, size)] if total % size == 0 else []
            assert all(list(piece) == list(range(piece[0], piece[0] + size)) for piece in pieces)


def test_drop_keeps_the_documented_count_in_order() -> None:
    kept = [len(perturb(32, "drop", seed=0, key="a", rate=rate).numbers) for rate in (16, 8, 4, 2)]
    assert kept == [2, 4, 8, 16]
    assert len(perturb(5, "drop", seed=0, key="a", rate=8).numbers) == 1
    found = perturb(9, "drop", seed=3, key="a", rate=2)
    assert list(found.numbers) == sorted(found.numbers) and found.kept == pytest.approx(4 / 9)
    seen = Counter(number for seed in range(600) for number in perturb(6, "drop", seed=seed, key="a", rate=2).numbers)
    assert all(abs(count / 600 - 0.5) < 0.08 for count in seen.values()) and len(seen) == 6


def test_hand_worked_groups() -> None:
    assert perturb(8, "reverse", seed=0, key="a", rate=2).numbers == (4, 5, 6, 7, 0, 1, 2, 3)
    assert perturb(8, "reverse", seed=0, key="a", rate=4).numbers == (6, 7, 4, 5, 2, 3, 0, 1)
    assert perturb(5, "reverse", seed=0, key="a", rate=2).numbers == (4, 2, 3, 0, 1)
    assert {perturb(4, "shuffle", seed=seed, key="a", rate=2).numbers for seed in range(9)} == {(2, 3, 0, 1)}
    assert kendall([3, 2, 1, 0]) == 1.0 and kendall([1, 0, 2]) == pytest.approx(1 / 3) and kendall([2, 2]) == 0.0


def test_drop_by_similarity_and_by_group() -> None:
    alike = np.eye(4)
    alike[1, 2] = alike[2, 1] = 0.9  # 1 and 2 look the same: one of them goes first
    alike[2, 3] = alike[3, 2] = 0.5
    assert perturb(4, "drop", seed=0, key="a", rate=2, by="similarity", similarity=alike).numbers in ((0, 2), (0, 3))
    assert perturb(4, "drop", seed=0, key="a", rate=2, by="similarity", similarity=alike).numbers == (0, 3)
    found = {perturb(6, "drop", seed=s, key="a", rate=2, by="group", groups=[0, 0, 1, 1, 0, 2]).numbers for s in range(30)}
    assert found == {(0, 1, 4), (2, 3), (5,), (2, 3, 5)}


def test_our_own_kinds() -> None:
    assert {perturb(6, "speed", seed=s, key="a", rate=2).numbers for s in range(9)} == {(0, 2, 4), (1, 3, 5)}
    still = perturb(6, "freeze", seed=1, key="a", rate=2).numbers
    assert len(still) == 6 and list(still) == sorted(still) and len(set(still)) in (3, 4)
    joined = perturb(6, "splice", seed=1, key="a", rate=2, other=9)
    assert sum(number >= 6 for number in joined.numbers) == 3 and joined.kept == 0.5
    assert all(number % 6 == place for place, number in enumerate(joined.numbers))


def test_levels_that_coincide_are_named_once() -> None:
    assert distinct_rates(32) == (16, 8, 4, 2)
    assert distinct_rates(8) == (8, 4, 2)
    assert distinct_rates(6) == (4, 2)
    assert distinct_rates(3) == (2,) and distinct_rates(1) == ()
    strengths = [perturb(32, "drop", seed=0, key="a", rate=rate).strength for rate in RATES]
    assert strengths == sorted(strengths, reverse=True)


def test_a_perturbation_is_a_function_of_seed_kind_rate_and_key() -> None:
    def draw(**changed: Any) -> tuple[int, ...]:
        settings = {"kind": "shuffle", "seed": 0, "key": "a", "rate": 16, **changed}
        return perturb(16, **settings).numbers

    assert draw() == draw()
    assert len({draw(), draw(seed=1), draw(key="b")}) == 3
    assert perturb(16, "drop", seed=0, key="a", rate=2).record()["strength"] == 0.5


@pytest.mark.parametrize(
    "bad",
    [{"kind": "stretch"}, {"total": 1}, {"rate": 1}, {"by": "size"}, {"kind": "shuffle", "by": "group"}, {"by": "group"},
     {"by": "similarity", "similarity": np.eye(3)}, {"kind": "splice", "other": 3}],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(bad: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"total": 4, "kind": "drop", "seed": 0, "key": "a", **bad}
    with pytest.raises(DataError):
        perturb(settings.pop("total"), settings.pop("kind"), **settings)


def test_all_kinds_run_at_every_small_size() -> None:
    for kind in PERTURBATIONS:
        for total in range(2, 9):
            for rate in (2, 3, 16):
                found = perturb(total, kind, seed=0, key="k", rate=rate, other=total)
                assert found.numbers and 0 < found.kept <= 1 and 0 <= found.distance <= 1
