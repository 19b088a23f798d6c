"""Pictures under diffusion noise (POVID, arXiv:2402.11411, as released in YiyangZhou/POVID): what the model sees is blurred.

The released code is taken for the noise alone. It writes values outside [0, 1] to 8 bits by wrapping them round; here they are
clipped.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image

from mmalign.branches import BranchRecord, MediaRef, VideoRef
from mmalign.media import MediaError, open_image
from mmalign.models.vlm.errors import VlmDataError
from mmalign.types import ImageRef

STEPS = 999
"""The last of 1,000 noise levels, counted from 0."""


@cache
def signal(steps: int) -> float:
    """How much of a picture is left after some noise steps: square root of the product of (1 - beta_k), k from 0 to `steps`;
    no step leaves all of it.

    beta_k = sigmoid(-6 + 12 k / 999) (0.005 - 0.00001) + 0.00001 for k = 0, 1, ..., 999; after 500 steps 0.863 is left, with
    noise of standard deviation 0.505 on a scale of 0 to 1.

    Raises:
        ValueError: more steps than there are, or fewer than none.
    """
    if not 0 <= steps <= STEPS:
        raise ValueError(f"noise_steps must be in 0 to {STEPS}, got {steps}")
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, STEPS + 1))) * (0.5e-2 - 1e-5) + 1e-5
    return math.sqrt(float(np.prod(1 - betas[: steps + 1]))) if steps else 1.0


def noisy_picture(picture: Image.Image, steps: int, rng: np.random.Generator) -> Image.Image:
    """A picture after some steps of noise, in its own size, 8 bits."""
    kept = signal(steps)
    pixels = np.asarray(picture.convert("RGB"), np.float64) / 255
    mixed = kept * pixels + math.sqrt(1 - kept**2) * rng.standard_normal(pixels.shape)
    return Image.fromarray((np.clip(mixed, 0, 1) * 255).round().astype(np.uint8))


def noisy_record(record: BranchRecord, steps: int, rng: np.random.Generator) -> BranchRecord:
    """The record with noise over its pictures, and over the frames of clips that are given as frames.

    Raises:
        VlmDataError: a picture that cannot be decoded, or a clip in a file: give its frames.
    """
    return replace(record, media=tuple(_noisy(record.id, item, steps, rng) for item in record.media))


def _noisy(name: str, item: MediaRef, steps: int, rng: np.random.Generator) -> MediaRef:
    if isinstance(item, VideoRef):
        if not item.frames:
            raise VlmDataError(name, "undecodable_media", "noise is put on pictures and on clips given as frames, not on files")
        return replace(item, frames=tuple(_noisy_picture(name, frame, steps, rng) for frame in item.frames))
    return _noisy_picture(name, item, steps, rng)


def _noisy_picture(name: str, item: ImageRef, steps: int, rng: np.random.Generator) -> ImageRef:
    try:
        picture = open_image(item).image
    except MediaError as error:
        raise VlmDataError(name, "undecodable_media", str(error)) from error
    buffer = io.BytesIO()
    noisy_picture(picture, steps, rng).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue(), label=f"{item.label} under noise")
