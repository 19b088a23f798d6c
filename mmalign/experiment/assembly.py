"""From settings to parts: the family on its device, the policy with its adapters, the reference, the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmalign import rng
from mmalign.errors import ConfigError
from mmalign.experiment.freezing import adapter_targets, hold
from mmalign.experiment.settings import ExperimentConfig, FullConfig, LoraConfig, UserTuningConfig
from mmalign.experiment.users import attach_users
from mmalign.models.adapters import attach_lora, load_adapter
from mmalign.models.diffusion import FAMILIES
from mmalign.models.diffusion.base import DiffusionFamily, FamilyConfig
from mmalign.models.reference import (
    AdapterOffReference,
    CopyReference,
    FrozenAdapterConfig,
    FrozenAdapterReference,
    Reference,
    StoredReference,
    UntrainedReference,
)
from mmalign.models.vlm.base import VlmConfig
from mmalign.models.vlm.loading import compile_blocks
from mmalign.registry import did_you_mean
from mmalign.trainers import METHODS
from mmalign.trainers.base import Parts, Trainer


@dataclass(slots=True, kw_only=True)
class Assembled:
    """What a run works with."""

    family: Any
    """``models.diffusion.base.DiffusionFamily``, or ``models.vlm.base.VlmFamily`` for methods on answers."""
    policy: nn.Module
    trainer: Trainer
    start: Reference | None = None
    """Asks the starting weights, to store what they say; set where the reference is precomputed."""
    frames: Any = None
    """Stored frames of clips (``data.frames.FrameCache``), where the run keeps them."""


def load_family(config: ExperimentConfig, device: torch.device) -> DiffusionFamily:
    """The model family with its weights.

    Raises:
        ModelError: the folder or a part of it cannot be loaded.
    """
    quiet_libraries()
    settings = config.model
    if not isinstance(settings, FamilyConfig):
        raise ConfigError(f"model.name: '{config.model_dump()['model']}' is not a diffusion family")
    return FAMILIES.get(settings.name).load(settings, device=device)  # type: ignore[attr-defined, no-any-return]


def quiet_libraries() -> None:
    """Our own bars tell what is under way; loading a few shards needs none."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def lora_targets(family: DiffusionFamily, tuning: LoraConfig) -> tuple[str, ...]:
    """Layer-name suffixes of a named set or of a list."""
    if not isinstance(tuning.targets, str):
        return tuning.targets
    if tuning.targets not in family.lora_targets:
        hint = did_you_mean(tuning.targets, family.lora_targets)
        raise ConfigError(f"tuning.targets: '{tuning.targets}' is not a set of this family{hint}")
    return tuple(family.lora_targets[tuning.targets])


def tune(config: ExperimentConfig, family: DiffusionFamily) -> nn.Module:
    """The family's network made trainable as the experiment says. The same object, adapters attached."""
    network = family.network
    if isinstance(config.tuning, UserTuningConfig):
        network.requires_grad_(False)
    elif isinstance(config.tuning, LoraConfig):
        tuning = config.tuning
        attach_lora(
            network, rank=tuning.rank, alpha=tuning.alpha or float(tuning.rank), dropout=tuning.dropout,
            targets=adapter_targets(config, network, lora_targets(family, tuning)), seed=rng.key(config.run.seed, "lora"),
        )  # fmt: skip
        if isinstance(config.reference, FrozenAdapterConfig) and config.reference.path is not None:
            load_adapter(network, config.reference.path, alpha=tuning.alpha or float(tuning.rank))
    else:
        network.float().requires_grad_(True)
    attach_users(config, network, rng.key(config.run.seed, "users"))
    return hold(config, network)


def assemble(config: ExperimentConfig, device: torch.device, rank: int = 0) -> Assembled:
    """Load and wire everything one process needs."""
    if config.on_answers:
        from mmalign.experiment.vlm_assembly import assemble_vlm

        return assemble_vlm(config, device, rank)
    family = load_family(config, device)
    name = config.reference_name
    if name == "precomputed":
        family.fingerprint("network")  # before anything changes it
    if not isinstance(config.tuning, FullConfig) and family.dtype != torch.float32:
        # Frozen weights need no float32 master copy. The plain method: the library's own warns of an empty list.
        nn.Module.to(family.network, family.dtype)
    # The copy has the policy's own dtype: weights rounded on one side alone would be a margin before the first step.
    reference: Reference | None = CopyReference(family.copy_network()) if name == "copy" else None
    policy = tune(config, family)
    if name == "adapter_off":
        reference = start_reference(config, policy)
    elif name == "frozen_adapter":
        reference = FrozenAdapterReference(policy)
    elif name == "precomputed":
        reference = StoredReference()
    parts = Parts(family=family, policy=compiled(policy, config), reference=reference, steps=config.optim.steps)
    trainer = METHODS.get(config.method_name).build(config.method, parts)
    start = start_reference(config, policy) if name == "precomputed" else None
    return Assembled(family=family, policy=policy, trainer=trainer, start=start)


def start_reference(config: ExperimentConfig, policy: nn.Module) -> Reference:
    """The starting weights through the very kernels that the policy uses, while it has not been trained.

    With the users' attention alone trained, the policy asked for nobody is that at any time.
    """
    return AdapterOffReference(policy) if isinstance(config.tuning, LoraConfig) else UntrainedReference(policy)


def compiled(policy: nn.Module, config: ExperimentConfig) -> nn.Module:
    """Compile in place: the module keeps its identity and its parameter names."""
    settings: Any = config.model
    if settings.compile and isinstance(settings, VlmConfig):
        compile_blocks(policy)
    elif settings.compile:
        policy.compile()
    return policy
