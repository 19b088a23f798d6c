"""Trained weights in the ecosystem's layouts: a diffusers folder, a peft/diffusers LoRA, kohya-style keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.engine.checkpoint import complete_or_absent
from mmalign.errors import ConfigError
from mmalign.experiment.assembly import lora_targets
from mmalign.experiment.freezing import exported_targets, verify_export
from mmalign.experiment.settings import ExperimentConfig, LoraConfig, UserTuningConfig
from mmalign.experiment.users import save_users, users_of
from mmalign.models.adapters import lora_state
from mmalign.models.diffusion.base import DiffusionFamily

FORMATS = ("diffusers", "peft", "kohya", "transformers")
"""All layouts; `transformers` is for vision-language models, `diffusers` and `kohya` are for models that make pictures."""


def export_policy(
    config: ExperimentConfig, family: Any, policy: nn.Module, folder: Path, layout: str | None = None
) -> Path:
    """Write trained weights; the default is peft for LoRA and diffusers for full fine-tuning.

    Args:
        folder: replaced as a whole when complete.
        layout: ``diffusers`` (a pipeline folder; adapters are merged), ``peft`` (``pytorch_lora_weights.safetensors`` for
            `load_lora_weights`), ``kohya`` (one safetensors file with ``lora_unet_`` keys).

    Raises:
        ConfigError: an unknown format, or a LoRA format for a run that trained the full network.
    """
    if config.on_answers:
        from mmalign.experiment.vlm_exporting import export_vlm

        return export_vlm(config, family, policy, folder, layout)
    lora = config.tuning if isinstance(config.tuning, LoraConfig) else None
    alone = isinstance(config.tuning, UserTuningConfig)
    chosen = layout or ("peft" if lora or alone else "diffusers")
    if chosen not in FORMATS[:3]:
        raise ConfigError(f"export --format {chosen}: a model that makes pictures is written as {', '.join(FORMATS[:3])}")
    if chosen == "kohya" and users_of(config) is not None:
        raise ConfigError("export --format kohya: its readers know no users; use peft or diffusers")
    if chosen != "diffusers" and lora is None and not alone:
        raise ConfigError(f"export --format {chosen}: this run trained the full network; use --format diffusers")
    with complete_or_absent(folder) as temporary:
        if chosen == "diffusers":
            _save_pipeline(family, policy, temporary)
        elif lora is not None and chosen == "peft":
            family.save_lora(lora_state(policy), temporary, _peft_settings(config, family, policy, lora))
        elif lora is not None and chosen == "kohya":
            _save_kohya(family, lora_state(policy), lora, temporary / "lora_kohya.safetensors")
        if users_of(config) is not None:
            save_users(config, family, policy, temporary, beside_pipeline=chosen == "diffusers")
        verify_export(config, policy, temporary, chosen)
        (temporary / "mmalign.json").write_text(
            json.dumps({"format": chosen, "method": config.method_name, "base": family.config.path}, indent=2) + "\n"
        )
    return folder


def _peft_settings(
    config: ExperimentConfig, family: DiffusionFamily, policy: nn.Module, lora: LoraConfig
) -> dict[str, object]:
    """What a reader needs to rebuild the adapter's layers and scale."""
    targets = exported_targets(lora_state(policy)) if config.freezing is not None else list(lora_targets(family, lora))
    return {"r": lora.rank, "lora_alpha": lora.alpha or float(lora.rank), "target_modules": targets}


def _save_pipeline(family: DiffusionFamily, policy: nn.Module, folder: Path) -> None:
    """A plain pipeline folder; adapters are folded into the weights of a second network."""
    network = policy
    if any("lora_" in name or name.startswith("user_adapter.") for name, _ in policy.named_parameters()):
        network = merged(family, policy)
    family.pipeline(network).save_pretrained(folder, safe_serialization=True)


@torch.no_grad()
def merged(family: DiffusionFamily, policy: nn.Module) -> nn.Module:
    """A network of the base's class whose weights hold base plus adapter, without users; the policy stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    state: dict[str, Tensor] = {}
    layers = {name: part for name, part in policy.named_modules() if isinstance(part, BaseTunerLayer)}
    for name, value in policy.state_dict().items():
        if "lora_" not in name and not name.startswith("user_adapter."):
            state[name.replace(".base_layer.", ".")] = value.detach().clone()
    for name, layer in layers.items():
        weight = f"{name}.weight"
        for adapter in layer.active_adapters:
            state[weight] = (state[weight].float() + layer.get_delta_weight(adapter).float()).to(state[weight].dtype)  # type: ignore[operator]
    network = type(policy).from_config(policy.config)  # type: ignore[attr-defined]
    network.load_state_dict(state)
    return network.to(next(iter(state.values())).dtype)  # type: ignore[no-any-return]


def _save_kohya(family: DiffusionFamily, state: dict[str, Tensor], lora: LoraConfig, path: Path) -> None:
    from safetensors.torch import save_file

    alpha = lora.alpha or float(lora.rank)
    metadata = {"ss_network_dim": str(lora.rank), "ss_network_alpha": str(alpha), "ss_network_module": "networks.lora"}
    save_file(family.kohya(state, rank=lora.rank, alpha=alpha), path, metadata=metadata)
