"""What the files beside weights declare about the network and its pixels, and the refusal of what we do not compute.

Weights fit many networks: another pooling, mask or resize has the same tensors and gives other scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import ModelError
from mmalign.rewards.files import read_json
from mmalign.rewards.preprocess import CLIP_MEAN, CLIP_STD

_READ = {
    "vision_cfg": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs", "norm_kwargs"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"},
}
"""Used, or seen in the tensors."""
_WITHOUT_EFFECT = {
    "vision_cfg": {"patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "pos_embed_type", "final_ln_after_pool",
                   "output_tokens", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_drop"},
    "text_cfg": {"pad_id", "eos_id", "final_ln_after_pool", "output_tokens", "hf_model_pretrained", "hf_proj_type",
                 "hf_pooler_type"},
}  # fmt: skip
"""On the features of a class-token tower without the named parts."""
_ONLY = {
    "vision_cfg": {"pool_type": ("tok",), "block_type": ("default", None)},
    # Ordinary prompts hold the largest id once, at their end.
    "text_cfg": {"pool_type": ("argmax", "eos"), "proj_type": ("linear",), "block_type": ("default", None)},
}


def check_open_clip(config: Mapping[str, Any], source: Path | str) -> None:
    """Refuse an open_clip ``model_cfg`` that describes another network than ours.

    Raises:
        ModelError: all settings that we do not have.
    """
    problems = []
    for part, known in _READ.items():
        section = config.get(part) or {}
        for name, value in section.items():
            if name in _ONLY[part]:
                allowed = value in _ONLY[part][name]
            else:
                allowed = name in known or name in _WITHOUT_EFFECT[part] or not value
            if not allowed:
                problems.append(f"{part}.{name} = {value!r}")
        for name, inner in (("act_kwargs", {"approximate"}), ("norm_kwargs", {"eps"})):
            problems += [f"{part}.{name}.{key}" for key in section.get(name) or {} if key not in inner]
        if config.get("quick_gelu") and section.get("act_kwargs"):
            problems.append(f"{part}.act_kwargs with quick_gelu")
    if problems:
        raise ModelError(f"{source}: this network is not supported; its open_clip_config.json says {', '.join(problems)}")


def tower_details(section: Mapping[str, Any], *, quick_gelu: bool) -> dict[str, Any]:
    """Activation and epsilon of a tower's ``vision_cfg`` or ``text_cfg``."""
    tanh = (section.get("act_kwargs") or {}).get("approximate", "none") == "tanh"
    activation = "quick_gelu" if quick_gelu else "gelu_tanh" if tanh else "gelu"
    return {"activation": activation, "eps": float((section.get("norm_kwargs") or {}).get("eps", 1e-5))}


def statistics(folder: Path, *, own_rule: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the checkpoint's own preprocessing file; CLIP's where it has none.

    Args:
        own_rule: the reward prescribes how pictures are resized, whatever the file says of that.

    Raises:
        ModelError: the file asks for another treatment of pictures than bicubic resizing and a centre crop.
    """
    if (folder / "preprocessor_config.json").is_file():
        source = folder / "preprocessor_config.json"
        config = read_json(source)
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        wanted: dict[str, Any] = {**dict.fromkeys(steps, True), "resample": 3}
        found = {name: config[name] for name, value in wanted.items() if config.get(name, value) != value}
        if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            found["rescale_factor"] = config["rescale_factor"]
        mean, std = config.get("image_mean"), config.get("image_std")
    elif (folder / "open_clip_config.json").is_file():
        source = folder / "open_clip_config.json"
        config = read_json(source).get("preprocess_cfg", {})
        wanted = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}
        found = {name: config[name] for name, value in wanted.items() if config.get(name) not in (None, value)}
        mean, std = config.get("mean"), config.get("std")
    else:
        return CLIP_MEAN, CLIP_STD
    if found and not own_rule:
        said = ", ".join(f"{name} = {value!r}" for name, value in found.items())
        raise ModelError(f"{source}: pictures cannot be prepared as it says ({said}); only bicubic resizing and a centre crop")
    return _triple(mean, CLIP_MEAN), _triple(std, CLIP_STD)


def _triple(values: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    if values is None:
        return default
    return tuple(float(value) for value in values) if isinstance(values, list | tuple) else (float(values),) * 3
