"""Rewards that compare one image vector with one text vector: CLIPScore and its variants, PickScore, HPS v2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmalign import assets
from mmalign.errors import RewardError
from mmalign.rewards.base import EncodingBackend, Texts
from mmalign.rewards.cards import Card
from mmalign.rewards.clip_net import ClipNet, VisionTower
from mmalign.rewards.declared import statistics
from mmalign.rewards.files import fingerprint
from mmalign.rewards.hub import local_weights, pick_device, pick_dtype
from mmalign.rewards.layouts import load_clip
from mmalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from mmalign.rewards.table import LoadRequest
from mmalign.rewards.tokens import ClipTokenizer, load_tokenizer

VALUES = ("cosine", "percent", "hessel", "logits")
"""cos; 100 max(0, cos); 2.5 max(0, cos); exp(logit_scale) cos."""


class DualEncoder(EncodingBackend):
    """A reward that is a function of the cosine of two CLIP embeddings.

    Args:
        net: both towers, on their device.
        tokenizer: in the dialect the weights were trained with.
        value: one of `VALUES`.
        prefix: text put before every prompt.
    """

    def __init__(
        self,
        card: Card,
        net: ClipNet,
        tokenizer: ClipTokenizer,
        *,
        preprocess: Preprocess,
        value: str,
        prefix: str = "",
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
        identity: str = "",
    ) -> None:
        if value not in VALUES:
            raise RewardError(f"the value of a dual encoder is one of {', '.join(VALUES)}; got {value!r}")
        self.card, self.net, self.tokenizer = card, net, tokenizer
        self.preprocess, self.value, self.prefix, self.mean, self.std = preprocess, value, prefix, mean, std
        self.device = net.logit_scale.device
        self.dtype = net.vision.positions.dtype
        self.identity = identity or fingerprint(net.state_dict())
        self.image_key = f"clip:{self.identity}:{self.dtype}"
        self.text_key = f"clip:{self.identity}:{self.dtype}:{tokenizer.key}:{prefix}"

    def record(self) -> Mapping[str, Any]:
        return {
            "weights": self.identity,
            "dtype": str(self.dtype),
            "value": self.value,
            "prefix": self.prefix,
            "preprocess": self.preprocess.key,
            "tokenizer": self.tokenizer.dialect,
        }

    @property
    def cosine_unit(self) -> float:
        fixed = {"cosine": 1.0, "percent": 100.0, "hessel": 2.5}
        return fixed.get(self.value) or float(self.net.logit_scale.exp())

    def encode_images(self, pixels: Tensor) -> Tensor:
        return unit(self.net.embed_images(pixels))

    @property
    def image_tower(self) -> VisionTower:
        return self.net.vision

    @property
    def reads_first(self) -> bool:
        return True

    def finish_images(self, states: Tensor) -> Tensor:
        return unit(self.net.vision.pool(states))

    def bytes_per_image(self) -> int:
        return self.net.bytes_per_image()

    def encode_texts(self, prompts: Sequence[str]) -> Texts:
        tokens = self.tokenizer([self.prefix + prompt for prompt in prompts])
        vectors = unit(self.net.embed_texts(tokens.ids.to(self.device, non_blocking=True)))
        return Texts(tensors=(vectors,), truncated=tokens.truncated)

    def pair(self, images: Tensor, texts: Texts | None) -> Tensor:
        if texts is None:
            raise RewardError(f"reward '{self.name}' needs a prompt")
        cosine = (images * texts.tensors[0]).sum(dim=-1)
        if self.value == "percent":
            return 100 * cosine.clamp(min=0)
        if self.value == "hessel":
            return 2.5 * cosine.clamp(min=0)
        return cosine if self.value == "cosine" else self.net.logit_scale.exp() * cosine

    def embedding(self, images: Tensor) -> Tensor:
        return images


def unit(vectors: Tensor) -> Tensor:
    """L2-normalised; a zero or non-finite vector gives NaN, which the engine turns into a row error."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, vectors / norms, torch.nan)


def build_dual(
    request: LoadRequest,
    *,
    value: str,
    preprocess: str | None = None,
    dialect: str | None = None,
    prefix: str = "",
    files: tuple[str, ...] = (),
    allow_special_tokens: bool = False,
) -> DualEncoder:
    """Load the weights of a request into a `DualEncoder`; what is None follows the checkpoint's layout."""
    path = local_weights(request)
    folder = path if path.is_dir() else path.parent
    place = f"clip|{path.resolve()}|{request.device}|{request.dtype}"
    if place not in request.shared:
        loaded, layout = load_clip(path, files=files)
        identity = fingerprint(loaded.state_dict())
        loaded.place(pick_device(request.device), pick_dtype(request.dtype, request.device))
        request.shared[place] = (loaded, layout, identity)
    net, layout, identity = request.shared[place]
    dialect = dialect or ("open_clip" if layout == "open_clip" else "hf")
    rule = preprocess or ("clip_tv" if layout == "open_clip" else "clip_hf")
    mean, std = statistics(folder, own_rule=preprocess is not None)
    size = net.shape.image_size
    tokenizer = load_tokenizer(
        folder, context=net.shape.context, dialect=dialect, allow_special_tokens=allow_special_tokens
    )
    card = replace(request.card, preprocess=f"{rule}:{size}", max_text_tokens=net.shape.context)
    return DualEncoder(card, net, tokenizer, preprocess=Preprocess(rule, size), value=value, prefix=prefix, mean=mean,
                       std=std, identity=identity)  # fmt: skip


def clipscore(request: LoadRequest) -> DualEncoder:
    """CLIPScore (arXiv:2104.08718) and its named variants."""
    value = {"clipscore-raw": "cosine", "clipscore-hessel": "hessel", "clipscore-logits": "logits"}.get(
        request.name, "percent"
    )
    options = request.take(allow_special_tokens=False)
    return build_dual(request, value=value, prefix="A photo depicts " if value == "hessel" else "", **options)


def pickscore(request: LoadRequest) -> DualEncoder:
    """PickScore v1 (arXiv:2305.01569): exp(logit_scale) cos; option ``scale="cosine"`` for the bare cosine."""
    options = request.take(scale="logits", allow_special_tokens=False)
    scale = options.pop("scale")
    if scale not in ("logits", "cosine"):
        raise RewardError(f"pickscore's scale is 'logits' or 'cosine', got {scale!r}")
    return build_dual(request, value=scale, preprocess="clip_hf", dialect="hf", **options)


def hps(request: LoadRequest) -> DualEncoder:
    """HPS v2.0 and v2.1 (arXiv:2306.09341): the cosine; ``legacy_resize=True`` resizes as under torchvision < 0.17."""
    options = request.take(legacy_resize=False, allow_special_tokens=False)
    rule = "hps_letterbox_noaa" if options.pop("legacy_resize") else "hps_letterbox"
    return build_dual(request, value="cosine", preprocess=rule, dialect="open_clip", **options)


def embedded(request: LoadRequest) -> DualEncoder:
    """The reward models that come with the project: logit_scale.exp() cos, 32 pixels."""
    options = request.take(allow_special_tokens=False)
    placed = request if request.path is not None else replace(request, path=assets.path(request.name))
    return build_dual(placed, value="logits", **options)
