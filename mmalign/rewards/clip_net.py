"""A CLIP dual encoder in plain torch: one network for transformers, open_clip and HPS checkpoints.

The towers may run in half precision; the last layer norm, the projection and everything after are float32, because the
whole spread of a reward can be smaller than the spacing of half-precision numbers. Reading checkpoints is in `layouts`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """One transformer: all that its weights' shapes do not say is here too."""

    width: int
    layers: int
    heads: int
    mlp: int
    activation: str = "quick_gelu"
    """``quick_gelu`` (OpenAI), ``gelu`` (LAION) or ``gelu_tanh``."""
    eps: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipShape:
    """A whole dual encoder."""

    vision: TowerShape
    text: TowerShape
    patch: int
    image_size: int
    vocabulary: int
    context: int
    embedding: int
    eos_id: int | None = None
    """Token whose first position is pooled; None or 2 pools the position of the largest id, as older checkpoints do."""


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.heads, self.activation = shape.heads, shape.activation
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.up = nn.Linear(shape.width, shape.mlp)
        self.down = nn.Linear(shape.mlp, shape.width)

    def forward(self, states: Tensor, *, causal: bool, first: bool = False) -> Tensor:
        """States ``[N, L, width]`` -> the same, or ``[N, 1, width]`` with `first`: the first position alone, which sees all."""
        rows, length, width = states.shape
        normed = self._first_norm(states)
        if first:
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(normed[:, :1], weight[:width], bias[:width]).view(rows, 1, self.heads, -1).transpose(1, 2)
            both = F.linear(normed, weight[width:], bias[width:]).view(rows, length, 2, self.heads, width // self.heads)
            key, value = both.permute(2, 0, 3, 1, 4)
            return self._finish(states[:, :1], F.scaled_dot_product_attention(query, key, value))
        qkv = self.qkv(normed).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return self._finish(states, F.scaled_dot_product_attention(query, key, value, is_causal=causal))

    def _finish(self, states: Tensor, mixed: Tensor) -> Tensor:
        """What follows attention: states ``[N, L, width]``, mixed values ``[N, heads, L, width / heads]``."""
        update = self.out(mixed.transpose(1, 2).reshape(states.shape))
        if _fused(states):
            from mmalign.rewards import kernels

            norm = self.norm2
            states, normed = kernels.add_layer_norm(states, update, norm.weight, norm.bias, norm.eps)
            return states + self.down(kernels.activate_(self.up(normed), self.activation))
        states = states + update
        return states + self.down(_activate(self.up(self.norm2(states)), self.activation))

    def _first_norm(self, states: Tensor) -> Tensor:
        if not _fused(states):
            normed: Tensor = self.norm1(states)
            return normed
        from mmalign.rewards import kernels

        return kernels.layer_norm(states, self.norm1.weight, self.norm1.bias, self.norm1.eps)


class VisionTower(nn.Module):
    """Patches to states; `pool` gives the image embedding."""

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        tower = shape.vision
        self.architecture = (tower, shape.patch, shape.image_size)
        self.patch = nn.Conv2d(3, tower.width, shape.patch, stride=shape.patch, bias=False)
        self.cls = nn.Parameter(torch.zeros(tower.width))
        self.positions = nn.Parameter(torch.zeros((shape.image_size // shape.patch) ** 2 + 1, tower.width))
        self.norm_in = nn.LayerNorm(tower.width, eps=tower.eps)
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.layers))
        self.norm_out = nn.LayerNorm(tower.width, eps=tower.eps)
        self.projection = nn.Linear(tower.width, shape.embedding, bias=False)

    def stem(self, pixels: Tensor) -> Tensor:
        """Normalised float pixels ``[N, 3, s, s]`` -> ``[N, 1 + patches, width]``."""
        pixels = pixels.to(self.patch.weight.dtype)
        patches = self._as_product(pixels) if _fused(pixels) else self.patch(pixels).flatten(2).transpose(1, 2)
        states = torch.cat([self.cls.expand(len(patches), 1, -1), patches], dim=1) + self.positions
        return self.norm_in(states)

    def _as_product(self, pixels: Tensor) -> Tensor:
        """The convolution of `stem` as one matrix product, ``[N, patches, width]``, for its patches do not overlap: several times
        faster than cuDNN's kernel."""
        side = self.patch.kernel_size[0]
        rows, colours, height, width = pixels.shape
        cut = pixels.view(rows, colours, height // side, side, width // side, side).permute(0, 2, 4, 1, 3, 5)
        flat, weight = cut.reshape(rows, -1, colours * side * side), self.patch.weight.flatten(1)
        spare = -flat.shape[-1] % 8  # rows that do not begin at 16 bytes are read slowly
        return F.linear(F.pad(flat, (0, spare)), F.pad(weight, (0, spare)))

    def stem_state(self) -> dict[str, Tensor]:
        """The tensors `stem` uses, by name."""
        later = ("blocks.", "norm_out.", "projection.")
        return {name: value for name, value in self.state_dict().items() if not name.startswith(later)}

    def forward(self, pixels: Tensor) -> Tensor:
        """States after the last block, before the last norm: ``[N, 1 + patches, width]``."""
        states = self.stem(pixels)
        for block in self.blocks:
            states = block(states, causal=False)
        return states

    def pool(self, states: Tensor) -> Tensor:
        """Image embedding, not normalised: float32 ``[N, embedding]``."""
        return self.projection(self.norm_out(states[:, 0].float()))


class TextTower(nn.Module):
    """Token ids to states; `pool` gives the text embedding. Causal, so padding after the end changes nothing."""

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        tower = shape.text
        self.eos_id = shape.eos_id
        self.tokens = nn.Embedding(shape.vocabulary, tower.width)
        self.positions = nn.Parameter(torch.zeros(shape.context, tower.width))
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.layers))
        self.norm_out = nn.LayerNorm(tower.width, eps=tower.eps)
        self.projection = nn.Linear(tower.width, shape.embedding, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[N, L]`` -> states before the last norm ``[N, L, width]``."""
        states = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            states = block(states, causal=True)
        return states

    def pool(self, states: Tensor, ids: Tensor) -> Tensor:
        """Text embedding at the end token, not normalised: float32 ``[N, embedding]``."""
        position = (
            ids.argmax(dim=1) if self.eos_id is None or self.eos_id == 2 else ids.eq(self.eos_id).int().argmax(dim=1)
        )
        ends = states[torch.arange(len(ids), device=ids.device), position]
        return self.projection(self.norm_out(ends.float()))

    def project_all(self, states: Tensor) -> Tensor:
        """Every position through the last norm and the projection: float32 ``[N, L, embedding]``."""
        return self.projection(self.norm_out(states.float()))


class ClipNet(nn.Module):
    """Both towers and the learned temperature."""

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        self.shape = shape
        self.vision = VisionTower(shape)
        self.text = TextTower(shape)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def place(self, device: torch.device, dtype: torch.dtype) -> ClipNet:
        """Move to a device with towers in `dtype` and heads in float32."""
        self.to(device=device, dtype=dtype)
        for head in (self.vision.norm_out, self.vision.projection, self.text.norm_out, self.text.projection):
            head.float()
        self.logit_scale.data = self.logit_scale.data.float()
        return self

    def bytes_per_image(self) -> int:
        """Memory one picture takes in the vision tower without gradients: one block's tensors, with room to spare."""
        tower = self.shape.vision
        tokens = (self.shape.image_size // self.shape.patch) ** 2 + 1
        pixels = 2 * 3 * self.shape.image_size**2 * 4
        return pixels + tokens * (8 * tower.width + 2 * tower.mlp) * self.vision.positions.element_size()

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Normalised float pixels ``[N, 3, s, s]`` -> float32 ``[N, embedding]``, not normalised.

        Only the first position is pooled, so the last block computes no other.
        """
        states = self.vision.stem(pixels)
        for block in self.vision.blocks[:-1]:
            states = block(states, causal=False)
        return self.vision.pool(self.vision.blocks[-1](states, causal=False, first=True))

    def embed_texts(self, ids: Tensor) -> Tensor:
        """Token ids ``[N, L]`` -> float32 ``[N, embedding]``, not normalised."""
        return self.text.pool(self.text(ids), ids)


def _fused(states: Tensor) -> bool:
    """Whether the steps between matrix products run in our kernels: in half precision on a GPU, where no gradient is wanted."""
    if not states.is_cuda or states.dtype == torch.float32 or not torch.is_inference_mode_enabled():
        return False
    return not torch.compiler.is_compiling() and _kernels_work(states.device)


@lru_cache(maxsize=16)
def _kernels_work(device: torch.device) -> bool:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    from mmalign.rewards import kernels

    return kernels.work_on(device)


def _activate(states: Tensor, activation: str) -> Tensor:
    if activation == "quick_gelu":
        if torch.is_inference_mode_enabled():  # the same numbers with one new tensor instead of three
            return torch.mul(states, 1.702).sigmoid_().mul_(states)
        return states * torch.sigmoid(1.702 * states)
    return F.gelu(states, approximate="tanh" if activation == "gelu_tanh" else "none")
