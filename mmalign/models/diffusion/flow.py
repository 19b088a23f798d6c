"""What SD3 and FLUX share beyond their folders: rectified flow with its settings, and a T5 text encoder.

T5 reads without a mask, as the published pipelines call it: what stands at the padding takes part in the attention, so
outputs are kept at full length. They stay in the precision that the encoder runs in, which loses nothing and halves a text
cache. One distinct prompt takes about 2.7 MB for SD3 (256 T5 tokens in bf16, and CLIP) and 4.2 MB for FLUX (512 tokens);
`t5_length` shortens it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmalign.diffusion.process import NoiseProcess, RectifiedFlow, flow_shift, flow_steps, is_flow
from mmalign.errors import ModelError
from mmalign.models.diffusion.base import FamilyConfig
from mmalign.models.diffusion.folder import FolderFamily

ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""Both streams of joint attention: the layers that public LoRA recipes for SD3 train (yifan123/flow_grpo, diffusers)."""
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class FlowConfig(FamilyConfig):
    """Settings of a rectified-flow model."""

    timesteps: Literal["logit_normal", "uniform"] = "logit_normal"
    """Density of training levels before the shift: sigmoid of a normal (SD3, arXiv:2403.03206 section 3.1), or uniform."""
    logit_mean: float = 0.0
    """Mean of that normal; above 0 is noisier."""
    logit_std: float = 1.0
    """Deviation of that normal."""
    shift: float | None = None
    """Timestep shift u' = s u / (1 + (s - 1) u) of training levels; 1 is none. Default: the scheduler's own, which may follow
    the resolution."""
    weighting: Literal["constant", "noise"] = "constant"
    """Weight of both errors: 1, or (1 - u)^2, with which velocity errors are errors of the predicted noise."""
    t5_length: int = 256
    """Tokens that T5 reads and gives, padding included; at most 512."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.logit_std <= 0 or (self.shift is not None and self.shift <= 0):
            raise ValueError(f"logit_std and shift must be positive, got {self.logit_std} and {self.shift}")
        if self.timesteps == "uniform" and {"logit_mean", "logit_std"} & self.model_fields_set:
            raise ValueError("logit_mean and logit_std have no effect with timesteps 'uniform'; remove them")
        if not 1 <= self.t5_length <= 512:
            raise ValueError(f"t5_length must be from 1 to 512, got {self.t5_length}")


class FlowFamily(FolderFamily):
    """A rectified flow with a T5 encoder; latents are cut into tokens of two by two."""

    Config = FlowConfig
    network_part = "transformer"
    t5: ClassVar[tuple[str, str]]
    """Folders of the T5 encoder and of its tokenizer."""
    patch: ClassVar[int] = 2

    config: FlowConfig

    def _process(self, scheduler: Mapping[str, Any], source: str) -> NoiseProcess:
        if not is_flow(scheduler):
            raise ModelError(
                f"{source}: {scheduler.get('_class_name')} is not a flow-matching scheduler, which model.name: "
                f"{self.config.name} needs{self._other_family()}"
            )
        config, own = self.config, flow_shift(scheduler, source)
        return RectifiedFlow(
            shift=own if config.shift is None else config.shift, num_train_timesteps=flow_steps(scheduler),
            logit_normal=config.timesteps == "logit_normal", mean=config.logit_mean, std=config.logit_std,
            noise_weight=config.weighting == "noise",
        )  # fmt: skip

    @property
    def image_multiple(self) -> int:
        return self.latent_factor * self.patch

    def _encoder_dtype(self, name: str) -> torch.dtype:
        """T5-XXL has 4.7 billion weights and is published for half precision; the library keeps what overflows in float32."""
        return self.dtype if name == self.t5[0] else torch.float32

    @torch.no_grad()
    def _encode_t5(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden state of T5 ``[N, t5_length, D]`` in the precision it runs in."""
        encoder, tokenizer = self.t5
        hidden: Tensor = self._part(encoder)(self._tokens(prompts, tokenizer, self.config.t5_length))[0]
        self._fits("joint_attention_dim", hidden.shape[-1], encoder)
        return hidden

    def _prompt_lengths(self) -> dict[str, int]:
        """T5 is what reads long prompts; where a checkpoint is used without it, CLIP is."""
        if self._part(self.t5[0]) is None:
            return {"tokenizer": int(self._part("tokenizer").model_max_length)}
        return {self.t5[1]: self.config.t5_length}

    def _fits(self, setting: str, width: int, part: str) -> None:
        """Refuse text outputs that the denoiser cannot read."""
        wanted = self.network.config[setting]
        if width != wanted:
            raise ModelError(
                f"model.path: {part} of {self.config.path} gives {width} numbers a token or prompt, the denoiser's {setting} "
                f"is {wanted}; are they parts of one model?"
            )

    def _text_settings(self) -> dict[str, Any]:
        return {"t5_length": self.config.t5_length}

    def _network_settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "timesteps": config.timesteps, "logit": [config.logit_mean, config.logit_std], "shift": config.shift,
            "weighting": config.weighting,
        }  # fmt: skip
