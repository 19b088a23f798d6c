"""The contract of a diffusion family: everything a trainer may ask of a text-to-image model.

A trainer sees latents ``[B, C, h, w]`` and ``Conditioning``; tokenizers, packing, time ids, pooled vectors and file layouts
stay inside the family. A further family is one file, one line in ``FAMILIES`` and one tiny fixture for the contract test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.config import Section
from mmalign.diffusion.process import NoiseProcess
from mmalign.errors import ModelError
from mmalign.types import Conditioning, Geometry, Moments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FamilyConfig(Section):
    """Which weights to start from, and how to run them."""

    name: str
    path: str
    """A local folder in the diffusers layout, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    variant: str | None = None
    """Suffix of the weight files, e.g. fp16 for `diffusion_pytorch_model.fp16.safetensors`."""
    network_path: str | None = None
    """Another denoiser to start from (folder or hub id holding a `unet` or `transformer` folder), e.g. a fine-tuned one."""
    vae_path: str | None = None
    """Another VAE, e.g. one that does not overflow in half precision."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward passes. Errors, losses and trained weights are float32 in any case."""
    attention: Literal["sdpa", "xformers", "flash"] = "sdpa"
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a quarter more time."""
    compile: bool = False
    """torch.compile the denoiser: slow first steps, faster later ones."""


class DiffusionFamily(ABC):
    """A loaded model: frozen parts, the denoiser, and the process it was trained with."""

    Config: ClassVar[type[FamilyConfig]] = FamilyConfig
    lora_targets: ClassVar[Mapping[str, Sequence[str]]]
    """Named sets of layer-name suffixes: at least 'attention' and 'all'."""

    network: nn.Module
    """The denoiser as loaded: the start of the policy, and the base to compare with."""
    process: NoiseProcess
    dtype: torch.dtype
    device: torch.device
    config: FamilyConfig

    @classmethod
    @abstractmethod
    def load(cls, config: FamilyConfig, *, device: torch.device) -> DiffusionFamily:
        """Load from a folder or hub id, safetensors only. Text encoders and VAE are read when first needed.

        Raises:
            ModelError: no such folder, a part missing, or weights that do not fit.
        """

    @abstractmethod
    def release(self) -> None:
        """Drop text encoders and VAE from memory, for training on caches; they come back when needed."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent at the model's own resolution."""

    @property
    @abstractmethod
    def latent_factor(self) -> int:
        """Pixels per latent position along one side."""

    @property
    def image_multiple(self) -> int:
        """What both sides of a picture must be multiples of, in pixels."""
        return self.latent_factor

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Moments:
        """Posterior of the VAE: ``[N, 3, H, W]`` in [-1, 1] to float32 moments, without scaling or shift."""

    @abstractmethod
    def scale(self, latents: Tensor) -> Tensor:
        """Raw VAE latents to the space that the denoiser works in."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text-encoder outputs by name, ``[N, ...]`` each: what a text cache stores per distinct prompt."""

    def tokens_cut(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens of each prompt are lost to the text encoder that reads most of it; 0 for those that are read whole."""
        return [0] * len(prompts)

    @abstractmethod
    def conditioning(self, text: Mapping[str, Tensor], geometry: Geometry) -> Conditioning:
        """Conditioning for N samples from their text outputs and what was done to their pictures."""

    @abstractmethod
    def predict(self, module: nn.Module, noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """One evaluation of a denoiser at its own timestep per sample. ``[N, C, h, w]``."""

    @abstractmethod
    def pipeline(self, network: nn.Module) -> Any:
        """A plain diffusers pipeline around a denoiser."""

    @abstractmethod
    def save_lora(self, state: Mapping[str, Tensor], folder: Path, config: Mapping[str, Any]) -> Path:
        """Write adapter weights so that the plain pipeline's `load_lora_weights` reads them."""

    def kohya(self, state: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
        """Adapter weights under the names of kohya-ss/sd-scripts, for readers that know those alone.

        Raises:
            ModelError: the family has no such names that a plain pipeline reads.
        """
        raise ModelError(
            f"export --format kohya: a plain pipeline reads no kohya names for model.name: {self.config.name}; use --format peft"
        )

    @abstractmethod
    def fingerprint(self, part: Literal["vae", "text", "network"]) -> dict[str, Any]:
        """What identifies the frozen part that fills a cache: file hashes, config, dtype, how it is asked.

        `network` is the denoiser with its noise process as it was when first asked for, so ask before it is trained.
        """

    @abstractmethod
    def copy_network(self) -> nn.Module:
        """A second denoiser with the weights and dtype that `network` has at the moment, frozen, in evaluation mode."""

    def user_inputs(self, cond: Conditioning) -> dict[str, Any]:
        """What a denoiser with user attention is called with besides; nothing where a batch has no users.

        A denoiser without it does not know the word and raises: a user is never left out in silence.
        """
        if cond.user is None or cond.user_weights is None:
            return {}
        return {"user": (cond.user, cond.user_weights)}

    def latents(self, moments: Moments, noise: Tensor) -> Tensor:
        """A sample of the posterior in the denoiser's space: ``scale(mean + std noise)``, float32."""
        return self.scale(moments.mean + moments.std * noise)

    def sampling_inputs(self, prompts: Sequence[str], noise: Tensor) -> dict[str, Any]:
        """Prompts and initial noise ``[N, C, h, w]`` as the family's pipeline is called with them."""
        return {"prompt": list(prompts), "latents": noise}

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run networks in the configured dtype; nothing in float32."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            yield

    def sample(
        self,
        network: nn.Module,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
        during: Callable[[slice], AbstractContextManager[Any]] | None = None,
    ) -> np.ndarray:
        """Pictures for prompts from given initial noise ``[N, C, h, w]``, through the plain pipeline.

        Returns uint8 ``[N, H, W, 3]``. `progress` is called with the number of pictures finished after each batch; `during`
        makes a block that is open while the pictures of these rows are made (who they are for).
        """
        pipeline = self.pipeline(network)
        pipeline.set_progress_bar_config(disable=True)
        was_training = network.training
        network.eval()
        # Kernels fold a product differently when a weight may want a gradient, even where none is taken: equal weights must
        # give equal pictures whether they are trained or frozen.
        trained = [value for value in network.parameters() if value.requires_grad]
        network.requires_grad_(False)
        pictures = []
        try:
            for start in range(0, len(prompts), batch_size):
                rows = slice(start, start + batch_size)
                block = nullcontext() if during is None else during(rows)
                with torch.no_grad(), self.autocast(), block:
                    images = pipeline(
                        **self.sampling_inputs(prompts[rows], noise[rows].to(self.device)), num_inference_steps=steps,
                        guidance_scale=guidance, output_type="pt", height=noise.shape[2] * self.latent_factor,
                        width=noise.shape[3] * self.latent_factor,
                    ).images  # fmt: skip
                images = (images.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)
                pictures.append(images.permute(0, 2, 3, 1).cpu().numpy())
                if progress is not None:
                    progress(len(images))
        finally:
            network.train(was_training)
            for value in trained:
                value.requires_grad_(True)
        return np.concatenate(pictures)
