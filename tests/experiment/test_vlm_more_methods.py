"""Lists, triples and conversations through the public commands: what their tables hold, and what is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmalign.errors import ConfigError, DataError
from mmalign.experiment import train as run_training
from tests.fixtures import tiny_vlm
from tests.fixtures.vlm_runs import turn, write_experiment, write_table
from tests.invariants.conftest import metric_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("more")
    tiny_vlm.build("llava", folder / "llava")
    for kind in ("pairs", "lists"):
        write_table(folder, kind)
    return folder


def changed(world: Path, name: str, change: Any) -> Path:
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= change(number, row)
    (world / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world / name


def run(world: Path, out: Path, table: Path, *overrides: str, **sections: dict[str, Any]) -> Path:
    run_training(write_experiment(out, world / "llava", table, **sections), list(overrides))
    return out / "run"


def test_lists_are_learnt(world: Path, tmp_path: Path) -> None:
    lines = metric_lines(run(world, tmp_path, world / "lists.jsonl", "optim.steps=8", method={"name": "vlm_list", "beta": 5.0}))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and lines[0]["list_accuracy"] == 0.5
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01 and lines[-1]["list_accuracy"] > 0.6


def test_lists_with_stored_references_equal_those_asked(world: Path, tmp_path: Path) -> None:
    found = [
        metric_lines(run(world, tmp_path / name, world / "lists.jsonl", f"data.cache={tmp_path / 'cache'}",
                         method={"name": "vlm_list", "beta": 5.0}, reference={"name": name}))
        for name in ("adapter_off", "precomputed")
        if (tmp_path / name).mkdir() is None
    ]  # fmt: skip
    for live, stored in zip(*found, strict=True):
        assert stored["loss"] == pytest.approx(live["loss"], rel=1e-5)


def test_triples_read_the_gold_answer_and_rows_without_one_are_left_out(world: Path, tmp_path: Path) -> None:
    def gold(number: int, row: dict[str, Any]) -> dict[str, Any]:
        return {"reference": [None, "a gold star", turn("assistant", "two stars")][min(number, 2)]}

    out = run(world, tmp_path, changed(world, "triples.jsonl", gold), "optim.steps=6", method={"name": "vlm_tpo", "beta": 0.5},
              data={"max_bad_fraction": 0.0})  # fmt: skip
    lines = metric_lines(out)
    assert lines[-1]["gold_nll"] < lines[0]["gold_nll"]
    assert json.loads((out / "summary.json").read_text())["samples_dropped"] == {"no_reference": 1}


def test_a_table_without_gold_answers_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row|none"):
        run(world, tmp_path, world / "pairs.jsonl", method={"name": "vlm_tpo"})


def test_conversations_have_prompts_of_their_own(world: Path, tmp_path: Path) -> None:
    def other(number: int, row: dict[str, Any]) -> dict[str, Any]:
        return {"rejected_prompt": turn("user", "Is there a star?", len(row["images"]))}

    table = changed(world, "joint.jsonl", other)
    lines = metric_lines(run(world, tmp_path, table, "optim.steps=6", method={"name": "vlm_dove"}))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and lines[-1]["loss"] < 0.69
    assert lines[0]["chosen_length"] > metric_lines(
        run(world, tmp_path / "dpo", table) if (tmp_path / "dpo").mkdir() is None else Path()
    )[0]["chosen_length"]  # fmt: skip


def test_a_prompt_with_other_media_is_a_defect(world: Path, tmp_path: Path) -> None:
    table = changed(world, "wrong.jsonl", lambda number, row: {"rejected_prompt": turn("user", "Which?", 3)})
    with pytest.raises(DataError, match="placeholder_count_mismatch"):
        run(world, tmp_path, table, method={"name": "vlm_dove"})


def test_lists_read_lists_alone(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'vlm_list' reads lists"):
        run(world, tmp_path, world / "pairs.jsonl", method={"name": "vlm_list"})


def test_sparse_po_resumes_with_its_masks(world: Path, tmp_path: Path) -> None:
    """Four steps, and two and two: the same weights and masks; what is exported is an adapter and nothing of the masks."""
    from safetensors.torch import load_file

    from mmalign.export import export_run

    method = {"name": "vlm_sparse_po", "beta": 0.3, "masks": "independent"}
    for name in ("straight", "halves"):
        (tmp_path / name).mkdir()
    straight = run(world, tmp_path / "straight", world / "pairs.jsonl", method=method)
    halves = run(world, tmp_path / "halves", world / "pairs.jsonl", "optim.steps=2", method=method)
    file = write_experiment(tmp_path / "halves", world / "llava", world / "pairs.jsonl", method=method)
    run_training(file, [], resume=True)
    lines = metric_lines(straight)
    assert metric_lines(halves) == lines and lines[-1]["mask_reward"] != 1.0
    step = "checkpoints/step-00000004"
    assert (straight / step / "policy.safetensors").read_bytes() == (halves / step / "policy.safetensors").read_bytes()
    export_run(straight, "peft", tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_sparse_po_cannot_store_its_reference(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precomputed"):
        run(world, tmp_path, world / "pairs.jsonl", method={"name": "vlm_sparse_po"}, reference={"name": "precomputed"})
