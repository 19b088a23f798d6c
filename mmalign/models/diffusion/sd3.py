"""Stable Diffusion 3 and 3.5: a transformer that predicts velocities, with two CLIP encoders and an optional T5.

The CLIP outputs stand side by side, are filled with zeros to T5's width, and T5's tokens follow them; without T5 zeros take its
place, as in the published pipeline. Source: arXiv:2403.03206, and the layout of diffusers' StableDiffusion3Pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmalign.errors import ModelError
from mmalign.models.diffusion.flow import ATTENTION, MLP, FlowConfig, FlowFamily
from mmalign.types import Conditioning, Geometry


class StableDiffusion3Config(FlowConfig):
    """Settings of SD3 and SD3.5."""

    t5: bool | None = None
    """Whether T5 takes part; false saves 9 GB of memory (in bf16) at some cost in prompt following. Default: what the folder's
    model_index.json says."""


class StableDiffusion3(FlowFamily):
    """See the module's head, and ``DiffusionFamily`` for the contract."""

    Config = StableDiffusion3Config
    lora_targets: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": (*ATTENTION, *(name.replace("attn.", "attn2.") for name in ATTENTION[:4])),
        "all": (*ATTENTION, *(name.replace("attn.", "attn2.") for name in ATTENTION[:4]), *MLP),
    }
    """The second attention of 3.5 medium (`attn2`) is a plain one; 3 and 3.5 large have none."""
    network_class = "SD3Transformer2DModel"
    pipeline_class = "StableDiffusion3Pipeline"
    encoders: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5TokenizerFast",
    }
    t5 = ("text_encoder_3", "tokenizer_3")
    kernels = ("sdpa",)

    config: StableDiffusion3Config

    def _right_network(self) -> None:
        config = self.network.config
        if config.out_channels != config.in_channels:
            raise ModelError(
                f"model.path: the denoiser of {self.config.path} reads {config.in_channels} channels and gives "
                f"{config.out_channels}; models that edit pictures are not supported"
            )

    @classmethod
    def probe(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        size = values["sample_size"]
        return {
            "hidden_states": torch.empty(1, values["in_channels"], size, size), "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.empty(1, 77 + 256, values["joint_attention_dim"]),
            "pooled_projections": torch.empty(1, values["pooled_projection_dim"]),
        }  # fmt: skip

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.network.config.sample_size
        return self._latent_channels, size, size

    def _has_t5(self) -> bool:
        if self.config.t5 is not None:
            return self.config.t5
        listed = self._index().get(self.t5[0])
        return bool(listed) and listed[0] is not None  # type: ignore[index]

    def _load_part(self, name: str) -> Any:
        if name not in self.t5:
            return super()._load_part(name)
        if not self._has_t5():
            return None
        try:
            return super()._load_part(name)
        except ModelError as error:
            raise ModelError(f"{error}; to do without T5: model.t5=false") from error

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``clip``: penultimate layers of both CLIPs side by side, float32 ``[N, L, D1 + D2]``; ``pooled``: their projections
        ``[N, P1 + P2]``; ``t5``: ``[N, t5_length, D]`` in the run's dtype, absent where T5 is.

        Raises:
            ModelError: the encoders are not those of the denoiser.
        """
        hidden, pooled = [], []
        for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            with self.autocast():
                out = self._part(encoder)(
                    self._tokens(prompts, tokenizer, self._clip_length), output_hidden_states=True
                )
            hidden.append(out.hidden_states[-2].float())
            pooled.append(out.text_embeds.float())
        found = {"clip": torch.cat(hidden, -1), "pooled": torch.cat(pooled, -1)}
        if found["clip"].shape[-1] > self.network.config.joint_attention_dim:
            self._fits("joint_attention_dim", found["clip"].shape[-1], "text_encoder")
        self._fits("pooled_projection_dim", found["pooled"].shape[-1], "text_encoder")
        if self._part(self.t5[0]) is not None:
            found["t5"] = self._encode_t5(prompts)
        return found

    @property
    def _clip_length(self) -> int:
        """Both encoders read as many tokens as the first one's tokenizer says."""
        return int(self._part("tokenizer").model_max_length)

    def conditioning(self, text: Mapping[str, Tensor], geometry: Geometry) -> Conditioning:
        clip, width = text["clip"].float(), self.network.config.joint_attention_dim
        clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
        t5 = text.get("t5")
        if t5 is None:
            t5 = clip.new_zeros(len(clip), self.config.t5_length, width)
        return Conditioning(tokens=torch.cat([clip, t5.float()], 1), pooled=text["pooled"])

    def predict(self, module: nn.Module, noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with self.autocast():
            return module(  # type: ignore[no-any-return]
                hidden_states=noisy, timestep=self.process.network_time(t), encoder_hidden_states=cond.tokens,
                pooled_projections=cond.pooled, **self.user_inputs(cond), return_dict=False,
            )[0]  # fmt: skip

    def sampling_inputs(self, prompts: Sequence[str], noise: Tensor) -> dict[str, Any]:
        return {"prompt": list(prompts), "latents": noise, "max_sequence_length": self.config.t5_length}

    def _text_settings(self) -> dict[str, Any]:
        return {**super()._text_settings(), "t5": self._has_t5()}
