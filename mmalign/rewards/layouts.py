"""Checkpoints of CLIP dual encoders into our one network: transformers folders, open_clip folders, HPS release files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import ModelError
from mmalign.rewards.clip_net import ClipNet, ClipShape, TowerShape
from mmalign.rewards.declared import check_open_clip, tower_details
from mmalign.rewards.files import load_strictly, read_folder_state, read_json, read_state, strip_prefix

HF_FILES = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_model.bin",
                   "open_clip_pytorch_model.bin")  # fmt: skip
HPS_FILES = ("HPS_v2.1_compressed.safetensors", "HPS_v2_compressed.safetensors", "HPS_v2.1_compressed.pt",
             "HPS_v2_compressed.pt")  # fmt: skip
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def load_clip(path: Path, *, files: tuple[str, ...] = ()) -> tuple[ClipNet, str]:
    """A dual encoder from a folder or a single release file.

    Args:
        path: a transformers folder (``config.json``), an open_clip folder (``open_clip_config.json``), or a weight file
            in open_clip names; a file's shape is read from an ``open_clip_config.json`` beside it, else from its tensors.
        files: extra weight file names to look for in an open_clip folder.

    Returns:
        the network in float32 on the CPU, and its layout: ``transformers`` or ``open_clip``.

    Raises:
        ModelError: no such folder, unknown layout, or weights that do not fit.
    """
    if not path.exists():
        raise ModelError(f"no weights at {path}")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file():
        config = read_json(folder / "config.json")
        state, source = read_folder_state(folder, HF_FILES)
        return _fill(shape_from_transformers(config, source), from_transformers(state), source), "transformers"
    found = (folder / "open_clip_config.json").is_file()
    config = read_json(folder / "open_clip_config.json") if found else {}
    if path.is_dir():
        state, source = read_folder_state(folder, (*files, *OPEN_CLIP_FILES, *HPS_FILES))
    else:
        state, source = read_state(path), path
    state = strip_prefix(state, "module.")
    shape = shape_from_open_clip(config.get("model_cfg", config), state, source)
    return _fill(shape, from_open_clip(state), source), "open_clip"


def _fill(shape: ClipShape, state: Mapping[str, Tensor], source: Path) -> ClipNet:
    net = ClipNet(shape)
    load_strictly(net, {name: value.float() for name, value in state.items()}, source)
    return net.requires_grad_(False).eval()


def shape_from_transformers(config: Mapping[str, Any], source: Path) -> ClipShape:
    """The shape from a transformers ``config.json``; values left out are CLIPConfig's defaults.

    Raises:
        ModelError: not a CLIP configuration, or an activation we do not have.
    """
    if config.get("model_type") != "clip":
        raise ModelError(f"{source.parent}/config.json is for '{config.get('model_type')}', expected 'clip'")
    vision = {**(config.get("vision_config_dict") or {}), **(config.get("vision_config") or {})}
    text = {**(config.get("text_config_dict") or {}), **(config.get("text_config") or {})}
    return ClipShape(
        vision=_tower(vision, width=768, heads=12, mlp=3072, source=source),
        text=_tower(text, width=512, heads=8, mlp=2048, source=source),
        patch=vision.get("patch_size", 32),
        image_size=vision.get("image_size", 224),
        vocabulary=text.get("vocab_size", 49408),
        context=text.get("max_position_embeddings", 77),
        embedding=config.get("projection_dim", 512),
        eos_id=text.get("eos_token_id", 49407),
    )


def _tower(config: Mapping[str, Any], *, width: int, heads: int, mlp: int, source: Path) -> TowerShape:
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in _ACTIVATIONS:
        raise ModelError(f"{source.parent}/config.json: activation '{activation}' is not one of {sorted(_ACTIVATIONS)}")
    return TowerShape(
        width=config.get("hidden_size", width),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", heads),
        mlp=config.get("intermediate_size", mlp),
        activation=_ACTIVATIONS[activation],
        eps=config.get("layer_norm_eps", 1e-5),
    )


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel names to ours; query, key and value are stacked."""
    rules = (
        (r"^vision_model\.embeddings\.class_embedding$", "vision.cls"),
        (r"^vision_model\.embeddings\.patch_embedding\.weight$", "vision.patch.weight"),
        (r"^vision_model\.embeddings\.position_embedding\.weight$", "vision.positions"),
        (r"^vision_model\.pre_layrnorm\.", "vision.norm_in."),
        (r"^vision_model\.post_layernorm\.", "vision.norm_out."),
        (r"^visual_projection\.", "vision.projection."),
        (r"^text_model\.embeddings\.token_embedding\.", "text.tokens."),
        (r"^text_model\.embeddings\.position_embedding\.weight$", "text.positions"),
        (r"^text_model\.final_layer_norm\.", "text.norm_out."),
        (r"^text_projection\.", "text.projection."),
        (r"^(vision|text)_model\.encoder\.layers\.(\d+)\.", r"\1.blocks.\2."),
        (r"\.self_attn\.out_proj\.", ".out."),
        (r"\.self_attn\.([qkv])_proj\.", r".\1."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"\.mlp\.fc1\.", ".up."),
        (r"\.mlp\.fc2\.", ".down."),
    )
    # Older checkpoints store the constant 0..n-1; it is not a weight.
    kept = {name: value for name, value in state.items() if not name.endswith("embeddings.position_ids")}
    return _stack_qkv({_rename(name, rules): value for name, value in kept.items()})


def _stack_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = dict(state)
    for name in state:
        match = re.match(r"(.*\.blocks\.\d+)\.q\.(weight|bias)$", name)
        if match:
            parts = [f"{match[1]}.{letter}.{match[2]}" for letter in "qkv"]
            if all(part in out for part in parts):
                out[f"{match[1]}.qkv.{match[2]}"] = torch.cat([out.pop(part) for part in parts])
    return out


def standard_heads(width: int, source: Path | str, remedy: str) -> int:
    """Number of attention heads where only the width is known: 80 wide for ViT-H/14, else 64 wide.

    Raises:
        ModelError: another width. Weights load with any number of heads that divides it, and score wrongly with most.
    """
    if width == 1280:
        return 16
    if width % 64:
        raise ModelError(
            f"{source}: the number of attention heads of a {width} wide network is not in its weights; {remedy}"
        )
    return width // 64


def shape_from_tensors(
    state: Mapping[str, Tensor],
    source: Path | str,
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    remedy: str = "put its config.json beside them",
) -> ClipShape:
    """The shape of weights in our names: standard heads where none are given, and plain GELU (LAION's models).

    Raises:
        ModelError: a width whose number of heads is not standard.
    """
    depth = {
        tower: 1 + max(int(name.split(".")[2]) for name in state if name.startswith(f"{tower}.blocks."))
        for tower in ("vision", "text")
    }
    vision_width, _, patch, _ = state["vision.patch.weight"].shape
    vocabulary, text_width = state["text.tokens.weight"].shape
    return ClipShape(
        vision=TowerShape(
            width=vision_width,
            layers=depth["vision"],
            heads=vision_heads or standard_heads(vision_width, source, remedy),
            mlp=state["vision.blocks.0.up.weight"].shape[0],
            activation="gelu",
        ),
        text=TowerShape(
            width=text_width,
            layers=depth["text"],
            heads=text_heads or standard_heads(text_width, source, remedy),
            mlp=state["text.blocks.0.up.weight"].shape[0],
            activation="gelu",
        ),
        patch=patch,
        image_size=round((state["vision.positions"].shape[0] - 1) ** 0.5) * patch,
        vocabulary=vocabulary,
        context=state["text.positions"].shape[0],
        embedding=state["text.projection.weight"].shape[0],
    )


def shape_from_open_clip(config: Mapping[str, Any], state: Mapping[str, Tensor], source: Path) -> ClipShape:
    """The shape from open_clip's ``model_cfg`` and the tensors; without a config, the standard head widths are taken.

    Raises:
        ModelError: the tensors are not a CLIP dual encoder in open_clip names, or the config is of another network than ours.
    """
    names = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "token_embedding.weight",
             "positional_embedding", "text_projection")
    flat = _flat_text(state)
    missing = [name for name in (*names, "transformer.resblocks.0.mlp.c_fc.weight") if name not in flat]
    if missing:
        raise ModelError(f"{source} is not an open_clip dual encoder: it has no {', '.join(missing)}")
    check_open_clip(config, source)
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    width = flat["visual.conv1.weight"].shape[0]
    plain = shape_from_tensors(
        from_open_clip(state),
        source,
        # open_clip's own default for the vision tower is 64 wide heads, whatever the width, once there is a config.
        vision_heads=width // vision.get("head_width", 64) if vision else None,
        text_heads=text.get("heads", 8) if text else None,
        remedy="put its open_clip_config.json beside them",
    )
    quick = bool(config.get("quick_gelu", False))
    return replace(
        plain,
        vision=replace(plain.vision, **tower_details(vision, quick_gelu=quick)),
        text=replace(plain.text, **tower_details(text, quick_gelu=quick)),
    )


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip names to ours; the two projections are stored (in x out) there and are transposed."""
    rules = (
        (r"^visual\.class_embedding$", "vision.cls"),
        (r"^visual\.conv1\.weight$", "vision.patch.weight"),
        (r"^visual\.positional_embedding$", "vision.positions"),
        (r"^visual\.ln_pre\.", "vision.norm_in."),
        (r"^visual\.ln_post\.", "vision.norm_out."),
        (r"^visual\.proj$", "vision.projection.weight"),
        (r"^token_embedding\.", "text.tokens."),
        (r"^positional_embedding$", "text.positions"),
        (r"^ln_final\.", "text.norm_out."),
        (r"^text_projection$", "text.projection.weight"),
        (r"^visual\.transformer\.resblocks\.(\d+)\.", r"vision.blocks.\1."),
        (r"^transformer\.resblocks\.(\d+)\.", r"text.blocks.\1."),
        (r"\.attn\.in_proj_(weight|bias)$", r".qkv.\1"),
        (r"\.attn\.out_proj\.", ".out."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.mlp\.c_fc\.", ".up."),
        (r"\.mlp\.c_proj\.", ".down."),
    )
    out = {}
    for name, value in _flat_text(state).items():
        renamed = _rename(name, rules)
        out[renamed] = value.T.contiguous() if name in ("visual.proj", "text_projection") else value
    return out


def _flat_text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Newer open_clip models keep the text tower under ``text.``; the causal mask is a constant, not a weight."""
    kept = {name: value for name, value in state.items() if not name.endswith("attn_mask")}
    return {name.removeprefix("text."): value for name, value in kept.items()}


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
