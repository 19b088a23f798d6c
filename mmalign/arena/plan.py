"""Which pair a person sees next: a function of the seed, the name and what that person has chosen before.

Every user meets the prompts in an order of their own, one pair of each prompt before a second one of any, and no pair twice.
Which picture is on the left is drawn too, so that neither side nor source can be read from the place.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from mmalign import rng
from mmalign.arena.catalogue import Catalogue, Group

REMEMBERED = 256
"""Users whose order is kept in memory."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Two pictures of a group as they stand on the page."""

    group: Group
    left: int
    right: int

    @property
    def key(self) -> str:
        """Names this showing: group, left, right."""
        return f"{self.group.key}.{self.left}.{self.right}"

    @property
    def pair(self) -> str:
        """Names the pair whatever the sides are."""
        low, high = sorted((self.left, self.right))
        return f"{self.group.key}.{low}.{high}"


class Plan:
    """Orders of pairs over a catalogue that may still grow."""

    def __init__(self, catalogue: Catalogue, seed: int) -> None:
        self.catalogue, self.seed = catalogue, seed
        self._orders: OrderedDict[str, tuple[int, list[Shown]]] = OrderedDict()

    def next(self, user: str, done: Collection[str]) -> Shown | None:
        """The user's next pair that is not in `done` (names of pairs) and whose pictures can be read."""
        for shown in self._order(user):
            if shown.pair in done:
                continue
            pictures = shown.group.pictures
            if self.catalogue.sound(pictures[shown.left]) and self.catalogue.sound(pictures[shown.right]):
                return shown
        return None

    def find(self, key: str) -> Shown | None:
        """The showing of that name; None if there is no such group or picture."""
        parts = key.split(".")
        if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts[1:]):
            return None
        group, left, right = self.catalogue.group(parts[0]), int(parts[1]), int(parts[2])
        if group is None or left == right or max(left, right) >= len(group.pictures):
            return None
        return Shown(group, left, right)

    def count(self, user: str) -> int:
        """Pairs there are for a user."""
        return len(self._order(user))

    def _order(self, user: str) -> list[Shown]:
        groups = self.catalogue.groups()
        known = self._orders.get(user)
        if known is None or known[0] != len(groups):
            known = (len(groups), self._arrange(user, groups))
            self._orders[user] = known
            while len(self._orders) > REMEMBERED:
                self._orders.popitem(last=False)
        return known[1]

    def _arrange(self, user: str, groups: list[Group]) -> list[Shown]:
        ranked = []
        for group in groups:
            place = rng.key(self.seed, "arena/group", 0, f"{user}\x1f{group.key}")
            pairs = [
                (rng.key(self.seed, "arena/pair", left * 1000 + right, f"{user}\x1f{group.key}"), left, right)
                for left, right in itertools.combinations(range(len(group.pictures)), 2)
            ]
            for turn, (draw, first, second) in enumerate(sorted(pairs)):
                sides = (first, second) if draw & 1 else (second, first)
                ranked.append((turn, place, Shown(group, *sides)))
        return [shown for _, _, shown in sorted(ranked, key=lambda item: item[:2])]
