"""Which pairs an embedding may come from: never the one trained with, nor one that shows the same picture."""

from __future__ import annotations

from mmalign.experiment.supports import Supports, make_supports


def supports(
    sizes: dict[str, int], *, shots: int = 4, free: bool, most: int = 20, shared: dict[int, bytes] | None = None
) -> Supports:
    owners = dict(enumerate(user for user, size in sizes.items() for _ in range(size)))
    pictures = {row: frozenset({b"%d" % row, (shared or {}).get(row, b"x%d" % row)}) for row in owners}
    return make_supports(owners, pictures, shots=shots, most=most, free=free, seed=0)


def test_free_draws_leave_the_pair_out_and_stay_with_the_user() -> None:
    found = supports({"a": 6, "b": 5}, free=True)
    drawn = {found.draw("a", 2, seed=0, step=step, sample="row-2") for step in range(50)}
    assert len(drawn) == 5, "the five ways to take four of the five others"
    assert all(len(support) == 4 and 2 not in support and max(support) < 6 for support in drawn)
    assert found.draw("a", 2, seed=0, step=7, sample="row-2") == found.draw("a", 2, seed=0, step=7, sample="row-2")


def test_a_user_with_one_pair_too_few_has_no_support() -> None:
    found = supports({"a": 5, "b": 4}, free=True)
    assert all(found.has("a", row) for row in range(5))
    assert not any(found.has("b", row) for row in range(5, 9))


def test_groups_are_disjoint_and_only_the_left_out_pair_has_one() -> None:
    found = supports({"a": 5}, free=False)
    (group,) = found.groups["a"]
    (left,) = set(range(5)) - set(group)
    assert found.has("a", left) and not any(found.has("a", row) for row in group)
    assert found.draw("a", left, seed=0, step=0, sample="x") == group
    many = supports({"a": 30}, free=False, most=3).groups["a"]
    assert len(many) == 3 and len({row for group in many for row in group}) == 12


def test_pairs_that_share_a_picture_are_left_out() -> None:
    found = supports({"a": 7}, free=True, shared={0: b"same", 3: b"same", 5: b"same"})
    assert found.has("a", 0)
    assert {row for step in range(40) for row in found.draw("a", 0, seed=0, step=step, sample="r")} == {1, 2, 4, 6}
    assert not supports({"a": 5}, free=True, shared={0: b"same", 3: b"same"}).has("a", 0)
    groups = supports({"a": 9}, shots=4, free=False)
    first, second = groups.groups["a"]
    clash = supports({"a": 9}, shots=4, free=False, shared={first[0]: b"same", second[0]: b"same"})
    assert clash.choices("a", first[1]) == [second] and clash.choices("a", first[0]) == []
