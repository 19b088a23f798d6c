"""From one real score per named tensor to masks: soft ones of an exact mean, and hard ones of an exact ratio.

FreezeAsGuard (arXiv:2405.17472) squashes a score by a sigmoid and pulls the mean towards the wanted ratio with a penalty;
one step of the released penalty saturates most scores, after which the mask can no longer change and is mostly its random
start. Here the mean is exact at every step: the scores are shifted by the one number that makes it so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmalign.errors import ConfigError

_HALVINGS = 90
"""Enough for float64 precision where the smallest tensor holds a millionth of the largest."""


def project_mean(scores: Tensor, ratio: float, *, temperature: float, weights: Tensor | None = None) -> Tensor:
    """``sigmoid((scores + b N weights) / temperature)`` with the one b that makes its weighted mean `ratio`. ``[N]`` in [0, 1].

    That is the mask of the highest sum of scores plus ``temperature`` times its entropy among all masks of that weighted
    mean: -b is the price of a share. With equal weights the order of the scores is kept; with shares of parameters a large
    tensor has to earn its size, and as the temperature falls the mask goes to those of the highest score per parameter. It
    does not change when a multiple of the weights (equal weights: a constant) is added to the scores.

    Args:
        scores: ``[N]``.
        ratio: in [0, 1]; 0 and 1 give exact zeros and ones.
        temperature: of the squashing; small values make hard masks.
        weights: ``[N]``, positive, summing to one; default equal.
    """
    if ratio <= 0 or ratio >= 1:
        return torch.full_like(scores, float(ratio >= 1))
    values = scores.double()
    share = torch.full_like(values, 1 / len(values)) if weights is None else weights.double()
    price = share * len(values)
    ends = (-values - 50 * temperature) / price, (-values + 50 * temperature) / price
    low, high = ends[0].min(), ends[1].max()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = (share * torch.sigmoid((values + price * middle) / temperature)).sum() > ratio
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.sigmoid((values + price * (low + high) / 2) / temperature).to(scores.dtype)


def tangent(direction: Tensor, weights: Tensor | None = None) -> Tensor:
    """A direction without the part that would change the weighted mean of the mask. ``[N]``"""
    normal = torch.ones_like(direction) if weights is None else weights
    return direction - normal * ((direction * normal).sum() / normal.square().sum())


def top_names(
    scores: Mapping[str, float], ratio: float, *, sizes: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """The names to freeze: highest scores first, ties by name, whatever the order of the mapping.

    Args:
        scores: name -> score.
        ratio: wanted share in [0, 1].
        sizes: None counts tensors: exactly ``round(ratio * N)`` names. With sizes, parameters are counted: the highest
            scores are taken for as long as that brings the share nearer to `ratio`, so it is met to within one tensor.

    Raises:
        ConfigError: a ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ConfigError(f"ratio must be in [0, 1], got {ratio}")
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    if sizes is None:
        return tuple(sorted(ranked[: round(ratio * len(ranked))]))
    total, held, count = sum(sizes[name] for name in ranked), 0, 0
    wanted = ratio * total
    for name in ranked:
        if abs(held + sizes[name] - wanted) > abs(held - wanted):
            break
        held, count = held + sizes[name], count + 1
    return tuple(sorted(ranked[:count]))


def jaccard(first: Sequence[str], second: Sequence[str]) -> float:
    """Size of the intersection over that of the union, in [0, 1]; two empty sets agree."""
    one, two = set(first), set(second)
    return len(one & two) / len(one | two) if one | two else 1.0


def mean_jaccard(sets: Sequence[Sequence[str]]) -> float:
    """The mean over all pairs; 1 for a single set."""
    pairs = [(i, j) for i in range(len(sets)) for j in range(i)]
    return sum(jaccard(sets[i], sets[j]) for i, j in pairs) / len(pairs) if pairs else 1.0


def chance_jaccard(ratio: float) -> float:
    """What two unrelated random masks of the same ratio share on average (large N): ratio / (2 - ratio)."""
    return ratio / (2 - ratio)
