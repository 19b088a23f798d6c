"""FLUX.1 dev and schnell: velocities of packed latents, CLIP's pooled vector, T5's tokens, and dev's guidance as an input.

Latents are packed two by two into tokens of 4 C numbers, row by row, and every token's place goes to the rotary embedding as
(0, row, column); text tokens stand at (0, 0, 0). The network multiplies the level by 1000 itself, in the precision it runs in.
Source: black-forest-labs/flux, and the layout of diffusers' FluxPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmalign.errors import ModelError
from mmalign.models.diffusion.flow import ATTENTION, MLP, FlowConfig, FlowFamily
from mmalign.models.diffusion.kohya import flux_names
from mmalign.types import Conditioning, Geometry

SINGLE_BLOCKS = 38


class FluxConfig(FlowConfig):
    """Settings of FLUX.1."""

    t5_length: int = 512
    """Tokens that T5 reads and gives, padding included; at most 512. Schnell was made with 256."""
    guidance: float | None = None
    """Guidance that dev is told in training; default 1, as in diffusers' recipe. Sampling has its own (evaluate.guidance)."""


class Flux(FlowFamily):
    """See the module's head, and ``DiffusionFamily`` for the contract."""

    Config = FluxConfig
    lora_targets: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": ATTENTION,
        # By place, because the last layer of the network is a `proj_out` too.
        "all": (
            *ATTENTION, *MLP, "proj_mlp", *(f"single_transformer_blocks.{index}.proj_out" for index in range(SINGLE_BLOCKS)),
        ),
    }  # fmt: skip
    network_class = "FluxTransformer2DModel"
    pipeline_class = "FluxPipeline"
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
    t5 = ("text_encoder_2", "tokenizer_2")
    kernels = ("sdpa", "flash")

    config: FluxConfig

    def _right_network(self) -> None:
        config = self.network.config
        if (config.out_channels or config.in_channels) != config.in_channels:
            raise ModelError(
                f"model.path: the denoiser of {self.config.path} reads {config.in_channels} numbers a token and gives "
                f"{config.out_channels}; models that edit pictures are not supported"
            )
        if self.config.guidance is not None and not config.guidance_embeds:
            raise ModelError(f"model.guidance: the denoiser of {self.config.path} is not told any guidance; remove it")

    @classmethod
    def probe(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """At 1024 pixels, 4096 tokens."""
        return {
            "hidden_states": torch.empty(1, 4096, values["in_channels"]), "timestep": torch.zeros(1),
            "guidance": torch.ones(1) if values.get("guidance_embeds") else None,
            "encoder_hidden_states": torch.empty(1, 512, values["joint_attention_dim"]),
            "pooled_projections": torch.empty(1, values["pooled_projection_dim"]), "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
        }  # fmt: skip

    @property
    def _latent_channels(self) -> int:
        return int(self.network.config.in_channels) // self.patch**2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The network has no size of its own; the published VAE says 1024 pixels."""
        size = max(self.patch, int(self._vae_config.sample_size) // self.image_multiple * self.patch)
        return self._latent_channels, size, size

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``t5``: ``[N, t5_length, D]`` in the run's dtype; ``pooled``: CLIP's pooled vector, float32 ``[N, P]``.

        Raises:
            ModelError: the encoders are not those of the denoiser.
        """
        with self.autocast():
            pooled = self._part("text_encoder")(self._tokens(prompts, "tokenizer")).pooler_output.float()
        self._fits("pooled_projection_dim", pooled.shape[-1], "text_encoder")
        return {"t5": self._encode_t5(prompts), "pooled": pooled}

    def conditioning(self, text: Mapping[str, Tensor], geometry: Geometry) -> Conditioning:
        extras = {}
        if self.network.config.guidance_embeds:
            value = 1.0 if self.config.guidance is None else self.config.guidance
            extras = {"guidance": torch.full((len(text["pooled"]),), value, device=text["pooled"].device)}
        return Conditioning(tokens=text["t5"].float(), pooled=text["pooled"], extras=extras)

    def predict(self, module: nn.Module, noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        height, width = noisy.shape[2] // self.patch, noisy.shape[3] // self.patch
        with self.autocast():
            found = module(
                hidden_states=pack(noisy), timestep=self.process.network_time(t) / 1000, guidance=cond.extras.get("guidance"),
                encoder_hidden_states=cond.tokens, pooled_projections=cond.pooled, img_ids=places(height, width, noisy.device),
                txt_ids=torch.zeros(cond.tokens.shape[1], 3, device=noisy.device), **self.user_inputs(cond), return_dict=False,
            )[0]  # fmt: skip
        return unpack(found, height, width)

    def sampling_inputs(self, prompts: Sequence[str], noise: Tensor) -> dict[str, Any]:
        """Text outputs instead of prompts: the pipeline would otherwise round latents to T5's precision."""
        text = self.encode_prompts(prompts)
        return {"prompt_embeds": text["t5"].float(), "pooled_prompt_embeds": text["pooled"], "latents": pack(noise)}

    def kohya(self, state: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
        return flux_names(state, rank=rank, alpha=alpha)

    def _network_settings(self) -> dict[str, Any]:
        return {**super()._network_settings(), "guidance": self.config.guidance}


def pack(latents: Tensor) -> Tensor:
    """``[N, C, h, w]`` to tokens ``[N, (h / 2) (w / 2), 4 C]``; inside a token the channel comes first, then row and column."""
    n, channels, height, width = latents.shape
    cut = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack`` for `height` times `width` tokens."""
    n, _, numbers = tokens.shape
    cut = tokens.reshape(n, height, width, numbers // 4, 2, 2)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(n, numbers // 4, 2 * height, 2 * width)


def places(height: int, width: int, device: torch.device) -> Tensor:
    """(0, row, column) of every image token, row by row. ``[height width, 3]`` float32."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(down), down, right], -1).reshape(-1, 3).float()
