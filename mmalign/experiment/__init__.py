"""Experiments: files to settings, settings to parts, parts to a run folder. The public functions, resolved lazily."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "ExperimentConfig": "settings",
    "load_experiment": "settings",
    "schema": "settings",
    "explain": "settings",
    "check": "describe",
    "train": "running",
    "run": "running",
    "RunResult": "running",
    "open_run": "opening",
    "OpenRun": "opening",
    "fill_caches": "caching",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mmalign.experiment' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mmalign.experiment.{_WHERE[name]}"), name)
