"""Choices of simulated people written as a pair table with users: the best against the worst of the candidates of a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmalign.world.people import Person, liking

CANDIDATES = 4


def choices(
    persons: Sequence[Person], measured: np.ndarray, *, each: int, seed: int, first: int = 0
) -> dict[str, list[tuple[int, int, int]]]:
    """For everybody, `each` prompts of their own and the candidates they like best and least there.

    Args:
        measured: `people.properties` of the candidates, those of a prompt side by side. ``[P * 4, 2]``
        first: skip so many of a person's prompts: choices for another use.

    Returns:
        name -> [(prompt, chosen candidate, rejected candidate)], numbers into prompts and pictures.
    """
    count = len(measured) // CANDIDATES
    if (first + each) > count:
        raise ValueError(f"{count} prompts have no {first + each} choices of one person")
    found = {}
    for person in persons:
        digest = hashlib.sha256(f"people\x1f{seed}\x1f{person.name}".encode()).digest()
        order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little"))).permutation(count)
        scores = liking(person, measured).reshape(count, CANDIDATES)
        found[person.name] = [
            (int(row), int(row * CANDIDATES + scores[row].argmax()), int(row * CANDIDATES + scores[row].argmin()))
            for row in order[first : first + each]
        ]
    return found


def write_choices(
    folder: Path, made: dict[str, list[tuple[int, int, int]]], pictures: Sequence[bytes], prompts: Sequence[str]
) -> Path:
    """A folder with ``pairs.jsonl`` and the pictures it names. Returns the table's path.

    Args:
        pictures: PNG files of the candidates.
        prompts: one per prompt.
    """
    media = folder / "pictures"
    media.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as handle:
        for name, rows in made.items():
            for prompt, chosen, rejected in rows:
                names = []
                for index in (chosen, rejected):
                    place = media / f"{index:05d}.png"
                    if not place.exists():
                        place.write_bytes(pictures[index])
                    names.append(f"pictures/{place.name}")
                row = {"id": f"{name}-{prompt:04d}", "prompt": prompts[prompt], "chosen": names[0], "rejected": names[1],
                       "user": name}  # fmt: skip
                handle.write(json.dumps(row) + "\n")
    return folder / "pairs.jsonl"
