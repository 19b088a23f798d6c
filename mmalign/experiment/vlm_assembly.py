"""From settings to parts for methods on answers: the counterpart of ``assembly`` for vision-language models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from mmalign import rng
from mmalign.errors import ConfigError
from mmalign.experiment.freezing import adapter_targets, hold
from mmalign.experiment.settings import ExperimentConfig, FullConfig, LoraConfig
from mmalign.experiment.vlm_buffer import OnlineBuffer
from mmalign.media import decode_video, require_decoder
from mmalign.models.adapters import attach_lora, load_adapter
from mmalign.models.reference import (
    AdapterOffReference,
    CopyReference,
    FrozenAdapterConfig,
    FrozenAdapterReference,
    Reference,
    UntrainedReference,
)
from mmalign.models.stored_answers import StoredAnswers, VisionStore
from mmalign.models.table import MODELS
from mmalign.models.vlm.base import VlmConfig, VlmFamily
from mmalign.models.vlm.loading import cast_weights
from mmalign.registry import did_you_mean


def load_vlm(config: ExperimentConfig, device: torch.device) -> VlmFamily:
    """The family with its weights and the limits of the `data` section.

    Raises:
        ModelError: the folder or a part of it cannot be loaded.
        MissingExtraError, DataError: `data.video_decoder` cannot be used on this machine.
    """
    from mmalign.experiment.assembly import quiet_libraries

    require_decoder(config.data.video_decoder)  # before weights are read for nothing
    quiet_libraries()
    settings = config.model
    if not isinstance(settings, VlmConfig):
        raise ConfigError(f"model.name: '{config.model_name}' is no vision-language family")
    family: VlmFamily = MODELS.get(settings.name).load(settings, device=device)  # type: ignore[attr-defined]
    if config.data.video_decoder != "pyav":
        family.read_clip = partial(decode_video, decoder=config.data.video_decoder)
    return family.with_limits(max_length=config.data.max_length, max_answer=config.data.max_answer)


def lora_targets(family: VlmFamily, tuning: LoraConfig) -> tuple[str, ...]:
    """Layer names of a named set or of a list.

    Raises:
        ConfigError: a set that the family does not have.
    """
    if not isinstance(tuning.targets, str):
        return tuning.targets
    if tuning.targets not in family.lora_targets:
        hint = did_you_mean(tuning.targets, family.lora_targets)
        raise ConfigError(f"tuning.targets: '{tuning.targets}' is not a set of this family{hint}")
    return tuple(family.lora_targets[tuning.targets])


def tune_vlm(config: ExperimentConfig, family: VlmFamily) -> nn.Module:
    """The family's network made trainable as the experiment says. The same object, adapters attached."""
    network, tuning = family.network, config.tuning
    if isinstance(tuning, LoraConfig):
        attach_lora(
            network, rank=tuning.rank, alpha=tuning.alpha or float(tuning.rank), dropout=tuning.dropout,
            targets=adapter_targets(config, network, lora_targets(family, tuning)), seed=rng.key(config.run.seed, "lora"),
        )  # fmt: skip
        if isinstance(config.reference, FrozenAdapterConfig) and config.reference.path is not None:
            load_adapter(network, config.reference.path, alpha=tuning.alpha or float(tuning.rank))
        return hold(config, network)
    network = network.float().requires_grad_(True)
    vision = tuning.vision if isinstance(tuning, FullConfig) else "trained"
    return hold(config, network if vision == "trained" else family.freeze_vision(network, projector=vision == "frozen"))


def assemble_vlm(config: ExperimentConfig, device: torch.device, rank: int = 0) -> Any:
    """Load and wire everything one process needs; an ``assembly.Assembled``."""
    from mmalign.experiment.assembly import Assembled, compiled
    from mmalign.experiment.vlm_inputs import vision_folder
    from mmalign.trainers import METHODS
    from mmalign.trainers.base import Parts

    family, name = load_vlm(config, device), config.reference_name
    if name == "precomputed":
        family.fingerprint("reference")  # before anything changes the weights
    if isinstance(config.tuning, LoraConfig) and family.dtype != torch.float32:
        cast_weights(family.network, family.dtype)
    reference: Reference | StoredAnswers | None = CopyReference(family.copy_network()) if name == "copy" else None
    features = VisionStore(vision_folder(config, family)) if config.data.cache_vision else None
    policy = tune_vlm(config, family)
    start: Reference | None = None
    if name == "adapter_off":
        reference = AdapterOffReference(policy)
    elif name == "frozen_adapter":
        reference = FrozenAdapterReference(policy)
    elif name == "precomputed":
        reference = StoredAnswers()
        start = AdapterOffReference(policy) if isinstance(config.tuning, LoraConfig) else UntrainedReference(policy)
    if features is not None and not family.shares_vision(policy):
        raise ConfigError("data.cache_vision: the vision tower or projector is trained, so its features cannot be stored")
    parts = Parts(
        family=family, policy=compiled(policy, config), reference=reference, steps=config.optim.steps, features=features,
        buffer=OnlineBuffer(config.folder / "online" / f"rank-{rank}.jsonl"),
    )
    trainer = METHODS.get(config.method_name).build(config.method, parts)
    return Assembled(family=family, policy=policy, trainer=trainer, start=start)
