"""Clips in a run: with stored frames each is decoded once in all, and training cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av")

from mmalign.data import frames as stored
from mmalign.experiment import train
from mmalign.models.vlm import base
from tests.data.clips import clip
from tests.fixtures import tiny_vlm
from tests.fixtures.vlm_runs import turn, write_experiment
from tests.invariants.conftest import metric_lines

SAMPLED = ("model.video_fps=4", "model.max_frames=4")


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    tiny_vlm.build("qwen2_vl", tmp_path / "model")
    rows = []
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(clip(9 + number % 2, size=(32, 48)))
        prompt = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": f"What happens? {number}"}]}]
        answers = {"chosen": turn("assistant", "it gets brighter"), "rejected": turn("assistant", "it gets darker")}
        rows.append({"id": f"r{number}", "prompt": prompt, "videos": [f"{number}.mp4"], **answers})
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_experiment(tmp_path, tmp_path / "model", table)


def test_stored_frames_are_the_decoded_ones(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []

    def counting(*args: Any, **settings: Any) -> Any:
        decoded.append(args[0])
        return real(*args, **settings)

    real = base.decode_video
    monkeypatch.setattr(base, "decode_video", counting)
    monkeypatch.setattr(stored, "decode_video", counting)
    train(experiment, [*SAMPLED, f"run.out={tmp_path / 'live'}"])
    live = len(decoded)
    assert live >= 4 + 8  # asked once when the run starts, and again at every step
    train(experiment, [*SAMPLED, f"run.out={tmp_path / 'stored'}", "data.cache_frames=true", f"data.cache={tmp_path / 'cache'}"])
    assert len(decoded) == live + 2  # four files hold two different clips
    assert metric_lines(tmp_path / "stored") == metric_lines(tmp_path / "live")
    train(experiment, [*SAMPLED, f"run.out={tmp_path / 'again'}", "data.cache_frames=true", f"data.cache={tmp_path / 'cache'}"])
    assert len(decoded) == live + 2
