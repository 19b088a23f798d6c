"""What leaves the house, and what identifies it: adapter folders, model folders, fingerprints and keys of caches."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign.branches import EncodedExample
from mmalign.models.tokenizing import tokenizer_hash
from mmalign.models.vlm.forward import inner

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmFamily

PEFT_PREFIX = "base_model.model."
MOVING = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation", "use_cache"}
"""Settings that change with where a model was read from or how it is run."""


def save_lora(family: VlmFamily, state: Mapping[str, Tensor], folder: Path, config: Mapping[str, Any]) -> Path:
    """See ``VlmFamily.save_lora``. `config`: r, lora_alpha, target_modules and what else peft's LoraConfig takes."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    values = {**config, "target_modules": sorted(config["target_modules"])}
    adapter = LoraConfig(base_model_name_or_path=family.config.path, inference_mode=True, **values)
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    named = {PEFT_PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(named, path, metadata={"format": "pt"})
    return path


def save_full(family: VlmFamily, module: nn.Module, folder: Path) -> Path:
    """See ``VlmFamily.save_full``; adapters are merged into a copy of the weights."""
    network = inner(module)
    folder.mkdir(parents=True, exist_ok=True)
    merged(network).save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def merged(network: Any) -> Any:
    """A network of the base's class that holds base plus adapter; the given one, where it carries none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: part for name, part in network.named_modules() if isinstance(part, BaseTunerLayer)}
    if not layers:
        return network
    state = {
        name.replace(".base_layer.", "."): value.detach().clone()
        for name, value in network.state_dict().items()
        if "lora_" not in name
    }
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)  # type: ignore[operator]
    config = copy.deepcopy(network.config)
    config._attn_implementation = "sdpa"  # not the names of kernels that are known in this process alone
    plain = type(network)._from_config(config, dtype=next(iter(state.values())).dtype)
    plain.load_state_dict(state)
    plain.generation_config = network.generation_config
    return plain.eval()


def fingerprint(family: VlmFamily, kind: str) -> dict[str, Any]:
    """See ``VlmFamily.fingerprint``."""
    found: dict[str, Any] = {"family": type(family).__name__, "kind": kind, "dtype": family.config.dtype}
    settings = family.model_config.to_dict()
    if kind == "processor":
        found.pop("dtype")
        found["processor"] = _text_hash(_plain(family.processor.to_dict()))
        found["tokenizer"] = tokenizer_hash(family.tokenizer)
        found["template"] = _text_hash(family.processor.chat_template)
    elif kind == "vision":
        parts = family.parts()
        found["weights"] = _weights_hash(
            (f"{name}{number}.{key}", value)
            for name in ("vision", "projector")
            for number, part in enumerate(parts[name])
            for key, value in _tensors(part)
        )
        found["config"] = _text_hash(_plain(settings.get("vision_config")))
    else:
        found["weights"] = _weights_hash(family.network.state_dict().items())
        found["config"] = _text_hash(_plain(settings))
        if kind == "reference":
            found["processor"] = family.fingerprint("processor")
    return found


def _tensors(part: nn.Module | nn.Parameter) -> Iterable[tuple[str, Tensor]]:
    return [("", part)] if isinstance(part, nn.Parameter) else part.state_dict().items()


def answer_keys(examples: Sequence[EncodedExample]) -> list[str]:
    """See ``VlmFamily.reference_keys``."""
    keys: list[str] = []
    for example in examples:
        own: dict[int, str] = {}
        for row in example.rows:
            for number, ids in zip(row.answers, row.branches, strict=True):
                made = hashlib.blake2b(digest_size=16)
                made.update(row.prefix.numpy().tobytes())
                made.update(b"|" + ids.numpy().tobytes())
                made.update("|".join(unit.digest for unit in row.units).encode())
                own[number] = made.hexdigest()
        keys += [own[number] for number in sorted(own)]
    return keys


def _plain(value: Any) -> Any:
    """Settings without what moves, in an order of their own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=str) if key not in MOVING}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _text_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:32]


def _weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
