"""Clips made worse in order or in coverage: index operations on anything listed in time, frames as well as captions.

A perturbation never touches a picture. It says which items of a sequence are shown, in which order, so that one decode
serves every perturbed version. Three kinds are those of arXiv:2503.16929 in the form of its release (lscpku/TEMPLE), with
magnitude r over n items: `drop` keeps max(1, floor(n / r)) of them; `shuffle` and `reverse` cut the sequence into consecutive
groups of max(1, floor(n / r)) items and reorder the groups. A large r is strong and easy to tell from the original, 2 is hard.
Three more are ours: `speed`, `freeze` and `splice`.

Departures: a shuffle is drawn again until it moves something (the release keeps the original order in half of its r = 2
shuffles of an even number), and levels that would be the same operation on a short clip are named once (`distinct_rates`).
Everything is a function of (seed, kind, rate, key).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from mmalign.errors import DataError

PAPER: Final = ("drop", "shuffle", "reverse")
"""Kinds of arXiv:2503.16929."""
OURS: Final = ("speed", "freeze", "splice")
"""Further kinds of our own."""
PERTURBATIONS: Final = (*PAPER, *OURS)
DROPS: Final = ("rate", "similarity", "group")
RATES: Final = (16, 8, 4, 2)
"""The release's levels, from easy to hard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbed:
    """Which items are shown in place of 0..total - 1, and how far that is from them."""

    kind: str
    rate: int
    total: int
    numbers: tuple[int, ...]
    """Items in the order shown. `splice` counts those of the other sequence from `total` on."""
    kept: float
    """Share of the items that are still shown, in (0, 1]."""
    distance: float
    """Normalised Kendall distance to the original order in [0, 1]: 0 as it was, 1 backwards."""

    @property
    def strength(self) -> float:
        """How easy it is to tell from the original, in (0, 1]: what is missing, or how far the order is off, whichever is
        more."""
        return max(1.0 - self.kept, self.distance)

    def record(self) -> dict[str, Any]:
        """For provenance: plain data with `strength`."""
        return {**asdict(self), "numbers": list(self.numbers), "strength": self.strength}


def group_size(total: int, rate: int) -> int:
    """max(1, floor(total / rate)): items that a drop keeps, and items of a group that moves as one."""
    return max(1, total // rate)


def distinct_rates(total: int, rates: Sequence[int] = RATES) -> tuple[int, ...]:
    """The rates that differ on so many items, from easy to hard; of rates that coincide, the smallest.

    On 6 items 16, 8 and 4 all move single items: (4, 2) is left. Fewer than two items have no levels at all.
    """
    if total < 2:
        return ()
    smallest = {group_size(total, rate): rate for rate in sorted(rates, reverse=True)}
    return tuple(sorted(smallest.values(), reverse=True))


def perturb(
    total: int,
    kind: str,
    *,
    seed: int,
    key: str,
    rate: int = 2,
    by: str = "rate",
    groups: Sequence[int] | None = None,
    similarity: np.ndarray | None = None,
    other: int = 0,
) -> Perturbed:
    """A perturbed order of `total` items.

    - ``drop``: keeps g = max(1, floor(total / rate)) items in order. ``by`` says which: ``rate`` draws them uniformly;
      ``similarity`` leaves out, one by one, the item most like a kept neighbour (hard to notice); ``group`` leaves out whole
      groups of alike items, drawn, until at most g are left (the last one left is cut to g).
    - ``shuffle``, ``reverse``: groups of g consecutive items, their order drawn (never the original) or reversed.
    - ``speed`` (ours): every rate-th item from a drawn start, as a film played faster.
    - ``freeze`` (ours): the film stands still for total - g items in a row.
    - ``splice`` (ours): total - g items in a row are those of another sequence at the same places.

    Args:
        total: items of the sequence, at least 2.
        seed, key: what the draw depends on, besides kind and rate; `key` names the clip.
        rate: at least 2.
        by: for ``drop`` alone.
        groups: [total] group of every item, for ``by='group'``.
        similarity: [total, total] for ``by='similarity'``.
        other: items of the other sequence, for ``splice``; at least `total`.

    Raises:
        DataError: an unknown kind, fewer than two items, a rate below 2, or what the kind needs is missing.
    """
    _refuse(total, kind, rate, by, groups, similarity, other)
    draws = _stream(seed, kind, rate, key)
    keep = group_size(total, rate)
    if kind == "drop":
        numbers = _dropped(total, keep, by, groups, similarity, draws)
    elif kind == "speed":
        start = int(draws.integers(min(rate, total)))
        numbers = list(range(start, total, rate))
    elif kind in ("freeze", "splice"):
        numbers = _stopped(total, keep, kind, draws)
    else:
        numbers = _reordered(total, keep, kind, draws)
    own = [number for number in numbers if number < total]
    return Perturbed(
        kind=kind, rate=rate, total=total, numbers=tuple(numbers), kept=len(set(own)) / total, distance=kendall(own)
    )


def perturbed(total: int, kind: str, *, seed: int, key: str, rate: int | None = None) -> list[int]:
    """The numbers of `perturb` alone, for ``Frames.take``; a single frame stays as it is.

    Without a rate, `reverse` and `shuffle` move single frames and the others take 2.

    Raises:
        DataError: as `perturb`.
    """
    if total < 2:
        return list(range(total))
    chosen = rate or (total if kind in ("reverse", "shuffle") else 2)
    return list(perturb(total, kind, seed=seed, key=key, rate=chosen, other=total).numbers)


def kendall(numbers: Sequence[int]) -> float:
    """Share of the pairs of different items that stand in the wrong order, in [0, 1]."""
    values = np.asarray(numbers)
    later = values[:, None] > values[None, :]
    pairs = np.triu(values[:, None] != values[None, :], 1)
    return float((later & pairs).sum() / max(1, pairs.sum()))


def _refuse(
    total: int, kind: str, rate: int, by: str, groups: Sequence[int] | None, similarity: np.ndarray | None, other: int
) -> None:
    if kind not in PERTURBATIONS:
        raise DataError(f"clip perturbation '{kind}' is not known (known: {', '.join(PERTURBATIONS)})")
    if total < 2:
        raise DataError(f"'{kind}' needs two items or more to change anything, got {total}")
    if rate < 2:
        raise DataError(f"the rate of a perturbation is at least 2, got {rate}")
    if by not in DROPS or (by != "rate" and kind != "drop"):
        raise DataError(f"'{kind}' by '{by}' is not known; 'drop' goes by {', '.join(DROPS)}")
    if by == "group" and (groups is None or len(groups) != total):
        raise DataError(f"drop by group needs the group of each of {total} items")
    if by == "similarity" and (similarity is None or similarity.shape != (total, total)):
        raise DataError(f"drop by similarity needs a matrix of {total} x {total}")
    if kind == "splice" and other < total:
        raise DataError(f"splice needs another sequence of at least {total} items, got {other}")


def _stream(seed: int, kind: str, rate: int, key: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}\x1fclip-{kind}-{rate}\x1f{key}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _dropped(
    total: int, keep: int, by: str, groups: Sequence[int] | None, similarity: np.ndarray | None,
    draws: np.random.Generator,
) -> list[int]:  # fmt: skip
    numbers = list(range(total))
    if by == "rate":
        return sorted(int(number) for number in draws.choice(total, keep, replace=False))
    if by == "similarity":
        alike = np.asarray(similarity, dtype=np.float64)
        while len(numbers) > keep:
            near = [max(alike[number, numbers[place - 1]] if place else -np.inf,
                        alike[number, numbers[place + 1]] if place + 1 < len(numbers) else -np.inf)
                    for place, number in enumerate(numbers)]  # fmt: skip
            del numbers[int(np.argmax(near))]
        return numbers
    left = list(dict.fromkeys(groups or ()))
    own = {group: [number for number in numbers if (groups or ())[number] == group] for group in left}
    while sum(len(own[group]) for group in left) > keep and len(left) > 1:
        left.pop(int(draws.integers(len(left))))
    return sorted(number for group in left for number in own[group])[:keep]


def _stopped(total: int, keep: int, kind: str, draws: np.random.Generator) -> list[int]:
    """A stretch of total - keep items that stands still, or is that of the other sequence."""
    length = total - keep
    start = int(draws.integers(total - length + 1))
    stretch = range(start, start + length)
    if kind == "splice":
        return [number + total if number in stretch else number for number in range(total)]
    still = max(start - 1, 0)
    return [still if number in stretch else number for number in range(total)]


def _reordered(total: int, size: int, kind: str, draws: np.random.Generator) -> list[int]:
    groups = [list(range(start, min(start + size, total))) for start in range(0, total, size)]
    order = list(range(len(groups)))[::-1]
    if kind == "shuffle":
        order = list(range(len(groups)))
        while order == sorted(order):
            order = [int(place) for place in draws.permutation(len(groups))]
    return [number for place in order for number in groups[place]]
