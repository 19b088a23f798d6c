"""Bad rows of answers at every batch size and on one or two processes: loss and gradient are those of the sound rows alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmalign.data.order import Order
from mmalign.data.vlm import open_vlm
from mmalign.experiment import load_experiment
from mmalign.experiment.assembly import assemble
from mmalign.experiment.running import train_experiment
from mmalign.experiment.vlm_inputs import prepare_vlm
from mmalign.types import StepContext
from tests.fixtures import tiny_vlm
from tests.fixtures.vlm_runs import write_experiment, write_table
from tests.forks import launched

from .conftest import metric_lines
from .test_hostile_rows import gradients

CASES = ((1, 1, 1), (1, 5, 1), (2, 2, 2))
"""Processes, batch size of each, and micro-batches of a step; with MMALIGN_CROSS=all every one with every other."""
if os.environ.get("MMALIGN_CROSS") == "all":
    CASES = tuple((world, batch, micro) for world in (1, 2) for batch in (1, 2, 5) for micro in (1, 2) if batch * micro < 6)
ROWS = 13
REFUSED = {"r3": "missing_image", "r10": "non_finite_score"}
"""Found before the first step even where no picture is decoded."""
MASKED = {"r7": "undecodable_media", "r11": "undecodable_media"}
"""A picture cut short, and a web page under a picture's name."""
SOUND = [row for row in range(ROWS) if f"r{row}" not in REFUSED]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Experiments on the hostile table and on the clean one."""
    root = tmp_path_factory.mktemp("answers")
    model = tiny_vlm.build("qwen2_5_vl", root / "model")
    made = []
    for name in ("hostile", "clean"):
        (root / name).mkdir()
        table = write_table(root / name, number=ROWS)
        sections: dict[str, Any] = {
            "method": {"objective": "simpo", "gamma": 0.5}, "data": {"check": "off", "workers": 2, "max_bad_fraction": 0.5},
            "optim": {"lr": 0.0, "max_grad_norm": 0.0},
        }  # fmt: skip
        made.append(write_experiment(root / name, model, table, **sections))
    pictures = root / "hostile" / "pictures"
    (pictures / "3.png").unlink()
    (pictures / "7.png").write_bytes((pictures / "7.png").read_bytes()[:-30])
    (pictures / "11.png").write_bytes(b"<!DOCTYPE html>")
    table = root / "hostile" / "pairs.jsonl"
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    lines[10]["p_chosen"] = float("nan")
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made[0], made[1]


def run_cases(file: str, out: str, world: int) -> None:
    rank = int(os.environ.get("RANK", "0"))
    for batch, accumulate in [case[1:] for case in CASES if case[0] == world]:
        folder = Path(out) / f"{world}-{batch}-{accumulate}"
        steps = -(-len(SOUND) // (world * batch * accumulate))
        settings = [f"run.out={folder}", f"optim.batch_size={batch}", f"optim.accumulate={accumulate}", f"optim.steps={steps}"]
        with gradients() as found:
            train_experiment(load_experiment(file, settings), page=False, evaluate=False)
        for number, state in enumerate(found):
            save_file(state, folder / f"gradient-{rank}-{number}.safetensors")


@pytest.fixture(scope="module")
def runs(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_cases(str(files[0]), str(out), 1)
    launched(2, run_cases, str(files[0]), str(out), 2)
    return out


def reference(files: tuple[Path, Path], size: int) -> Iterator[tuple[list[str], Any]]:
    """For every step: ids, and loss and gradients of its sound rows, read from the clean table as one batch."""
    from accelerate import Accelerator

    config = load_experiment(files[1]).config
    parts = assemble(config, torch.device("cpu"))
    loader = prepare_vlm(config, parts, Accelerator(cpu=True)).loader
    hostile = open_vlm(load_experiment(files[0]).config.data.manifest)
    order = Order(table_fingerprint=hostile.fingerprint, rows=np.array(SOUND), seed=config.run.seed, global_batch=size)
    tensors = [value for value in parts.policy.parameters() if value.requires_grad]
    for step in range(-(-len(SOUND) // size)):
        rows = [slot.row for slot in order.batch(step)]
        sound = [row for row in rows if f"r{row}" not in MASKED]
        found = None
        if sound:
            batch = loader.collate([loader.encode(loader.table.record(row), None) for row in sound])  # type: ignore[union-attr]
            out = parts.trainer.training_step(batch, StepContext(step=step, seed=config.run.seed, device=torch.device("cpu")))
            found = (float(out.loss.detach()), torch.autograd.grad(out.loss, tensors, allow_unused=True))
        yield [f"r{row}" for row in rows], found


@pytest.mark.parametrize(("world", "batch", "accumulate"), CASES)
def test_bad_rows_count_nowhere(runs: Path, files: tuple[Path, Path], world: int, batch: int, accumulate: int) -> None:
    folder, moved, on_rank = runs / f"{world}-{batch}-{accumulate}", 0, set()
    for line, (ids, expected) in zip(metric_lines(folder), reference(files, world * batch * accumulate), strict=True):
        on_rank |= {place // batch % world for place, name in enumerate(ids) if name in MASKED}
        if expected is None:
            assert "loss" not in line
            continue
        loss, gradient = expected
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        largest = max(float(value.abs().max()) for value in gradient if value is not None)
        assert largest > 1e-6
        for rank in range(world):
            found = load_file(folder / f"gradient-{rank}-{moved}.safetensors")
            for number, value in enumerate(gradient):
                if value is not None:
                    assert (found[str(number)] - value).abs().max() < 2e-5 * largest
        moved += 1
    assert not (folder / f"gradient-0-{moved}.safetensors").exists()
    listed = {row["id"]: row["reason"] for row in map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())}
    assert listed == {**REFUSED, **MASKED}
    if world == 2:
        assert 1 in on_rank


__all__ = ["run_cases"]
