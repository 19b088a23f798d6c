"""Which pairs an embedding may be made from while training: never the pair it is trained with, nor one with its pictures.

A user's rows give, per (seed, step, row id), one support: `shots` other rows drawn at random where pairs are read one by one, or
one of the disjoint groups where a support is read whole (at most `groups` of a user; arXiv:2501.06655, released code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmalign import rng


@dataclass(frozen=True, slots=True, kw_only=True)
class Supports:
    """The supports of every usable row."""

    groups: Mapping[str, tuple[tuple[int, ...], ...]]
    """Disjoint groups of each user's rows; with free draws one group holds them all."""
    pictures: Mapping[int, frozenset[bytes]]
    """What each row shows."""
    shots: int
    free: bool
    """Draw rows freely instead of taking a whole group."""

    def choices(self, user: str, row: int) -> list[tuple[int, ...]]:
        """Groups (or, with free draws, single rows) that share neither the row nor a picture with it."""
        shown = self.pictures[row]
        if self.free:
            return [(one,) for one in self.groups[user][0] if one != row and not (self.pictures[one] & shown)]
        return [
            group for group in self.groups[user]
            if row not in group and not any(self.pictures[one] & shown for one in group)
        ]  # fmt: skip

    def has(self, user: str, row: int) -> bool:
        """Whether a support can be drawn for a row."""
        return len(self.choices(user, row)) >= (self.shots if self.free else 1)

    def draw(self, user: str, row: int, *, seed: int, step: int, sample: str) -> tuple[int, ...]:
        """The rows of one support."""
        found = self.choices(user, row)
        stream = rng.numpy_stream(seed, "support", step, sample)
        order = np.argsort(stream.bit_generator.random_raw(len(found)), kind="stable")
        if not self.free:
            return found[int(order[0])]
        return tuple(sorted(found[int(place)][0] for place in order[: self.shots]))


def make_supports(
    owners: Mapping[int, str], pictures: Mapping[int, frozenset[bytes]], *, shots: int, most: int, free: bool, seed: int
) -> Supports:
    """Supports of the users' rows.

    Args:
        owners: row -> user.
        pictures: row -> hashes of its two pictures.
        shots: pairs of a support.
        most: groups of a user at most; without free draws.
    """
    rows: dict[str, list[int]] = {}
    for row, user in owners.items():
        rows.setdefault(user, []).append(row)
    groups = {user: _groups(user, found, shots, most, seed) if not free else (tuple(found),) for user, found in rows.items()}
    return Supports(groups=groups, pictures=pictures, shots=shots, free=free)


def _groups(user: str, rows: Sequence[int], shots: int, most: int, seed: int) -> tuple[tuple[int, ...], ...]:
    draws = rng.numpy_stream(seed, "support-groups", 0, user).bit_generator.random_raw(len(rows))
    order = [rows[int(place)] for place in np.argsort(draws, kind="stable")]
    return tuple(tuple(order[start : start + shots]) for start in range(0, len(order) - shots + 1, shots))[:most]
