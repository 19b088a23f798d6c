"""SparsePO on a tiny real model: the start, masks by hand, divergence against full distributions, and what a checkpoint keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.models.reference import AdapterOffReference
from mmalign.models.vlm.base import VlmFamily
from mmalign.models.vlm.states import answer_states
from mmalign.objectives.divergence import token_divergence
from mmalign.trainers.vlm_sparse_po import TokenMasks
from tests.fixtures import tiny_vlm
from tests.trainers.test_vlm import CONTEXT, batch_of, gradient, pairs, policy_of, trainer


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> VlmFamily:
    return tiny_vlm.load("llava", tiny_vlm.build("llava", tmp_path_factory.mktemp("llava")))


def test_divergence_in_chunks_equals_whole_distributions() -> None:
    stream = torch.Generator().manual_seed(0)
    policy = torch.randn(11, 6, generator=stream, dtype=torch.float64).float().requires_grad_()
    reference = torch.randn(11, 6, generator=stream)
    weight, target = torch.randn(9, 6, generator=stream), torch.randint(9, (11,), generator=stream)

    def head(hidden: Tensor) -> Tensor:
        return hidden @ weight.T

    mine, theirs = (head(states).log_softmax(-1) for states in (policy, reference))
    wanted = (theirs.exp() * (theirs - mine)).sum(-1)
    mixture = torch.randn(2, 11, generator=stream)
    (expected,) = torch.autograd.grad((mixture[0] * wanted + mixture[1] * mine[torch.arange(11), target]).sum(), policy)
    for chunk in (1, 4, 100):
        logps, start, kl = token_divergence(policy, reference, target, head=head, reference_head=head, chunk=chunk)
        torch.testing.assert_close(kl, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(start, theirs[torch.arange(11), target])
        (slope,) = torch.autograd.grad((mixture[0] * kl + mixture[1] * logps).sum(), policy)
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)
    assert not start.requires_grad


def test_states_of_all_layers_are_those_of_the_library(family: VlmFamily) -> None:
    """The naive pass: one answer alone with `output_hidden_states`; the last layer's comes before the final norm."""
    (record, *_) = pairs(1)
    (row,) = family.encode(record).rows
    whole = torch.cat([row.prefix, row.branches[1]])[None]
    pixels = torch.stack([unit.tensors["pixel_values"] for unit in row.units])
    seen: list[Tensor] = []
    layers: Any = family.parts()["language"][0]
    hook = layers.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        naive = family.network(input_ids=whole, pixel_values=pixels, output_hidden_states=True)
    hook.remove()
    wanted = [*naive.hidden_states[1:-1], seen[0]]
    for prefix in ("shared", "plain"):
        with torch.no_grad():
            found = answer_states(family, family.network, batch_of(family, [record]), prefix=prefix, layers=True)  # type: ignore[arg-type]
        own = found.flat == 1
        assert found.layers is not None and len(found.layers) == len(wanted)
        for mine, theirs in zip(found.layers, wanted, strict=True):
            torch.testing.assert_close(mine[own], theirs[0, len(row.prefix) - 1 : -1], rtol=1e-4, atol=1e-4)


def test_masks_by_hand() -> None:
    """Two layers, width two: states (3, 1) and (1, 3) are +-1 after the norm."""
    masks = TokenMasks(2, 2)
    states = torch.tensor([[[3.0, 1.0]], [[1.0, 3.0]]])
    assert masks(states).item() == 1.0
    with torch.no_grad():
        masks.direction.copy_(torch.tensor([[0.5, 0.0], [2.0, 0.0]]))
        masks.mix.copy_(torch.tensor([1.0, 4.0]))
        masks.shift.fill_(0.25)
    assert masks(states).item() == pytest.approx(1.5 + 0.25, abs=1e-4)  # the second layer's relu(1 - 2) is shut


@pytest.mark.parametrize("masks", ["common", "independent"])
def test_the_first_step_is_dpo_and_norms(family: VlmFamily, masks: str) -> None:
    batch = batch_of(family, pairs(2))
    made = trainer("vlm_sparse_po", family, policy_of(family), masks=masks, reward_weight=0.01, kl_weight=0.03)
    out = made.training_step(batch, CONTEXT)
    tokens = float(batch.lengths.sum()) / 2
    assert out.loss.item() == pytest.approx(math.log(2) + 0.04 * tokens, rel=1e-5)
    assert out.metrics["mask_reward"].item() == 1.0 and out.metrics["kl_per_token"].item() == pytest.approx(0, abs=1e-6)


def test_without_divergence_and_norms_it_is_dpo_on_masked_tokens(family: VlmFamily) -> None:
    policy, batch = policy_of(family, moved=True), batch_of(family, pairs(2))
    made = trainer("vlm_sparse_po", family, policy, masks="independent", beta=0.3, reward_weight=0.0, kl_weight=0.0)
    with torch.no_grad():
        made.masks[1].mix.zero_()  # no weight on divergence
    loss, slope = gradient(made, batch)
    wanted, expected = gradient(trainer("vlm_dpo", family, policy, beta=0.3), batch)
    assert loss == pytest.approx(wanted, rel=1e-5) and (slope - expected).norm() < 1e-4 * expected.norm()


def test_both_layouts_agree_and_masks_learn(family: VlmFamily) -> None:
    policy, batch = policy_of(family, moved=True), batch_of(family, pairs(3))
    found = []
    for prefix in ("shared", "plain"):
        made = trainer("vlm_sparse_po", family, policy, prefix=prefix)
        direction = made.masks[0].direction
        direction.data.copy_(0.05 * torch.arange(direction.numel()).sin().view_as(direction))
        loss, slope = gradient(made, batch)
        found.append((loss, slope, made.masks[0].direction.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 1e-4 * found[1][1].norm()
    assert (found[0][2] - found[1][2]).norm() < 1e-4 * found[1][2].norm() and found[0][2].norm() > 0
    held = made.parameter_groups()["main"]
    assert all(any(value is other for other in held) for value in made.masks.parameters())


def test_a_checkpoint_brings_the_masks_back(family: VlmFamily) -> None:
    made, other = (trainer("vlm_sparse_po", family, policy_of(family)) for _ in range(2))
    with torch.no_grad():
        made.masks[0].offset.fill_(0.5)
    other.extra_state()["masks"].load_state_dict(made.extra_state()["masks"].state_dict())
    assert torch.equal(other.masks[0].offset, made.masks[0].offset)
    assert isinstance(made.reference, AdapterOffReference)
