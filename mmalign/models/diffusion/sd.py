"""Stable Diffusion 1.x, 2.x and XL: one U-Net file, because they differ only in their text side.

SD 1.x and 2.x have one text encoder; SDXL has two, whose penultimate layers are joined, plus the second one's pooled
vector and the six size and crop numbers, which are the picture's own and not constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmalign.diffusion.process import NoiseProcess, process_from_scheduler
from mmalign.errors import ModelError
from mmalign.models.diffusion.folder import FolderFamily
from mmalign.models.diffusion.kohya import unet_names
from mmalign.types import Conditioning, Geometry

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class StableDiffusion(FolderFamily):
    """SD 1.x and 2.x, epsilon or v. See ``DiffusionFamily`` for the contract."""

    lora_targets: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": ATTENTION,
        "all": (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    }
    network_part = "unet"
    network_class = "UNet2DConditionModel"
    pipeline_class = "StableDiffusionPipeline"
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "CLIPTextModel"}
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "CLIPTokenizer"}

    def _process(self, scheduler: Mapping[str, Any], source: str) -> NoiseProcess:
        return process_from_scheduler(scheduler, source=source)

    def _right_network(self) -> None:
        """SDXL's network asks for what only its own family gives, and the other way round."""
        extended = self.network.config.addition_embed_type == "text_time"
        if extended != (len(self.encoders) > 1):
            name = "sdxl" if extended else "sd"
            raise ModelError(f"model.name: {self.config.path} holds a model of another family; use model.name: {name}")

    @classmethod
    def probe(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        size, width = values.get("sample_size") or 64, values.get("cross_attention_dim", 768)
        found: dict[str, Any] = {
            "sample": torch.empty(1, values.get("in_channels", 4), size, size), "timestep": torch.zeros(1, dtype=torch.long),
            "encoder_hidden_states": torch.empty(1, 77, width if isinstance(width, int) else width[0]),
        }  # fmt: skip
        if values.get("addition_embed_type") == "text_time":
            pooled = values["projection_class_embeddings_input_dim"] - 6 * values["addition_time_embed_dim"]
            found["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        return found

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.network.config.sample_size
        return self.network.config.in_channels, size, size

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``tokens``: last hidden state of the text encoder, float32 ``[N, L, D]``."""
        with self.autocast():
            hidden = self._part("text_encoder")(self._tokens(prompts, "tokenizer")).last_hidden_state
        return {"tokens": hidden.float()}

    def conditioning(self, text: Mapping[str, Tensor], geometry: Geometry) -> Conditioning:
        return Conditioning(tokens=text["tokens"])

    def predict(self, module: nn.Module, noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with self.autocast():
            return module(  # type: ignore[no-any-return]
                noisy, self.process.network_time(t), cond.tokens, **self._added(cond), **self.user_inputs(cond),
                return_dict=False,
            )[0]  # fmt: skip

    def _added(self, cond: Conditioning) -> dict[str, Any]:
        return {}

    def kohya(self, state: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
        return unet_names(state, alpha=alpha)

    def _pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, a pooled vector, and the true size and crop of every picture."""

    pipeline_class = "StableDiffusionXLPipeline"
    encoders: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``tokens``: both encoders' penultimate layers side by side ``[N, L, D1 + D2]``; ``pooled`` ``[N, P]``."""
        hidden = []
        with self.autocast():
            for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
                out = self._part(encoder)(self._tokens(prompts, tokenizer), output_hidden_states=True)
                hidden.append(out.hidden_states[-2])
        return {"tokens": torch.cat(hidden, -1).float(), "pooled": out.text_embeds.float()}

    def conditioning(self, text: Mapping[str, Tensor], geometry: Geometry) -> Conditioning:
        ids = torch.cat([geometry.original, geometry.crop, geometry.target], 1).to(text["tokens"].device)
        return Conditioning(tokens=text["tokens"], pooled=text["pooled"], extras={"time_ids": ids.float()})

    def _added(self, cond: Conditioning) -> dict[str, Any]:
        return {"added_cond_kwargs": {"text_embeds": cond.pooled, "time_ids": cond.extras["time_ids"]}}

    def _pipeline_options(self) -> dict[str, Any]:
        """What the checkpoint says of an absent negative prompt decides every guided sample."""
        values = self._index()
        return {
            "force_zeros_for_empty_prompt": bool(values.get("force_zeros_for_empty_prompt", True)),
            "add_watermarker": False,
        }
