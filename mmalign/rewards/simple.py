"""Rewards without a model: for tests, demonstrations and ablations. All read pictures only."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.rewards.base import Answers, DirectBackend
from mmalign.rewards.table import LoadRequest

BAND = 1 << 18
"""Pixels looked at together."""


class JpegSize(DirectBackend):
    """Size of the picture as a JPEG of a given quality, in kilobytes (1000 bytes); negated for ``jpeg-compressible``."""

    def __init__(self, request: LoadRequest) -> None:
        self.card = request.card
        self.quality = int(request.take(quality=95)["quality"])
        self.sign = -1.0 if request.name == "jpeg-compressible" else 1.0

    def record(self) -> dict[str, object]:
        return {"quality": self.quality}

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Answers:
        return _all([self.sign * self._kilobytes(image) for image in images])

    def _kilobytes(self, image: Image.Image) -> float:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000


class Brightness(DirectBackend):
    """Mean luma (Rec. 601 weights) in [0, 1]."""

    WEIGHTS = (0.299, 0.587, 0.114)

    def __init__(self, request: LoadRequest) -> None:
        request.take()
        self.card = request.card

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Answers:
        # From counts of values: exact, and without a float of every pixel.
        weights = np.kron(self.WEIGHTS, np.arange(256))
        return _all([float(weights @ np.array(image.histogram())) / (255 * image.width * image.height) for image in images])

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        weights = torch.tensor(self.WEIGHTS, device=pixels.device)
        return torch.einsum("nchw,c->nhw", pixels, weights).mean(dim=(1, 2))


class Saturation(DirectBackend):
    """Mean HSV saturation, (max - min) / max per pixel with 0 for black, in [0, 1]."""

    def __init__(self, request: LoadRequest) -> None:
        request.take()
        self.card = request.card

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Answers:
        return _all([self._mean(np.asarray(image)) for image in images])

    def _mean(self, pixels: np.ndarray) -> float:
        """Of uint8 ``[H, W, 3]``, in bands: floats of a large picture would take many times its memory."""
        total, rows = 0.0, max(1, BAND // pixels.shape[1])
        for start in range(0, len(pixels), rows):
            red, green, blue = (pixels[start : start + rows, :, channel] for channel in range(3))
            high = np.maximum(np.maximum(red, green), blue)
            low = np.minimum(np.minimum(red, green), blue)
            total += float(((high - low) / np.maximum(high, 1)).sum(dtype=np.float64))
        return total / (pixels.shape[0] * pixels.shape[1])

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        high, low = pixels.amax(dim=1), pixels.amin(dim=1)
        return torch.where(high > 0, (high - low) / high.clamp(min=1e-6), 0.0).mean(dim=(1, 2))


def _all(values: list[float]) -> Answers:
    return Answers(values=torch.tensor(values, dtype=torch.float32), errors=(None,) * len(values))
