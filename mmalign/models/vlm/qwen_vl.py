"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: grids of patches, positions on three axes, features added to deeper layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmalign.branches import Unit
from mmalign.models.vlm.base import VlmFamily

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class Qwen25VL(VlmFamily):
    """Patches of all media lie in one long list; a grid (time, height, width) says where each ends."""

    windowed: ClassVar[bool] = True
    projector_names: ClassVar[tuple[str, ...]] = ()  # the merger is part of the vision tower

    def cut(self, inputs: Mapping[str, Any]) -> list[tuple[Literal["image", "video"], dict[str, Tensor]]]:
        found: list[tuple[Literal["image", "video"], dict[str, Tensor]]] = []
        kinds: tuple[Literal["image", "video"], ...] = ("image", "video")
        for kind in kinds:
            if inputs.get(PIXELS[kind]) is None:
                continue
            grids = torch.as_tensor(inputs[GRIDS[kind]])
            pieces = inputs[PIXELS[kind]].split(grids.prod(-1).tolist())
            seconds = inputs.get("second_per_grid_ts") if kind == "video" else None
            for number, (pixels, grid) in enumerate(zip(pieces, grids, strict=True)):
                tensors = {PIXELS[kind]: pixels, GRIDS[kind]: grid}
                if seconds is not None:
                    tensors["second_per_grid_ts"] = torch.tensor(float(seconds[number]))
                found.append((kind, tensors))
        return found

    def join(self, kind: str, units: Sequence[Unit]) -> dict[str, Tensor]:
        return {
            PIXELS[kind]: torch.cat([unit.tensors[PIXELS[kind]] for unit in units]),
            GRIDS[kind]: torch.stack([unit.tensors[GRIDS[kind]] for unit in units]),
        }

    def positions(self, prefix: Tensor, types: Tensor, units: Sequence[Unit]) -> Tensor:
        found: dict[str, Any] = {}
        for kind, name in GRIDS.items():
            grids = [unit.tensors[name] for unit in units if unit.kind == kind]
            found[name] = torch.stack(grids) if grids else None
        seconds = [unit.tensors["second_per_grid_ts"] for unit in units if "second_per_grid_ts" in unit.tensors]
        if seconds:
            found["second_per_grid_ts"] = torch.stack(seconds)
        if not units:
            return torch.arange(len(prefix)).expand(3, -1)
        network: Any = self.network
        made, _ = network.model.get_rope_index(
            prefix[None], mm_token_type_ids=types[None], attention_mask=torch.ones_like(prefix)[None], **found
        )
        return made[:, 0].clone()


class Qwen3VL(Qwen25VL):
    """Features of some vision layers are added to the first language layers; time stands in the text between frames."""

    def encode_units(self, base: Any, kind: str, tensors: Mapping[str, Tensor]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        ask = base.get_image_features if kind == "image" else base.get_video_features
        out = ask(tensors[PIXELS[kind]], tensors[GRIDS[kind]], return_dict=True)
        return list(out.pooler_output), list(zip(*out.deepstack_features, strict=True))

    def pooled(self, kind: str, features: Sequence[Tensor], deep: Sequence[tuple[Tensor, ...]]) -> Any:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=list(features), deepstack_features=[list(layer) for layer in zip(*deep, strict=True)]
        )
