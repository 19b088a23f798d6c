"""Methods on answers on a tiny real model: values at the start, gradients, weights of rows and tokens, exact batching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.branches import Answer, BranchBatch, BranchRecord
from mmalign.errors import ConfigError
from mmalign.models.adapters import attach_lora
from mmalign.models.reference import AdapterOffReference
from mmalign.models.stored_answers import StoredAnswers, VisionStore
from mmalign.models.vlm.base import VlmFamily
from mmalign.trainers import METHODS
from mmalign.trainers.answers import weigh_excess
from mmalign.trainers.base import Parts
from mmalign.types import StepContext
from tests.fixtures import tiny_vlm

CONTEXT = StepContext(step=0, seed=0, device=torch.device("cpu"))
LOG2 = 0.6931472


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> VlmFamily:
    return tiny_vlm.load("llava", tiny_vlm.build("llava", tmp_path_factory.mktemp("llava")))


def policy_of(family: VlmFamily, *, moved: bool = False) -> nn.Module:
    """A copy with adapters; `moved`: their second matrices are not zero."""
    policy = attach_lora(family.copy_network(), rank=2, alpha=2.0, targets=tuple(family.lora_targets["language"]))
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, value in policy.named_parameters():
                if "lora_B" in name:
                    value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return policy


def trainer(name: str, family: VlmFamily, policy: nn.Module, *, stored: Any = None, features: Any = None, **settings: Any) -> Any:
    method = METHODS.get(name)
    reference = stored if stored is not None else AdapterOffReference(policy)
    parts = Parts(family=family, policy=policy, reference=reference, steps=4, features=features)
    return method.build(method.Config(name=name, **settings), parts)


def pairs(number: int, **changed: Any) -> list[BranchRecord]:
    """Pairs with unequal answers, a picture each; the last one has two."""
    made = []
    for index in range(number):
        media = [tiny_vlm.picture(index, (24, 24))] * (2 if index == number - 1 else 1)
        answers = ("a red circle" + " and a star" * index, "nothing" + " at all" * (number - index))
        made.append(tiny_vlm.record(f"p{index}", media=media, answers=answers, **changed))
    return made


def batch_of(family: VlmFamily, records: Sequence[BranchRecord]) -> BranchBatch:
    return family.collate([family.encode(record) for record in records])


def gradient(made: Any, batch: Any) -> tuple[float, torch.Tensor]:
    made.policy.zero_grad()
    out = made.training_step(batch, CONTEXT)
    out.loss.backward()
    parts = [value.grad.flatten() for value in made.policy.parameters() if value.requires_grad and value.grad is not None]
    return out.loss.item(), torch.cat(parts)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"objective": "dpo"}, LOG2), ({"objective": "dpo", "label_smoothing": 0.2}, LOG2),
        ({"objective": "robust", "label_smoothing": 0.2}, LOG2), ({"objective": "ipo"}, 25.0),
        ({"objective": "hinge"}, 1.0), ({"objective": "ln_dpo"}, LOG2), ({"objective": "ld_dpo", "alpha": 0.5}, LOG2),
        ({"objective": "kto"}, 0.5), ({"objective": "bco"}, 2 * LOG2), ({"objective": "nca"}, 2 * LOG2),
        ({"objective": "sppo_hard"}, 50.0), ({"objective": "exo_pair", "label_smoothing": 1e-3}, 2.76123),
        ({"objective": "apo_zero"}, 1.0), ({"objective": "apo_down"}, 1.0), ({"objective": "discopop"}, 0.846574),
        ({"objective": "flex_dpo", "beta_rejected": 0.08}, LOG2), ({"mix": {"bco": 0.5}}, 2 * LOG2),
    ],
)  # fmt: skip
def test_values_of_the_first_step(family: VlmFamily, settings: dict[str, Any], expected: float) -> None:
    made = trainer("vlm_dpo", family, policy_of(family), **settings)
    out = made.training_step(batch_of(family, pairs(2)), CONTEXT)
    assert out.loss.item() == pytest.approx(expected, abs=2e-5, rel=1e-5)
    assert out.metrics["accuracy"].item() == 0.5
    assert out.metrics["chosen_drift"].item() == pytest.approx(0.0, abs=1e-5)


def test_the_step_in_plain_transformers(family: VlmFamily) -> None:
    """Every answer read on its own by the library's forward: the loss and its gradient are those of the trainer."""
    policy = policy_of(family, moved=True)
    made, records = trainer("vlm_dpo", family, policy, beta=0.3, nll_weight=0.5), pairs(2)
    loss, found = gradient(made, batch_of(family, records))

    def log_prob(record: BranchRecord, number: int) -> tuple[torch.Tensor, int]:
        row = family.encode(record).rows[0]
        answer = row.branches[number]
        ids = torch.cat([row.prefix, answer])[None]
        pixels = torch.stack([unit.tensors["pixel_values"] for unit in row.units])
        logits = policy(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0]
        values = logits.log_softmax(-1)[len(row.prefix) - 1 : -1].gather(1, answer[:, None])
        return values.sum(), len(answer)

    policy.zero_grad()
    total = torch.zeros(())
    for record in records:
        (chosen, length), (rejected, _) = log_prob(record, 0), log_prob(record, 1)
        reference = AdapterOffReference(policy)
        start = reference(lambda module, own=record: torch.stack([log_prob(own, 0)[0], log_prob(own, 1)[0]]))  # type: ignore[misc]
        margin = (chosen - start[0]) - (rejected - start[1])
        total = total - torch.nn.functional.logsigmoid(0.3 * margin) - 0.5 * chosen / length
    (total / 2).backward()
    expected = torch.cat([v.grad.flatten() for v in policy.parameters() if v.requires_grad and v.grad is not None])
    assert loss == pytest.approx(total.item() / 2, rel=1e-5)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["vlm_dpo", "vlm_sft"])
def test_a_batch_is_the_mean_of_its_rows(family: VlmFamily, name: str) -> None:
    policy = policy_of(family, moved=True)
    made, records = trainer(name, family, policy), pairs(3)
    if name == "vlm_sft":
        records = [replace(record, answers=record.answers[:1]) for record in records]
    whole, gradients = gradient(made, batch_of(family, records))
    single = [gradient(made, batch_of(family, [record])) for record in records]
    assert whole == pytest.approx(sum(loss for loss, _ in single) / 3, rel=1e-5)
    assert (gradients - sum(g for _, g in single) / 3).norm() < 1e-5 * gradients.norm()


def test_a_row_without_weight_teaches_nothing(family: VlmFamily) -> None:
    policy = policy_of(family, moved=True)
    made = trainer("vlm_dpo", family, policy)
    first, second = pairs(2)
    alone, expected = gradient(made, batch_of(family, [first]))
    masked, found = gradient(made, batch_of(family, [first, replace(second, weight=0.0)]))
    assert masked == pytest.approx(alone / 2, rel=1e-5)
    assert (2 * found - expected).norm() < 1e-5 * expected.norm()


def test_soft_labels_and_margins_are_those_of_the_table(family: VlmFamily) -> None:
    policy = policy_of(family, moved=True)
    soft = trainer("vlm_dpo", family, policy, soft_labels=True)
    (record,) = pairs(1)
    even = soft.training_step(batch_of(family, [replace(record, p_chosen=0.5)]), CONTEXT)
    margin = even.metrics["reward_margin"]
    sigmoid = torch.nn.functional.logsigmoid
    assert even.loss.item() == pytest.approx(-0.5 * (sigmoid(margin) + sigmoid(-margin)).item(), rel=1e-5)
    better, worse = record.answers
    scored = replace(record, answers=(replace(better, scores={"length": 3.0}), replace(worse, scores={"length": 1.0})))
    multi = trainer("vlm_dpo", family, policy, objective="modpo", margin_weights={"length": 0.1}, own_weight=0.5)
    out = multi.training_step(batch_of(family, [scored]), CONTEXT)
    assert out.loss.item() == pytest.approx(-sigmoid((margin - 0.2) / 0.5).item(), rel=1e-4)
    with pytest.raises(ConfigError, match="no scores of 'length'"):
        multi.training_step(batch_of(family, [record]), CONTEXT)


def test_tokens_beyond_the_shorter_answer_are_weighed_down(family: VlmFamily) -> None:
    batch = batch_of(family, pairs(2))
    weighed = weigh_excess(batch, 0.25)
    assert weighed.tok_weight is not None
    for record in range(2):
        own = [int(number) for number in (batch.record == record).nonzero().flatten()]
        shortest = min(int(batch.lengths[number]) for number in own)
        for number in own:
            found = weighed.tok_weight[(batch.flat == number) & (batch.seg > 0)]
            length = int(batch.lengths[number])
            assert found.sum().item() == pytest.approx(shortest + 0.25 * (length - shortest))
    made = trainer("vlm_dpo", family, policy_of(family, moved=True), objective="ld_dpo", alpha=1.0)
    plain = trainer("vlm_dpo", family, made.policy)
    unweighed = plain.training_step(batch, CONTEXT).loss.item()
    assert made.training_step(batch, CONTEXT).loss.item() == pytest.approx(unweighed, rel=1e-5)


def labelled(records: Sequence[BranchRecord], others: Sequence[str]) -> list[BranchRecord]:
    """Each record's first answer with a label, liked and disliked in turn, and another row's answer behind it."""
    return [
        replace(record, answers=(replace(record.answers[0], label=float(number % 2 == 0)), Answer(text=other)))
        for number, (record, other) in enumerate(zip(records, others, strict=True))
    ]


def test_kto_against_the_mean_of_mismatched_answers(family: VlmFamily) -> None:
    policy = policy_of(family, moved=True)
    made = trainer("vlm_kto", family, policy, beta=0.5, undesirable_weight=2.0)
    batch = batch_of(family, labelled(pairs(2), ["another star", "a blue square"]))
    out = made.training_step(batch, CONTEXT)
    logps = family.log_probs(policy, batch).sum.detach()
    start = AdapterOffReference(policy)(lambda module: family.log_probs(module, batch).sum)
    gains = logps - start
    point = gains[1::2].mean().clamp_min(0)
    expected = (torch.sigmoid(-0.5 * (gains[0] - point)) + 2 * torch.sigmoid(0.5 * (gains[2] - point))) / 2
    assert out.metrics["reference_point"].item() == pytest.approx(point.item(), abs=1e-6)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    zero = trainer("vlm_kto", family, policy, reference_point="zero")
    assert zero.training_step(batch, CONTEXT).metrics["reference_point"].item() == 0.0


def test_kto_on_pairs_likes_the_first_answer(family: VlmFamily) -> None:
    made = trainer("vlm_kto", family, policy_of(family), reference_point="zero")
    out = made.training_step(batch_of(family, pairs(2)), CONTEXT)
    assert out.loss.item() == pytest.approx(0.5, abs=1e-6)
    assert out.metrics["liked"].item() == 0.5


def test_stored_parts_stand_for_computed_ones(family: VlmFamily, tmp_path: Path) -> None:
    policy = policy_of(family, moved=True)
    batch = batch_of(family, pairs(2))
    expected = trainer("vlm_dpo", family, policy).training_step(batch, CONTEXT)
    sums = AdapterOffReference(policy)(lambda module: family.log_probs(module, batch).sum).tolist()
    store = VisionStore(tmp_path / "vision")
    assert store.lacks(batch)
    store.put(batch, family.vision_features(policy, batch))
    assert not store.lacks(batch)
    stored = StoredAnswers({"p0": sums[:2], "p1": sums[2:]})
    found = trainer("vlm_dpo", family, policy, stored=stored, features=store).training_step(batch, CONTEXT)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    with pytest.raises(Exception, match="row 'p0' are not stored"):
        trainer("vlm_dpo", family, policy, stored=StoredAnswers()).training_step(batch, CONTEXT)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("vlm_dpo", {"beta": 0.0}), ("vlm_dpo", {"label_smoothing": 0.5}), ("vlm_dpo", {"nll_weight": -1.0}),
        ("vlm_dpo", {"objective": "modpo"}), ("vlm_dpo", {"mix": {"nonsense": 1.0}}), ("vlm_dpo", {"objective": "lc_dpo"}),
        ("vlm_dpo", {"soft_labels": True, "label_smoothing": 0.1}), ("vlm_kto", {"beta": -1.0}),
        ("vlm_kto", {"desirable_weight": -1.0}),
    ],
)  # fmt: skip
def test_settings_without_meaning_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|needs|cannot|works"):
        METHODS.get(name).Config(name=name, **wrong)


def test_methods_without_a_reference_ask_for_none() -> None:
    for objective, extra, expected in (("dpo", {}, True), ("simpo", {"gamma": 1.0}, False), ("orpo", {}, False)):
        config = METHODS.get("vlm_dpo").Config(objective=objective, **extra)
        assert METHODS.get("vlm_dpo").wants_reference(config) is expected
    mixed = METHODS.get("vlm_dpo").Config(objective="orpo", mix={"dpo": 0.5})
    assert METHODS.get("vlm_dpo").wants_reference(mixed)


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        ({"objective": "dpo"}, ("vlm_dpo", {"objective": "dpo"})),
        ({"objective": "lc_dpo"}, ("vlm_dpo", {"objective": "lc_dpo", "alpha": 0.05})),
        ({"objective": "lc_dpo", "alpha": 0.2}, ("vlm_dpo", {"objective": "lc_dpo", "alpha": 0.2})),
        ({"objective": "ipo", "beta": 0.3}, ("vlm_dpo", {"objective": "ipo", "beta": 0.3})),
        ({"objective": "orpo"}, ("vlm_dpo", {"objective": "orpo"})),
    ],
)  # fmt: skip
def test_the_report_recipe_computes_the_study_s_objectives(
    family: VlmFamily, settings: dict[str, Any], other: tuple[str, dict[str, Any]]
) -> None:
    policy = policy_of(family, moved=True)
    batch = batch_of(family, pairs(3))
    ours, wanted = (gradient(trainer(name, family, policy, **given), batch) for name, given in (("cxr_dpo", settings), other))
    assert ours[0] == pytest.approx(wanted[0], rel=1e-6) and torch.allclose(ours[1], wanted[1], rtol=1e-5, atol=1e-7)


def test_the_report_recipe_s_kto_likes_and_dislikes_against_another_study_s_report(family: VlmFamily) -> None:
    """The chosen answer is liked, the rejected one disliked, the third (of another row) sets the reference point."""
    policy = policy_of(family, moved=True)
    made = trainer("cxr_dpo", family, policy, objective="kto", beta=0.5)
    assert made.wants_mismatched(made.config) and not made.wants_mismatched(made.Config(objective="dpo"))
    records = [replace(r, answers=(*r.answers, Answer(text=f"a star {n}"))) for n, r in enumerate(pairs(3))]
    labelled = [
        replace(r, answers=(replace(r.answers[0], label=1.0), replace(r.answers[1], label=0.0), r.answers[2])) for r in records
    ]
    ours = gradient(made, batch_of(family, records))
    wanted = gradient(trainer("vlm_kto", family, policy, beta=0.5), batch_of(family, labelled))
    assert ours[0] == pytest.approx(wanted[0], rel=1e-6) and torch.allclose(ours[1], wanted[1], rtol=1e-5, atol=1e-7)


def test_the_report_recipe_refuses_settings_without_effect_and_says_what_it_is_not() -> None:
    method = METHODS.get("cxr_dpo")
    wrong_ones = {"beta": 0}, {"objective": "dpo", "alpha": 0.1}, {"objective": "lc_dpo", "alpha": -1.0}, {"objective": "simpo"}
    for wrong in wrong_ones:
        with pytest.raises(ValueError):
            method.Config(**wrong)
    assert "Not a medical device" in method.notice
    assert not method.wants_reference(method.Config(objective="orpo")) and method.wants_reference(method.Config())
