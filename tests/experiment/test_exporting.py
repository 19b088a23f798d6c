"""Exports load in plain libraries and give the pictures of the trained network."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmalign.errors import ConfigError
from mmalign.experiment import open_run, train
from mmalign.export import export_run
from tests.invariants.conftest import CONFIG, settings, write_pairs

PROMPTS = ["a large red star on a black background", "two blue circles on a grey background"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA run with alpha unlike rank, and a full run, long enough to change pictures visibly."""
    manifest = write_pairs(tmp_path_factory.mktemp("export-pairs"), 8)
    made = {}
    for name, more in (
        ("lora", {"tuning.name": "lora", "tuning.rank": 4, "tuning.alpha": 8, "tuning.targets": "all"}),
        ("full", {"tuning.name": "full"}),
    ):
        out = tmp_path_factory.mktemp("export") / name
        train(CONFIG, [*settings(manifest, out, optim__lr=2e-3, optim__ema_decay=0.0), *(f"{k}={v}" for k, v in more.items())])
        made[name] = out
    return made


def pictures(pipeline: object) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline(PROMPTS, latents=noise, num_inference_steps=6, guidance_scale=2.0, output_type="np").images  # type: ignore[operator, no-any-return]


@cache
def ours(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of the aligned and of the base network of a run, in this process; made once."""
    opened = open_run(run)
    return pictures(opened.family.pipeline(opened.aligned)), pictures(opened.family.pipeline(opened.base()))


def test_lora_loads_in_a_plain_pipeline(runs: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from mmalign import assets

    aligned, base = ours(runs["lora"])
    assert np.abs(aligned - base).max() > 0.02
    for folder in (runs["lora"] / "export", export_run(runs["lora"], "peft", tmp_path / "peft")):
        plain = StableDiffusionPipeline.from_pretrained(assets.path("tiny-sd"))
        plain.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
        assert np.abs(pictures(plain) - aligned).max() < 1e-3


@pytest.mark.parametrize("name", ["lora", "full"])
def test_full_export_loads_with_from_pretrained(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    aligned, base = ours(runs[name])
    assert np.abs(aligned - base).max() > 0.02
    plain = StableDiffusionPipeline.from_pretrained(export_run(runs[name], "diffusers", tmp_path / "pipeline"))
    assert np.abs(pictures(plain) - aligned).max() < 1e-3


def test_kohya_keys_load_in_diffusers_and_follow_the_convention(runs: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from mmalign import assets

    folder = export_run(runs["lora"], "kohya", tmp_path / "kohya")
    state = load_file(folder / "lora_kohya.safetensors")
    assert all(name.startswith("lora_unet_") for name in state)
    assert {name.split(".", 1)[1] for name in state} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert float(next(value for name, value in state.items() if name.endswith(".alpha"))) == 8.0
    plain = StableDiffusionPipeline.from_pretrained(assets.path("tiny-sd"))
    plain.load_lora_weights(str(folder), weight_name="lora_kohya.safetensors")
    assert np.abs(pictures(plain) - ours(runs["lora"])[0]).max() < 1e-3


def test_refusals(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained the full network"):
        export_run(runs["full"], "peft", tmp_path / "a")
    with pytest.raises(ConfigError, match="did you mean 'kohya'"):
        export_run(runs["lora"], "khoya", tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "file").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        export_run(runs["lora"], "peft", tmp_path / "c")
    assert not (tmp_path / "a").exists()


def test_a_run_opened_again_is_the_run_that_was(runs: dict[str, Path], tiny_folder: Callable[[str], Path]) -> None:
    opened = open_run(runs["full"])
    saved = load_file(runs["full"] / "checkpoints" / "step-00000006" / "policy.safetensors")
    for name, value in opened.aligned.named_parameters():
        assert torch.equal(value, saved[name]), name
