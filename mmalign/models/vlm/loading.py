"""Read a vision-language model from a folder: weights complete, processor, attention kernel, named layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.errors import ModelError
from mmalign.models.vlm import MODEL_TYPES, VLM_FAMILIES, kernels

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmConfig, VlmFamily

ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj")
KERNELS = {"sdpa": "sdpa", "flex": "flex_attention", "eager": "eager", "flash": "flash_attention_2"}


def load(cls: type[VlmFamily], config: VlmConfig, device: torch.device) -> VlmFamily:
    """See ``VlmFamily.load``."""
    settings = _read(config, "config.json", _settings, config)
    kind = str(settings.model_type)
    name = MODEL_TYPES.get(kind)
    if config.name == "vlm" and name is not None:
        cls = VLM_FAMILIES.get(name)
    elif name is not None and config.name in VLM_FAMILIES.names() and name != config.name:
        raise ModelError(f"model.name: {config.path} holds a '{kind}' model; use model.name: {name}, or vlm")
    family = cls(config, device)
    family.processor = _read(config, "processor", _processor, config)
    family.tokenizer = family.processor.tokenizer
    if family.processor.chat_template is None:  # some folders keep it beside the tokenizer alone
        family.processor.chat_template = family.tokenizer.chat_template
    if family.processor.chat_template is None:
        raise ModelError(f"model.path: {config.path} has no chat template (chat_template.jinja), which turns messages into text")
    _check_attention(config, device)
    return assemble(family, _read(config, "weights", _network, config), known=name is not None)


def assemble(family: VlmFamily, network: Any, *, known: bool = True) -> VlmFamily:
    """Give a family with its processor the network it runs.

    Args:
        family: with `processor` and `tokenizer` set.
        network: as transformers made it.
        known: whether a family of the table was written for this class.
    """
    config = family.config
    for module in network.modules():
        _without_dropout(module)
    if not known:
        _require_usual_shape(network)
    family.network = network.to(family.device).eval()
    if known:
        _own_kernels(family)
    _own_memory(family.network)
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _name_tokens(family)
    family.lora_targets = _targets(family)
    return family


def cast_weights(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights in another precision, in place; tables that a model computes for itself stay as they are.

    ``Module.to`` would round those as well: the frequencies of rotary positions in bfloat16 are wrong by up to 0.2 %, which is
    whole turns some thousand tokens into a prompt. What transformers loads in bfloat16 has them in float32.
    """
    for module in network.modules():
        for value in module.parameters(recurse=False):
            if value.is_floating_point():
                value.data = value.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
    return network


def compile_blocks(network: nn.Module) -> nn.Module:
    """torch.compile every transformer block in place: masks, heads and media change from step to step, blocks do not."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1:
            for block in module:
                if not isinstance(block, nn.Linear | nn.LayerNorm):
                    block.compile(dynamic=True)
    return network


def _settings(config: VlmConfig) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(config.path, revision=config.revision)


def _processor(config: VlmConfig) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(config.path, revision=config.revision)
    if getattr(processor, "tokenizer", None) is None:  # AutoProcessor falls back to a bare tokenizer in silence
        raise ValueError("no processor: preprocessor_config.json or processor_config.json is missing")
    pixels = processor.image_processor
    if config.min_pixels is not None or config.max_pixels is not None:
        size = dict(pixels.size)
        if not {"shortest_edge", "longest_edge"} <= set(size) or "patch_size" not in vars(pixels):
            raise ValueError("min_pixels and max_pixels fit only processors that resize to an area (Qwen)")
        size["shortest_edge"] = config.min_pixels or size["shortest_edge"]
        size["longest_edge"] = config.max_pixels or size["longest_edge"]
        pixels.size = type(pixels.size)(**size)
    if config.image_splitting is not None:
        names = [name for name in ("do_image_splitting", "crop_to_patches") if name in dir(pixels)]
        if not names:
            raise ValueError("image_splitting fits only processors that cut pictures into tiles")
        setattr(pixels, names[0], config.image_splitting)
        if names[0] == "crop_to_patches":  # the processor's own default would win
            processor.images_kwargs = {**type(processor).images_kwargs, "crop_to_patches": config.image_splitting}
    return processor


def _network(config: VlmConfig) -> Any:
    from transformers import AutoModelForImageTextToText

    model, found = AutoModelForImageTextToText.from_pretrained(
        config.path, revision=config.revision, dtype=torch.float32, use_safetensors=True,
        attn_implementation=KERNELS[config.attention], output_loading_info=True,
    )  # fmt: skip
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(map(str, found.get(problem) or ()))
        if names:
            raise ValueError(f"{problem.replace('_', ' ')} in its weights, e.g. '{names[0]}' ({len(names)} in all)")
    return model


def _require_usual_shape(network: Any) -> None:
    """A model class that nobody has tried here: what the shared pass relies on must be there, and nothing behind it."""
    if not {"model", "lm_head"} <= dict(network.named_children()).keys():
        raise ModelError(f"model.path: {type(network).__name__} is not built as `model` and `lm_head`; no family here knows it")
    values = network.config.get_text_config().to_dict()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if values.get(name) not in (None, 1, 1.0):
            raise ModelError(f"model.path: {type(network).__name__} scales its logits ({name}), which no family here supports")


def _read(config: VlmConfig, part: str, reading: Any, *arguments: Any) -> Any:
    """Library errors about files become one message that names the folder and the remedy."""
    from safetensors import SafetensorError

    try:
        return reading(*arguments)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        hint = (
            f"expected a folder in the transformers layout with its {part}, weights as safetensors"
            if Path(config.path).exists()
            else "no such local folder; a hub id needs network access or a filled cache"
        )
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model.path: cannot load {part} from {config.path}: {hint} ({reason})") from error


def _check_attention(config: VlmConfig, device: torch.device) -> None:
    """Whether the library itself is there, transformers says when the weights are read."""
    if config.attention == "flash" and device.type != "cuda":
        raise ModelError(f"model.attention: flash runs on CUDA devices, this is '{device.type}'; use sdpa")


def _without_dropout(module: nn.Module) -> None:
    """Policy and reference must agree before the first step: the base's dropout is off in training too."""
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    for name in ("attention_dropout", "dropout"):
        if isinstance(vars(module).get(name), float):
            setattr(module, name, 0.0)


def _own_kernels(family: VlmFamily) -> None:
    """Let the layers run the kernels of ``kernels`` where PyTorch's own were asked for."""
    kernels.register()
    config, parts = family.config, family.parts()
    if config.attention == "sdpa" and not config.compile:
        use_kernel(parts["language"], kernels.BRANCHES)
        family.splits = True
    if family.windowed and config.attention in ("sdpa", "flex"):
        use_kernel(parts["vision"], kernels.SEGMENTS)


def use_kernel(parts: Sequence[nn.Module | nn.Parameter], kernel: str) -> None:
    """Let every module of some parts run an attention kernel that transformers knows by this name."""
    for part in parts:
        for module in part.modules() if isinstance(part, nn.Module) else ():
            settings = vars(module).get("config")
            if settings is not None:
                settings._attn_implementation = kernel


def _own_memory(network: nn.Module) -> None:
    """Weights in memory of their own instead of a mapping of the file, which others may replace under a run."""
    seen: set[int] = set()
    for value in (*network.parameters(), *network.buffers()):
        if id(value) not in seen:
            seen.add(id(value))
            value.data = value.data.clone()


def _name_tokens(family: VlmFamily) -> None:
    tokenizer, network = family.tokenizer, family.network
    generation: Any = network.generation_config
    ends = generation.eos_token_id if generation is not None else None
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list | tuple) else [ends])} - {None}
    if not found:
        raise ModelError(f"model.path: the tokenizer of {family.config.path} has no end-of-sequence token")
    family.end_ids = frozenset(int(number) for number in found)
    family.end_marks = tuple(str(tokenizer.convert_ids_to_tokens(number)) for number in sorted(family.end_ids))
    numbers = {family.image_token_id, family.video_token_id} - {None}
    family.placeholder_ids = frozenset(int(number) for number in numbers if number is not None)


def _targets(family: VlmFamily) -> dict[str, tuple[str, ...]]:
    """Full names of linear layers by set; the output layer is in none, because answers are read through it."""
    parts = family.parts()
    inside = {
        name: {id(layer) for part in parts[name] if isinstance(part, nn.Module) for layer in part.modules()}
        for name in ("vision", "projector", "language")
    }
    linear = [
        (name, layer) for name, layer in family.network.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    ]  # fmt: skip
    language = [name for name, layer in linear if id(layer) in inside["language"]]
    known = set().union(*inside.values())
    return {
        "language": tuple(language),
        "attention": tuple(name for name in language if name.rpartition(".")[2] in ATTENTION_NAMES),
        "all": tuple(name for name, layer in linear if id(layer) in known),
    }
