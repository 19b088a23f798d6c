"""The GPU benchmark's path at a size where its figures mean nothing, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rewards_gpu
import torch
from rewards_models import build

SMALL = ["--device", "cpu", "--model", "tiny", "--images", "20", "--side", "96", "--batches", "4", "--batch", "4", "--seconds",
         "0.05", "--loop", "2", "--decode-workers", "1", "--no-compile", "--minutes", "5"]  # fmt: skip


def test_every_part_runs_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    grad = torch.is_grad_enabled()
    try:
        assert rewards_gpu.main([*SMALL, "--json", str(out)]) == 0
    finally:
        torch.set_grad_enabled(grad)
    found = json.loads(out.read_text())
    assert found["exactness"]["pixels"] == {"clip_hf": 0.0, "clip_tv": 0.0, "hps_letterbox": 0.0}
    assert found["loop in float32"]["cosine_gap"] < 1e-6  # the network of transformers and ours, on the same weights
    assert all(found[name]["rate"] > 0 for name in found if name.startswith("end to end"))
    assert len([name for name in found if name.startswith("end to end")]) == 6
    assert all(any(name.startswith("end to end, short") and way[0] in name for name in found) for way in rewards_gpu.WAYS)
    assert "hoped for" in capsys.readouterr().out


def test_flops_of_vit_h_are_those_of_the_ceiling() -> None:
    """Published counts for ViT-H/14 are 334.6 and 47.1 GFLOP; the last block leaves out what is not pooled."""
    image, text = build("vit-h", torch.device("meta"), torch.bfloat16).flops
    assert 318e9 < image < 334.6e9 and text == pytest.approx(47.1e9, rel=0.01)
