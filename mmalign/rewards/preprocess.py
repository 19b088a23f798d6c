"""From a decoded picture to the pixels a network reads; each rule has an id that is part of a score's identity.

Every rule exists twice: for Pillow images (what scoring uses; results equal the released preprocessing) and for float
tensors (differentiable, used by ``score_tensor``). Values stay in [0, 1]; mean and deviation are applied on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmalign.media import PLAIN, Colours, stored_to_rgb
from mmalign.rewards.resample import pass_order, resize_crop_exact

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MOST_PIXELS = 2**25
"""Of a resized picture before it is cropped: at 224 pixels, sides as 1 to 660."""
MOST_SHRINKING = 8
"""Longest side over the letterbox that torch's antialiased resize is asked for on a GPU; its kernel has a limit."""


@dataclass(frozen=True, slots=True)
class Preprocess:
    """One geometry rule.

    - ``clip_hf``: shortest side to `size` (the other truncated), bicubic on 8-bit, centre crop, offset ``floor(m/2)``;
      as transformers' Pillow CLIP processor.
    - ``clip_tv``: the same with the crop offset rounded half to even; as torchvision, open_clip and OpenAI's CLIP.
    - ``blip_224``: as ``clip_tv``, but resized in the file's own colours and converted to RGB afterwards; as ImageReward. Pillow
      resizes palettes and 1-bit pictures without interpolation, and weighs colours by their alpha.
    - ``hps_letterbox``: longest side to `size` (half to even) on floats with antialias, zero padding to a square;
      as HPSv2 under torchvision 0.17 and later. ``hps_letterbox_noaa``: without antialias, as under earlier ones.
    """

    id: str
    size: int
    fast: bool = False
    """``clip_hf`` and ``clip_tv`` resized by torch on 8-bit, as torchvision and transformers' default processor do (within two
    grey levels of Pillow); other rules have no such form and stay as they are."""
    draft: bool = False
    """JPEGs are decoded at a half, a quarter or an eighth where that leaves at least twice the size that is wanted."""

    def __post_init__(self) -> None:
        if self.id not in ("clip_hf", "clip_tv", "blip_224", "hps_letterbox", "hps_letterbox_noaa"):
            raise ValueError(f"unknown preprocessing '{self.id}'")

    @property
    def key(self) -> str:
        return f"{self.id}{'_u8tv' if self.is_fast else ''}{'+draft2x' if self.draft else ''}:{self.size}"

    @property
    def is_fast(self) -> bool:
        """Whether `fast` is asked for and there is such a form."""
        return self.fast and self.id in ("clip_hf", "clip_tv")

    @property
    def is_letterbox(self) -> bool:
        """Whether the whole picture is kept, in floats; otherwise a square is cut out of it, in whole numbers."""
        return self.id.startswith("hps")

    def least(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Twice the (width, height) that a picture of this size is resized to: what a draft of it must not fall below."""
        width, height = stored
        scale = 2 * self.size / (max(stored) if self.is_letterbox else min(stored))
        return math.ceil(width * scale), math.ceil(height * scale)

    @property
    def needs_stored(self) -> bool:
        """Whether `from_image` wants pictures before colour conversion too."""
        return self.id == "blip_224"

    def from_image(
        self, image: Image.Image, stored: Image.Image | None = None, colours: Colours = PLAIN
    ) -> Tensor:
        """An RGB picture -> uint8 (crops) or float32 in about [0, 1] (letterbox), ``[3, size, size]``.

        Args:
            stored: the same picture in its file's own colours (`Decoded.stored`); None when these are RGB.
            colours: how `stored` becomes RGB.
        """
        if self.is_letterbox:
            pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float().div_(255)
            return self._letterbox(pixels[None])[0].contiguous()
        resized, (left, top) = self._crop(image.size)
        source = stored if stored is not None and self.needs_stored else image
        if self.is_fast and resized != image.size and resized[0] * resized[1] <= MOST_PIXELS:
            return _resize_crop_u8(image, resized, (left, top), self.size)
        if resized == image.size:
            cut = source.crop((left, top, left + self.size, top + self.size))
        else:
            cut = _resize_crop(source, resized, (left, top), self.size)
        return _to_uint8(cut if source is image else stored_to_rgb(cut, colours))

    def fits_device(self, stored: tuple[int, int]) -> bool:
        """Whether `from_planes` gives what `from_image` gives for pictures of this size, (width, height)."""
        if self.is_fast:
            return False
        if self.is_letterbox:
            return max(stored) <= MOST_SHRINKING * self.size
        resized, offset = self._crop(stored)
        if resized[0] * resized[1] > MOST_PIXELS:
            return False
        return resized == stored or pass_order(stored, resized, offset, self.size) is not None

    def geometry(self, stored: tuple[int, int]) -> bytes:
        """Equal for two rules that make equal pixels of every RGB picture of this size."""
        if self.is_letterbox or self.fast or self.draft:
            return self.key.encode()
        return f"{self._crop(stored)}{self.size}".encode()

    def from_planes(self, planes: Tensor) -> Tensor:
        """As `from_image` for RGB pictures given as uint8 ``[3, H, W]`` or ``[N, 3, H, W]``, on their device: crops bit for bit,
        letterboxes to the rounding of float32. Only for sizes that `fits_device` knows."""
        if planes.ndim == 3:
            return self.from_planes(planes[None])[0]
        if self.is_letterbox:
            return self._letterbox(planes.float().div_(255)).contiguous()
        stored = (planes.shape[3], planes.shape[2])
        resized, offset = self._crop(stored)
        order = resized != stored and pass_order(stored, resized, offset, self.size)
        found = resize_crop_exact(planes.flatten(0, 1), resized, offset, self.size, vertical_first=bool(order))
        return found.unflatten(0, planes.shape[:2])

    def _crop(self, stored: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) after the resize, and where the square lies in it."""
        resized = _shortest_side(*stored, self.size)
        return resized, (self._offset(resized[0]), self._offset(resized[1]))

    def from_tensor(self, pixels: Tensor) -> Tensor:
        """Float ``[N, 3, H, W]`` in [0, 1] -> ``[N, 3, size, size]``, differentiable; the identity where sizes fit."""
        if self.is_letterbox:
            return self._letterbox(pixels)
        height, width = pixels.shape[-2:]
        (new_width, new_height), (left, top) = self._crop((width, height))
        if (new_width, new_height) != (width, height):
            pixels = _bicubic(pixels, (new_height, new_width), antialias=True).clamp(0, 1)
        return pixels[..., top : top + self.size, left : left + self.size]

    def _offset(self, length: int) -> int:
        margin = length - self.size
        return margin // 2 if self.id == "clip_hf" else round(margin / 2)

    def _letterbox(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        scale = self.size / max(height, width)
        # A very thin picture would round to no pixels at all; one line is the least that can be padded.
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        if (new_height, new_width) != (height, width):
            pixels = _bicubic(pixels, (new_height, new_width), antialias=self.id == "hps_letterbox")
        top, left = (self.size - new_height) // 2, (self.size - new_width) // 2
        return F.pad(pixels, (left, self.size - new_width - left, top, self.size - new_height - top))


def normalise(pixels: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """uint8 or float [0, 1] ``[N, 3, h, w]`` -> float32 with mean and deviation removed, on the same device."""
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    # A plain copy to a GPU would wait for everything it still has to do.
    centre, spread = (torch.tensor(row).view(3, 1, 1).to(values.device, non_blocking=True) for row in (mean, std))
    return (values - centre) / spread


def _shortest_side(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shortest side equal to `size` and the other one truncated."""
    if width <= height:
        return size, max(size, math.floor(size * height / width))
    return max(size, math.floor(size * width / height)), size


def _resize_crop(image: Image.Image, resized: tuple[int, int], offset: tuple[int, int], size: int) -> Image.Image:
    """The square at `offset` of the picture resized to `resized` (width, height).

    The whole picture is resized wherever that is possible at all: Pillow takes the place of a crop in single precision, so
    resampling only what survives changes some pixels.
    """
    (width, height), (left, top) = resized, offset
    bicubic = Image.Resampling.BICUBIC
    if width * height <= MOST_PIXELS:
        return image.resize(resized, bicubic).crop((left, top, left + size, top + size))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return image.resize((size, size), bicubic, box=box)


def _resize_crop_u8(image: Image.Image, resized: tuple[int, int], offset: tuple[int, int], size: int) -> Tensor:
    """As `_resize_crop`, by torch's 8-bit bicubic with antialias: uint8 ``[3, size, size]``."""
    (width, height), (left, top) = resized, offset
    # Channels last, as the picture lies in memory: that is the layout the fast kernel wants.
    planes = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)[None]
    found = _bicubic(planes, (height, width), antialias=True)[0]
    return found[:, top : top + size, left : left + size].contiguous()


def _to_uint8(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def _bicubic(pixels: Tensor, size: tuple[int, int], *, antialias: bool) -> Tensor:
    return F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=antialias)
