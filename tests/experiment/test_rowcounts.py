"""What became of the rows is said at the start and after every epoch, kept in checkpoints, and the same after a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.data import check_table
from mmalign.data.pair_loader import MaskedRow
from mmalign.engine.checkpoint import read_checkpoint
from mmalign.experiment import rowcounts
from tests.invariants.conftest import write_pairs


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs: one repeated, one of a picture cut short, one of a picture that another took the place of after the check."""
    path = write_pairs(tmp_path_factory.mktemp("counted"), 8)
    lines = path.read_text().splitlines()
    repeated = json.loads(lines[0]) | {"id": "again"}
    cut = path.with_name("5-chosen.png")
    cut.write_bytes(cut.read_bytes()[:-40])
    path.write_text("\n".join([*lines, json.dumps(repeated)]) + "\n")
    check_table(path, max_bad_fraction=0.5, progress=False)
    shutil.copyfile(path.with_name("2-chosen.png"), path.with_name("3-chosen.png"))
    return path


def test_counts_are_printed_and_survive_a_resume(
    table: Path, tmp_path: Path, train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "pairs": table, "data__cache": "off", "data__check": "required", "run__log_every": 7, "optim__steps": 7,
        "run__save_every": 4,
    }  # fmt: skip
    whole = train(tmp_path / "whole", **settings)
    said = [line for line in capsys.readouterr().out.splitlines() if "rows used" in line]
    fixed = "7 of 9 rows used; 1 truncated_image quarantined, 1 duplicate dropped"
    assert said[0] == f"data: {fixed}"
    assert said[1:] == [f"epoch 1: {fixed}; masked while training: 1 changed_image"]  # the second says nothing new
    state = read_checkpoint(whole / "checkpoints" / "step-00000007", rowcounts.PART)
    assert state["reasons"] == {"truncated_image": 1, "duplicate": 1} and state["used"] == 7
    masked = [MaskedRow(**row) for row in state["masked"]]
    assert [row.id for row in masked] == ["row-3", "row-3"] and masked[0].step < masked[1].step < 7

    # A run that is killed after its first checkpoint knows what came before when it goes on.
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-00000007")
    train(again, resume=True, **settings)
    assert read_checkpoint(again / "checkpoints" / "step-00000007", rowcounts.PART) == state
    assert (again / "quarantine.jsonl").read_text() == (whole / "quarantine.jsonl").read_text()
    refused = [json.loads(line)["reason"] for line in (whole / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(refused) == ["changed_image", "changed_image", "duplicate", "truncated_image"]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["samples_quarantined"] == 3
