"""What every method on answers shares: its parts, log-probabilities with the vision tower run once, the step of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.branches import BranchBatch, BranchLogps, VisionFeatures
from mmalign.models.stored_answers import StoredAnswers
from mmalign.objectives.lengths import desensitised_weights
from mmalign.objectives.reduce import pair_metrics, weighted_mean
from mmalign.trainers.base import ModelTrainer, Parts
from mmalign.types import PairScores, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerScores:
    """Log-probabilities of all R answers of a batch, float32, in its flat order."""

    policy: Tensor  # [R], with gradient
    reference: Tensor | None  # [R], without; None where the method has no reference
    length: Tensor  # [R] tokens, turn end included

    def pair(self, batch: BranchBatch) -> PairScores:
        """The same as pairs, chosen first.

        Raises:
            ValueError: a record has not exactly two answers.
        """
        chosen, rejected = batch.pair(torch.arange(len(self.policy), device=self.policy.device))
        return self.compare(chosen, rejected)

    def compare(self, chosen: Tensor, rejected: Tensor) -> PairScores:
        """Pairs of answers by their numbers ``[N]`` in the flat order."""
        asked = self.reference
        return PairScores(
            policy_chosen=self.policy[chosen], policy_rejected=self.policy[rejected],
            reference_chosen=None if asked is None else asked[chosen],
            reference_rejected=None if asked is None else asked[rejected],
            chosen_length=self.length[chosen], rejected_length=self.length[rejected],
        )  # fmt: skip


class AnswerTrainer(ModelTrainer):
    """Parent of the methods on answers: holds what a method is given, and asks about every answer once.

    Settings of a subclass have ``prefix``, those of a method on pairs ``beta`` as well.
    """

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__(config, parts)
        self.features = parts.features

    def scores(self, batch: BranchBatch, *, reference: bool = True) -> AnswerScores:
        """Every answer of a batch that is on its device already, by the policy and (where there is one) the reference.

        Args:
            reference: whether to ask it.
        """
        return answer_scores(
            self.family, self.policy, self.reference if reference else None, batch, prefix=self.config.prefix,
            features=self.features,
        )  # fmt: skip

    def pair_output(
        self, losses: Tensor, scores: PairScores, weight: Tensor, *, paired: Tensor | None = None,
        metrics: Mapping[str, Tensor] | None = None,
    ) -> StepOutput:  # fmt: skip
        """The step's loss and metrics, from one loss per pair.

        Args:
            losses, weight: of the rows. ``[N]``
            paired: 1 for rows whose pair the metrics are to count, 0 for others; default: all. ``[N]``
            metrics: what the method reports of its own.
        """
        counted = weight if paired is None else weight * paired
        told = {
            "weight": weight.sum(), "loss": weighted_mean(losses.detach(), weight),
            **answer_metrics(scores, counted, beta=self.config.beta), **(metrics or {}),
        }  # fmt: skip
        return StepOutput(loss=(losses * weight).sum() / len(weight), metrics=told)


def answer_scores(
    family: Any, policy: nn.Module, reference: Any, batch: BranchBatch, *, prefix: str, features: Any = None
) -> AnswerScores:
    """Score every answer of a batch that is on its device already.

    A frozen vision tower is run once for policy, reference and all answers; where its features are stored, not at all.

    Args:
        family: ``models.vlm.base.VlmFamily``.
        reference: ``models.reference.Reference``, stored answers, or None.
        prefix: ``shared`` (the prompt once for all answers) or ``plain``.
        features: a ``VisionStore``, or None.
    """
    vision = vision_features(family, policy, batch, features)
    found: BranchLogps = family.log_probs(policy, batch, prefix=prefix, vision=vision)
    if reference is None:
        asked = None
    elif isinstance(reference, StoredAnswers):
        asked = reference.of(batch)
    else:
        asked = reference(lambda module: family.log_probs(module, batch, prefix=prefix, vision=vision).sum)
    return AnswerScores(policy=found.sum, reference=asked, length=found.length.float())


def vision_features(family: Any, policy: nn.Module, batch: BranchBatch, features: Any = None) -> VisionFeatures | None:
    """Features that policy and reference share; None where the tower or projector is trained, or nothing is to be seen."""
    if not (batch.media.image or batch.media.video) or not family.shares_vision(policy):
        return None
    if features is not None:
        stored: VisionFeatures = features.of(batch)
        return stored
    with torch.no_grad():
        fresh: VisionFeatures = family.vision_features(policy, batch)
    return fresh


def weigh_excess(batch: BranchBatch, alpha: float) -> BranchBatch:
    """The batch with LD-DPO's token weights: `alpha` for what an answer has beyond the shortest of its record."""
    shortest = torch.full((len(batch),), torch.iinfo(torch.int64).max, device=batch.lengths.device)
    shortest = shortest.scatter_reduce(0, batch.record, batch.lengths, "amin")
    weights = desensitised_weights(batch.offset, shortest[batch.record[batch.flat]], alpha=alpha) * (batch.seg > 0)
    return replace(batch, tok_weight=weights if batch.tok_weight is None else batch.tok_weight * weights)


def answer_metrics(scores: PairScores, weight: Tensor, *, beta: float) -> dict[str, Tensor]:
    """The metrics of every pairwise method, and those of answers: lengths, rewards, and drift per token.

    ``chosen_drift_per_token`` well below zero means that the policy finds even the chosen answers less likely than at the start.
    """
    with torch.no_grad():
        found = pair_metrics(scores, weight)
        both = (scores.chosen_length, scores.rejected_length)
        lengths = [torch.ones_like(weight) if value is None else value.float() for value in both]
        found["chosen_length"], found["rejected_length"] = (weighted_mean(value, weight) for value in lengths)
        found["chosen_nll"] = weighted_mean(-scores.policy_chosen.float() / lengths[0].clamp_min(1), weight)
        if scores.reference_chosen is not None and scores.reference_rejected is not None:
            chosen = scores.policy_chosen.float() - scores.reference_chosen.float()
            rejected = scores.policy_rejected.float() - scores.reference_rejected.float()
            found["chosen_drift_per_token"] = weighted_mean(chosen / lengths[0].clamp_min(1), weight)
            found["reward_chosen"] = weighted_mean(beta * chosen, weight)
            found["reward_rejected"] = weighted_mean(beta * rejected, weight)
            found["reward_margin"] = weighted_mean(beta * (chosen - rejected), weight)
    return found
