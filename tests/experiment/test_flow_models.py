"""SD3 and FLUX from the shipped presets, through the command line: training, exports, candidates and evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mmalign.cli.application import app
from mmalign.errors import ModelError
from mmalign.experiment import load_experiment, open_run
from mmalign.experiment.describe import _estimate
from mmalign.export import export_run
from tests.invariants.conftest import ROOT, write_pairs
from tests.models.test_family_contract import plain_pipeline
from tests.trainers.test_rank_dpo import write_lists

PRESETS = sorted(
    path
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.name.startswith(("sd3", "flux")) and path.parent.name not in ("generate", "base")
)
PROMPTS = ["a large red star on a black background", "two blue circles on a grey background"]
Folders = Callable[[str], Path]


def variant_of(name: str) -> str:
    return "flux" if name.startswith("flux") else ("sd35" if name.startswith("sd35") else "sd3")


def invoke(*arguments: str) -> str:
    found = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerate: None) -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pairs with the score that SmPO's presets name, and ranked lists."""
    pairs = write_pairs(tmp_path_factory.mktemp("flow-pairs"), 4)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows = [{**row, "scores": {"pickscore": [0.22, 0.19 + 0.01 * number]}} for number, row in enumerate(rows)]
    pairs.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return {"pairs": pairs, "lists": write_lists(tmp_path_factory.mktemp("flow-lists") / "table", number=4)}


def train(preset: Path, folder: Path, table: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """Two steps with the preset's own data and precision; only what depends on the machine and on the model's size is changed."""
    invoke(
        "train", str(preset), f"model.path={folder}", f"data.manifest={table}", f"run.out={out}", "data.resolution=64",
        "optim.steps=2", "optim.batch_size=2", "optim.accumulate=1", "optim.warmup_steps=0",
        "run.log_every=1", "evaluate.every=0", "model.t5_length=48", *more,
    )  # fmt: skip
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_presets_train_two_steps_on_real_layouts(
    preset: Path, tiny_folder: Folders, tables: dict[str, Path], tmp_path: Path
) -> None:
    lists = preset.parent.name == "rank_dpo"
    folder = tiny_folder(variant_of(preset.name))
    lines = train(preset, folder, tables["lists" if lists else "pairs"], tmp_path / "run", "evaluate.prompts=null")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines) and lines[1]["loss"] != lines[0]["loss"]
    if not lists:
        assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert (tmp_path / "run" / "report.html").is_file() and any((tmp_path / "run" / "export").iterdir())


@pytest.mark.parametrize(("name", "parameters"), [("sd3", "2,028,328,000"), ("flux", "11,901,408,320")])
def test_the_cost_of_a_preset_is_told_from_the_published_settings(name: str, parameters: str, tmp_path: Path) -> None:
    """Parameter counts of SD3 medium and FLUX.1 dev, from their config.json alone."""
    values = {
        "sd3": {"sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
                "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 192},
        "flux": {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
                 "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
                 "guidance_embeds": True},
    }[name]  # fmt: skip
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(values))
    preset = ROOT / f"configs/diffusion_dpo/{name}_pickapic_lora.yaml"
    experiment = load_experiment(preset, [f"model.path={tmp_path}", "tuning={name: full}", "reference={name: copy}"])
    told = "\n".join(_estimate(experiment.config))
    assert f"trained    {parameters} of {parameters} parameters" in told and "TFLOP a pair" in told


def test_presets_of_every_promised_method_exist() -> None:
    names = {(path.parent.name, variant_of(path.name)) for path in PRESETS}
    methods = ("diffusion_dpo", "rank_dpo", "smpo", "ddim_inpo")
    assert names >= {(method, variant) for method in methods for variant in ("sd3", "flux")}


def pictures(pipeline: Any, channels: int = 16) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    if hasattr(pipeline, "_pack_latents"):
        noise = pipeline._pack_latents(noise, 2, channels, 8, 8)
    images = pipeline(
        PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=2.0, output_type="np", height=64, width=64
    ).images
    assert isinstance(images, np.ndarray)
    return images


@pytest.mark.parametrize(("name", "tuning"), [("sd3", "lora"), ("sd3", "full"), ("flux", "lora"), ("flux", "full")])
def test_a_trained_model_leaves_for_plain_pipelines(
    name: str, tuning: str, tiny_folder: Folders, tables: dict[str, Path], tmp_path: Path
) -> None:
    import diffusers

    preset, run = ROOT / f"configs/diffusion_dpo/{name}_pickapic_lora.yaml", tmp_path / "run"
    more = ["tuning.targets=all"] if tuning == "lora" else ["tuning={name: full}", "reference={name: copy}"]
    train(
        preset,
        tiny_folder(name),
        tables["pairs"],
        run,
        "evaluate.prompts=null",
        "optim.lr=0.02",
        "model.dtype=fp32",
        *more,
    )
    opened = open_run(run)
    aligned, base = pictures(opened.family.pipeline(opened.aligned)), pictures(opened.family.pipeline(opened.base()))
    assert np.abs(aligned - base).max() > 0.02
    kind = getattr(diffusers, opened.family.pipeline_class)  # type: ignore[attr-defined]
    plain = kind.from_pretrained(export_run(run, "diffusers", tmp_path / "folder"))
    assert np.abs(pictures(plain) - aligned).max() < 1e-3
    if tuning == "lora":
        plain = plain_pipeline(name, tiny_folder(name))
        plain.load_lora_weights(
            str(export_run(run, "peft", tmp_path / "peft")), weight_name="pytorch_lora_weights.safetensors"
        )
        assert np.abs(pictures(plain) - aligned).max() < 1e-3
    if (name, tuning) == ("sd3", "lora"):
        with pytest.raises(ModelError, match="no kohya names for model.name: sd3; use --format peft"):
            export_run(run, "kohya", tmp_path / "kohya")


@pytest.mark.parametrize("name", ["sd35", "flux"])
def test_a_run_with_samples_is_evaluated(
    name: str, tiny_folder: Folders, tables: dict[str, Path], tmp_path: Path
) -> None:
    """Grids before and after, then `mmalign evaluate` with the embedded judge."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    run = tmp_path / "run"
    train(
        ROOT / f"configs/diffusion_dpo/{name}_pickapic_lora.yaml", tiny_folder(name), tables["pairs"], run,
        f"evaluate.prompts={tmp_path}/prompts.txt", "evaluate.steps=2", "evaluate.rewards=[tiny-clip]", "evaluate.grid_prompts=2",
    )  # fmt: skip
    assert len(list((run / "samples").glob("*/grid.png"))) == 2
    invoke("evaluate", str(run))
    assert "tiny-clip" in (run / "report.html").read_text()


def test_candidates_of_both_families_in_one_table(tiny_folder: Folders, tmp_path: Path) -> None:
    from mmalign.data import open_ranked

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    sources = "".join(
        f"  - {{label: {name}, model: {{name: {name}, path: {tiny_folder(name)}}}, steps: 2, resolution: 64, guidance: 2.0}}\n"
        for name in ("sd3", "flux")
    )
    settings = f"prompts: {tmp_path}/prompts.txt\nout: {tmp_path}/out\ndevice: cpu\nsources:\n{sources}"
    (tmp_path / "config.yaml").write_text(settings)
    invoke("generate", str(tmp_path / "config.yaml"))
    table = open_ranked(tmp_path / "out")
    assert [table[row].prompt for row in range(2)] == PROMPTS
    assert all(len(table[row].images) == 2 for row in range(2))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(settings.replace("resolution: 64", "resolution: 72").replace("/out", "/other"))
    found = CliRunner().invoke(app, ["generate", str(wrong)])
    assert found.exit_code == 2 or "72 is not a multiple of 16" in str(found.exception)
