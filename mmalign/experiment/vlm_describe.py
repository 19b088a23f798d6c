"""``mmalign check`` for methods on answers: the files an experiment names, and an estimate without loading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmalign.errors import ConfigError, DataError, RewardError
from mmalign.experiment.absent import absent_model, absent_tables
from mmalign.experiment.settings import ExperimentConfig, LoraConfig

ANSWER = 128
"""Tokens of an answer, where nothing else is said, in estimates."""


def answer_files(config: ExperimentConfig) -> list[str]:
    """What the experiment names and is not there or cannot be read."""
    from mmalign.data.vlm import open_vlm
    from mmalign.experiment.vlm_inputs import require_kind
    from mmalign.experiment.vlm_samples import read_questions
    from mmalign.rewards.answers import require_judge

    problems = []
    if absent := absent_tables(config):
        problems += absent
    else:
        try:
            require_kind(config, open_vlm(config.data.manifest, progress=False))
        except ConfigError as error:
            problems += error.problems
        except DataError as error:
            problems += [f"data.manifest: {line}" for line in str(error).splitlines()]
    try:
        read_questions(config, 1)
    except ConfigError as error:
        problems += error.problems
    except DataError as error:
        problems.append(f"evaluate.prompts: {error}")
    method = config.method.model_dump()
    judge, options = method.get("judge"), method.get("judge_options")
    for key, names in (("method.judge", [judge] if judge else []), ("evaluate.rewards", config.evaluate.rewards),
                       ("evaluate.holdout", config.evaluate.holdout)):  # fmt: skip
        for name in names:
            try:
                require_judge(name, options if key == "method.judge" else None)
            except ConfigError as error:
                problems += [f"{key}: {problem}" for problem in error.problems]
            except RewardError as error:
                problems.append(f"{key}: {error}")
    problems += _held_out(config)
    return problems + absent_model(config.model.model_dump()["path"])


def _held_out(config: ExperimentConfig) -> list[str]:
    """What is wrong with the tasks and the extractor of an evaluation."""
    from mmalign.experiment.vlm_tasks import task_records
    from mmalign.rewards.findings import load_extractor

    problems: list[str] = []
    for name, source in (config.evaluate.tasks or {}).items():
        try:
            task_records(name, source)
        except ConfigError as error:
            problems += error.problems
        except DataError as error:
            problems.append(f"evaluate.tasks.{name}: {error}")
    if config.evaluate.reports is not None:
        try:
            load_extractor(config.evaluate.reports.extractor)
        except ConfigError as error:
            problems += [f"evaluate.reports.extractor: {problem}" for problem in error.problems]
        except RewardError as error:
            problems.append(f"evaluate.reports.extractor: {error}")
    return problems


def answer_estimate(config: ExperimentConfig, *, gib: int, optimizer_bytes: int) -> list[str]:
    """Parameters, memory of weights and optimiser, and FLOPs of a pair, from the folder's config.json alone."""
    if not (Path(config.model.model_dump()["path"]) / "config.json").is_file():
        return ["estimate   none: the model's config.json is not on this disk"]
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    settings = AutoConfig.from_pretrained(config.model.model_dump()["path"])
    with torch.device("meta"):
        network: Any = AutoModelForImageTextToText.from_config(settings)
    base = sum(parameter.numel() for parameter in network.parameters())
    language = _language(network)
    width = 4 if config.model.model_dump()["dtype"] == "fp32" else 2
    if isinstance(config.tuning, LoraConfig):
        learned = _adapter(network, config.tuning)
        weights, words = base * width + (learned or 0) * 4, "adapters on language layers"
    else:
        learned = base if config.tuning.model_dump().get("vision") == "trained" else language
        weights, words = learned * 4 + (base - learned) * width, "weights"
    copies = base * width if config.reference_name == "copy" else 0
    state = (learned or 0) * (4 + optimizer_bytes + (4 if config.optim.ema_decay else 0))
    longest = config.data.max_length or 1024
    prefix = max(longest - ANSWER, ANSWER)
    shared = config.method.model_dump().get("prefix", "shared") == "shared"
    tokens = prefix + 2 * ANSWER if shared else 2 * (prefix + ANSWER)
    asked = config.reference_name not in ("none", "precomputed")
    flops = 2 * language * tokens * (3 + asked + bool(config.model.model_dump()["gradient_checkpointing"]))
    return [
        f"trained    {'unknown' if learned is None else format(learned, ',')} of {base:,} parameters ({words})",
        f"memory     {(weights + copies + state) / gib:.2f} GiB for weights, reference, gradients and optimiser, activations "
        "not counted",
        f"compute    about {flops / 1e12:.3f} TFLOP a pair of {ANSWER}-token answers behind {prefix} tokens, "
        f"{'shared' if shared else 'read twice'} (language model only)",
    ]


def _language(network: Any) -> int:
    """Parameters outside tower and projector."""
    parts = {name for name, _ in network.model.named_children()}
    outside = parts & {"vision_tower", "visual", "vision_model", "multi_modal_projector", "connector"}
    seen = sum(value.numel() for name in outside for value in getattr(network.model, name).parameters())
    return sum(value.numel() for value in network.parameters()) - seen


def _adapter(network: Any, tuning: LoraConfig) -> int | None:
    """Parameters of adapters on a named set; None for sets and lists that only the loaded family knows."""
    import torch

    names = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "language": None}
    if not isinstance(tuning.targets, str) or tuning.targets not in names:
        return None
    wanted = names[tuning.targets]
    inner = network.model.get_submodule("language_model") if "language_model" in dict(network.model.named_children()) else None
    total = 0
    for name, layer in (inner or network.model).named_modules():
        if isinstance(layer, torch.nn.Linear) and (wanted is None or name.rpartition(".")[2] in wanted):
            total += tuning.rank * (layer.in_features + layer.out_features)
    return total
