"""What may change between a checkpoint and its continuation. A run is one experiment from its first step to its last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.engine.checkpoint import read_checkpoint
from mmalign.errors import ConfigError
from mmalign.experiment.settings import ExperimentConfig

MAY_CHANGE = {
    "evaluate", "run.name", "run.out", "run.log_every", "run.save_every", "run.keep_checkpoints", "run.trackers",
    "run.device", "optim.steps", "optim.batch_size", "optim.accumulate", "data.manifest", "data.mix", "data.cache",
    "data.check", "data.workers", "data.decode", "data.prefetch", "data.max_bad_fraction", "data.cache_vision",
    "data.cache_frames", "data.video_decoder", "model.path", "model.network_path", "model.vae_path", "model.attention",
    "model.gradient_checkpointing", "model.compile",
}  # fmt: skip
"""Settings that say where, how fast or how long, not what is learned. Rows, their order and the weights are checked by content,
and rows a step when the number of processes is known."""


def require_same_experiment(checkpoint: Path, config: ExperimentConfig) -> list[str]:
    """Refuse to continue another experiment; returns what the user should know of changes that are allowed.

    Raises:
        ConfigError: every setting that differs from the checkpoint's and decides what is learned; or the run is longer already.
    """
    before: Mapping[str, Any] = read_checkpoint(checkpoint, "experiment")["config"]
    now = config.model_dump(mode="json")
    problems = [
        f"{key}: {old!r} when {checkpoint} was saved and {new!r} now; keep it, or start a new run with another run.name"
        for key, old, new in _changes(before, now)
    ]
    step = int(checkpoint.name.rpartition("-")[2])
    if config.optim.steps < step:
        problems.append(f"optim.steps: the run is at step {step} already; set at least {step}, or start a new run")
    if problems:
        raise ConfigError(problems)
    notes = []
    for key in ("model.path", "optim.steps"):
        section, _, leaf = key.partition(".")
        old, new = before[section].get(leaf), now[section][leaf]
        if old != new and (key != "optim.steps" or config.optim.schedule != "constant"):
            notes.append(f"{key} was {old!r} when {checkpoint} was saved and is {new!r} now; the run continues with {new!r}")
    return notes


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value then, value now) of settings that must not differ; keys that another version lacked are passed over."""
    for name, new in now.items():
        key = f"{at}{name}"
        if key in MAY_CHANGE or name not in before or before[name] == new:
            continue
        old = before[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("name") == new.get("name"):
            yield from _changes(old, new, f"{key}.")
        elif isinstance(old, Mapping) and isinstance(new, Mapping) and "name" in old:
            yield f"{key}.name", old["name"], new["name"]
        else:
            yield key, old, new
