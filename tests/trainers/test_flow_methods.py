"""Every picture method on velocity models: the same starts, batches that are their rows, inversion of fixed cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.diffusion.process import RectifiedFlow
from mmalign.errors import ConfigError
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.reference import AdapterOffReference, CopyReference
from mmalign.trainers import METHODS
from mmalign.trainers.base import Parts, Trainer
from mmalign.types import Geometry, RankedBatch, Side
from tests.fixtures.batches import context, gradients, lora_policy
from tests.trainers.test_rank_dpo import ranked_batch
from tests.trainers.test_siblings import batch, single

Families = Callable[[str], DiffusionFamily]
SETTINGS: dict[str, dict[str, Any]] = {
    "diffusion_dpo": {"beta": 50.0},
    "ddim_inpo": {"beta": 50.0, "steps": 3, "eta": 0.0},
    "smpo": {"beta": 50.0, "reward": "made-up", "low": 0.0, "high": 1.0, "mode": "code"},
    "diffusion_kto": {"beta": 50.0},
    "mapo": {},
    "diffusion_orpo": {},
    "linear_dpo": {"beta": 50.0},
    "dspo": {"beta": 0.5},
    "diffusion_sft": {},
    "rank_dpo": {"beta": 50.0},
    "plackett_luce": {"beta": 50.0},
}
LISTS = ("rank_dpo", "plackett_luce")
both = pytest.mark.parametrize("variant", ["sd3", "flux"])


def trainer(name: str, family: DiffusionFamily, policy: nn.Module, reference: Any = None, **more: Any) -> Trainer:
    method = METHODS.get(name)
    held = (reference or AdapterOffReference(policy)) if method.needs_reference else None
    parts = Parts(family=family, policy=policy, reference=held, steps=10)
    return method.build(method.Config(**{**SETTINGS[name], **more}), parts)  # type: ignore[no-any-return]


def made(name: str, number: int) -> Any:
    return ranked_batch(number) if name in LISTS else batch(number)


def single_list(whole: RankedBatch, index: int) -> RankedBatch:
    """One list of a batch as a batch."""
    assert whole.images.pixels is not None
    width, one = whole.mask.shape[1], slice(index, index + 1)
    rows, geometry = slice(width * index, width * (index + 1)), whole.images.geometry
    cut = Geometry(original=geometry.original[rows], crop=geometry.crop[rows], target=geometry.target[rows])
    return replace(
        whole, ids=whole.ids[one], prompts=whole.prompts[one], mask=whole.mask[one], weight=whole.weight[one],
        images=Side(geometry=cut, pixels=whole.images.pixels[rows]),
        scores={name: value[one] for name, value in whole.scores.items()},
    )  # fmt: skip


def test_every_picture_method_is_tested_here() -> None:
    """But PPD, whose batches bring users: tests/models/users and tests/trainers/test_personalized_dpo.py."""
    picture = {name for name in METHODS.names() if METHODS.get(name).batches in ("pairs", "lists")}
    assert picture == {*SETTINGS, "personalized_dpo"}


@both
@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_is_the_mean_of_its_rows_at_mixed_timesteps(tiny_family: Families, name: str, variant: str) -> None:
    """KTO's rows share a reference point, so it is held to finite gradients alone."""
    family = tiny_family(variant)
    policy = lora_policy(family, moved=0.02)
    method, whole = trainer(name, family, policy), made(name, 2)
    together = method.training_step(whole, context())
    together.loss.backward()
    found = gradients(policy)
    assert found and all(torch.isfinite(value).all() for value in found.values())
    largest = max(value.abs().max().item() for value in found.values())
    assert largest > 0
    if name == "diffusion_kto":
        return
    cut = single_list if name in LISTS else single
    alone = torch.stack([method.training_step(cut(whole, index), context()).loss for index in range(2)])
    assert together.loss.item() == pytest.approx(alone.mean().item(), abs=1e-5, rel=1e-5)
    alone.mean().backward()
    for key, value in gradients(policy).items():
        assert torch.allclose(value, found[key], atol=1e-4 * largest), key


@both
@pytest.mark.parametrize("name", ["diffusion_dpo", "ddim_inpo", "smpo"])
def test_a_fresh_adapter_and_a_copy_start_at_log_2(tiny_family: Families, name: str, variant: str) -> None:
    family = tiny_family(variant)
    for policy, reference in (
        (lora_policy(family), None),
        (family.copy_network().requires_grad_(True).train(), CopyReference(family.copy_network())),
    ):
        out = trainer(name, family, policy, reference).training_step(batch(2), context())
        assert out.loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert out.metrics["accuracy"].item() == 0.5


@both
@pytest.mark.parametrize(("name", "calls"), [("ddim_inpo", 3), ("smpo", 10)])
@pytest.mark.parametrize("inverted_by", ["policy", "reference"])
def test_inversion_costs_the_same_at_every_level_and_leaves_no_gradient(
    tiny_family: Families, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, inverted_by: str, variant: str
) -> None:
    """Calls are counted at the family; only the last one, on the policy, may build a graph."""
    family = tiny_family(variant)
    policy = lora_policy(family, moved=0.02)
    method = trainer(name, family, policy, inverted_by=inverted_by)
    graphs: list[bool] = []
    predict = type(family).predict

    def counted(self: Any, *inputs: Any) -> torch.Tensor:
        found = predict(self, *inputs)
        graphs.append(found.requires_grad)
        return found

    monkeypatch.setattr(type(family), "predict", counted)
    for level in (0.01, 0.5, 0.999):
        monkeypatch.setattr(
            RectifiedFlow,
            "sample_t",
            lambda self, uniform, positions=None, level=level: torch.full((len(uniform),), level),
        )
        graphs.clear()
        out = method.training_step(batch(2), context())
        assert graphs == [False] * (calls + 1) + [True]
        assert out.metrics["network_calls"].item() == calls + 2


def test_added_noise_of_ddim_is_refused(tiny_family: Families) -> None:
    family = tiny_family("sd3")
    with pytest.raises(ConfigError, match=r"set method.eta=0"):
        trainer("ddim_inpo", family, lora_policy(family), eta=0.1)


@both
def test_gradient_checkpointing_changes_no_gradient(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    policy: Any = lora_policy(family, moved=0.02)
    found = []
    for switch in (policy.disable_gradient_checkpointing, policy.enable_gradient_checkpointing):
        switch()
        trainer("diffusion_dpo", family, policy).training_step(batch(2), context()).loss.backward()
        found.append(gradients(policy))
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-6)


def test_plackett_luce_starts_at_the_likelihood_of_chance(tiny_family: Families) -> None:
    """Four pictures without ties: log 4! = log 24, whatever the model."""
    family = tiny_family("sd3")
    out = trainer("plackett_luce", family, lora_policy(family), utilities="scores", rewards=("first",)).training_step(
        ranked_batch(2), context()
    )
    assert out.loss.item() == pytest.approx(math.log(24), abs=1e-5)
    assert out.metrics["list_accuracy"].item() == 0.5 and out.metrics["evaluations"].item() == 16


def test_plackett_luce_of_two_pictures_is_diffusion_dpo(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    policy = lora_policy(family, moved=0.02)
    whole = ranked_batch(1, width=2)
    scores = {"first": torch.tensor([[1.0, 0.0]])}
    method = trainer("plackett_luce", family, policy, utilities="scores", rewards=("first",))
    out = method.training_step(replace(whole, scores=scores), context())
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-50.0 * out.metrics["margin"].item())), rel=1e-4)
    turned = method.training_step(replace(whole, scores={"first": torch.tensor([[0.0, 1.0]])}), context())
    assert turned.metrics["margin"].item() == pytest.approx(-out.metrics["margin"].item(), rel=1e-5)
