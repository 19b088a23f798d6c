"""TensorBoard and Weights & Biases through accelerate, and the progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmalign.errors import MissingExtraError
from mmalign.experiment.settings import ExperimentConfig

PACKAGES = {"tensorboard": ("tensorboard", "track"), "wandb": ("wandb", "track")}


def require_trackers(config: ExperimentConfig) -> None:
    """Refuse a tracker whose library is missing, before anything is loaded."""
    import importlib.util

    for name in config.run.trackers:
        library, extra = PACKAGES[name]
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, extra, f"run.trackers: {name}")


class AccelerateTracker:
    """Sends a logged line to every configured tracker."""

    def __init__(self, accelerator: Any, config: ExperimentConfig) -> None:
        self.accelerator = accelerator
        flat = {key: json.dumps(value) for key, value in _flatten(config.model_dump(mode="json")).items()}
        accelerator.init_trackers(
            "mmalign", config=flat, init_kwargs={"wandb": {"name": config.run.name, "dir": str(config.folder)}}
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

LOG_WIDTH = 120
"""Columns that a line of the bar needs at most."""


class Bar:
    """A rich progress bar: done, rate, time left, and the newest loss and accuracy."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.unit = unit
        console = Console(stderr=True)
        if not console.is_terminal:  # a log: nothing says how wide it is, and a cut-off number is worse than a long line
            console.width = LOG_WIDTH
        elif console.width < LOG_WIDTH:
            title = title.split()[-1]
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(max(4, min(40, console.width - 80))), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"), console=console,
        )  # fmt: skip
        self.task = self.progress.add_task(title, total=total, completed=done, rate="", note="")

    def advance(self, number: int = 1, note: str = "") -> None:
        """Count `number` more as done."""
        self.progress.advance(self.task, number)
        speed = self.progress.tasks[0].speed
        self.progress.update(self.task, rate=f"{speed:.1f} {self.unit}/s" if speed else "", note=note)


@contextmanager
def bar(title: str, total: int, unit: str, *, done: int = 0, show: bool = True) -> Iterator[Bar]:
    """A bar that is on screen inside the block; with show=False it counts in silence (other processes)."""
    made = Bar(title, total, unit, done)
    if not show:
        made.progress.disable = True
    with made.progress:
        yield made


def note_of(metrics: Mapping[str, float]) -> str:
    """The newest numbers worth watching, for the bar."""
    parts = [f"{name} {metrics[name]:.3f}" for name in ("loss", "accuracy") if name in metrics]
    return ", ".join(parts)
