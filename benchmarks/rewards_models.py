"""Random weights for the GPU benchmark, made on the device: one transformers CLIP, and our reward on the same tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flops import forward_flops, on_meta
from PIL import Image
from rewards_inputs import SHAPES, TEXT

from mmalign import assets
from mmalign.rewards.clip_net import ClipNet
from mmalign.rewards.dual import DualEncoder
from mmalign.rewards.files import load_strictly
from mmalign.rewards.layouts import from_transformers, shape_from_transformers
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.table import CARDS
from mmalign.rewards.tokens import load_tokenizer

IDS = {"bos_token_id": 623, "eos_token_id": 624, "pad_token_id": 624}
"""Of the embedded tokenizer; the table of embeddings has CLIP's full size all the same."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Both sides of the benchmark."""

    backend: DualEncoder
    hf: Any
    flops: tuple[int, int]
    """Of one picture, and of one prompt of full length."""
    words: int = 620
    end: int = 624
    scale: float = 100.0

    def snippet(self, dtype: torch.dtype) -> Callable[[Path, str], float]:
        """Score one file with its prompt as PickScore's example does, in `dtype`."""
        from transformers import CLIPTokenizer

        try:
            from transformers import CLIPImageProcessorPil as Processor
        except ImportError:  # earlier releases name the one that computes with Pillow differently
            from transformers import CLIPImageProcessor as Processor

        size = self.backend.preprocess.size
        processor = Processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        tokenizer = CLIPTokenizer.from_pretrained(assets.path("tiny-clip"))
        model, device = self.hf.to(dtype), self.backend.device

        @torch.no_grad()
        def score(file: Path, prompt: str) -> float:
            pixels = processor(images=Image.open(file), return_tensors="pt").pixel_values.to(device, dtype)
            tokens = tokenizer(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
            image = model.get_image_features(pixel_values=pixels).pooler_output.float()
            text = model.get_text_features(**tokens).pooler_output.float()
            image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
            return float(self.scale * (image * text).sum())

        return score


def build(model: str, device: torch.device, dtype: torch.dtype) -> Models:
    """transformers' network in float32 and our reward in `dtype`, with equal random weights.

    Args:
        model: ``tiny`` or a name of `rewards_inputs.SHAPES`.
    """
    from transformers import CLIPConfig, CLIPModel

    vision, patch, width = (TINY, 32, 32) if model == "tiny" else SHAPES[model]
    text = TINY if model == "tiny" else TEXT[model]
    config = CLIPConfig(
        vision_config={**vision, "patch_size": patch, "image_size": 224, "hidden_act": "gelu"},
        text_config={**text, **IDS, "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu"},
        projection_dim=width,
    )
    with torch.device("meta"):
        hf = CLIPModel(config)
    hf = hf.to_empty(device=device).eval().requires_grad_(False)
    fill(hf)
    state = from_transformers(hf.state_dict())
    with torch.device("meta"):
        net = ClipNet(shape_from_transformers(config.to_dict(), Path(model)))
    net = net.to_empty(device=device).requires_grad_(False).eval()
    load_strictly(net, state, Path(model))
    empty = torch.empty((1, 3, 224, 224), device="meta")
    bare: Any = on_meta(net)
    ids = torch.zeros((1, 77), dtype=torch.long, device="meta")
    flops = forward_flops(lambda: bare.embed_images(empty)), forward_flops(lambda: bare.embed_texts(ids))
    net.place(device, dtype)
    tokenizer = load_tokenizer(assets.path("tiny-clip"), context=77)
    backend = DualEncoder(CARDS["pickscore"], net, tokenizer, preprocess=Preprocess("clip_hf", 224), value="logits",
                          identity="random")  # fmt: skip
    return Models(backend=backend, hf=hf, flops=flops)


def fill(network: torch.nn.Module) -> None:
    """Random weights of the usual size, and the counters that a network without storage has lost."""
    torch.manual_seed(0)
    for name, value in network.named_parameters():
        if value.ndim >= 2:
            value.normal_(std=0.02)
        elif name.endswith("logit_scale"):
            value.fill_(math.log(100))
        else:
            value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    for name, buffer in network.named_buffers():
        if not name.endswith("position_ids"):
            raise ValueError(f"no value is known for the buffer '{name}'")
        buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))
