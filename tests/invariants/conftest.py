"""Small real runs: the embedded model, 24 pairs of rendered pictures, the public commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.world.shapes import Style, render, sample_scene

ROOT = Path(__file__).resolve().parents[2]
TIMING = {"seconds", "samples_per_second", "data_wait_fraction"}


def write_pairs(folder: Path, number: int = 24) -> Path:
    """A JSONL manifest beside PNG files: vivid pictures preferred to pale ones."""
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(number):
        scene = sample_scene(rng)
        for side, saturation in (("chosen", 1.0), ("rejected", 0.55)):
            Image.fromarray(render(scene, rng, Style(saturation=saturation))).save(folder / f"{index}-{side}.png")
        sides = {side: f"{index}-{side}.png" for side in ("chosen", "rejected")}
        lines.append(json.dumps({"id": f"row-{index}", "prompt": scene.caption, **sides}))
    manifest = folder / "pairs.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mmalign", *arguments]


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def settings(pairs: Path, out: Path, **more: object) -> list[str]:
    """Overrides of the tiny experiment that make a run of a few steps without evaluation."""
    values: dict[str, object] = {
        "data.manifest": pairs, "run.out": out, "optim.steps": 6, "optim.batch_size": 2, "optim.accumulate": 1,
        "optim.warmup_steps": 2, "optim.ema_decay": 0.9, "run.log_every": 1, "run.save_every": 2,
        "run.keep_checkpoints": 0, "evaluate.every": 0, "data.max_bad_fraction": 0.5,
        "evaluate.rewards": "[]", "evaluate.holdout": "[]", "evaluate.prompts": "null",
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in values.items()]


CONFIG = str(ROOT / "configs" / "tiny" / "diffusion_dpo.yaml")


@pytest.fixture(scope="session")
def train(pairs: Path) -> Callable[..., Path]:
    """Train in this process; returns the run folder."""
    from mmalign.experiment import train as run

    def start(out: Path, resume: bool = False, config: str = CONFIG, **more: object) -> Path:
        run(config, settings(more.pop("pairs", pairs), out, **more), resume=resume)  # type: ignore[arg-type]
        return out

    return start


def state_files(run: Path, step: int) -> dict[str, bytes]:
    """Every file of a checkpoint that does not hold clock readings or the run's own path."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    names = ("policy", "optimizer", "average")
    return {
        f"{name}{suffix}": (folder / f"{name}{suffix}").read_bytes() for name in names for suffix in (".json", ".safetensors")
    }


def train_elsewhere(config: str, overrides: list[str], resume: bool = False) -> None:
    """What a process that is to be killed does."""
    from mmalign.experiment import train as run

    run(config, overrides, resume=resume)


def logged(run: Path) -> int:
    """Steps that a run has logged so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metric_lines(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]
