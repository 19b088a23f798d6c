"""MPS, the multi-dimensional preference score (arXiv:2405.14705): its released "overall" model.

Image tokens attend to the prompt tokens that resemble a fixed condition sentence; the first of them is compared with the
pooled text. Departures from the release: similarities are scaled by the maximum of their own row, not of the whole batch
(equal at batch size one, which the authors' evaluation uses), and everything after the trunk is float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.errors import ModelError, RewardError
from mmalign.rewards.base import EncodingBackend, Texts
from mmalign.rewards.cards import Card
from mmalign.rewards.clip_net import ClipNet, VisionTower
from mmalign.rewards.dual import unit
from mmalign.rewards.files import fingerprint, load_strictly, read_folder_state, read_json, read_state
from mmalign.rewards.hub import local_weights, pick_device, pick_dtype
from mmalign.rewards.layouts import from_transformers, shape_from_tensors, shape_from_transformers
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.table import LoadRequest
from mmalign.rewards.tokens import ClipTokenizer, load_tokenizer

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, "
    "instance, texture, quantity, attributes, position, number, location, word, things."
)
"""The sentence that stands for "overall" in the authors' evaluation."""
WEIGHT_FILES = ("MPS_overall_checkpoint.safetensors", "model.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossShape:
    """Sizes of the cross-attention part; keys and values have a single head."""

    width: int
    layers: int
    heads: int
    head_width: int
    mlp: int


class WeightNorm(nn.Module):
    """Layer norm without a learned shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        return F.layer_norm(states, states.shape[-1:], self.weight)


class CrossBlock(nn.Module):
    """Image tokens attend to prompt tokens; a gated feed-forward runs beside it on the same normed input."""

    def __init__(self, shape: CrossShape) -> None:
        super().__init__()
        inner = shape.heads * shape.head_width
        self.heads = shape.heads
        self.norm = WeightNorm(shape.width)
        self.to_q = nn.Linear(shape.width, inner, bias=False)
        self.to_kv = nn.Linear(shape.width, 2 * shape.head_width, bias=False)
        self.to_out = nn.Linear(inner, shape.width, bias=False)
        self.up = nn.Linear(shape.width, 2 * shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.width, bias=False)

    def forward(self, states: Tensor, context: Tensor, keep: Tensor) -> Tensor:
        normed = self.norm(states)
        key, value = self.to_kv(context).chunk(2, dim=-1)
        mixed = _one_key_head(self.to_q(normed), key, value, self.heads, keep[:, None, None, :])
        return states + self.to_out(mixed) + self.down(_swiglu(self.up(normed)))


class SelfBlock(nn.Module):
    """Rotary self-attention and a gated feed-forward in parallel, from one fused projection."""

    def __init__(self, shape: CrossShape) -> None:
        super().__init__()
        inner = shape.heads * shape.head_width
        self.heads, self.parts = shape.heads, (inner, shape.head_width, shape.head_width, 2 * shape.mlp)
        self.norm = WeightNorm(shape.width)
        self.fused = nn.Linear(shape.width, sum(self.parts), bias=False)
        self.to_out = nn.Linear(inner, shape.width, bias=False)
        self.down = nn.Linear(shape.mlp, shape.width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        query, key, value, gate = self.fused(self.norm(states)).split(self.parts, dim=-1)
        rows, length, _ = query.shape
        turned = _rotate(query.view(rows, length, self.heads, -1).transpose(1, 2)).transpose(1, 2).reshape(query.shape)
        mixed = _one_key_head(turned, _rotate(key), value, self.heads, None)
        return states + self.to_out(mixed) + self.down(_swiglu(gate))


class MpsNet(nn.Module):
    """The CLIP trunk and the cross-attention part."""

    def __init__(self, clip: ClipNet, shape: CrossShape) -> None:
        super().__init__()
        self.clip = clip
        self.cross = nn.ModuleList(CrossBlock(shape) for _ in range(shape.layers))
        self.self_blocks = nn.ModuleList(SelfBlock(shape) for _ in range(shape.layers))

    def place(self, device: torch.device, dtype: torch.dtype) -> MpsNet:
        """Move to a device with the trunk in `dtype`; the rest is float32."""
        self.to(device)
        self.clip.place(device, dtype)
        return self

    def mix(self, image: Tensor, text: Tensor, keep: Tensor) -> Tensor:
        """Image tokens ``[N, T, D]``, prompt tokens ``[N, L, D]``, kept ones ``[N, L]`` -> image feature ``[N, D]``."""
        for cross, own in zip(self.cross, self.self_blocks, strict=True):
            image = own(cross(image, text, keep))
        return image[:, 0]


class Mps(EncodingBackend):
    """exp(logit_scale) times the cosine of the mixed image feature and the pooled text feature."""

    def __init__(
        self, card: Card, net: MpsNet, tokenizer: ClipTokenizer, *, threshold: float, condition: str, identity: str
    ) -> None:
        self.card, self.net, self.tokenizer, self.identity = card, net, tokenizer, identity
        self.threshold, self.condition = threshold, condition
        self.preprocess = Preprocess("clip_hf", net.clip.shape.image_size)
        self.device, self.dtype = net.clip.logit_scale.device, net.clip.vision.positions.dtype
        self.image_key = f"mps:{identity}:{self.dtype}"
        self.text_key = f"mps:{identity}:{self.dtype}:{condition}:{tokenizer.key}"
        with torch.inference_mode():
            self._condition = self._text_tokens([condition])[0][0]  # [L, D]

    @property
    def cosine_unit(self) -> float:
        return float(self.net.clip.logit_scale.exp())

    def record(self) -> Mapping[str, Any]:
        return {
            "weights": self.identity, "dtype": str(self.dtype), "preprocess": self.preprocess.key,
            "threshold": self.threshold, "condition": self.condition,
        }  # fmt: skip

    def _text_tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        # All positions take part, padding included, so every prompt has the full length.
        tokens = self.tokenizer(prompts, full_length=True)
        ids = tokens.ids.to(self.device, non_blocking=True)
        states = self.net.clip.text(ids)
        return self.net.clip.text.project_all(states), self.net.clip.text.pool(states, ids), tokens.truncated

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.finish_images(self.net.clip.vision(pixels))

    @property
    def image_tower(self) -> VisionTower:
        return self.net.clip.vision

    def finish_images(self, states: Tensor) -> Tensor:
        # Projected without the tower's last norm: that is how these weights were trained.
        return self.net.clip.vision.projection(states.float())

    def bytes_per_image(self) -> int:
        return self.net.clip.bytes_per_image()

    def encode_texts(self, prompts: Sequence[str]) -> Texts:
        tokens, pooled, truncated = self._text_tokens(prompts)
        return Texts(tensors=(tokens, pooled), truncated=truncated)

    def kept(self, tokens: Tensor) -> Tensor:
        """Which prompt tokens resemble the condition: bool ``[N, L]``.

        The similarity to the nearest condition token must exceed `threshold` times the row's largest. Where even the
        largest is not positive, that ratio means nothing and every token is kept.
        """
        nearest = torch.einsum("nld,kd->nlk", tokens, self._condition.to(tokens.device)).amax(dim=-1)
        largest = nearest.amax(dim=-1, keepdim=True)
        return (nearest > self.threshold * largest) | (largest <= 0)

    def pair(self, images: Tensor, texts: Texts | None) -> Tensor:
        if texts is None:
            raise RewardError("mps needs a prompt")
        tokens, pooled = texts.tensors
        mixed = self.net.mix(images, tokens, self.kept(tokens))
        return self.net.clip.logit_scale.exp() * (unit(mixed) * unit(pooled)).sum(dim=-1)


def mps(request: LoadRequest) -> Mps:
    """Load converted MPS weights (a safetensors file, or a folder with it). Options: ``threshold``, ``condition``."""
    options = request.take(threshold=0.3, condition=CONDITION, allow_special_tokens=False)
    path = local_weights(request)
    if path.suffix in (".pt", ".pth"):
        raise RewardError(f"{path} is a pickled module; 'mmalign rewards convert {path} OUT.safetensors' extracts it")
    folder = path if path.is_dir() else path.parent
    state, source = read_folder_state(path, WEIGHT_FILES) if path.is_dir() else (read_state(path), path)
    trunk = {name.removeprefix("model."): value.float() for name, value in state.items() if name.startswith("model.")}
    cross = {name: value.float() for name, value in state.items() if not name.startswith("model.")}
    renamed = from_transformers(trunk)
    found = (folder / "config.json").is_file()
    shape = (
        shape_from_transformers(read_json(folder / "config.json"), source)
        if found
        else shape_from_tensors(renamed, source)
    )
    net = MpsNet(ClipNet(shape), _cross_shape(cross, str(source)))
    load_strictly(net, {**{f"clip.{k}": v for k, v in renamed.items()}, **_cross_names(cross)}, source)
    identity = fingerprint(net.state_dict())
    net.requires_grad_(False).eval().place(pick_device(request.device), pick_dtype(request.dtype, request.device))
    tokenizer = load_tokenizer(folder, context=shape.context, allow_special_tokens=options["allow_special_tokens"])
    card = replace(request.card, preprocess=f"clip_hf:{shape.image_size}")
    return Mps(card, net, tokenizer, threshold=float(options["threshold"]), condition=str(options["condition"]),
               identity=identity)  # fmt: skip


def _cross_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's nested names to ours; its constant zero shifts and rotary tables are not weights."""
    rules = (
        (r"^cross_model\.layers\.(\d+)\.0\.fn\.", r"cross.\1."),
        (r"^cross_model\.layers\.(\d+)\.1\.fn\.", r"self_blocks.\1."),
        (r"\.ff\.0\.", ".up."),
        (r"\.(ff\.2|ff_out\.1)\.", ".down."),
        (r"\.fused_attn_ff_proj\.", ".fused."),
        (r"\.attn_out\.", ".to_out."),
    )
    out = {}
    for name, value in state.items():
        if name.endswith(("rotary_emb.inv_freq", ".pos_emb")) or (name.endswith("norm.bias") and not bool(value.any())):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def _cross_shape(state: Mapping[str, Tensor], source: str) -> CrossShape:
    try:
        inner, width = state["cross_model.layers.0.0.fn.to_q.weight"].shape
        head_width = state["cross_model.layers.0.0.fn.to_kv.weight"].shape[0] // 2
        mlp = state["cross_model.layers.0.0.fn.ff.2.weight"].shape[1]
    except KeyError as error:
        raise ModelError(f"{source} is not an MPS checkpoint: it has no tensor {error}") from error
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("cross_model.layers."))
    return CrossShape(width=width, layers=layers, heads=inner // head_width, head_width=head_width, mlp=mlp)


def _one_key_head(query: Tensor, key: Tensor, value: Tensor, heads: int, keep: Tensor | None) -> Tensor:
    """Attention of many query heads over one key and value head: ``[N, T, heads * d]``."""
    rows, length, _ = query.shape
    split = query.view(rows, length, heads, -1).transpose(1, 2)
    shared = (rows, heads, *key.shape[1:])
    mixed = F.scaled_dot_product_attention(
        split, key[:, None].expand(shared), value[:, None].expand(shared), attn_mask=keep
    )
    return mixed.transpose(1, 2).reshape(query.shape)


def _swiglu(states: Tensor) -> Tensor:
    value, gate = states.chunk(2, dim=-1)
    return F.silu(gate) * value


def _rotate(states: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on ``[..., T, d]``, halves paired."""
    length, width = states.shape[-2:]
    frequencies = 1.0 / (10000 ** (torch.arange(0, width, 2, device=states.device).float() / width))
    angles = torch.outer(torch.arange(length, device=states.device).float(), frequencies).repeat(1, 2)
    first, second = states.chunk(2, dim=-1)
    return states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
