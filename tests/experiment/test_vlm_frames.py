"""Clips in a run: with stored frames each is decoded once in all, and training cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av")

from mmalign.data import frames as stored
from mmalign.experiment import load_experiment, train
from mmalign.experiment.opening import load_any
from mmalign.experiment.vlm_samples import AnswerSamples, frame_sheet
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


def test_a_clip_is_shown_by_its_frames(experiment: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    config = load_experiment(experiment, [*SAMPLED, f"evaluate.prompts={table}", f"run.out={out}"]).config
    family = load_any(config, torch.device("cpu"))
    samples = AnswerSamples(config, family, family.network)
    assert samples.pictures(samples.records[0]) == ["samples/media/r0-0-frames.png"]
    with Image.open(out / "samples/media/r0-0-frames.png") as sheet:
        assert sheet.size == (4 * 96 + 3 * 4, 64)  # four frames of 48 x 32, twice as large
    (tmp_path / "1.mp4").unlink()
    assert samples.pictures(samples.records[1]) == []  # the answer was given; the page shows the rest


def test_a_sheet_takes_frames_evenly_and_enlarges_small_ones() -> None:
    frames = np.stack([np.full((10, 40, 3), 10 * number, dtype=np.uint8) for number in range(16)])
    sheet = frame_sheet(frames)
    assert sheet.size == (4 * 80 + 3 * 4, 2 * 20 + 4)
    shown = [sheet.getpixel((84 * (place % 4) + 5, 24 * (place // 4) + 5))[0] for place in range(8)]  # type: ignore[index]
    assert shown == [0, 20, 40, 60, 80, 100, 120, 140]
    assert frame_sheet(frames[:1]).size == (80, 20)
