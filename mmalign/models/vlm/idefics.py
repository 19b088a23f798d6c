"""SmolVLM and Idefics3: pictures are tiles of one size, each encoded alone, marked in the text by row and column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from mmalign.models.vlm.base import VlmFamily


class Idefics3(VlmFamily):
    """A unit is a tile: rows and columns are text, so nothing of a tile's features depends on its neighbours."""

    def cut(self, inputs: Mapping[str, Any]) -> list[tuple[Literal["image", "video"], dict[str, Tensor]]]:
        pixels, masks = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
        if pixels is None or masks is None:
            return []
        tiles = zip(pixels.flatten(0, 1), masks.flatten(0, 1), strict=True)
        # Padding between pictures of different tile counts is all zero, pixels and mask.
        return [("image", {"pixel_values": tile, "pixel_attention_mask": mask}) for tile, mask in tiles if mask.any()]

    def encode_units(self, base: Any, kind: str, tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], tuple[()]]:
        out = base.get_image_features(
            tensors["pixel_values"][:, None], tensors["pixel_attention_mask"][:, None], return_dict=True
        )
        return list(out.pooler_output), ()


class SmolVLM(Idefics3):
    """Clips are frames under the picture's placeholder, with timestamps in the text."""

    mixes_media: ClassVar[bool] = False  # the processor hands frames over in the place of the pictures' tiles
