"""Masks that nothing was learnt for: random ones, attention only; and masks of a wanted parameter share, random or by score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmalign import rng
from mmalign.errors import ConfigError
from mmalign.freezing.names import kind

TOLERANCE = 0.005
"""Parameter shares this near to each other count as matched."""
_SWAPS = 20_000


def random_scores(names: Sequence[str], *, seed: int) -> dict[str, float]:
    """A uniform draw per tensor that depends on the seed and its name alone."""
    return {name: float(rng.uniform([name], seed=seed, purpose="freeze-mask/random")[0]) for name in names}


def attention_scores(shapes: Mapping[str, Sequence[int]], *, seed: int) -> dict[str, float]:
    """Attention weights first, cross before self, random within a group: the attention-only rule at any ratio."""
    rank = {"cross-attention": 2.0, "self-attention": 1.0}
    draws = random_scores(list(shapes), seed=seed)
    return {name: rank.get(kind(name, len(shape)), 0.0) + draws[name] for name, shape in shapes.items()}


def matched_scored(scores: Mapping[str, float], sizes: Mapping[str, int], *, share: float) -> tuple[str, ...]:
    """The highest scored tensors that together hold `share` of the parameters, to within `TOLERANCE` where they can.

    The ranking is gone through from the top (ties by name), and a tensor that would lead beyond the share is left out. How many
    tensors that makes is what it makes.
    """
    total, held = sum(sizes.values()), 0
    chosen: list[str] = []
    for name in sorted(scores, key=lambda name: (-scores[name], name)):
        if held + sizes[name] <= (share + TOLERANCE) * total:
            held += sizes[name]
            chosen.append(name)
        if held >= (share - TOLERANCE) * total:
            break
    return tuple(sorted(chosen))


def matched_random(sizes: Mapping[str, int], *, count: int, share: float, seed: int) -> tuple[str, ...]:
    """`count` random tensors that together hold `share` of the parameters, to within `TOLERANCE`.

    Starts at a random mask of `count` tensors and swaps random members with random others as long as that does not lead
    away from the share: the control that freezes as many tensors and as many parameters as a learned mask.

    Raises:
        ConfigError: no such mask was found, because `count` tensors cannot hold that share.
    """
    stream = rng.numpy_stream(seed, "freeze-mask/matched")
    names = sorted(sizes)
    total = sum(sizes.values())
    order = [names[index] for index in stream.permutation(len(names))]
    inside, outside = order[:count], order[count:]
    held = sum(sizes[name] for name in inside)
    for _ in range(_SWAPS):
        if abs(held / total - share) <= TOLERANCE:
            return tuple(sorted(inside))
        if not inside or not outside:
            break
        one, two = int(stream.integers(len(inside))), int(stream.integers(len(outside)))
        after = held + sizes[outside[two]] - sizes[inside[one]]
        if abs(after / total - share) <= abs(held / total - share):
            inside[one], outside[two], held = outside[two], inside[one], after
    raise ConfigError(
        f"no random mask of {count} tensors holds {100 * share:.1f} % of the parameters (nearest {100 * held / total:.1f} %)"
    )
