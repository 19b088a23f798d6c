"""PPD through tiny real networks: where it starts, who sees the user, what a batch of several users means."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.reference import UntrainedReference
from mmalign.models.users.adapter import AdapterSettings, adapter_of, attach
from mmalign.trainers import METHODS
from mmalign.trainers.base import Parts
from mmalign.trainers.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from mmalign.trainers.personalized_dpo import PersonalizedDPO, PersonalizedDPOConfig
from mmalign.types import PairBatch
from tests.fixtures.batches import cached, context, pair_batch, row, swapped
from tests.models.users.test_user_attention import spoil

Families = Callable[[str], DiffusionFamily]
ROWS, DIM = 2, 6
ENCODED = {"source": "encoded", "encoder": "clip", "path": "somewhere"}


def people(number: int, seed: int = 0, first: int = 0) -> Tensor:
    return torch.randn(8, ROWS, DIM, generator=torch.Generator().manual_seed(seed))[first : first + number]


def batch(number: int = 3, first: int = 0, **words: Any) -> PairBatch:
    names = ("a", "b", "a", "c")[:number]
    return replace(pair_batch(number, first=first), user=people(number, first=first), users=names, **words)


def policy(family: DiffusionFamily, *, trained: bool = True) -> nn.Module:
    network = copy.deepcopy(family.network).requires_grad_(False)
    adapter = attach(network, AdapterSettings(rows=ROWS, dim=DIM), seed=3)
    if trained:
        spoil(adapter)
    return network


def trainer(family: DiffusionFamily, network: nn.Module, **settings: Any) -> PersonalizedDPO:
    parts = Parts(family=family, policy=network, reference=UntrainedReference(network), steps=10)
    values = {"beta": 500.0, "user_dropout": 0.0, "users": ENCODED, **settings}
    return PersonalizedDPO.build(PersonalizedDPOConfig(**values), parts)


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("variant", ["sd1", "sdxl", "sd3"])
def test_a_fresh_adapter_gives_exactly_log_2_and_moves_values_alone(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    network = policy(family, trained=False)
    out = trainer(family, network).training_step(batch(), context())
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert out.metrics["margin"].item() == 0.0 and out.metrics["user_accuracy"].item() == 0.5
    assert out.metrics["users_in_batch"].item() == 2.0
    moved = {name for name, value in gradients(network, out.loss).items() if bool(value.any())}
    assert moved == {name for name, _ in network.named_parameters() if name.endswith("to_v_user.weight")}


def test_the_reference_never_sees_the_user(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    method = trainer(family, policy(family))
    here, other = batch(), batch()
    other = replace(other, user=people(3, seed=5))
    seen = []
    for one in (here, other):
        users, _ = method.with_dropout(one, context())
        from mmalign.diffusion.noise import GaussianNoise
        from mmalign.models.diffusion.pairs import denoising_scores

        seen.append(denoising_scores(family, method.policy, method.reference, GaussianNoise(), one, context(), users=users))
    first, second = seen
    assert torch.equal(first.reference_chosen, second.reference_chosen)  # type: ignore[arg-type]
    assert torch.equal(first.reference_rejected, second.reference_rejected)  # type: ignore[arg-type]
    assert not torch.allclose(first.policy_chosen, second.policy_chosen, atol=1e-5)


def test_one_user_for_all_is_diffusion_dpo_with_a_constant_user(tiny_family: Families) -> None:
    """And with nobody at all it is Diffusion-DPO on a policy that equals its reference."""
    family = tiny_family("sd1")
    network = policy(family)
    nobody = trainer(family, network, user_dropout=0.999999).training_step(batch(), context())
    assert nobody.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    parts = Parts(family=family, policy=network, reference=UntrainedReference(network), steps=10)
    plain = DiffusionDPO.build(DiffusionDPOConfig(beta=500.0), parts).training_step(pair_batch(3), context())
    assert plain.loss.item() == pytest.approx(nobody.loss.item(), abs=1e-6)


def test_a_batch_of_several_users_is_its_rows(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    network = policy(family)
    method = trainer(family, network, user_dropout=0.5)
    whole = batch(4)
    together = method.training_step(whole, context())
    alone = [
        method.training_step(replace(row(whole, index), user=whole.user[index : index + 1]), context())  # type: ignore[index]
        for index in range(4)
    ]
    assert together.loss.item() == pytest.approx(sum(out.loss.item() for out in alone) / 4, rel=1e-5)
    singles = [replace(row(whole, index), user=whole.user[index : index + 1]) for index in range(4)]  # type: ignore[index]
    expected = [gradients(network, method.training_step(one, context()).loss) for one in singles]
    for name, value in gradients(network, method.training_step(whole, context()).loss).items():
        torch.testing.assert_close(value, sum(one[name] for one in expected) / 4, atol=1e-5, rtol=1e-3)


def test_turning_the_verdicts_round_turns_the_margin_round(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    method = trainer(family, policy(family))
    found = cached(batch(1), family)
    # The VAE's noise is keyed by side; without it the two directions have the same latents.
    sides = {name: replace(side, moments=replace(side.moments, std=torch.zeros_like(side.moments.std)))
             for name, side in (("chosen", found.chosen), ("rejected", found.rejected))}  # type: ignore[union-attr]  # fmt: skip
    here = replace(found, **sides)
    first = method.training_step(here, context()).metrics["margin"].item()
    second = method.training_step(swapped(here), context()).metrics["margin"].item()
    assert first != 0 and second == pytest.approx(-first, rel=1e-4, abs=1e-8)


def test_dropout_is_a_function_of_seed_step_and_row(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    method = trainer(family, policy(family), user_dropout=0.5)
    kept = [method.with_dropout(batch(4), context(step))[1].tolist() for step in range(40)]
    assert kept == [method.with_dropout(batch(4), context(step))[1].tolist() for step in range(40)]
    assert [method.with_dropout(batch(1, first=2), context(step))[1].tolist() for step in range(40)] == [one[2:3] for one in kept]
    share = sum(map(sum, kept)) / 160
    assert 0.35 < share < 0.65
    (user, weights), one = method.with_dropout(batch(4), context(0))
    assert weights[:, 0].tolist() == [float(value) for value in one] and user.shape == (4, 1, ROWS, DIM)


def test_a_population_stands_for_nobody_where_that_is_asked_for(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    network = policy(family)
    population = trainer(family, network, user_dropout=0.999999, null="population")
    (user, weights), kept = population.with_dropout(batch(), context())
    assert not kept.any() and not user.any() and weights.tolist() == [[1.0]] * 3
    found = gradients(network, population.training_step(batch(), context()).loss)
    assert found["user_adapter.proj.0.bias"].any()
    base = trainer(family, network, user_dropout=0.999999)
    assert not any(value.any() for value in gradients(network, base.training_step(batch(), context()).loss).values())


def test_places_in_an_own_table_train_the_rows_of_the_batch_alone(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    network = copy.deepcopy(family.network).requires_grad_(False)
    adapter = attach(network, AdapterSettings(rows=ROWS, dim=DIM, users=4), seed=3)
    spoil(adapter)
    method = trainer(family, network, users={"source": "table", "rows": ROWS, "dim": DIM})
    found = gradients(network, method.training_step(replace(batch(), user=torch.tensor([2, 0, 2])), context()).loss)
    moved = found["user_adapter.table"].flatten(1).any(1).tolist()
    assert moved == [True, False, True, False]


def test_settings_without_meaning_are_refused() -> None:
    for settings, message in (
        ({"beta": 0}, "beta must be positive"), ({"user_dropout": 1.0}, r"user_dropout must be in \[0, 1\)"),
        ({"users": {"source": "encoded"}}, "path: the encoder's folder"),
        ({"users": {**ENCODED, "shots": 0}}, "shots must be at least 1"),
        ({"users": {"source": "table"}, "null": "population"}, "null 'population' replaces an embedding"),
        ({"users": {"source": "prototypes", "prototypes": 1}}, "one is no mixture"), ({"users": {**ENCODED, "shot": 3}}, "shot"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=message):
            PersonalizedDPOConfig(**{"users": ENCODED, **settings})


def test_a_batch_without_users_is_refused(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    method = trainer(family, policy(family))
    with pytest.raises(ValueError, match="needs batches that bring their users"):
        method.training_step(pair_batch(2), context())
    assert METHODS.get("personalized_dpo").users(method.config) is method.config.users
    assert METHODS.get("diffusion_dpo").users(DiffusionDPOConfig()) is None
    assert adapter_of(method.policy) is not None
