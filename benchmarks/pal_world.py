"""Simulated voters over pictures of the shape world: what each likes is stated, and what they chose is drawn from it.

A picture has four features that no caption names, read from its pixels: how vivid its shapes are, how warm its background is,
how near the middle the shapes sit, and how much of it they cover; a fifth is whether it shows what its caption says. A voter's
utility is a weighted sum of the five in standard deviations, and a choice is drawn from the Bradley-Terry model on the
difference. Every voter cares for the caption alike; tastes differ in the other four.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmalign import rng
from mmalign.data.writer import TableWriter
from mmalign.world.oracle import CHROMA
from mmalign.world.shapes import corrupt, render, sample_scene, sample_style
from mmalign.world.taste import factors

FEATURES = ("faithful", "vivid", "warm", "placed", "covered")
FAITHFUL = 0.6
"""Weight of the caption in every voter's utility."""
STRENGTH = 2.0
"""Length of a taste: one standard deviation along it moves the logit of a choice by this much."""
WORLDS = ("groups", "mixtures", "agree")
VOTES_PER_VOTER = 40
NEW_VOTES = 80
PICTURES = 4
"""Pictures of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Pictures with their captions and standardised features."""

    captions: Sequence[str]  # [P]
    pictures: Sequence[bytes]  # [P * PICTURES], PNG
    features: np.ndarray  # [P, PICTURES, 5]


def make_pool(prompts: int, seed: int, name: str) -> Pool:
    """Distinct captions with four pictures each; every second one has something wrong about it."""
    draw = rng.numpy_stream(seed, f"pal-world/{name}")
    captions: dict[str, list[np.ndarray]] = {}
    while len(captions) < prompts:
        scene = sample_scene(draw)
        if scene.caption in captions:
            continue
        shown = [scene if draw.random() < 0.5 else corrupt(scene, draw) for _ in range(PICTURES)]
        captions[scene.caption] = [render(one, draw, sample_style(draw)) for one in shown]
    stack = np.stack([picture for group in captions.values() for picture in group])
    texts = [caption for caption in captions for _ in range(PICTURES)]
    measured = factors(stack, texts) | {"covered": _covered(stack)}
    columns = np.stack([measured[feature] for feature in FEATURES], 1).astype(np.float64)
    columns = (columns - columns.mean(0)) / columns.std(0)
    return Pool(captions=list(captions), pictures=[_png(picture) for picture in stack],
                features=columns.reshape(prompts, PICTURES, len(FEATURES)))  # fmt: skip


def _covered(stack: np.ndarray) -> np.ndarray:
    pixels = stack.astype(np.float32) / 255
    return (pixels.max(-1) - pixels.min(-1) >= CHROMA).mean((1, 2))


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def tastes(world: str, voters: int, seed: int, name: str) -> np.ndarray:
    """Weights of every voter's five features ``[voters, 5]``.

    groups: one of three tastes, two of them opposite (vivid and warm, pale and cool, small and in the middle); mixtures: a
    Dirichlet(0.5) mixture of these three and a fourth; agree: everybody has the first.
    """
    draw = rng.numpy_stream(seed, f"pal-tastes/{world}/{name}")
    axes = np.array([[0, 0.7, 0.7, 0, 0], [0, -0.7, -0.7, 0, 0], [0, 0, 0, 0.7, -0.7], [0, 0.7, -0.7, 0, 0.3]])
    axes = STRENGTH * axes / np.linalg.norm(axes, axis=1, keepdims=True)
    if world == "agree":
        shares = np.tile([1.0, 0, 0, 0], (voters, 1))
    elif world == "groups":
        shares = np.eye(4)[np.arange(voters) % 3]
    else:
        shares = draw.dirichlet([0.5] * 4, voters)
    return shares @ axes + np.array([FAITHFUL, 0, 0, 0, 0])


@dataclass(frozen=True, kw_only=True)
class Votes:
    """Choices of some voters, as rows (voter, prompt, chosen, rejected)."""

    rows: np.ndarray  # [n, 4]
    certain: float
    """Share of choices that are the one with the higher utility: no model can order more of them as chosen, on average."""


def vote(pool: Pool, weights: np.ndarray, each: int, seed: int, name: str) -> Votes:
    """`each` choices of every voter among two pictures of a random prompt."""
    draw = rng.numpy_stream(seed, f"pal-votes/{name}")
    rows, right = [], 0
    for voter, taste in enumerate(weights):
        for prompt in draw.integers(0, len(pool.captions), each):
            first, second = draw.choice(PICTURES, 2, replace=False)
            margin = float((pool.features[prompt, first] - pool.features[prompt, second]) @ taste)
            if draw.random() >= 1 / (1 + np.exp(-margin)):
                first, second, margin = second, first, -margin
            right += margin > 0
            rows.append((voter, prompt, first, second))
    return Votes(rows=np.array(rows), certain=right / len(rows))


def write_votes(out: Path, pool: Pool, votes: Votes, prefix: str) -> None:
    """The choices as a table of pairs with user names."""
    with TableWriter(out) as writer:
        for number, (voter, prompt, chosen, rejected) in enumerate(votes.rows.tolist()):
            writer.add(
                id=f"{prefix}-{number}", prompt=pool.captions[prompt], chosen=pool.pictures[prompt * PICTURES + chosen],
                rejected=pool.pictures[prompt * PICTURES + rejected], p_chosen=1.0, user=f"{prefix}-{voter}", weight=1.0,
                group=None, meta="{}", scores=None,
            )  # fmt: skip
