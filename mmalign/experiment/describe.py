"""``mmalign check``: what a run would train, hold in memory and compute, without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.errors import ConfigError, DataError, ModelError
from mmalign.experiment.absent import absent_model, absent_tables, unknown_rewards
from mmalign.experiment.prompts import read_prompts
from mmalign.experiment.settings import Experiment, ExperimentConfig, LoraConfig, UserTuningConfig, load_experiment
from mmalign.experiment.trackers import require_trackers
from mmalign.experiment.users import adapter_settings, names_of, users_of
from mmalign.models.diffusion import FAMILIES
from mmalign.models.diffusion.base import DTYPES, FamilyConfig
from mmalign.models.diffusion.folder import PIPELINES, FolderFamily
from mmalign.models.users.adapter import size_of
from mmalign.trainers import METHODS

GIB = 2**30
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 4}


def check(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Validate an experiment and the files it names; returns a report with an estimate.

    Raises:
        ConfigError: every problem found, together.
    """
    experiment = load_experiment(path, overrides)
    config = experiment.config
    problems = _files(config)
    if problems:
        raise ConfigError(problems, experiment.source)
    require_trackers(config)
    notice = METHODS.get(config.method_name).notice
    return "\n".join([f"{experiment.source}: valid", "", *_lines(experiment), *(["", notice] if notice else [])])


def _files(config: ExperimentConfig) -> list[str]:
    """What the experiment names and is not there."""
    if config.on_answers:
        from mmalign.experiment.vlm_describe import answer_files

        return answer_files(config)
    problems = []
    if config.freezing is not None:
        from mmalign.freezing import FreezeMask, FreezingError

        try:
            FreezeMask.load(config.freezing.mask)
        except FreezingError as error:
            problems.append(str(error))
    if absent := absent_tables(config):
        problems += absent
    else:
        from mmalign import data

        try:
            if METHODS.get(config.method_name).batches == "lists":
                problems += _scores(config, data.open_ranked(config.data.manifest, progress=False).rewards)
            elif METHODS.get(config.method_name).batches == "domains":
                from mmalign.data.domains import open_domains

                open_domains(config.data.manifest).rows("learn")
            else:
                table = data.open_table(config.data.manifest)
                problems += _scores(config, table.rewards)
                if users_of(config) is not None:
                    names_of(table)
        except DataError as error:
            problems += [f"data.manifest: {line}" for line in str(error).splitlines()]
        except ConfigError as error:
            problems += error.problems
    if config.evaluate.prompts is not None:
        try:
            read_prompts(config.evaluate.prompts)
        except ConfigError as error:
            problems += error.problems
    problems += unknown_rewards(config) + _other_family(config)
    return problems + absent_model(config.model.model_dump()["path"])


def _other_family(config: ExperimentConfig) -> list[str]:
    """A local folder that says that it belongs to another family."""
    path = config.model.model_dump()["path"]
    try:
        index = json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))
        family = PIPELINES.get(str(index["_class_name"]))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if family is None or family == config.model_name or config.model_name not in PIPELINES.values():
        return []
    return [f"model.name: {path} holds a model of another family; use model.name: {family}"]


def _scores(config: ExperimentConfig, held: Sequence[str]) -> list[str]:
    """What the method misses in the table's column `scores`."""
    problem = METHODS.get(config.method_name).lacking_scores(config.method, held)
    return [problem] if problem else []


def _lines(experiment: Experiment) -> list[str]:
    config = experiment.config
    entry = next((item for item in METHODS if item.name == config.method_name), None)
    rows = config.optim.batch_size * config.optim.accumulate
    found = [
        f"method     {config.method_name}" + (f" ({entry.cite})" if entry else ""),
        f"model      {config.model.model_dump()['name']} from {config.model.model_dump()['path']}",
        f"reference  {config.reference_name}",
        f"step       {config.optim.batch_size} x {config.optim.accumulate} = {rows} pairs per process, lr {config.optim.lr:g}",
        f"run        {config.optim.steps} steps = {config.optim.steps * rows:,} pairs per process, into {config.folder}",
    ]
    if config.on_answers:
        from mmalign.experiment.vlm_describe import answer_estimate

        return found + answer_estimate(config, gib=GIB, optimizer_bytes=OPTIMIZER_BYTES[config.optim.name])
    found += _estimate(config)
    return found


def network_config(config: ExperimentConfig) -> dict[str, Any] | None:
    """``config.json`` of a local folder's denoiser; None for a hub id that is not on this disk, or another kind of model."""
    settings = config.model
    if not isinstance(settings, FamilyConfig) or not issubclass(family := FAMILIES.get(settings.name), FolderFamily):
        return None
    file = Path(settings.network_path or settings.path) / family.network_part / "config.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _estimate(config: ExperimentConfig) -> list[str]:
    """Parameters, memory of weights and optimiser, and FLOPs of a step, on tensors without storage."""
    values = network_config(config)
    if values is None:
        return ["estimate   none: the network's config.json is not on this disk"]
    import diffusers
    import torch

    from mmalign.experiment.assembly import lora_targets
    from mmalign.models.adapters import attach_lora, trainable

    family: Any = FAMILIES.get(config.model.model_dump()["name"])
    with torch.device("meta"):
        network = getattr(diffusers, family.network_class).from_config(values).to("meta")
    flops = _forward_flops(network, family, values)
    base = sum(parameter.numel() for parameter in network.parameters())
    width = torch.finfo(DTYPES[config.model.model_dump()["dtype"]]).bits // 8
    added = size_of(network, adapter_settings(config)) if users_of(config) is not None else 0
    if isinstance(config.tuning, UserTuningConfig):
        learned = added
        weights = base * width + added * 4
    elif isinstance(config.tuning, LoraConfig):
        tuning = config.tuning
        targets = lora_targets(family, tuning)
        with torch.device("meta"):
            attach_lora(network, rank=tuning.rank, alpha=1.0, targets=targets)
        learned = trainable(network).parameters + added
        weights = base * width + learned * 4
    else:
        learned = base + added
        weights = learned * 4
    full = not isinstance(config.tuning, LoraConfig | UserTuningConfig)
    copies = base * width if config.reference_name == "copy" else 0
    training = learned * (4 + OPTIMIZER_BYTES[config.optim.name] + (4 if config.optim.ema_decay else 0))
    asked = config.reference_name not in ("none", "precomputed")
    passes = 2 * (3 + asked + config.model.model_dump()["gradient_checkpointing"])
    rows = config.optim.batch_size * config.optim.accumulate
    return [
        f"trained    {learned:,} of {learned if full else base + learned:,} parameters",
        f"memory     {(weights + copies + training) / GIB:.2f} GiB for weights, reference, gradients and optimiser, "
        "activations not counted",
        f"compute    {passes * flops / 1e12:.3f} TFLOP a pair, {passes * flops * rows / 1e12:.2f} TFLOP a step and process "
        f"(denoiser only)",
    ]


def _forward_flops(network: Any, family: Any, values: dict[str, Any]) -> int:
    """FLOPs of one forward pass for one latent at the model's own size."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network(**family.probe(values))
        except (RuntimeError, NotImplementedError, ValueError, KeyError) as error:
            raise ModelError(f"the network's config.json describes a network that cannot run: {error}") from error
    return int(counter.get_total_flops())
