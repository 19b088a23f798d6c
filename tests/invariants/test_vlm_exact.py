"""Runs on answers that must agree: killed and resumed, one process that accumulates and two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmalign.experiment import train as run_training
from tests.fixtures import tiny_vlm
from tests.fixtures.vlm_runs import write_experiment, write_table
from tests.forks import kill_when, launched, start

from .conftest import logged, metric_lines, train_elsewhere


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm-exact")
    model = tiny_vlm.build("qwen2_5_vl", folder / "model")
    return write_experiment(folder, model, write_table(folder), optim={"steps": 8, "schedule": "cosine", "warmup_steps": 2})


def policy(run: Path, step: int) -> bytes:
    return (run / f"checkpoints/step-{step:08d}/policy.safetensors").read_bytes()


def test_a_run_killed_and_resumed_equals_the_straight_run(file: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_training(file, [f"run.out={straight}"])
    process = start(train_elsewhere, str(file), [f"run.out={killed}"])
    assert kill_when(process, lambda: logged(killed) >= 3)
    assert not (killed / "summary.json").exists(), "it had ended before it was killed"
    run_training(file, [f"run.out={killed}"], resume=True)
    assert policy(killed, 8) == policy(straight, 8)
    assert metric_lines(killed) == metric_lines(straight)


def test_two_processes_equal_one_that_accumulates(file: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_training(file, [f"run.out={one}", "optim.steps=3", "optim.accumulate=2"])
    launched(2, run_training, str(file), [f"run.out={two}", "optim.steps=3"])
    first, second = (load_file(run / "checkpoints/step-00000003/policy.safetensors") for run in (one, two))
    apart = max((first[name] - second[name]).abs().max().item() for name in first)
    moved = max(value.abs().max().item() for name, value in first.items() if "lora_B" in name)
    assert moved > 1e-4
    assert apart < 1e-6, f"{apart} apart after moving {moved}"
    for left, right in zip(metric_lines(one), metric_lines(two), strict=True):
        for name in ("loss", "accuracy", "margin"):
            assert left[name] == pytest.approx(right[name], rel=1e-5, abs=1e-6), name
    assert torch.isfinite(torch.tensor(metric_lines(two)[-1]["loss"]))
