"""A curriculum on real films: killed at and around stage boundaries and resumed, decoded once, ordered by the seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.staged import StagedLoader
from mmalign.experiment import train as run_training
from tests.data.clips import clip
from tests.fixtures import tiny_vlm
from tests.fixtures.vlm_runs import turn, write_experiment
from tests.forks import kill_when, start

from .conftest import logged, metric_lines, state_files, train_elsewhere

STAGES = [
    {"name": "easy", "rows": "4", "steps": 3}, {"name": "hard", "rows": "2", "steps": 2},
    {"name": "sft", "loss": "answers", "manifest": "answers.jsonl", "steps": 3, "lr": 5e-3},
]  # fmt: skip


def stored(run: Path) -> dict[str, bytes]:
    """Weights, optimiser, average and the stage's reference after the last step."""
    folder = run / "checkpoints/step-00000008"
    return {**state_files(run, 8), **{path.name: path.read_bytes() for path in folder.glob("extra*")}}


def question() -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Describe what happens in the clip."}]}
    ]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("temple")
    model = tiny_vlm.build("llava_onevision", folder / "model")
    pairs, answers = [], []
    for film in range(4):
        (folder / f"{film}.mp4").write_bytes(clip(2 + film, times=[500 * number for number in range(2 + film)]))
        for level in ("4", "2"):
            pairs.append(
                {"id": f"{film}-{level}", "prompt": question(), "chosen": turn("assistant", f"a red circle and {film} stars"),
                 "rejected": turn("assistant", f"{film} stars{level}"), "videos": [f"{film}.mp4"], "stage": level}
            )  # fmt: skip
        answers.append({"id": f"a{film}", "prompt": question(), "completion": turn("assistant", f"{film} stars"),
                        "videos": [f"{film}.mp4"]})  # fmt: skip
    for name, rows in (("pairs", pairs), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [
        {**stage, **({"manifest": str(folder / "answers.jsonl")} if "manifest" in stage else {})} for stage in STAGES
    ]
    return write_experiment(
        folder, model, folder / "pairs.jsonl", method={"name": "temple", "stages": stages},
        data={"cache_vision": True, "cache_frames": True, "workers": 2},
        optim={"steps": 8, "ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 1}, run={"save_every": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    run_training(file, [f"run.out={out}"])
    return out


def test_stages_follow_each_other_with_schedules_of_their_own(straight: Path) -> None:
    lines = metric_lines(straight)
    assert [line["stage"] for line in lines] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [lines[at]["loss"] for at in (0, 3)] == pytest.approx(
        [0.6931472] * 2, abs=1e-6
    )  # margins of zero at each start
    assert lines[1]["loss"] != pytest.approx(0.6931472, abs=1e-6)
    assert [line["lr"] for line in lines] == pytest.approx([0.01, 0.01, 0.005, 0.01, 0.01, 0.005, 0.005, 0.0025])


def test_no_film_is_decoded_or_encoded_twice(straight: Path) -> None:
    media = json.loads((straight / "summary.json").read_text())["media"]
    assert media["clips_decoded"] == 4 and media["features_encoded"] == 4
    assert media["features_read"] >= 8 * 2


@pytest.mark.parametrize("step", [2, 3, 5])
def test_every_checkpoint_around_boundaries_leads_to_the_same_end(
    file: Path, straight: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for later in range(step + 1, 9):
        shutil.rmtree(run / f"checkpoints/step-{later:08d}")
    run_training(file, [f"run.out={run}"], resume=True)
    assert stored(run) == stored(straight)
    assert metric_lines(run) == metric_lines(straight)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["media"]["clips_decoded"] == 0 and summary["media"]["features_encoded"] == 0


def test_a_run_killed_at_a_boundary_and_resumed_equals_the_straight_run(
    file: Path, straight: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    process = start(train_elsewhere, str(file), [f"run.out={killed}"])
    assert kill_when(process, lambda: logged(killed) >= 3)  # the last step of the first stage
    assert not (killed / "summary.json").exists(), "it had ended before it was killed"
    run_training(file, [f"run.out={killed}"], resume=True)
    assert stored(killed) == stored(straight)
    assert metric_lines(killed) == metric_lines(straight)


def test_the_order_of_samples_is_a_function_of_the_seed(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[list[tuple[str, ...]]] = []
    inside = StagedLoader.micro_batches

    def watched(self: StagedLoader, start_step: int = 0) -> Any:
        seen.append([self.step_ids(step) for step in range(8)])
        return inside(self, start_step)

    monkeypatch.setattr(StagedLoader, "micro_batches", watched)
    for number, seed in enumerate((0, 0, 5)):
        run_training(file, [f"run.out={tmp_path / str(number)}", f"run.seed={seed}", "optim.steps=0"])
    assert seen[0] == seen[1] != seen[2]
    assert all(name.endswith("-4") for ids in seen[0][:3] for name in ids)
    assert all(name.endswith("-2") for ids in seen[0][3:5] for name in ids)
    assert all(name.startswith("a") for ids in seen[0][5:] for name in ids)
