"""BDHS-DPO through the public command: offline as `vlm_dpo`, online and mixed from the current policy, exact resumption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmalign.errors import ConfigError
from mmalign.experiment import train as run_training
from tests.fixtures import tiny_vlm
from tests.fixtures.vlm_runs import write_experiment, write_table
from tests.invariants.conftest import metric_lines, state_files

ONLINE = {"name": "bdhs_dpo", "offline": 0.0, "max_new_tokens": 10, "made_up": {"rho": 0.7, "rounds": 2, "sentence_tokens": 8}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bdhs")
    tiny_vlm.build("llava", folder / "llava")
    for kind in ("pairs", "unpaired", "lists"):
        write_table(folder, kind)
    return folder


def train(world: Path, out: Path, *overrides: str, kind: str = "pairs", resume: bool = False, **method: Any) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    file = write_experiment(out, world / "llava", world / f"{kind}.jsonl", method={**ONLINE, **method})
    run_training(file, [f"run.out={out / 'run'}", "optim.ema_decay=0.9", *overrides], resume=resume)
    return out / "run"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "online/rank-0.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mixed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(world, tmp_path_factory.mktemp("mixed"), offline=0.5)


def test_offline_is_vlm_dpo_on_the_table(world: Path, tmp_path: Path) -> None:
    """To the last bit: the same losses, gradients and weights."""
    ours = train(world, tmp_path / "ours", offline=1.0)
    file = write_experiment(tmp_path, world / "llava", world / "pairs.jsonl")
    run_training(file, [f"run.out={tmp_path / 'theirs'}", "optim.ema_decay=0.9"])
    left, right = metric_lines(ours), metric_lines(tmp_path / "theirs")
    assert len(left) == 4 and left == right
    assert state_files(ours, 4) == state_files(tmp_path / "theirs", 4)
    assert not (ours / "online").exists(), "nothing was made up"


def test_mixed_rows_draw_the_table_or_the_policy_and_say_which(mixed: Path) -> None:
    rows = lines(mixed)
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {"made_up", "offline"} <= {row["source"] for row in rows} <= {"made_up", "offline", "none"}
    for row in rows:
        if row["source"] == "offline":
            assert "made_up" not in row and row["pair"][1].startswith("there is")
        elif row["source"] == "made_up":
            assert row["pair"][0].startswith("a red circle") and not row["pair"][1].startswith("there is nothing")
            assert row["made_up"]["reason"] == "" and row["made_up"]["image_tokens"] >= 16
    logged = metric_lines(mixed)
    assert sum(line["share_offline"] for line in logged) / 4 == pytest.approx(
        sum(row["source"] == "offline" for row in rows) / 8
    )


def test_a_resumed_run_makes_up_what_the_straight_one_did(world: Path, mixed: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    train(world, tmp_path, offline=0.5, resume=True)
    assert lines(tmp_path / "run") == lines(mixed)
    assert state_files(tmp_path / "run", 4) == state_files(mixed, 4)
    assert metric_lines(tmp_path / "run") == metric_lines(mixed)


def test_online_needs_no_rejected_answers_and_takes_liked_ones(world: Path, tmp_path: Path) -> None:
    run = train(world, tmp_path, "optim.steps=2", kind="unpaired")
    assert all(row["source"] in ("made_up", "none") for row in lines(run))
    assert {row["id"] for row in lines(run)} <= {"r1", "r3", "r5", "r7"}, "a disliked answer is no reference"
    assert json.loads((run / "summary.json").read_text())["samples_dropped"] == {"disliked": 4}


def test_the_policy_of_the_step_makes_the_answers_up(world: Path, tmp_path: Path) -> None:
    """At a large rate the answers of later steps are not those of the start; at rate 0 they are."""
    moving = train(world, tmp_path / "moving", "optim.lr=0.2")
    still = train(world, tmp_path / "still", "optim.lr=0")
    assert lines(moving)[0]["pair"] == lines(still)[0]["pair"]
    assert [row["pair"] for row in lines(moving)[4:]] != [row["pair"] for row in lines(still)[4:]]


def test_averaged_rows_take_both_rejected_answers(world: Path, tmp_path: Path) -> None:
    """At the start every pair loses log 2, whatever the weights."""
    run = train(world, tmp_path, offline=0.25, combine="averaged")
    rows, logged = lines(run), metric_lines(run)
    made = [row for row in rows if row["source"] == "averaged"]
    assert made and all(len(row["pair"]) == 3 and row["pair"][1].startswith("there is") for row in made)
    whole = sum(row["source"] == "averaged" for row in rows[:2])
    assert logged[0]["loss"] == pytest.approx(0.6931472 * (0.25 + 0.75 * whole / 2), abs=1e-5)
    assert logged[-1]["made_up_margin"] != 0


def test_rows_that_give_no_pair_teach_nothing(world: Path, tmp_path: Path) -> None:
    """A limit of similarity that nothing stays under."""
    run = train(world, tmp_path, "optim.steps=1", made_up={"rho": 0.5, "rounds": 1, "max_similarity": -1.0, "sentence_tokens": 8})
    (line,) = metric_lines(run)
    assert (line["share_none"], line["loss"], line["grad_norm"]) == (1.0, 0.0, 0.0)
    assert all(row["pair"] == [] and row["made_up"]["reason"] == "too_similar" for row in lines(run))


def test_accumulating_makes_up_what_one_batch_does(world: Path, mixed: Path, tmp_path: Path) -> None:
    split = train(world, tmp_path, "optim.batch_size=1", "optim.accumulate=2", offline=0.5)
    assert [row["pair"] for row in lines(split)[:2]] == [row["pair"] for row in lines(mixed)[:2]]
    for left, right in zip(metric_lines(split)[:2], metric_lines(mixed)[:2], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=2e-4)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [("unpaired", {"offline": 0.5}, r"method.offline: .*holds unpaired"), ("lists", {}, r"reads pairs or unpaired"),
     ("pairs", {"offline": 1.5}, r"offline must be in \[0, 1\]"), ("pairs", {"combine": "averaged"}, "has no effect"),
     ("pairs", {"objective": "ld_dpo", "alpha": 0.5}, "made up do not have"), ("pairs", {"temperature": -1.0}, "temperature"),
     ("pairs", {"made_up": {"rho": 2.0}}, "rho must be in")],
)  # fmt: skip
def test_what_cannot_work_is_refused(world: Path, tmp_path: Path, kind: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(world, tmp_path, kind=kind, **changed)
