"""The data of a curriculum: every stage prepared as a run of its own kind would be, joined into one stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mmalign import rng
from mmalign.config import Section
from mmalign.data.check import CheckResult
from mmalign.data.reasons import Problem
from mmalign.data.staged import StagedLoader
from mmalign.errors import ConfigError
from mmalign.experiment.inputs import Inputs, cache_root
from mmalign.experiment.settings import ExperimentConfig
from mmalign.trainers.temple import StageConfig, TempleConfig
from mmalign.trainers.vlm_dpo import VlmDPOConfig
from mmalign.trainers.vlm_sft import VlmSFTConfig


def stage_experiment(config: ExperimentConfig, stage: StageConfig, number: int) -> ExperimentConfig:
    """The experiment that one stage would be on its own: its table, its rows, an order of its own, the caches of the whole."""
    method: Section = VlmSFTConfig() if stage.loss == "answers" else VlmDPOConfig()
    data = config.data.model_dump() | {"manifest": stage.manifest or config.data.manifest, "stage": stage.rows}
    if config.data.cache == "auto":
        data["cache"] = str(cache_root(config))
    seed = rng.key(config.run.seed, f"stage/{stage.name}", number) % 2**31
    return config.model_copy(
        update={
            "method": method,
            "data": type(config.data)(**data),
            "run": config.run.model_copy(update={"seed": seed}),
            "reference": None,
        }
    )


def prepare_stages(config: ExperimentConfig, parts: Any, accelerator: Any) -> Inputs:
    """Check, encode and cache the rows of every stage, and build the stream of all.

    Raises:
        DataError, ConfigError: as ``vlm_inputs.prepare_vlm``, with the stage's name.
    """
    from mmalign.experiment.vlm_inputs import prepare_vlm

    method = config.method
    if not isinstance(method, TempleConfig):
        raise ConfigError(f"method.name: '{config.method_name}' has no stages")
    prepared = []
    for number, stage in enumerate(method.stages):
        try:
            prepared.append(prepare_vlm(stage_experiment(config, stage, number), parts, accelerator))
        except ConfigError as error:
            raise ConfigError(f"method.stages '{stage.name}': {error}") from error
    loader = StagedLoader([inputs.loader for inputs in prepared], [stage.steps for stage in method.stages])  # type: ignore[misc]
    return Inputs(
        loader=loader, table_fingerprint=loader.order.fingerprint, processes=accelerator.num_processes,
        checked=joined([inputs.checked for inputs in prepared]),
    )


def joined(results: list[CheckResult]) -> CheckResult:
    """The stages' checks as one: every refused row once, and no row that was merely another stage's."""
    problems: dict[tuple[Any, ...], Problem] = {}
    for result in results:
        for problem in result.problems:
            if problem.reason != "other_stage":
                problems.setdefault((problem.file, problem.row, problem.id, problem.reason), problem)
    rows = np.unique(np.concatenate([result.rows for result in results]))
    return replace(results[0], rows=rows, problems=tuple(problems.values()))
