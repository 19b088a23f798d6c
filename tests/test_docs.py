"""The Python on our pages: it compiles, its imports exist, and the worked example of a method really trains."""

from __future__ import annotations

import ast
import importlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.errors import ConfigError
from mmalign.experiment import load_experiment
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.reference import AdapterOffReference
from mmalign.trainers import METHODS
from mmalign.trainers.base import Parts
from tests.fixtures.batches import context, lora_policy, move, pair_batch

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
    for path in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_on_pages_compiles_and_imports_what_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmalign"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_python_of_the_readme_runs_as_it_stands() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        if "mmalign.run(" not in block:  # that one trains, on pairs which the demo makes
            exec(compile(block, "README.md", "exec"), names)
    assert names["scores"].shape == (2,) and names["scores"].dtype == torch.float32
    assert names["losses"].tolist() == pytest.approx([math.log(2)] * 4)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method of docs/adding_a_method.md as a module in the working directory."""
    page = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(# gap_dpo\.py.*?)```", page, re.DOTALL)
    assert found is not None
    (tmp_path / "gap_dpo.py").write_text(found[1], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gap_dpo", raising=False)
    return "gap_dpo:GapDPO"


def test_the_example_of_a_method_is_configured_like_ours(example: str) -> None:
    tiny = ROOT / "configs" / "tiny" / "diffusion_dpo.yaml"
    config = load_experiment(tiny, [f"method.name={example}", "method.reward=tiny-clip"]).config
    assert config.method.model_dump() == {"name": example, "beta": 2000.0, "reward": "tiny-clip"}
    assert config.reference_name == "copy"
    with pytest.raises(ConfigError, match=r"method\.reward: required"):
        load_experiment(tiny, [f"method.name={example}"])


def test_the_example_of_a_method_computes_what_it_says(
    example: str, tiny_family: Callable[[str], DiffusionFamily]
) -> None:
    family, method = tiny_family("sd1"), METHODS.get(example)
    policy = lora_policy(family)
    parts = Parts(family=family, policy=policy, reference=AdapterOffReference(policy), steps=1)
    trainer = method.build(method.Config(reward="taste", beta=100.0), parts)
    scores = torch.tensor([[3.0, 1.0], [0.5, 1.0]])  # gaps 2 and 0.5
    batch = replace(pair_batch(2), scores={"taste": scores}, weight=torch.tensor([1.0, 2.0]))
    out = trainer.training_step(batch, context())
    # Policy equal to reference: log 2 a pair, weights 1 x 2 and 2 x 0.5, two rows.
    assert out.loss.item() == pytest.approx(math.log(2) * (2 + 1) / 2, abs=1e-6)
    assert out.metrics["weight"].item() == pytest.approx(3.0)
    assert out.metrics["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    move(policy, 0.05)
    out = trainer.training_step(batch, context())
    out.loss.backward()
    assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in policy.parameters())
    assert out.metrics["margin"].item() != 0.0
