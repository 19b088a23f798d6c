"""The embedded default at a small size: the same code, fewer steps and prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmalign import demo as module
from mmalign.config import load_yaml
from mmalign.demo import demo, shown
from mmalign.errors import ConfigError

SMALL = [
    "optim.steps=3", "optim.warmup_steps=1", "optim.batch_size=8", "evaluate.max_prompts=8", "evaluate.steps=3",
    "evaluate.every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A demo as it is shipped but for its size: the folder, and the summary that was returned. Read-only."""
    out = tmp_path_factory.mktemp("first") / "demo"
    return out, demo(out, seed=1, overrides=SMALL).summary


@pytest.fixture
def labelled(first: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives demos what the first one labelled, which is the same for all methods and seeds."""

    def copied(folder: Path) -> Path:
        shutil.copytree(first[0] / "data", folder)
        return folder / "pairs"

    monkeypatch.setattr(module, "label_candidates", copied)


def test_demo_shows_base_aligned_and_control(first: tuple[Path, dict[str, Any]]) -> None:
    out, returned = first
    summary = json.loads((out / "summary.json").read_text())
    assert returned == summary
    assert summary["seed"] == 1
    assert summary["evaluation"]["models"] == ["base", "aligned", "control"]
    roles = {name: values["role"] for name, values in summary["evaluation"]["rewards"].items()}
    assert roles == {"tiny-clip": "training", "tiny-judge": "holdout", "oracle": "oracle"}
    assert json.loads((out / "control" / "summary.json").read_text())["steps"] == summary["steps"] == 3
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page.replace("https://www.w3.org", "")


@pytest.mark.usefixtures("labelled")
def test_an_earlier_demo_is_moved_aside(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    (out / "data").mkdir(parents=True)
    (out / "data" / "mine.txt").write_text("keep")
    demo(out, overrides=[*SMALL, "optim.steps=1", "evaluate.max_prompts=2"])
    assert (tmp_path / "demo.previous-1" / "data" / "mine.txt").read_text() == "keep"
    assert (out / "report.html").is_file()


@pytest.mark.usefixtures("fresh_accelerate", "labelled")
@pytest.mark.parametrize("method", ["rank_dpo", "inpo", "diffusion_sft"])
def test_any_method_has_a_demo(method: str, tmp_path: Path) -> None:
    """On lists, under a short name, and the control itself."""
    out = tmp_path / "demo"
    small = ["optim.steps=2", "optim.warmup_steps=0", "optim.batch_size=2", "evaluate.max_prompts=2", "evaluate.steps=2"]
    summary = demo(out, method=method, overrides=small).summary
    assert summary["method"] == {"inpo": "ddim_inpo"}.get(method, method)
    assert summary["evaluation"]["models"] == ["base", "aligned", *(["control"] if method != "diffusion_sft" else [])]
    data = load_yaml(out / "config.yaml").values["data"]
    assert Path(data["manifest"]).name == ("candidates" if method == "rank_dpo" else "pairs")
    if method != "diffusion_sft":
        control, own = (load_yaml(folder / "config.yaml").values for folder in (out / "control", out))
        assert Path(control["data"]["manifest"]).name == "pairs"
        assert control["optim"]["lr"] == own["optim"]["lr"]


def test_the_demo_of_a_mask_learns_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["optim.steps=2", "optim.batch_size=2", "method.user_steps=1", "method.episode=2"]
    result = demo(tmp_path / "mask", method="freeze_as_guard", overrides=small)
    assert (tmp_path / "mask" / "export" / "freeze_mask.json").is_file() and (tmp_path / "mask" / "report.html").is_file()
    page = (tmp_path / "mask" / "report.html").read_text(encoding="utf-8")
    assert "The mask freezes 30\u00a0% of the tensors" in page and "By kind of layer" in page and "By block" in page
    for other in ("no evaluation against the base", "Person by person", "holds no evaluation", "Before and after"):
        assert other not in page
    assert result.summary["steps"] == 2 and "evaluate-guard" in capsys.readouterr().out


def test_methods_with_a_demo(tmp_path: Path) -> None:
    from mmalign.trainers import METHODS

    assert set(shown()) == set(METHODS.names())
    with pytest.raises(ConfigError, match="'rank_dop' is not known; did you mean 'rank_dpo'"):
        demo(tmp_path / "x", method="rank_dop")
