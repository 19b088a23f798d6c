"""Methods on three and more answers, and on whole conversations, on a tiny real model: values, gradients, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.branches import Answer, BranchRecord, Message, Part
from mmalign.errors import ConfigError
from mmalign.models.reference import AdapterOffReference
from mmalign.models.vlm.base import VlmFamily
from mmalign.objectives import get_objective
from mmalign.trainers.answers import answer_scores
from mmalign.types import PairScores, RankedScores
from tests.fixtures import tiny_vlm
from tests.trainers.test_vlm import CONTEXT, batch_of, gradient, policy_of, trainer

TEXTS = ("a red circle", "there is nothing here, no star", "yes", "two green triangles")
VALUES = (3.0, 1.0, 2.0, 1.0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> VlmFamily:
    return tiny_vlm.load("qwen2_5_vl", tiny_vlm.build("qwen2_5_vl", tmp_path_factory.mktemp("qwen")))


def lists(number: int, count: int = 4, **scores: tuple[float, ...]) -> list[BranchRecord]:
    made = []
    for index in range(number):
        record = tiny_vlm.record(f"l{index}", media=[tiny_vlm.picture(index)], answers=TEXTS[: count - index])
        given = scores or {"judge": VALUES}
        answers = tuple(
            replace(answer, scores={name: values[place] for name, values in given.items()})
            for place, answer in enumerate(record.answers)
        )
        made.append(replace(record, answers=answers))
    return made


def gains(family: VlmFamily, policy: Any, records: list[BranchRecord]) -> Tensor:
    """Policy minus reference, token by token mean, every answer in a batch and row of its own."""
    found = []
    for record in records:
        for answer in record.answers:
            batch = batch_of(family, [replace(record, answers=(answer,))])
            scores = answer_scores(family, policy, AdapterOffReference(policy), batch, prefix="plain")
            assert scores.reference is not None
            found.append((scores.policy - scores.reference) / scores.length)
    return torch.cat(found)


@pytest.mark.parametrize("objective", ["tree_po", "rank_dpo", "plackett_luce"])
def test_a_list_is_the_objective_of_its_answers_one_by_one(family: VlmFamily, objective: str) -> None:
    policy, records = policy_of(family, moved=True), lists(2)
    made = trainer("vlm_list", family, policy, objective=objective, beta=2.0)
    loss, slope = gradient(made, batch_of(family, records))
    policy.zero_grad()
    values = gains(family, policy, records)
    table = torch.zeros(2, 4).index_put((torch.tensor([0] * 4 + [1] * 3), torch.tensor([0, 1, 2, 3, 0, 1, 2])), values)
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    ranked = RankedScores(policy=table, reference=torch.zeros(2, 4), utilities=torch.tensor([VALUES] * 2), mask=mask)
    wanted = get_objective(objective)(ranked, beta=2.0).mean()
    wanted.backward()
    expected = torch.cat([v.grad.flatten() for v in policy.parameters() if v.requires_grad and v.grad is not None])
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    assert (slope - expected).norm() < 1e-4 * expected.norm()


def test_two_answers_of_a_list_are_a_pair(family: VlmFamily) -> None:
    """Uniform Tree-PO on two answers, sums of tokens, is DPO; and at the start it is log 2."""
    policy, records = policy_of(family, moved=True), lists(1, 2)
    tree = trainer("vlm_list", family, policy, beta=0.1, length_average=False, weighting="uniform")
    dpo = trainer("vlm_dpo", family, policy, beta=0.1)
    (loss, slope), (wanted, expected) = (gradient(made, batch_of(family, records)) for made in (tree, dpo))
    assert loss == pytest.approx(wanted, rel=1e-6) and (slope - expected).norm() < 1e-5 * expected.norm()
    fresh = trainer("vlm_list", family, policy_of(family), beta=0.1, weighting="uniform")
    out = fresh.training_step(batch_of(family, lists(1)), CONTEXT)
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-5) and out.metrics["list_accuracy"].item() == 0.5


def test_weighed_tokens_make_weighted_means(family: VlmFamily) -> None:
    """A span of weight 0 over an answer's first word leaves the rest: the same as the mean over the other tokens."""
    policy = policy_of(family, moved=True)
    record = lists(1, 2)[0]
    weighed = replace(record, answers=(replace(record.answers[0], spans=((0, 2, 0.0),)), record.answers[1]))
    made = trainer("vlm_list", family, policy, beta=1.0)
    batch = batch_of(family, [weighed])
    scores = made.ranked(answer_scores(family, policy, AdapterOffReference(policy), batch, prefix="shared"), batch)
    tokens = family.log_probs(policy, batch, per_token=True)
    assert tokens.tokens is not None and batch.tok_weight is not None
    kept = batch.tok_weight[0, : int(batch.lengths[0])]
    assert kept.min() == 0 and kept.max() == 1
    wanted = (tokens.tokens[0, : len(kept)] * kept).sum() / kept.sum()
    assert scores.policy[0, 0].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_answers_without_a_number_take_no_part(family: VlmFamily) -> None:
    policy = policy_of(family, moved=True)
    full = lists(1)[0]
    holed = replace(full, answers=(*full.answers[:3], replace(full.answers[3], scores={})))
    made = trainer("vlm_list", family, policy, beta=2.0)
    three = replace(full, answers=full.answers[:3])
    (one, _), (other, _) = (gradient(made, batch_of(family, [record])) for record in (holed, three))
    assert one == pytest.approx(other, rel=1e-5)


def test_the_scores_must_be_named_where_there_are_several(family: VlmFamily) -> None:
    policy = policy_of(family)
    batch = batch_of(family, lists(1, a=VALUES, b=VALUES))
    with pytest.raises(ConfigError, match="scores of a, b; name one"):
        trainer("vlm_list", family, policy).training_step(batch, CONTEXT)
    with pytest.raises(ConfigError, match="no scores of 'c'"):
        trainer("vlm_list", family, policy, scores="c").training_step(batch, CONTEXT)
    with pytest.raises(ValueError, match="weighting has no effect"):
        trainer("vlm_list", family, policy, objective="rank_dpo", weighting="uniform")


def triple() -> list[BranchRecord]:
    made = [tiny_vlm.record(f"t{n}", media=[tiny_vlm.picture(n)], answers=TEXTS[:2]) for n in range(2)]
    return [replace(record, answers=(*record.answers, Answer(text=TEXTS[3]))) for record in made]


@pytest.mark.parametrize("settings", [{}, {"length_average": True, "gamma": 0.5, "beta": 2.0, "alpha": 0.3}])
def test_triples_are_a_preference_and_a_likelihood(family: VlmFamily, settings: dict[str, Any]) -> None:
    policy = policy_of(family, moved=True)
    batch = batch_of(family, triple())
    out = trainer("vlm_tpo", family, policy, stored=False, **settings).training_step(batch, CONTEXT)
    with torch.no_grad():
        found = family.log_probs(policy, batch, prefix="plain")
    values = {"beta": 0.01, "alpha": 1.0, "gamma": 0.0, "length_average": False} | settings
    sums = found.average() if values["length_average"] else found.sum
    wanted = [
        math.log1p(math.exp(-(values["beta"] * float(sums[3 * n] - sums[3 * n + 1]) - values["gamma"])))
        - values["alpha"] * float(found.average()[3 * n + 2])
        for n in range(2)
    ]
    assert out.loss.item() == pytest.approx(sum(wanted) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="TPO-L"):
        trainer("vlm_tpo", family, policy, stored=False, gamma=0.5)


def test_triple_po_by_hand() -> None:
    """Sums -4 and -8 over 2 and 4 tokens: means are equal, so that TPO-L sees its margin alone."""
    scores = PairScores(
        policy_chosen=torch.tensor([-4.0]), policy_rejected=torch.tensor([-8.0]), reference_chosen=None, reference_rejected=None,
        chosen_length=torch.tensor([2.0]), rejected_length=torch.tensor([4.0]),
    )  # fmt: skip
    loss = get_objective("triple_po")
    anchor = torch.tensor([0.25])
    assert loss(scores, beta=0.5, anchor=anchor, alpha=2.0).item() == pytest.approx(math.log1p(math.exp(-2)) + 0.5)
    found = loss(scores, beta=0.5, anchor=anchor, alpha=0.0, length_average=True, gamma=0.5).item()
    assert found == pytest.approx(math.log1p(math.exp(0.5)))


def asked(prompt: str, answer: str, number: int = 1) -> BranchRecord:
    return tiny_vlm.record("d", media=[tiny_vlm.picture(number)], answers=(answer,), prompt=prompt)


def conversations(*, words_first: bool = False) -> BranchRecord:
    """Two questions about one picture, with an answer each."""
    one, other = asked("What is in the picture?", TEXTS[0]), asked("Is there a star? yes no", TEXTS[1])

    def turned(record: BranchRecord) -> tuple[Message, ...]:
        (message,) = record.messages
        return (Message(role="user", parts=message.parts[::-1]),) if words_first else record.messages

    return replace(one, messages=turned(one), answers=(*one.answers, replace(other.answers[0], messages=turned(other))))


def joint_sum(family: VlmFamily, policy: Any, record: BranchRecord) -> Tensor:
    """log p of everything behind the picture, by the library's own forward on the whole conversation."""
    (row,) = family.encode(record).rows
    whole = torch.cat([row.prefix, row.branches[0]])[None]
    cut = int((family.token_types(row.prefix) > 0).nonzero()[-1]) + 1
    (unit,) = row.units
    logits = policy(
        input_ids=whole, attention_mask=torch.ones_like(whole), mm_token_type_ids=family.token_types(whole),
        pixel_values=unit.tensors["pixel_values"], image_grid_thw=unit.tensors["image_grid_thw"][None],
    ).logits[0]  # fmt: skip
    found: Tensor = logits[cut - 1 : -1].log_softmax(-1).gather(1, whole[0, cut:, None]).sum()
    return found


def test_conversations_are_scored_from_the_picture_on(family: VlmFamily) -> None:
    policy = policy_of(family, moved=True)
    record = replace(conversations(), joint=True)
    example = family.encode(record)
    assert len(example.rows) == 1 and len(example.rows[0].units) == 1  # two prompts, one picture, one row
    batch = family.collate([example])
    assert not (family.token_types(batch.target) > 0).any()
    loss, slope = gradient(trainer("vlm_dove", family, policy, beta=0.3), batch)
    policy.zero_grad()
    parts = (asked("What is in the picture?", TEXTS[0]), asked("Is there a star? yes no", TEXTS[1]))
    start = AdapterOffReference(policy)(lambda module: torch.stack([joint_sum(family, module, part) for part in parts]))
    now = torch.stack([joint_sum(family, policy, part) for part in parts])
    wanted = -torch.nn.functional.logsigmoid(0.3 * ((now - start)[0] - (now - start)[1]))
    wanted.backward()
    expected = torch.cat([v.grad.flatten() for v in policy.parameters() if v.requires_grad and v.grad is not None])
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    assert (slope - expected).norm() < 1e-4 * expected.norm()


def test_equal_instructions_cancel(family: VlmFamily) -> None:
    policy = policy_of(family, moved=True)
    record = tiny_vlm.record("d", media=[tiny_vlm.picture(1)], answers=TEXTS[:2])
    dove, _ = gradient(trainer("vlm_dove", family, policy), batch_of(family, [replace(record, joint=True)]))
    dpo, _ = gradient(trainer("vlm_dpo", family, policy), batch_of(family, [record]))
    assert dove == pytest.approx(dpo, rel=1e-5)


@pytest.mark.parametrize("joint", [True, False])
def test_prompts_that_share_nothing_have_rows_of_their_own(family: VlmFamily, joint: bool) -> None:
    """Words before the picture, or answers that are scored alone: every answer stands behind its own prompt."""
    record = replace(conversations(words_first=joint), joint=joint)
    example = family.encode(record)
    assert len(example.rows) == 2 and "own_prompt" in example.flags
    batch = family.collate([example])
    with torch.no_grad():
        both = family.log_probs(family.network, batch).sum
        alone = []
        for answer in record.answers:
            single = replace(record, messages=answer.messages or record.messages, answers=(replace(answer, messages=None),))
            alone.append(family.log_probs(family.network, batch_of(family, [single])).sum)
    assert torch.allclose(both, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_text_alone_is_scored_from_its_second_token(family: VlmFamily) -> None:
    record = replace(tiny_vlm.record("d", answers=TEXTS[:1]), joint=True)
    plain = family.encode(replace(record, joint=False)).rows[0]
    (row,) = family.encode(record).rows
    assert len(row.prefix) == 1
    assert torch.equal(torch.cat([row.prefix, row.branches[0]]), torch.cat([plain.prefix, plain.branches[0]]))
    assert torch.equal(row.positions, plain.positions)
    assert record.messages[-1].parts == (Part(text="What is in the picture?"),)
