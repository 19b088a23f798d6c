"""Attention without masks over all pairs of tokens, for models that run PyTorch's own kernels (`model.attention: sdpa`).

A prompt with its answers behind it needs no such mask: prompt and first answer are an ordinary causal pass, for which the
fast kernels take no mask, and every further answer is a few queries against the prompt and itself. The results are those
of the dense mask to rounding; neither the mask's memory nor the upper half of the products is paid for.

A vision tower that attends within windows (Qwen) asks for one kernel call a window where PyTorch's kernels are used:
thousands for a large picture. Windows of one length are put side by side here and computed in one call.

Both are registered with transformers under names of their own. The text one goes by what the mask argument carries, and is
the library's own function wherever that carries nothing (generation, sliding windows, hidden tokens).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BRANCHES = "mmalign_branches"
SEGMENTS = "mmalign_flash_segments"
"""The library hands a vision tower's kernel all windows at once, with their borders, if its name holds 'flash'."""


@dataclass(frozen=True, slots=True)
class Document:
    """A prompt and its answers in a row of a pass, in numbers of tokens."""

    start: int
    prefix: int
    branches: tuple[int, ...]

    @property
    def causal(self) -> int:
        """Tokens of the prompt and the first answer."""
        return self.prefix + (self.branches[0] if self.branches else 0)

    @property
    def stop(self) -> int:
        return self.start + self.prefix + sum(self.branches)


class Plan:
    """What lies where in the rows of a pass."""

    def __init__(self, rows: Sequence[Sequence[Document]]) -> None:
        self.rows = tuple(tuple(row) for row in rows)
        self._masks: dict[tuple[int, int, torch.device], Tensor] = {}

    def mask(self, length: int, prefix: int, device: torch.device) -> Tensor:
        """``[length, prefix + length]`` bool: an answer's tokens see the prompt and what stands before them."""
        key = (length, prefix, device)
        if key not in self._masks:
            full = torch.ones(length, prefix + length, dtype=torch.bool, device=device)
            self._masks[key] = full.tril(diagonal=prefix)
        return self._masks[key]


def carrying(plan: Plan, device: torch.device) -> Tensor:
    """The plan in the form of a mask, which every model hands on to its kernels as it is. Of no use to any other kernel.

    It has no entries, so that a kernel that took it for a real mask would fail instead of letting everything be seen.
    """
    mask = torch.empty(len(plan.rows), 1, 0, 0, dtype=torch.bool, device=device)
    mask.mmalign_plan = plan  # type: ignore[attr-defined]
    return mask


def register() -> None:
    """Make both kernels known to transformers. Harmless when called again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BRANCHES, branches_attention)
    AttentionMaskInterface.register(BRANCHES, sdpa_mask)
    AttentionInterface.register(SEGMENTS, segments_attention)
    AttentionMaskInterface.register(SEGMENTS, sdpa_mask)


def branches_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of a language model's layer: ``[B, H, T, D]`` each (fewer heads of key and value allowed) to ``[B, T, H, D]``."""
    plan: Plan | None = getattr(attention_mask, "mmalign_plan", None)
    if plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found, None
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("attention scores that are capped or biased need a mask; use model.attention: eager")
    options = {"scale": kwargs.get("scaling"), "dropout_p": kwargs.get("dropout", 0.0)}
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    return _rows(plan, query, key, value, options).transpose(1, 2).contiguous(), None


def _rows(plan: Plan, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """All rows of a pass. ``[B, H, T, D]``"""
    if all(len(row) == 1 for row in plan.rows):
        width = max(row[0].causal for row in plan.rows)
        first = F.scaled_dot_product_attention(
            query[:, :, :width], key[:, :, :width], value[:, :, :width], is_causal=True, **options
        )
        if width == query.shape[2] and all(len(row[0].branches) <= 1 for row in plan.rows):
            return first
        done = [[first[number : number + 1, :, : row[0].causal]] for number, row in enumerate(plan.rows)]
    else:
        done = [[] for _ in plan.rows]
    out = []
    for number, (documents, pieces) in enumerate(zip(plan.rows, done, strict=True)):
        here = slice(number, number + 1)
        alone = bool(pieces)
        for document in documents:
            span = slice(document.start, document.start + document.causal)
            if not alone:
                pieces.append(
                    F.scaled_dot_product_attention(
                        query[here, :, span], key[here, :, span], value[here, :, span], is_causal=True, **options
                    )
                )
            pieces += _further(plan, document, query[here], key[here], value[here], options)
        rest = query.shape[2] - (documents[-1].stop if documents else 0)
        if rest:
            pieces.append(value.new_zeros(1, query.shape[1], rest, value.shape[3]))
        out.append(torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0])
    return torch.cat(out) if len(out) > 1 else out[0]


def _further(
    plan: Plan, document: Document, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> list[Tensor]:
    """The answers behind the first one, each against the prompt and itself."""
    out, begin = [], document.start + document.causal
    prompt = slice(document.start, document.start + document.prefix)
    for length in document.branches[1:]:
        span = slice(begin, begin + length)
        keys, values = (torch.cat([whole[:, :, prompt], whole[:, :, span]], dim=2) for whole in (key, value))
        mask = plan.mask(length, document.prefix, query.device)
        out.append(F.scaled_dot_product_attention(query[:, :, span], keys, values, attn_mask=mask, **options))
        begin += length
    return out


def segments_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    cu_seq_lens_q: Tensor | None = None, scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention within segments of one long row: ``[1, H, N, D]`` each to ``[1, N, H, D]``.

    Args:
        cu_seq_lens_q: ``[segments + 1]`` borders of the segments, from 0 to N.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return found, None
    borders = cu_seq_lens_q.tolist()
    starts: dict[int, list[int]] = {}
    for begin, end in itertools.pairwise(borders):
        if end > begin:
            starts.setdefault(end - begin, []).append(begin)
    options = {"scale": scaling, "dropout_p": dropout}
    states = [whole[0].transpose(0, 1) for whole in (query, key, value)]  # [N, H, D]
    if len(starts) == 1:
        (length,) = starts
        return _together(states, length, options).reshape(1, -1, *states[2].shape[1:]), None
    order, pieces = [], []
    for length, begins in starts.items():
        index = (torch.tensor(begins)[:, None] + torch.arange(length)).flatten().to(query.device)
        order.append(index)
        pieces.append(_together([whole[index] for whole in states], length, options))
    back = torch.cat(order).argsort()
    return torch.cat(pieces)[back][None].contiguous(), None


def _together(states: Sequence[Tensor], length: int, options: dict[str, Any]) -> Tensor:
    """Segments of one length side by side: ``[n length, H, D]`` each to ``[n length, H, D]``."""
    query, key, value = (whole.unflatten(0, (-1, length)).transpose(1, 2) for whole in states)
    found = F.scaled_dot_product_attention(query, key, value, **options)
    return found.transpose(1, 2).flatten(0, 1)
