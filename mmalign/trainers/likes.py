"""The step of KTO on answers (arXiv:2402.01306), shared by the methods that offer it: labelled answers against a mean of
mismatched ones."""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.branches import BranchBatch
from mmalign.objectives import get_objective
from mmalign.objectives.answers import mismatched_point
from mmalign.objectives.reduce import accuracy, weighted_mean
from mmalign.trainers.answers import AnswerScores
from mmalign.types import StepOutput


def likes_output(
    scores: AnswerScores, batch: BranchBatch, *, labelled: Tensor, liked: Tensor, beta: float, mismatched: bool,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> StepOutput:  # fmt: skip
    """Loss and metrics of scored answers. A record's loss is the mean over its labelled answers.

    Args:
        labelled, liked: bool ``[R]``: answers that are learned from, and which of them are desirable; the others of a batch are
            mismatched answers, which only set the reference point.
        mismatched: hold log-ratios against the mean of mismatched answers on all processes, at least 0; otherwise against 0.

    Raises:
        ValueError: the scores have no reference.
    """
    if scores.reference is None:
        raise ValueError("KTO compares with a reference; these scores have none")
    gains = scores.policy - scores.reference
    weight = batch.weight[batch.record]
    point = _point(gains.detach(), weight * ~labelled) if mismatched else torch.zeros((), device=gains.device)
    each = get_objective("kto_unpaired")(
        gains, desirable=liked, beta=beta, reference_point=point, desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )  # fmt: skip
    counts = torch.zeros_like(batch.weight).index_add(0, batch.record, labelled.float()).clamp_min(1)
    losses = torch.zeros_like(batch.weight).index_add(0, batch.record, torch.where(labelled, each, 0.0)) / counts
    metrics = {"weight": batch.weight.sum(), "loss": weighted_mean(losses.detach(), batch.weight), "reference_point": point}
    metrics |= _metrics(gains.detach() - point, scores.length, weight * labelled, liked, beta)
    return StepOutput(loss=(losses * batch.weight).sum() / len(batch), metrics=metrics)


def _point(gains: Tensor, counted: Tensor) -> Tensor:
    """The reference point over the micro-batch on all processes. Scalar."""
    both = torch.stack([(gains * counted).sum(), counted.sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(both)
    return mismatched_point(both[0], both[1])


def _metrics(above: Tensor, length: Tensor, weight: Tensor, liked: Tensor, beta: float) -> dict[str, Tensor]:
    """Liked answers above the reference point and disliked ones below it; a micro-batch may hold one kind alone."""
    signed = torch.where(liked, above, -above)
    return {
        "accuracy": weighted_mean(accuracy(signed), weight),
        "signed_reward": beta * weighted_mean(signed, weight),
        "liked": weighted_mean(liked.float(), weight), "answer_length": weighted_mean(length, weight),
    }  # fmt: skip
