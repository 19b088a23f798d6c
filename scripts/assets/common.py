"""What the asset recipes share: determinism, where results go, a schedule, and the card beside every artefact."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.world.shapes import Scene, Style, render, sample_scene, sample_style

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"


def deterministic(seed: int) -> None:
    """One thread and fixed seeds: the same processor and library versions give the same files again."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


def draw_renders(number: int, seed: int) -> tuple[np.ndarray, list[Scene], list[Style]]:
    """Pictures of random training scenes in random styles: uint8 ``[N, 32, 32, 3]``."""
    rng = np.random.default_rng(seed)
    scenes, styles, pictures = [], [], np.empty((number, 32, 32, 3), np.uint8)
    for index in range(number):
        scenes.append(sample_scene(rng))
        styles.append(sample_style(rng))
        pictures[index] = render(scenes[-1], rng, styles[-1])
    return pictures, scenes, styles


def to_signed(pictures: np.ndarray) -> torch.Tensor:
    """uint8 ``[N, H, W, 3]`` to float32 ``[N, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def rate_factor(step: int, *, steps: int, warmup: int, flat: float = 0.0) -> float:
    """Linear warm-up, flat until the share `flat` of all steps, then linear to zero."""
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, flat * steps)
    return 1.0 if step < start else max(0.0, (steps - step) / max(1.0, steps - start))


def save_module(module: Any, folder: Path) -> None:
    """Save in half precision under the ordinary file names; `from_pretrained` reads it as float32."""
    module.half().save_pretrained(folder, safe_serialization=True)
    module.float()


def forget_paths(folder: Path) -> None:
    """Take out of all configurations where their parts were loaded from: a path of this machine."""
    for path in sorted(folder.rglob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(kept, dict) and kept.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_card(path: Path, *, recipe: str, seed: int, seconds: float, metrics: dict[str, Any], notes: str = "") -> None:
    """Record how an artefact was made. The commit is the newest one that touched recipe or package."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    card = {
        "recipe": recipe,
        "seed": seed,
        "commit": git("rev-parse", "HEAD") or "unknown",
        "metrics": metrics,
        "seconds_one_thread": round(seconds),
        "made": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "notes": notes,
        "licence": "Apache-2.0; trained from scratch on synthetic pictures",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(card, indent=2) + "\n")


class Progress:
    """A line every `every` steps: step, rate, remaining time, smoothed loss."""

    def __init__(self, steps: int, every: int = 250) -> None:
        self.steps, self.every, self.start, self.mean = steps, every, time.monotonic(), None

    def __call__(self, step: int, loss: torch.Tensor) -> None:
        value = float(loss.detach())
        self.mean = value if self.mean is None else 0.98 * self.mean + 0.02 * value
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            spent = time.monotonic() - self.start
            left = spent / (step + 1) * (self.steps - step - 1)
            print(f"step {step + 1}/{self.steps} loss {self.mean:.5f} {spent:.0f} s, {left:.0f} s left", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start
