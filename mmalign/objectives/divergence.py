"""Two next-token distributions over the whole vocabulary compared position by position, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def token_divergence(
    policy: Tensor, reference: Tensor, target: Tensor, *, head: Head, reference_head: Head, chunk: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the target under both, and KL(reference | policy). ``[N]`` float32 each.

    Logits exist for `chunk` positions at a time and are made again in the backward pass; gradients flow to `policy` alone.

    Args:
        policy, reference: hidden states ``[N, D]`` before the output layer.
        target: ``[N]`` int64.
        head, reference_head: hidden states ``[n, D]`` to logits ``[n, V]``.
    """
    found = []
    for start in range(0, len(target), chunk):
        rows = slice(start, start + chunk)
        parts = (policy[rows], reference[rows].detach(), target[rows])
        if torch.is_grad_enabled() and policy.requires_grad:
            found.append(checkpoint(_rows, *parts, head, reference_head, use_reentrant=False))
        else:
            found.append(_rows(*parts, head, reference_head))
    if not found:
        empty = policy.sum(-1).float()
        return empty, empty.detach(), empty
    first, second, third = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    return first, second, third


def _rows(policy: Tensor, reference: Tensor, target: Tensor, head: Head, other: Head) -> tuple[Tensor, Tensor, Tensor]:
    mine = head(policy).float().log_softmax(-1)
    with torch.no_grad():
        theirs = other(reference).float().log_softmax(-1)
    kl = (theirs.exp() * (theirs - mine)).sum(-1)
    return mine.gather(-1, target[:, None])[:, 0], theirs.gather(-1, target[:, None])[:, 0], kl
