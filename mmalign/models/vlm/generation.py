"""Answers from the current weights: left-padded prompts, cached keys, media encoded once, draws that belong to a sample.

A sample's randomness is one uniform number per token from its own stream, turned into a token through the cumulative
distribution: neither the batch it falls into nor the other samples change it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    hide: Sequence[Tensor] | None,
) -> list[list[str]]:  # fmt: skip
    """See ``VlmFamily.generate``."""
    if temperature < 0 or not 0 < top_p <= 1 or min(max_new_tokens, samples, batch_size) < 1:
        raise ValueError("temperature must not be negative, top_p in (0, 1], and the counts at least 1")
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
                    texts = _group(
                        family, network, [examples[n].rows[0] for n in group], draws, len(numbers), temperature, top_p,
                        hidden, family.collate([examples[n] for n in group]),
                    )  # fmt: skip
                for place, text in enumerate(texts):
                    out[group[place // len(numbers)]][numbers[place % len(numbers)]] = text
    finally:
        network.train(was_training)
    return out


def left_padded(family: VlmFamily, rows: Sequence[EncodedRow], hide: Sequence[Tensor] | None) -> Prefill:
    """Prompts with padding on the left; positions are those of the prompts themselves."""
    width = max(len(row.prefix) for row in rows)
    axes = rows[0].positions.shape[:-1]
    shape = (len(rows), width)
    input_ids = torch.full(shape, family.tokenizer.pad_token_id or 0)
    mask, types = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    positions = torch.zeros((*axes, *shape), dtype=torch.int64)
    following = torch.zeros(len(rows), dtype=torch.int64)
    for number, row in enumerate(rows):
        length = len(row.prefix)
        begin = width - length
        input_ids[number, begin:] = row.prefix
        mask[number, begin:] = 1 if hide is None else (~hide[number].cpu()).long()
        positions[..., number, begin:] = row.positions[..., :length]
        types[number, begin:] = family.token_types(row.prefix)
        following[number] = family.next_position(row.positions[..., :length])
    return Prefill(input_ids=input_ids, attention_mask=mask, position_ids=positions, types=types, next_position=following)


def _group(
    family: VlmFamily, network: Any, rows: Sequence[EncodedRow], draws: Tensor, samples: int, temperature: float,
    top_p: float, hide: Sequence[Tensor] | None, batch: Any,
) -> list[str]:  # fmt: skip
    """All samples of a few prompts: one pass over the prompts, then one token at a time for all."""
    from transformers import DynamicCache

    prompts = left_padded(family, rows, hide)
    device = next(network.parameters()).device
    media = batch.media.to(device)
    cache = DynamicCache(config=family.text_config)
    inputs: dict[str, Any] = {"position_ids": prompts.position_ids.to(device), **family.prefill_inputs(prompts.types.to(device))}
    if media.image or media.video:
        features = vision_features(family, network, media)
        images = tuple(unit for row in media.image_rows for unit in row)
        videos = tuple(unit for row in media.video_rows for unit in row)
        inputs |= media_inputs(network, encoder_outputs(family, features, images, videos))
    mask = prompts.attention_mask.to(device)
    logits = network(
        input_ids=prompts.input_ids.to(device), attention_mask=mask, past_key_values=cache, use_cache=True,
        logits_to_keep=1, **inputs,
    ).logits[:, -1]  # fmt: skip
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    position = prompts.next_position.to(device).repeat_interleave(samples)
    three_axes = prompts.position_ids.ndim == 3
    ends = torch.tensor(sorted(family.end_ids), device=device)
    done = torch.zeros(len(logits), dtype=torch.bool, device=device)
    made: list[Tensor] = []
    draws = draws.to(device)
    for number in range(draws.shape[1]):
        token = pick(logits, draws[:, number], temperature=temperature, top_p=top_p, never=family.placeholder_ids)
        made.append(torch.where(done, ends[0], token))
        done = done | torch.isin(token, ends)
        if number + 1 == draws.shape[1] or bool(done.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        where = position[:, None].expand(3, -1, -1) if three_axes else position[:, None]
        logits = network(
            input_ids=made[-1][:, None], attention_mask=mask, position_ids=where, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        position = position + 1
    return [text_of(family, ids) for ids in torch.stack(made, 1).tolist()]


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


def text_of(family: VlmFamily, ids: list[int]) -> str:
    """An answer's text up to its first end token."""
    end = next((place for place, number in enumerate(ids) if number in family.end_ids), len(ids))
    return str(family.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
