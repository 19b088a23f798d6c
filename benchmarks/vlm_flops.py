"""What a DPO step on a vision-language model must compute, in FLOPs, from its shapes: the numerator of MFU.

Two FLOPs per multiply-add. Attention counts the pairs of tokens that see each other (half of a square for a causal pass), not
what a kernel computes beside them. Activation checkpointing's second forward pass is no model work and left out. With adapters
on a frozen network the backward pass makes the gradients of activations alone: as many FLOPs as the forward pass in the linear
layers (the adapters' own, about one in a hundred, are left out) and twice as many in attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Qwen2.5-VL network, read off the network itself."""

    language: int
    """Weights of the language model's linear layers, without embedding and output layer."""
    layers: int
    width: int
    """Heads times their size."""
    head: int
    """Weights of the output layer."""
    vision: int
    """Weights that every patch goes through."""
    merger: int
    """Weights that every merged patch goes through."""
    vision_width: int
    full_blocks: int
    window_blocks: int
    window: int
    """Patches of a window."""
    merge: int
    """Patches that become one token."""

    @classmethod
    def of(cls, network: Any) -> Shape:
        text, vision = network.config.get_text_config(), network.config.vision_config
        tower = network.model.visual
        side = vision.window_size // vision.patch_size
        return cls(
            language=_linear(network.model.language_model), layers=text.num_hidden_layers,
            width=text.num_attention_heads * (text.hidden_size // text.num_attention_heads),
            head=network.get_output_embeddings().weight.numel(),
            vision=_linear(tower.blocks) + tower.patch_embed.proj.weight.numel(), merger=_linear(tower.merger),
            vision_width=vision.hidden_size, full_blocks=len(vision.fullatt_block_indexes),
            window_blocks=vision.depth - len(vision.fullatt_block_indexes), window=side * side,
            merge=vision.spatial_merge_size**2,
        )  # fmt: skip

    def encode(self, patches: int) -> int:
        """One picture through tower and merger."""
        linear = 2 * self.vision * patches + 2 * self.merger * (patches // self.merge)
        seen = self.full_blocks * patches * patches + self.window_blocks * patches * min(self.window, patches)
        return linear + 4 * self.vision_width * seen

    def answers(self, prefix: int, lengths: Sequence[int], *, shared: bool, gradient: bool) -> int:
        """Language model and output layer over a prompt with its answers; `gradient`: the backward pass as well."""
        if shared:
            tokens = prefix + sum(lengths)
            pairs = _causal(prefix) + sum(length * prefix + _causal(length) for length in lengths)
        else:
            tokens = sum(prefix + length for length in lengths)
            pairs = sum(_causal(prefix + length) for length in lengths)
        linear = 2 * self.language * tokens + 2 * self.head * sum(lengths)
        return linear * (2 if gradient else 1) + 4 * self.width * self.layers * pairs * (3 if gradient else 1)


def pair_flops(
    shape: Shape, *, patches: int, prefix: int, lengths: Sequence[int], shared: bool, encodes: int, reference: bool = True
) -> int:
    """One pair: policy forward and backward, reference forward (unless it is stored), and the picture `encodes` times."""
    total = shape.encode(patches) * encodes + shape.answers(prefix, lengths, shared=shared, gradient=True)
    return total + (shape.answers(prefix, lengths, shared=shared, gradient=False) if reference else 0)


def _linear(module: nn.Module) -> int:
    return sum(part.weight.numel() for name, part in module.named_modules()
               if isinstance(part, nn.Linear) and "lora_" not in name)  # fmt: skip


def _causal(length: int) -> int:
    return length * (length + 1) // 2
