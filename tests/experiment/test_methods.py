"""Every pairwise method through its shipped tiny experiment: check, train, files, and what must not depend on the batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.data import TableWriter
from mmalign.errors import ConfigError
from mmalign.experiment import check, train
from tests.data.making import picture

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("ddim_inpo", "smpo", "diffusion_kto", "mapo", "diffusion_orpo", "linear_dpo", "dspo")
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs with scores; every third chosen picture has the lower one."""
    folder = tmp_path_factory.mktemp("scored") / "pairs"
    with TableWriter(folder, rewards=("tiny-clip",)) as writer:
        for row in range(8):
            writer.add(
                id=f"row-{row}", prompt=f"a red circle {row}", chosen=picture(2 * row, size=(64, 64)),
                rejected=picture(2 * row + 1, size=(64, 64)),
                scores={"tiny-clip": (0.2, 0.7) if row % 3 == 0 else (0.9, 0.4)},
            )  # fmt: skip
    return folder


def overrides(model: Path, manifest: Path, out: Path, *more: str) -> list[str]:
    return [
        f"model.path={model}", f"data.manifest={manifest}", f"run.out={out}", "optim.steps=2", "optim.warmup_steps=0",
        "optim.batch_size=2", "run.log_every=1", "run.save_every=2", "evaluate.prompts=null", "evaluate.rewards=[]",
        "evaluate.holdout=[]", "tuning={name: lora, rank: 4}", *more,
    ]  # fmt: skip


def run(method: str, *arguments: str) -> list[dict[str, float]]:
    given = list(arguments)
    train(ROOT / "configs" / "tiny" / f"{method}.yaml", given)
    out = next(text.partition("=")[2] for text in given if text.startswith("run.out="))
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_from_its_shipped_file(tiny_folder: Folders, scored: Path, tmp_path: Path, method: str) -> None:
    settings = overrides(tiny_folder("sd1"), scored, tmp_path / "run")
    assert "valid" in check(ROOT / "configs" / "tiny" / f"{method}.yaml", settings)
    lines = run(method, *settings)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] is not None and line["grad_norm"] > 0 for line in lines)
    assert ("network_calls" in lines[0]) == (method in ("ddim_inpo", "smpo"))
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["steps"], summary["samples_seen"]) == (method, 2, 4)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("method", ["ddim_inpo", "smpo"])
def test_inverted_batches_may_be_split(tiny_folder: Folders, scored: Path, tmp_path: Path, method: str) -> None:
    """Two pairs at once, or one after the other: the same steps, timesteps and added noise."""
    model = tiny_folder("sd1")
    whole = run(method, *overrides(model, scored, tmp_path / "whole"))
    split = run(method, *overrides(model, scored, tmp_path / "split", "optim.batch_size=1", "optim.accumulate=2"))
    for one, two in zip(whole, split, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-2)
        assert one["network_calls"] == two["network_calls"] == 12


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_smpo_normalised_with_is_kept_and_a_missing_reward_is_named(
    tiny_folder: Folders, scored: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    lines = run("smpo", *overrides(tiny_folder("sd1"), scored, out, "method.low=0.25", "method.high=0.75"))
    kept = (out / "config.yaml").read_text()
    assert re.search(r"low: 0\.25\b", kept) and re.search(r"high: 0\.75\b", kept)
    assert all(0 <= line["label_agreement"] <= 1 for line in lines)
    with pytest.raises(ConfigError, match=r"no scores of 'pickscore'.*tiny-clip"):
        run("smpo", *overrides(tiny_folder("sd1"), scored, tmp_path / "other", "method.reward=pickscore"))
    assert not (tmp_path / "other" / "metrics.jsonl").exists(), "it is told before the first step"


def test_check_names_missing_scores(tiny_folder: Folders, scored: Path, tmp_path: Path) -> None:
    smpo = ROOT / "configs" / "tiny" / "smpo.yaml"
    settings = overrides(tiny_folder("sd1"), scored, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"column 'scores' holds no scores of 'pickscore'.*mmalign annotate.*labels=p_chosen"):
        check(smpo, [*settings, "method.reward=pickscore"])
    assert "valid" in check(smpo, [*settings, "method.reward=pickscore", "method.labels=p_chosen"])
