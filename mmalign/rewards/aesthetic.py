"""LAION's aesthetic predictors: a linear map of the normalised CLIP image embedding. They read no prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import ModelError, RewardError
from mmalign.rewards.base import EncodingBackend, Texts
from mmalign.rewards.cards import Card
from mmalign.rewards.clip_net import VisionTower
from mmalign.rewards.dual import DualEncoder, build_dual
from mmalign.rewards.files import fingerprint, read_state
from mmalign.rewards.table import LoadRequest

HEAD_PATTERNS = {
    "aesthetic": ("sac+logos+ava1-l14-linearMSE.*", "aesthetic*.safetensors", "aesthetic*.pth", "head.safetensors"),
    "aesthetic-v1-l14": ("sa_0_4_vit_l_14_linear.*", "aesthetic*.safetensors", "head.safetensors"),
    "aesthetic-v1-b32": ("sa_0_4_vit_b_32_linear.*", "aesthetic*.safetensors", "head.safetensors"),
    "aesthetic-v1-b16": ("sa_0_4_vit_b_16_linear.*", "aesthetic*.safetensors", "head.safetensors"),
}
V2_LAYERS = (0, 2, 4, 6, 7)
"""Positions of the linear layers in the released v2 stack; the others are dropout. Another set is another network."""


class Aesthetic(EncodingBackend):
    """score = w . normalised embedding + b, in float32."""

    text_key = ""

    def __init__(self, card: Card, clip: DualEncoder, weight: Tensor, bias: Tensor) -> None:
        if weight.shape != (clip.net.shape.embedding,):
            raise ModelError(
                f"the aesthetic head reads {weight.shape[0]} numbers, the CLIP embedding has {clip.net.shape.embedding}"
            )
        self.card, self.clip, self.device = card, clip, clip.device
        self.weight, self.bias = weight.to(self.device), bias.to(self.device)
        self.preprocess, self.mean, self.std, self.image_key = clip.preprocess, clip.mean, clip.std, clip.image_key

    def record(self) -> Mapping[str, Any]:
        head = fingerprint({"weight": self.weight, "bias": self.bias})
        return {
            "weights": self.clip.identity,
            "head": head,
            "dtype": str(self.clip.dtype),
            "preprocess": self.preprocess.key,
        }

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.clip.encode_images(pixels)

    @property
    def image_tower(self) -> VisionTower:
        return self.clip.image_tower

    @property
    def reads_first(self) -> bool:
        return self.clip.reads_first

    def finish_images(self, states: Tensor) -> Tensor:
        return self.clip.finish_images(states)

    def bytes_per_image(self) -> int:
        return self.clip.bytes_per_image()

    def encode_texts(self, prompts: Sequence[str]) -> Texts:
        raise RewardError(f"reward '{self.name}' reads no prompt")

    def pair(self, images: Tensor, texts: Texts | None) -> Tensor:
        return (images * self.weight).sum(dim=-1) + self.bias

    def embedding(self, images: Tensor) -> Tensor:
        return images


def read_head(path: Path) -> tuple[Tensor, Tensor]:
    """The head of either version as one affine map: weight ``[d]``, bias scalar, float32.

    v2 is five linear layers without activations, so their product is exact; it is taken in float64.

    Raises:
        ModelError: another network, such as the sibling that has ReLUs.
    """
    state = read_state(path)
    if set(state) == {"weight", "bias"} and state["weight"].shape[0] == 1:
        return state["weight"][0].float(), state["bias"][0].float()
    numbers = sorted({int(match[1]) for name in state if (match := re.match(r"layers\.(\d+)\.(weight|bias)$", name))})
    if tuple(numbers) != V2_LAYERS or len(state) != 2 * len(V2_LAYERS):
        raise ModelError(f"{path} is not a linear aesthetic head: its tensors are {sorted(state)[:12]}")
    width = state["layers.0.weight"].shape[1]
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for number in numbers:
        layer = state[f"layers.{number}.weight"].double()
        weight, bias = layer @ weight, layer @ bias + state[f"layers.{number}.bias"].double()
    return weight[0].float(), bias[0].float()


def aesthetic(request: LoadRequest) -> Aesthetic:
    """Load a predictor: `path` is a CLIP folder that also holds the head, or option ``head=`` names the head's file."""
    head = request.take(head=None)["head"]
    path = request.path
    if head is None and path is not None and path.is_file():
        head, request = path, replace(request, path=None)
    if head is None:
        folder = path
        found = [] if folder is None else [f for glob in HEAD_PATTERNS[request.name] for f in sorted(folder.glob(glob))]
        if not found:
            raise RewardError(
                f"reward '{request.name}' needs its head file, one of {', '.join(HEAD_PATTERNS[request.name])}: "
                "put it into the CLIP folder given as path, or give head='/file'. It is published on GitHub by "
                "LAION-AI/aesthetic-predictor (v1) and christophschuhmann/improved-aesthetic-predictor (v2)"
            )
        head = found[0]
    weight, bias = read_head(Path(head))
    clip = build_dual(replace(request, options={}), value="cosine", preprocess="clip_tv")
    card = replace(request.card, preprocess=clip.preprocess.key)
    return Aesthetic(card, clip, weight, bias)
