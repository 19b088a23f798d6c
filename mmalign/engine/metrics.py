"""Metrics: summed on the device, reduced across processes when written, one JSON line per logged step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Tracker(Protocol):
    """Anything that takes named numbers at a step (TensorBoard, W&B)."""

    def log(self, values: dict[str, float], step: int) -> None: ...


class WindowMeans:
    """Weighted means since the last line, without waiting for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add values that are means over `weight` rows."""
        for name, value in values.items():
            part, amount = value.detach().float() * weight, weight.detach().float()
            self.sums[name] = self.sums[name] + part if name in self.sums else part
            self.weights[name] = self.weights[name] + amount if name in self.weights else amount

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes, as numbers, of what any row counted for; empties the window."""
        names = list(self.sums)
        if not names:
            return {}
        both = torch.stack([torch.stack([self.sums[name], self.weights[name]]) for name in names])
        both = accelerator.reduce(both, "sum").cpu()
        self.sums, self.weights = {}, {}
        return {name: float(row[0] / row[1]) for name, row in zip(names, both, strict=True) if row[1] != 0}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.weights = {name: value.to(device) for name, value in state["weights"].items()}


class MetricsFile:
    """``metrics.jsonl``: appended to, one complete line at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, values: Mapping[str, float]) -> None:
        """Write one line. A value that is not finite is written as null: strict readers refuse NaN."""
        safe = {name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a") as handle:
            handle.write(json.dumps(safe) + "\n")

    def cut_after(self, step: int) -> None:
        """Drop lines later than `step`, which a resumed run writes again, and a last line that was cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                continue
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, self.path)
