"""Runs that must agree: killed and resumed, split over processes, cached or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmalign.cli.application import app
from tests.forks import kill_when, start

from .conftest import (
    CONFIG,
    ROOT,
    command,
    logged,
    metric_lines,
    quiet_environment,
    settings,
    state_files,
    train_elsewhere,
)

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def straight(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("straight") / "run")


def test_a_run_killed_at_any_moment_and_resumed_equals_the_straight_run(
    straight: Path, train: Train, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    wanted = [1, 4]  # SIGKILL soon after these steps were logged: before and after the first checkpoints
    for attempt, step in enumerate(wanted):
        process = start(train_elsewhere, CONFIG, settings(pairs, out), attempt > 0)
        assert kill_when(process, lambda step=step: logged(out) >= step), "it had ended before it was killed"
    train(out, resume=True)
    assert state_files(out, 6) == state_files(straight, 6)
    assert metric_lines(out) == metric_lines(straight)


def test_every_checkpoint_leads_to_the_same_end(straight: Path, train: Train, tmp_path: Path) -> None:
    import shutil

    for step in (2, 4):
        out = tmp_path / f"from-{step}"
        shutil.copytree(straight, out)
        for later in (out / "checkpoints").iterdir():
            if int(later.name[5:]) > step:
                shutil.rmtree(later)
        train(out, resume=True)
        assert state_files(out, 6) == state_files(straight, 6)
        assert metric_lines(out) == metric_lines(straight)


def test_sigterm_saves_a_checkpoint_and_exits_130(straight: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", CONFIG, *settings(pairs, out, optim__steps=400, run__save_every=1000)]
    process = subprocess.Popen(command(*arguments), env=quiet_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()[-2000:]
    saved = list((out / "checkpoints").iterdir())
    assert len(saved) == 1
    assert (saved[0] / "policy.safetensors").exists()
    logged = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert int(saved[0].name[5:]) == logged[-1]


def test_two_processes_equal_one_that_accumulates(train: Train, pairs: Path, tmp_path: Path) -> None:
    one = train(tmp_path / "one", optim__steps=3, optim__accumulate=2, run__save_every=3)
    two = tmp_path / "two"
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu2.yaml"),
        "--main_process_port", str(20000 + os.getpid() % 20000),
        str(ROOT / "scripts" / "train_diffusion_dpo.py"), "--config", CONFIG,
        *settings(pairs, two, optim__steps=3, run__save_every=3),
    ]  # fmt: skip
    done = subprocess.run(launch, capture_output=True, text=True, env=quiet_environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(run / "checkpoints/step-00000003/policy.safetensors") for run in (one, two))
    start = load_file(
        train(tmp_path / "start", optim__steps=1, optim__lr=0.0, run__save_every=1)
        / "checkpoints/step-00000001/policy.safetensors"
    )
    assert first.keys() == second.keys()
    moved = max((first[name] - start[name]).abs().max().item() for name in first)
    apart = max((first[name] - second[name]).abs().max().item() for name in first)
    assert moved > 1e-5
    assert apart < 1e-6, f"{apart} apart after moving {moved}"
    for left, right in zip(metric_lines(one), metric_lines(two), strict=True):
        for name in ("loss", "accuracy", "margin"):
            assert left[name] == pytest.approx(right[name], rel=1e-5, abs=1e-7), name


def test_cached_inputs_equal_uncached_ones(train: Train, tmp_path: Path) -> None:
    """The VAE rounds differently at another batch size, and Adam turns the sign of a gradient that is nothing but rounding
    into a full step. Its eps is raised here so that what is compared are the inputs and not that."""
    cached, uncached = (train(tmp_path / cache, data__cache=cache, optim__eps=1e-3) for cache in ("auto", "off"))
    for left, right in zip(metric_lines(cached), metric_lines(uncached), strict=True):
        for name in ("loss", "margin", "policy_chosen", "policy_rejected"):
            assert left[name] == pytest.approx(right[name], abs=1e-5, rel=0), name


def test_the_reference_is_the_start_and_every_trainable_tensor_moves(
    straight: Path, train: Train, tmp_path: Path
) -> None:
    start = load_file(
        train(tmp_path / "start", optim__steps=1, optim__lr=0.0, run__save_every=1)
        / "checkpoints/step-00000001/policy.safetensors"
    )
    end = load_file(straight / "checkpoints/step-00000006/policy.safetensors")
    still = [name for name in end if torch.equal(start[name], end[name])]
    assert not still
    first = metric_lines(straight)[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["accuracy"] == 0.5


def test_an_existing_run_is_not_continued_in_silence(straight: Path, pairs: Path) -> None:
    done = CliRunner().invoke(app, ["train", CONFIG, *settings(pairs, straight)])
    assert done.exit_code == 2
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
