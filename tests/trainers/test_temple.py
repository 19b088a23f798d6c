"""TEMPLE's stages: spans and schedules, the reference that moves up, the optimiser that starts afresh, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.errors import ConfigError
from mmalign.experiment import load_experiment
from mmalign.models.adapters import attach_lora
from mmalign.models.reference import CopyReference, FrozenAdapterReference
from mmalign.trainers.base import Parts
from mmalign.trainers.temple import StageConfig, Temple, TempleConfig
from mmalign.trainers.vlm_sft import VlmSFT, VlmSFTConfig
from mmalign.types import StepContext
from tests.fixtures import tiny_vlm
from tests.fixtures.vlm_runs import write_experiment, write_table

STAGES = ({"name": "r16", "steps": 2}, {"name": "r2", "steps": 1, "lr": 0.5}, {"name": "sft", "loss": "answers", "steps": 3})


def context(step: int) -> StepContext:
    return StepContext(step=step, seed=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_vlm.load("llava_onevision", tiny_vlm.build("llava_onevision", tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture
def trainer(family: Any) -> Temple:
    own = copy.copy(family)
    own.network = attach_lora(copy.deepcopy(family.network), rank=2, alpha=4, targets=family.lora_targets["language"], seed=1)
    stages = tuple(StageConfig(**stage) for stage in STAGES)
    parts = Parts(family=own, policy=own.network, reference=FrozenAdapterReference(own.network), steps=6)
    made = Temple.build(TempleConfig(stages=stages), parts)
    made.build_optimizers(lambda tensors: torch.optim.AdamW(tensors, lr=0.02))
    return made


def batch(trainer: Temple) -> Any:
    records = [tiny_vlm.record(f"r{number}", media=[tiny_vlm.clip(number)]) for number in range(2)]
    return trainer.family.collate([trainer.family.encode(record) for record in records])


def step(trainer: Temple, number: int) -> dict[str, float]:
    out = trainer.training_step(batch(trainer), context(number))
    out.loss.backward()
    for optimizer in trainer._optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    trainer.after_step(context(number))
    return {name: float(value) for name, value in out.metrics.items()}


def test_spans_follow_the_stages() -> None:
    config = TempleConfig(stages=tuple(StageConfig(**stage) for stage in STAGES))
    assert config.steps == 6
    assert [config.span(at)[0] for at in range(8)] == [0, 0, 1, 2, 2, 2, 2, 2]
    spans = [config.span(at)[1] for at in (0, 2, 3)]
    assert [(span.first, span.steps, span.lr) for span in spans] == [(0, 2, None), (2, 1, 0.5), (3, 3, None)]


def test_every_stage_of_pairs_begins_with_a_margin_of_zero_and_an_empty_optimiser(trainer: Temple) -> None:
    first = step(trainer, 0)
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6) and first["stage"] == 0
    second = step(trainer, 1)  # the last step of the first stage
    assert second["loss"] < first["loss"] - 1e-3
    assert all(not optimizer.state for optimizer in trainer._optimizers.values())
    third = step(trainer, 2)
    assert third["loss"] == pytest.approx(0.6931472, abs=1e-6) and third["margin"] == 0.0 and third["stage"] == 1


def test_the_reference_is_the_policy_of_the_boundary_and_survives_a_checkpoint(trainer: Temple) -> None:
    for number in range(2):
        step(trainer, number)
    at_boundary = {name: value.clone() for name, value in trainer.module.named_parameters() if "lora_" in name}
    state = {name: value.clone() for name, value in trainer.extra_state()["stage_reference"].state_dict().items()}
    step(trainer, 2)
    reference = trainer.extra_state()["stage_reference"]
    reference.renew(trainer.module)  # type: ignore[attr-defined]
    reference.load_state_dict(state)
    kept = trainer.reference.held
    named = {id(value): name for name, value in trainer.module.named_parameters()}
    assert len(kept) == len(at_boundary) > 0
    assert all(torch.equal(at_boundary[named[id(value)]], stored) for value, stored in kept)


def test_the_last_stage_is_plain_fine_tuning(trainer: Temple) -> None:
    parts = Parts(family=trainer.family, policy=trainer.module, reference=None, steps=1)
    chosen = trainer.family.collate(
        [trainer.family.encode(tiny_vlm.record("a", media=[tiny_vlm.clip(0)], answers=["a red circle"]))]
    )
    plain = VlmSFT.build(VlmSFTConfig(), parts).training_step(chosen, context(0))
    ours = trainer.training_step(chosen, context(4))
    assert ours.loss.item() == plain.loss.item() and float(ours.metrics["stage"]) == 2


def test_a_copied_network_moves_up_too() -> None:
    policy = torch.nn.Linear(2, 2)
    reference = CopyReference(copy.deepcopy(policy))
    with torch.no_grad():
        policy.weight.add_(1.0)
    assert not torch.equal(reference.module.weight, policy.weight)
    reference.renew(policy)
    assert torch.equal(reference.module.weight, policy.weight) and not reference.module.weight.requires_grad
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    reference.module.weight.zero_()
    reference.load_state_dict(state)
    assert torch.equal(reference.module.weight, policy.weight)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one"),
        (({"name": "a", "steps": 1}, {"name": "a", "steps": 1}), "names must differ"),
        (({"name": "a", "steps": 0},), "steps must be at least 1"),
        (({"name": "a", "steps": 1, "loss": "answers"},), "none trains on pairs"),
        (({"name": "a", "steps": 1, "lr": -1.0},), "lr must be positive"),
    ],
)
def test_a_curriculum_without_meaning_is_refused(stages: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TempleConfig(stages=tuple(StageConfig(**stage) for stage in stages))


def test_what_contradicts_a_curriculum_is_refused(tmp_path: Path) -> None:
    method = {"name": "temple", "stages": [{"name": "a", "steps": 3}]}
    table = write_table(tmp_path)
    for changed, message in (
        ({"optim": {"steps": 4}}, "stages have 3 steps in all, not 4; set optim.steps=3"),
        ({"optim": {"steps": 3}, "data": {"stage": "0"}}, "name their own rows"),
        ({"optim": {"steps": 3}, "data": {"cache": "off", "cache_frames": True}}, "data.cache_frames: is a cache"),
        ({"optim": {"steps": 3}, "reference": {"name": "precomputed"}}, "cannot be precomputed"),
    ):
        file = write_experiment(tmp_path, tmp_path, table, method=method, **changed)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            load_experiment(file)
    config = load_experiment(write_experiment(tmp_path, tmp_path, table, method=method, optim={"steps": 3})).config
    assert config.reference_name == "frozen_adapter"
