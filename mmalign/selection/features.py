"""Features of single frames by a CLIP-type reward, for comparing shots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from mmalign.rewards.dual import DualEncoder


class FrameFeatures:
    """A loaded encoder.

    Args:
        name: a CLIP-type reward.
        path: folder of its weights; None: its own place.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: the reward compares no pictures by one vector each.
        RewardError: it cannot be loaded.
    """

    def __init__(self, name: str, path: str | None, device: str) -> None:
        from mmalign import rewards
        from mmalign.rewards.dual import DualEncoder

        found = rewards.load_backend(name, path, None if device == "auto" else device)
        if not isinstance(found, DualEncoder):
            raise ConfigError(f"features: '{name}' is no CLIP-type reward; take one of the kind of tiny-clip or clipscore")
        self.backend: DualEncoder = found

    @property
    def identity(self) -> str:
        """Of weights and preprocessing."""
        return f"{self.backend.image_key}|{self.backend.preprocess.key}"

    def __call__(self, frames: Sequence[np.ndarray], *, batch: int = 32) -> np.ndarray:
        """Unit vectors ``[N, D]`` float32 of uint8 frames ``[H, W, 3]``."""
        import torch
        from PIL import Image

        from mmalign.rewards.batching import in_batches

        backend = self.backend
        stacks = [backend.preprocess.from_image(Image.fromarray(frame)) for frame in frames]
        found = in_batches(backend, lambda pixels: (backend.encode_images(pixels.to(backend.dtype)),), stacks, batch)
        return torch.stack([vectors[0].float().cpu() for vectors in found]).numpy()
