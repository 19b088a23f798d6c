"""Step by step against TRL's DPOTrainer on the same tiny model, pairs, order and optimiser; skipped where TRL is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.branches import BranchRecord
from tests.fixtures.tiny_vlm import build, picture, record

pytest.importorskip("trl", reason="needs the peer library TRL: pip install 'mmalign[bench]'")

CPU = torch.device("cpu")
OBJECTIVES = {
    "dpo": ({"objective": "dpo"}, {"loss_type": ["sigmoid"]}),
    "ipo": ({"objective": "ipo"}, {"loss_type": ["ipo"]}),
    "robust": ({"objective": "robust", "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "hinge": ({"objective": "hinge"}, {"loss_type": ["hinge"]}),
    "ln_dpo": ({"objective": "ln_dpo"}, {"loss_type": ["sigmoid_norm"]}),
    "nca": ({"objective": "nca"}, {"loss_type": ["nca_pair"]}),
    "sppo_hard": ({"objective": "sppo_hard"}, {"loss_type": ["sppo_hard"]}),
    "exo_pair": ({"objective": "exo_pair", "label_smoothing": 1e-3}, {"loss_type": ["exo_pair"], "label_smoothing": 1e-3}),
    "apo_zero": ({"objective": "apo_zero"}, {"loss_type": ["apo_zero"]}),
    "apo_down": ({"objective": "apo_down"}, {"loss_type": ["apo_down"]}),
    "discopop": ({"objective": "discopop"}, {"loss_type": ["discopop"]}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("parity")

    def made(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else build(name, folder)

    return made


def records() -> list[BranchRecord]:
    """Six pairs about different pictures, with answers of unequal lengths."""
    words = ("yes", "a red circle", "two green triangles on a grey ground", "no", "there is nothing here, one yellow star")
    return [
        record(str(n), media=[picture(n, (40 + 8 * (n % 3), 56))], answers=(words[n % 5], words[(n + 2) % 5])) for n in range(6)
    ]


@pytest.mark.parametrize(
    ("name", "objective", "prefix"),
    [("qwen2_5_vl", "dpo", "shared"), ("qwen2_5_vl", "ipo", "plain"), ("qwen2_5_vl", "robust", "shared"),
     ("qwen2_5_vl", "hinge", "shared"), ("internvl", "ipo", "shared"), ("llava", "dpo", "shared"),
     *[("llava", name, "shared") for name in ("ln_dpo", "nca", "sppo_hard", "exo_pair", "apo_zero", "apo_down", "discopop")]],
)  # fmt: skip
def test_ten_steps_equal_trl(
    name: str, objective: str, prefix: str, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and reward margins to 1e-4 of their size, from the same adapter, batches of two, AdamW at 1e-3."""
    from vlm_sides import Ours, Trl

    monkeypatch.setitem(os.environ, "TOKENIZERS_PARALLELISM", "false")
    mine, theirs = OBJECTIVES[objective]
    common: dict[str, Any] = {"dtype": "fp32", "checkpointing": False, "lr": 1e-3}
    ours = Ours(folders(name), records(), 2, CPU, objective={**mine, "prefix": prefix}, template_only=True, **common)
    trl = Trl(
        folders(name), records(), 2, CPU, objective=theirs, start=ours.policy, scratch=tmp_path,
        targets=ours.family.lora_targets["language"], **common,
    )  # fmt: skip
    moved = 0.0
    for _ in range(10):
        loss, wanted = ours.step(), trl.step()
        assert loss == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert ours.metrics["reward_margin"] == pytest.approx(trl.metric("rewards/margins"), rel=1e-4, abs=1e-4)
        moved = max(moved, abs(trl.metric("rewards/margins")))
    assert moved > 0.01


def trl_loss(objective: str, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """TRL's own loss functions on mean log-probabilities; its trainers for them read text alone."""
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    settings = {"loss_type": "simpo", "alpha": 0.0, "simpo_gamma": 1.0, "label_smoothing": 0.0,
                "beta": 2.0 if objective == "simpo" else 0.1, "accelerator": SimpleNamespace(device=CPU)}  # fmt: skip
    trainer: Any = SimpleNamespace(**settings)
    if objective == "simpo":
        return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()
    # Its trainer subtracts the ratio from a likelihood that takes the prompt in; ours, and this one, is of the answer alone.
    return -chosen.mean() - ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("objective", ["simpo", "orpo"])
def test_ten_steps_without_a_reference_equal_trls_losses(
    name: str, objective: str, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SimPO and ORPO: TRL's collator, whole sequences through transformers, TRL's loss function, the same optimiser."""
    from vlm_sides import Ours, Trl

    monkeypatch.setitem(os.environ, "TOKENIZERS_PARALLELISM", "false")
    common: dict[str, Any] = {"dtype": "fp32", "checkpointing": False, "lr": 1e-3}
    mine = {"objective": "simpo", "beta": 2.0, "gamma": 1.0} if objective == "simpo" else {"objective": "orpo", "beta": 0.1}
    ours = Ours(folders(name), records(), 2, CPU, objective=mine, template_only=True, **common)
    theirs = Trl(
        folders(name), records(), 2, CPU, start=ours.policy, scratch=tmp_path, targets=ours.family.lora_targets["language"],
        **common,
    )  # fmt: skip
    first = last = 0.0
    for number in range(10):
        loss = ours.step()
        batch = dict(next(theirs.batches))
        answers = batch.pop("completion_mask")[:, 1:].bool()
        logits = theirs.model(**batch, use_cache=False).logits[:, :-1]
        tokens = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * answers
        means = tokens.sum(1) / answers.sum(1)
        wanted = trl_loss(objective, *means.chunk(2))
        wanted.backward()
        torch.nn.utils.clip_grad_norm_(theirs.trained, 1.0)
        theirs.optimizer.step()
        theirs.optimizer.zero_grad()
        assert loss == pytest.approx(wanted.item(), rel=1e-4, abs=1e-4)
        first, last = (loss if number == 0 else first), loss
    assert abs(last - first) > 0.01
