"""Which image tokens a model may not look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmFamily


def _random(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    hidden: np.ndarray = rng.random(count) < share
    return hidden


def _exact(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    hidden = np.zeros(count, bool)
    hidden[rng.permutation(count)[: round(share * count)]] = True
    return hidden


def _run(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    hidden = np.zeros(count, bool)
    first = int(rng.integers(count))
    hidden[(first + np.arange(round(share * count))) % count] = True
    return hidden


STRATEGIES: Final[dict[str, Callable[[int, float, np.random.Generator], np.ndarray]]] = {
    "random": _random, "exact": _exact, "run": _run
}  # fmt: skip
"""``random`` hides every token with the same probability, independent of the others (the paper's); ``exact`` hides that share of
them; ``run`` that share as one stretch in reading order (round the end)."""


def image_positions(family: VlmFamily, prefix: Tensor) -> Tensor:
    """[P] bool: placeholders of pictures and clips among a prompt's tokens ``[P]``; marks around them are text."""
    return family.token_types(prefix) > 0


def hidden_tokens(
    family: VlmFamily, prefix: Tensor, share: float, rng: np.random.Generator, *, strategy: str = "random"
) -> Tensor:
    """[P] bool: image tokens of a prompt to hide, drawn anew at each call.

    Args:
        share: of the image tokens, in [0, 1]; 0 hides none, 1 all.
        strategy: a name of ``STRATEGIES``.

    Raises:
        ValueError: a share outside [0, 1], or an unknown strategy.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of hidden tokens must be in [0, 1], got {share}")
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown masking strategy '{strategy}' (known: {', '.join(STRATEGIES)})")
    found = image_positions(family, prefix)
    hidden = torch.zeros_like(found)
    count = int(found.sum())
    if count:
        hidden[found] = torch.from_numpy(STRATEGIES[strategy](count, share, rng)).to(hidden.device)
    return hidden
