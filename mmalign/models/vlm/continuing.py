"""Going on from a given beginning of an answer, at several places of it at once, with part of the prompt hidden.

A draft is read once; every place to go on from takes its own copy of the cached keys and hides those behind it, so that S
continuations of one answer cost one pass over prompt and answer instead of S. Layers with a window count the tokens between,
and would count hidden ones: models that have any read every beginning by itself.

Tokens are hidden as keys, from every query of every layer, in the pass over the prompt and in every step after it; what is hidden
keeps its position. To hide them from the text alone would not do: visible tokens of a picture have looked at the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign import rng
from mmalign.branches import EncodedExample
from mmalign.errors import ModelError
from mmalign.models.vlm.forward import inner, layer_kinds, unsharable
from mmalign.models.vlm.generation import Prefill, Read, branch, decode, left_padded, read

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A question with an answer to go on from."""

    example: EncodedExample
    """From ``encode(record, training=False)``."""
    given: Tensor  # [L] int64
    """The answer's tokens; may be none."""
    cuts: tuple[int, ...]
    """How many of them each continuation keeps, 0 to L."""
    names: tuple[str, ...]
    """One per cut: the draws of a continuation belong to its name, not to its place in a batch."""
    hide: Tensor | None = None  # [P] bool
    """Positions of the prompt that no token may look at."""


@torch.no_grad()
def continue_answers(
    family: VlmFamily, module: nn.Module, drafts: Sequence[Draft], *, max_new_tokens: int, temperature: float = 1.0,
    top_p: float = 1.0, seed: int = 0, step: int = 0, batch_size: int = 8, stop: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[list[int]]]:  # fmt: skip
    """What a model says next, for every cut of every draft.

    Args:
        family, module: as for ``VlmFamily.generate``; the media's placeholders are never drawn.
        max_new_tokens: most tokens of a continuation.
        temperature: 0 takes the most likely token.
        top_p: smallest set of tokens of this probability to draw from.
        seed, step: the draws of a continuation are a function of these and its name.
        batch_size: continuations made at a time.
        stop: whether these new tokens are enough.

    Returns:
        new tokens of every cut, without what ends an answer.

    Raises:
        ModelError: a model whose layers mix tokens in ways that no mask decides, or flash attention.
    """
    if temperature < 0 or not 0 < top_p <= 1 or min(max_new_tokens, batch_size) < 1:
        raise ValueError("temperature must not be negative, top_p in (0, 1], and the counts at least 1")
    reason = unsharable(family)
    if reason is not None:
        raise ModelError(f"{family.config.path}: part of a picture cannot be hidden: {reason}")
    network = inner(module)
    alone = "sliding_attention" in layer_kinds(family)[0]
    out: list[list[list[int]]] = [[[] for _ in draft.cuts] for draft in drafts]
    was_training = network.training
    network.eval()
    try:
        for group in _groups(drafts, batch_size, alone=alone):
            names = [drafts[number].names[cut] for number, cuts in group for cut in cuts]
            streams = [rng.torch_stream(seed, "continue", step, name) for name in names]
            draws = torch.stack([torch.rand(max_new_tokens, generator=stream, dtype=torch.float64) for stream in streams])
            chosen = [
                replace(
                    drafts[number],
                    cuts=tuple(drafts[number].cuts[cut] for cut in cuts),
                    names=tuple(drafts[number].names[cut] for cut in cuts),
                )
                for number, cuts in group
            ]
            with family.autocast():
                begun = _begin(family, network, chosen)
                made = decode(family, network, begun, draws, temperature=temperature, top_p=top_p, stop=stop)
            for (number, cut), ids in zip([(number, cut) for number, cuts in group for cut in cuts], made, strict=True):
                out[number][cut] = ids
    finally:
        network.train(was_training)
    return out


def _groups(drafts: Sequence[Draft], batch_size: int, *, alone: bool) -> list[list[tuple[int, tuple[int, ...]]]]:
    """(draft, numbers of its cuts) that are made together, of like length.

    Args:
        alone: one cut to a draft.
    """
    most = 1 if alone else batch_size
    pieces: list[tuple[int, tuple[int, ...]]] = []
    for number, draft in enumerate(drafts):
        cuts = range(len(draft.cuts))
        pieces += [(number, tuple(cuts[first : first + most])) for first in range(0, len(cuts), most)]

    def length(piece: tuple[int, tuple[int, ...]]) -> int:
        draft = drafts[piece[0]]
        return len(draft.example.rows[0].prefix) + max(draft.cuts[cut] for cut in piece[1])

    groups: list[list[tuple[int, tuple[int, ...]]]] = []
    filled = batch_size
    for piece in sorted(pieces, key=length):
        if filled + len(piece[1]) > batch_size:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += len(piece[1])
    return groups


def _begin(family: VlmFamily, network: Any, drafts: Sequence[Draft]) -> Read:
    """The state of a model that has read every draft up to every cut of it."""
    rows = [draft.example.rows[0] for draft in drafts]
    hide = [torch.zeros(len(row.prefix), dtype=torch.bool) if draft.hide is None else draft.hide.cpu()
            for row, draft in zip(rows, drafts, strict=True)]  # fmt: skip
    batch = family.collate([draft.example for draft in drafts])
    if all(len(draft.cuts) == 1 for draft in drafts):
        given = [draft.given[: draft.cuts[0]] for draft in drafts]
        prompts = left_padded(family, rows, hide, given)
        logits, cache = read(family, network, prompts, batch)
        return branch(prompts, logits[:, -1], cache, torch.arange(len(drafts)))
    given = [draft.given[: max(draft.cuts)] for draft in drafts]
    prompts = left_padded(family, rows, hide)
    width = prompts.input_ids.shape[1]
    whole = _followed(family, prompts, given)
    of_cut = torch.tensor([number for number, draft in enumerate(drafts) for _ in draft.cuts])
    cuts = torch.tensor([cut for draft in drafts for cut in draft.cuts])
    columns, place = (width - 1 + cuts).unique(return_inverse=True)
    logits, cache = read(family, network, whole, batch, columns)
    device = logits.device
    logits = logits[of_cut.to(device), place.to(device)]
    cache.batch_select_indices(of_cut.to(device))
    mask = whole.attention_mask[of_cut]
    mask[:, width:] *= torch.arange(whole.input_ids.shape[1] - width)[None] < cuts[:, None]
    return Read(
        logits=logits, cache=cache, mask=mask.to(device), position=(prompts.next_position[of_cut] + cuts).to(device),
        three_axes=prompts.position_ids.ndim == 3,
    )  # fmt: skip


def _followed(family: VlmFamily, prompts: Prefill, given: Sequence[Tensor]) -> Prefill:
    """Prompts with the given tokens behind them, padded on the right."""
    length = max(map(len, given))
    shape = (len(given), length)
    ids, mask = torch.full(shape, family.tokenizer.pad_token_id or 0), torch.zeros(shape, dtype=torch.int64)
    for number, tokens in enumerate(given):
        ids[number, : len(tokens)] = tokens
        mask[number, : len(tokens)] = 1
    after = prompts.next_position[:, None] + torch.arange(length)
    if prompts.position_ids.ndim == 3:
        after = after.expand(3, -1, -1)
    return Prefill(
        input_ids=torch.cat([prompts.input_ids, ids], 1), attention_mask=torch.cat([prompts.attention_mask, mask], 1),
        position_ids=torch.cat([prompts.position_ids, after], -1), types=torch.cat([prompts.types, torch.zeros_like(ids)], 1),
        next_position=prompts.next_position + length,
    )  # fmt: skip
