"""Bad rows at every batch size and on one or two processes: loss and gradient are those of the sound rows in one process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mmalign.data import CheckPolicy, check_table, open_table, usable_rows
from mmalign.data.order import Order, Slot
from mmalign.data.pair_loader import MAX_MASKED, PairLoader
from mmalign.engine.checkpoint import read_checkpoint
from mmalign.errors import DataError
from mmalign.experiment import load_experiment, rowcounts
from mmalign.experiment.assembly import assemble
from mmalign.experiment.running import train_experiment
from mmalign.types import StepContext
from tests.forks import launched

from .conftest import CONFIG, metric_lines, settings, write_pairs

CASES = ((1, 1), (2, 2), (5, 1))
"""Batch size of a process, and micro-batches of a step."""
SOUND = 13
"""Rows that pass the check: never a whole number of steps of more than one row."""
MASKED = {"row-3": "missing_image", "row-8": "changed_image", "row-11": "changed_image"}
"""Rows that pass the check and cannot be read any more when the run comes to them."""
LOST = MAX_MASKED + 2
REFUSED = {"truncated_image": 1, "missing_image": 1, "label_out_of_range": 1, "empty_prompt": 1}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The same rows twice: with what happened to them before the check and after it, and as they were; and a table of which
    half the rows lose a picture after the check."""
    clean = write_pairs(tmp_path_factory.mktemp("clean"), SOUND)
    hostile = write_pairs(tmp_path_factory.mktemp("hostile"), SOUND + 4)
    lines = [json.loads(line) for line in hostile.read_text().splitlines()]
    folder = hostile.parent
    cut(folder / lines[13]["rejected"])
    (folder / lines[14]["chosen"]).unlink()
    lines[15]["p_chosen"] = float("nan")
    lines[16]["prompt"] = " "
    # A defect at the beginning, in the middle and at the end: places of rows must not depend on what is left out.
    placed = [lines[13], *lines[:6], lines[14], lines[15], *lines[6:13], lines[16]]
    hostile.write_text("".join(json.dumps(line) + "\n" for line in placed))
    check_table(hostile, max_bad_fraction=0.5, progress=False)
    (folder / "3-chosen.png").unlink()
    shutil.copyfile(folder / "2-rejected.png", folder / "8-rejected.png")
    cut(folder / "11-chosen.png")
    lost = write_pairs(tmp_path_factory.mktemp("lost"), 2 * LOST)
    check_table(lost, progress=False)
    for number in range(LOST):
        (lost.parent / f"{2 * number}-chosen.png").unlink()
    return hostile, clean, lost


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def overrides(table: str, out: Path, batch: int, accumulate: int, steps: int) -> list[str]:
    return settings(
        Path(table), out, data__cache="off", data__check="required", optim__batch_size=batch, optim__accumulate=accumulate,
        optim__steps=steps, optim__lr=0.0, optim__warmup_steps=0, optim__ema_decay=0.0, optim__max_grad_norm=0.0,
        run__save_every=1000, method="{name: mapo}", reference="null", tuning="{name: lora, rank: 2}",
    )  # fmt: skip


def steps_of(size: int) -> int:
    """Steps of global batches of `size` until every row was seen; the last of them goes into the next epoch."""
    return -(-SOUND // size)


@contextmanager
def gradients() -> Iterator[list[dict[str, Tensor]]]:
    """What optimisers are given at each step, while the block runs."""
    found: list[dict[str, Tensor]] = []

    def look(optimizer: Any, *_: Any) -> None:
        tensors = [value for group in optimizer.param_groups for value in group["params"]]
        found.append({str(number): value.grad.detach().clone() for number, value in enumerate(tensors)})

    hook = register_optimizer_step_pre_hook(look)
    try:
        yield found
    finally:
        hook.remove()


def run_cases(table: str, lost: str, out: str, world: int) -> None:
    """All cases on one process of `world`; keeps the gradients of every step. Then a run on a table whose files go missing."""
    rank = int(os.environ.get("RANK", "0"))
    defaults = PairLoader.__init__.__kwdefaults__
    assert defaults is not None
    before = dict(defaults)
    defaults["retry_seconds"] = (0.01,)  # or every case would wait seconds for the file that is gone
    try:
        for batch, accumulate in CASES:
            folder = Path(out) / f"{world}-{batch}-{accumulate}"
            steps = steps_of(world * batch * accumulate)
            experiment = load_experiment(CONFIG, overrides(table, folder, batch, accumulate, steps))
            with gradients() as found:
                train_experiment(experiment, page=False, evaluate=False)
            for number, state in enumerate(found):
                save_file(state, folder / f"gradient-{rank}-{number}.safetensors")
        folder = Path(out) / f"{world}-lost"
        with pytest.raises(DataError) as raised:
            train_experiment(load_experiment(CONFIG, overrides(lost, folder, 4 // world, 1, 20)), page=False, evaluate=False)
        (Path(out) / f"stopped-{world}-{rank}.txt").write_text(str(raised.value))
    finally:
        defaults.update(before)


@pytest.fixture(scope="module", params=[1, 2])
def runs(
    request: pytest.FixtureRequest, tables: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    out, world = tmp_path_factory.mktemp("runs"), int(request.param)
    if world == 1:
        run_cases(str(tables[0]), str(tables[2]), str(out), 1)
        return world, out
    launched(world, run_cases, str(tables[0]), str(tables[2]), str(out), world)
    return world, out


def reference(tables: tuple[Path, Path, Path], size: int, tmp_path: Path) -> Iterator[tuple[list[str], list[int], Any]]:
    """For every step of global batches of `size`: ids of the sound rows, places of the masked ones, and what the sound rows of
    the clean table give in one go: (loss, gradients), or None where there is none."""
    hostile, clean = open_table(tables[0]), open_table(tables[1])
    config = load_experiment(CONFIG, overrides(str(tables[1]), tmp_path / "none", 1, 1, 1)).config
    parts = assemble(config, torch.device("cpu"))
    usable = usable_rows(hostile, check="required", policy=CheckPolicy(max_bad_fraction=0.5), progress=False).rows
    order = Order(table_fingerprint=hostile.fingerprint, rows=usable, seed=config.run.seed, global_batch=size)
    places = {str(clean.value(row, "id")): row for row in range(len(clean))}
    reader = PairLoader(clean, range(SOUND), batch_size=1, seed=config.run.seed, resolution=(32, 32), workers=0)
    tensors = [value for value in parts.policy.parameters() if value.requires_grad]
    for step in range(steps_of(size)):
        slots = order.batch(step)
        ids = [str(hostile.value(slot.row, "id")) for slot in slots]
        sound = [number for number, name in enumerate(ids) if name not in MASKED]
        found = None
        if sound:
            batch = reader.read([Slot(row=places[ids[number]], epoch=slots[number].epoch) for number in sound], step)
            out = parts.trainer.training_step(batch, StepContext(step=step, seed=config.run.seed, device=torch.device("cpu")))
            gradient = torch.autograd.grad(out.loss, tensors)
            found = (float(out.loss.detach()), gradient)
        yield ids, [number for number in range(size) if number not in sound], found


@pytest.mark.parametrize(("batch", "accumulate"), CASES)
def test_bad_rows_count_nowhere(
    runs: tuple[int, Path], tables: tuple[Path, Path, Path], batch: int, accumulate: int, tmp_path: Path
) -> None:
    world, out = runs
    folder, size = out / f"{world}-{batch}-{accumulate}", world * batch * accumulate
    lines, moved, seen, on_rank = metric_lines(folder), 0, [], set()
    for line, (ids, masked, expected) in zip(lines, reference(tables, size, tmp_path), strict=True):
        seen += ids
        on_rank |= {place // batch % world for place in masked}
        if expected is None:
            assert "loss" not in line, "no row of the step could be read: nothing moves, and there is no loss"
            continue
        loss, gradient = expected
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        largest = max(float(value.abs().max()) for value in gradient)
        assert largest > 1e-6
        for rank in range(world):
            found = load_file(folder / f"gradient-{rank}-{moved}.safetensors")
            for number, value in enumerate(gradient):
                assert (found[str(number)] - value).abs().max() < 2e-5 * largest
        moved += 1
    assert not (folder / f"gradient-0-{moved}.safetensors").exists()
    assert sorted(seen[:SOUND]) == sorted(f"row-{number}" for number in range(SOUND)), "each row once, none doubled or lost"
    if world == 2:
        assert 1 in on_rank, "a masked row fell to the second process"
    counted(folder)


def test_too_many_lost_rows_stop_every_process_at_the_same_step(runs: tuple[int, Path]) -> None:
    world, out = runs
    said = [(out / f"stopped-{world}-{rank}.txt").read_text() for rank in range(world)]
    assert len(set(said)) == 1
    listed = [line for line in said[0].splitlines() if "chosen: missing_image" in line]
    assert MAX_MASKED < len(listed) <= LOST and f"(limit {MAX_MASKED})" in said[0]
    if world == 2:
        assert "step " in said[0] and "--resume" in said[0]


def counted(folder: Path) -> None:
    """What became of the rows, the same for every case: in the checkpoint, the summary and the list."""
    (checkpoint,) = (folder / "checkpoints").iterdir()
    state = read_checkpoint(checkpoint, rowcounts.PART)
    assert state["reasons"] == REFUSED and state["used"] == SOUND
    masked = {row["id"]: row["reason"] for row in state["masked"]}
    assert masked == MASKED
    listed = [json.loads(line)["reason"] for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(set(listed)) == sorted({*REFUSED, *MASKED.values()})
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["samples_quarantined"] == sum(REFUSED.values()) + len(state["masked"]) == len(listed)


__all__ = ["run_cases"]
