"""Simulated people of the shape world, each with a stated taste: a direction over two measured properties of a picture.

``warm``: red minus blue of the background, and ``vivid``: saturation of the shapes (``taste.factors``), each divided by its
deviation among candidates of one prompt. A person at angle a likes cos(a) warm + sin(a) vivid; for everybody there is somebody
of the opposite taste, so that what all like together is nothing. Captions never name either property.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmalign.world.taste import factors

AXES = ("warm", "vivid")
SCALES = {"warm": 0.059, "vivid": 0.072}
"""Deviation of each property among the four embedded candidates of a prompt."""
TRAINED, UNSEEN = 24, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """A name and a taste."""

    name: str
    angle: float
    """In degrees: 0 likes warm, 90 vivid, 180 cool, 270 pale."""
    trained: bool

    @property
    def taste(self) -> tuple[float, float]:
        """Weights of warm and vivid; of length 1."""
        return math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))

    @property
    def words(self) -> str:
        """The nearest of eight plain descriptions."""
        names = ("warm", "warm and vivid", "vivid", "cool and vivid", "cool", "cool and pale", "pale", "warm and pale")
        return names[round(self.angle / 45) % 8]


def people(trained: int = TRAINED, unseen: int = UNSEEN) -> tuple[Person, ...]:
    """Trained people at even angles, then people never seen, at angles between them; both with everybody's opposite."""
    seen = [Person(name=f"person-{index:02d}", angle=360 * index / trained, trained=True) for index in range(trained)]
    offset = 180 / trained
    new = [
        Person(name=f"newcomer-{index:02d}", angle=(360 * index / unseen + offset) % 360, trained=False)
        for index in range(unseen)
    ]
    return (*seen, *new)


def properties(pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """What tastes are about: uint8 ``[N, 32, 32, 3]`` to float64 ``[N, 2]``, in deviations."""
    found = factors(pictures, captions)
    return np.stack([found[name] / SCALES[name] for name in AXES], 1).astype(np.float64)


def liking(person: Person, measured: np.ndarray) -> np.ndarray:
    """A person's utility of pictures from their `properties`, ``[N, 2]`` to ``[N]``. Higher is better."""
    found: np.ndarray = measured @ np.array(person.taste)
    return found
