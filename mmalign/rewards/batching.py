"""Pictures through an encoder in batches: how many at once, and what to do when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmalign.rewards.base import EncodingBackend
from mmalign.rewards.preprocess import normalise

EncodeEach = Callable[[Tensor], tuple[Tensor, ...]]
"""Normalised float32 pixels ``[n, 3, s, s]`` -> encodings ``[n, ...]``, one for each of several rewards."""


def batch_for(free_bytes: int, bytes_per_image: int) -> int:
    """Pictures per forward: a power of two from 16 to 512 within half of the free memory; 128 where sizes are unknown."""
    if bytes_per_image <= 0:
        return 128
    fits = free_bytes // (2 * bytes_per_image)
    return min(512, max(16, 1 << max(0, fits.bit_length() - 1)))


def in_batches(
    backend: EncodingBackend, encode: EncodeEach, stacks: Sequence[Tensor], size: int, *, pad: bool = False
) -> list[tuple[Tensor, ...]]:
    """Encode pictures `size` at a time, or fewer where the device's memory does not allow it.

    Args:
        stacks: uint8 or float pixels ``[3, s, s]``, already resized; some may lie on the encoder's device already.
        pad: fill the last batch with black pictures, so that a compiled encoder sees one shape.

    Returns:
        for every picture its encodings, as many as `encode` gives.
    """
    out: list[tuple[Tensor, ...]] = []
    start = 0
    while start < len(stacks):
        batch = _stacked(stacks[start : start + size], backend.device)
        count = len(batch)
        if pad and count < size:
            batch = torch.cat([batch, batch.new_zeros((size - count, *batch.shape[1:]))])
        try:
            with torch.inference_mode():
                batch = batch.to(backend.device, non_blocking=True)
                found = encode(normalise(batch, backend.mean, backend.std))
                out.extend(zip(*(value[:count] for value in found), strict=True))
            start += size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            # A smaller batch gives the same numbers, only slower.
            torch.cuda.empty_cache()
            size = max(1, size // 2)
    return out


def _stacked(pixels: Sequence[Tensor], device: torch.device) -> Tensor:
    """One batch of them; on `device` where any lies there, for those that were resized there are not brought back."""
    if len({value.device for value in pixels}) > 1:
        pixels = [value.to(device, non_blocking=True) for value in pixels]
    if device.type != "cuda" or pixels[0].device.type != "cpu":
        return torch.stack(list(pixels))
    # Row by row: torch would do it on all cores, which decode meanwhile, and wait for the slowest of them.
    batch = torch.empty((len(pixels), *pixels[0].shape), dtype=pixels[0].dtype, pin_memory=True)
    for place, value in zip(batch.numpy(), pixels, strict=True):
        place[...] = value.numpy()
    return batch


def stack_padded(values: tuple[Tensor, ...]) -> Tensor:
    """Stack, padding the first axis with zeros on the right where lengths differ (token sequences)."""
    if values[0].ndim == 0 or len({value.shape for value in values}) == 1:
        return torch.stack(values)
    longest = max(value.shape[0] for value in values)
    out = values[0].new_zeros((len(values), longest, *values[0].shape[1:]))
    for row, value in enumerate(values):
        out[row, : value.shape[0]] = value
    return out
