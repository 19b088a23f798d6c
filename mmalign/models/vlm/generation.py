"""Answers from the current weights: left-padded prompts, cached keys, media encoded once, draws that belong to a sample.

A sample's randomness is one uniform number per token from its own stream, turned into a token through the cumulative
distribution: neither the batch it falls into nor the other samples change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign import rng
from mmalign.branches import EncodedExample, EncodedRow
from mmalign.models.vlm.forward import encoder_outputs, inner, media_inputs, vision_features

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Prompts of one group, left padded, on the CPU."""

    input_ids: Tensor  # [B, P]
    attention_mask: Tensor  # [B, P]
    position_ids: Tensor  # [B, P] or [3, B, P]
    types: Tensor  # [B, P]
    next_position: Tensor  # [B]


@torch.no_grad()
def generate(
    family: VlmFamily, module: nn.Module, examples: Sequence[EncodedExample], *, max_new_tokens: int,
    temperature: float, top_p: float, seed: int, step: int, samples: int, batch_size: int,
    hide: Sequence[Tensor] | None, repetition_penalty: float,
) -> list[list[str]]:  # fmt: skip
    """See ``VlmFamily.generate``."""
    if temperature < 0 or not 0 < top_p <= 1 or min(max_new_tokens, samples, batch_size) < 1:
        raise ValueError("temperature must not be negative, top_p in (0, 1], and the counts at least 1")
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty must be positive, got {repetition_penalty}")
    out: list[list[str]] = [[""] * samples for _ in examples]
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].rows[0].prefix))
    together = max(1, batch_size // samples)
    network = inner(module)
    was_training = network.training
    network.eval()
    try:
        for start in range(0, len(order), together):
            group = order[start : start + together]
            for first in range(0, samples, batch_size):
                numbers = range(first, min(samples, first + batch_size))
                streams = [
                    rng.torch_stream(seed, "generate", step, f"{examples[n].id}#{k}") for n in group for k in numbers
                ]
                draws = torch.stack([torch.rand(max_new_tokens, generator=s, dtype=torch.float64) for s in streams])
                hidden = None if hide is None else [hide[n] for n in group]
                with family.autocast():
                    prompts = left_padded(family, [examples[n].rows[0] for n in group], hidden)
                    logits, cache = read(family, network, prompts, family.collate([examples[n] for n in group]))
                    rows = torch.arange(len(group)).repeat_interleave(len(numbers))
                    made = decode(
                        family, network, branch(prompts, logits[:, -1], cache, rows), draws, temperature=temperature,
                        top_p=top_p, penalty=Repetition.of(prompts, logits, rows, repetition_penalty),
                    )  # fmt: skip
                for place, ids in enumerate(made):
                    text = text_of(family, ids)
                    out[group[place // len(numbers)]][numbers[place % len(numbers)]] = text
    finally:
        network.train(was_training)
    return out


def branch(prompts: Prefill, logits: Tensor, cache: Any, rows: Tensor) -> Read:
    """Several answers to prompts that were read once.

    Args:
        logits: [B, V].
        cache: changed in place.
        rows: [n] which prompt each answer is to.
    """
    rows = rows.to(logits.device)
    if rows.tolist() != list(range(len(logits))):
        cache.batch_select_indices(rows)
        logits = logits[rows]
    mask, position = prompts.attention_mask.to(rows.device), prompts.next_position.to(rows.device)
    return Read(
        logits=logits, cache=cache, mask=mask[rows], position=position[rows], three_axes=prompts.position_ids.ndim == 3
    )


def left_padded(
    family: VlmFamily, rows: Sequence[EncodedRow], hide: Sequence[Tensor] | None, given: Sequence[Tensor] | None = None
) -> Prefill:
    """Prompts with padding on the left; positions are those of the prompts themselves.

    Args:
        hide: per prompt, [P] bool: positions that no token may look at.
        given: per prompt, [L] tokens of an answer that stand behind it.
    """
    answers = [torch.zeros(0, dtype=torch.int64)] * len(rows) if given is None else given
    width = max(len(row.prefix) + len(answer) for row, answer in zip(rows, answers, strict=True))
    axes = rows[0].positions.shape[:-1]
    shape = (len(rows), width)
    input_ids = torch.full(shape, family.tokenizer.pad_token_id or 0)
    mask, types = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    positions = torch.zeros((*axes, *shape), dtype=torch.int64)
    following = torch.zeros(len(rows), dtype=torch.int64)
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        length = len(row.prefix)
        begin = width - length - len(answer)
        middle = begin + length
        input_ids[number, begin:] = torch.cat([row.prefix, answer])
        mask[number, begin:] = 1
        if hide is not None:
            mask[number, begin:middle] = (~hide[number].cpu()).long()
        positions[..., number, begin:middle] = row.positions[..., :length]
        types[number, begin:middle] = family.token_types(row.prefix)
        after = family.next_position(row.positions[..., :length])
        positions[..., number, middle:] = after + torch.arange(len(answer))
        following[number] = after + len(answer)
    return Prefill(input_ids=input_ids, attention_mask=mask, position_ids=positions, types=types, next_position=following)


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What a model has read and how it would go on, one row per answer to be."""

    logits: Tensor  # [n, V]: of the next token
    cache: Any
    mask: Tensor  # [n, K]: which keys in the cache may be looked at
    position: Tensor  # [n]: of the next token
    three_axes: bool
    """Whether positions have three axes, which text walks together."""


class Repetition:
    """Tokens that the prompt or the answer holds already become less likely (arXiv:1909.05858 section 4.1).

    Logits of such tokens are divided by the penalty where positive and multiplied by it where negative, as transformers and vLLM
    do; padding does not count.

    Args:
        seen: bool ``[n, V]``, changed as tokens are drawn.
    """

    def __init__(self, seen: Tensor, penalty: float) -> None:
        self.seen, self.penalty = seen, penalty

    @classmethod
    def of(cls, prompts: Prefill, logits: Tensor, rows: Tensor, penalty: float) -> Repetition | None:
        """For answers to prompts, or None where nothing changes.

        Args:
            logits: [B, C, V], for vocabulary and device.
            rows: [n] which prompt each answer is to.
        """
        if penalty == 1:
            return None
        seen = torch.zeros(len(prompts.input_ids), logits.shape[-1], dtype=torch.bool)
        # Padding lies on the left, before positions that are never negative.
        for row, (ids, mask) in enumerate(zip(prompts.input_ids, prompts.attention_mask, strict=True)):
            seen[row, ids[int(mask.argmax()) :]] = True
        return cls(seen[rows].to(logits.device), penalty)

    def apply(self, logits: Tensor) -> Tensor:
        """Logits ``[n, V]`` with the penalty, float32."""
        values = logits.float()
        return torch.where(self.seen, torch.where(values > 0, values / self.penalty, values * self.penalty), values)

    def add(self, token: Tensor) -> None:
        """These tokens ``[n]`` have been drawn."""
        self.seen.scatter_(1, token[:, None], True)


def read(
    family: VlmFamily, network: Any, prompts: Prefill, batch: Any, columns: Tensor | None = None
) -> tuple[Tensor, Any]:
    """One pass over prompts with their media.

    Args:
        batch: the collated examples of the prompts, for their media.
        columns: [C] places of the prompts whose next token is wanted; None: the last.

    Returns:
        logits ``[B, C, V]`` and the cache of keys and values.
    """
    from transformers import DynamicCache

    device = next(network.parameters()).device
    media = batch.media.to(device)
    cache = DynamicCache(config=family.text_config)
    inputs: dict[str, Any] = {"position_ids": prompts.position_ids.to(device), **family.prefill_inputs(prompts.types.to(device))}
    if media.image or media.video:
        features = vision_features(family, network, media)
        images = tuple(unit for row in media.image_rows for unit in row)
        videos = tuple(unit for row in media.video_rows for unit in row)
        inputs |= media_inputs(network, encoder_outputs(family, features, images, videos))
    out = network(
        input_ids=prompts.input_ids.to(device), attention_mask=prompts.attention_mask.to(device), past_key_values=cache,
        use_cache=True, logits_to_keep=1 if columns is None else columns.to(device), **inputs,
    )  # fmt: skip
    return out.logits, cache


def decode(
    family: VlmFamily, network: Any, state: Read, draws: Tensor, *, temperature: float, top_p: float,
    stop: Callable[[Sequence[int]], bool] | None = None, penalty: Repetition | None = None,
) -> list[list[int]]:  # fmt: skip
    """Tokens that follow, one at a time for all rows, up to (and without) what ends an answer.

    Args:
        state: its cache is used up.
        draws: [n, T] uniform numbers: T tokens at most.
        stop: whether these tokens are enough of a row; the last of them is kept.
        penalty: makes tokens less likely that are there already.
    """
    device = state.logits.device
    logits, mask, position, draws = state.logits, state.mask, state.position, draws.to(device)
    ends = torch.tensor(sorted(family.end_ids), device=device)
    done = torch.zeros(len(logits), dtype=torch.bool, device=device)
    made: list[list[int]] = [[] for _ in range(len(logits))]
    for number in range(draws.shape[1]):
        if penalty is not None:
            logits = penalty.apply(logits)
        token = pick(logits, draws[:, number], temperature=temperature, top_p=top_p, never=family.placeholder_ids)
        token = torch.where(done, ends[0], token)
        if penalty is not None:
            penalty.add(token)
        done = done | torch.isin(token, ends)
        enough = []
        for row, (value, over) in enumerate(zip(token.tolist(), done.tolist(), strict=True)):
            if not over:
                made[row].append(value)
            enough.append(not over and stop is not None and stop(made[row]))
        done = done | torch.tensor(enough, device=device)
        if number + 1 == draws.shape[1] or bool(done.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        where = position[:, None].expand(3, -1, -1) if state.three_axes else position[:, None]
        logits = network(
            input_ids=token[:, None], attention_mask=mask, position_ids=where, past_key_values=state.cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        position = position + 1
    return made


def pick(logits: Tensor, draw: Tensor, *, temperature: float, top_p: float, never: frozenset[int]) -> Tensor:
    """One token per row from ``logits [n, V]`` and uniform numbers ``draw [n]``; greedy at temperature 0."""
    logits = logits.float().clone()
    logits[:, sorted(never)] = float("-inf")
    if temperature == 0:
        return logits.argmax(-1)
    sorted_p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = sorted_p.double().cumsum(-1)
    kept = total - sorted_p < top_p
    mass = (sorted_p * kept).double().sum(-1, keepdim=True)
    place = (total * kept <= draw[:, None] * mass).logical_and(kept).sum(-1)
    place = place.clamp_max(kept.sum(-1) - 1)
    return order.gather(-1, place[:, None])[:, 0]


def text_of(family: VlmFamily, ids: Sequence[int]) -> str:
    """An answer's text up to its first end token."""
    end = next((place for place, number in enumerate(ids) if number in family.end_ids), len(ids))
    return text_so_far(family, ids[:end]).strip()


def text_so_far(family: VlmFamily, ids: Sequence[int]) -> str:
    """What tokens say, blanks around it included; marks of the template are left out."""
    return str(family.tokenizer.decode(list(ids), skip_special_tokens=True))
