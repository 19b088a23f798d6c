"""A ranked list of answers to one question: Tree-PO's weighted pairs, RankDPO's, or the likelihood of the whole ranking.

All answers of a list are branches behind one prompt, so that a list of K costs K answers and one prompt. Choices in plain words:

- An answer's gain is policy minus reference, by default per token: a mean that token weights (the table's spans) weigh, which is
  how weights of reasoning steps enter. arXiv:2410.12854 weighs steps by their likeness to those of the best answer; making such
  weights is the table's matter. The weight of a pair could not be confirmed there: see ``objectives.trees``.
- Utilities are the table's scores of one judge; an answer without a number takes no part.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmalign.branches import BranchBatch
from mmalign.config import Section
from mmalign.errors import ConfigError
from mmalign.objectives import get_objective
from mmalign.objectives.reduce import weighted_mean
from mmalign.trainers.answers import AnswerScores, AnswerTrainer
from mmalign.trainers.lists import list_metrics
from mmalign.types import RankedScores, StepContext, StepOutput


class VlmListConfig(Section):
    """Settings of training on ranked lists of answers."""

    name: str = "vlm_list"
    objective: Literal["tree_po", "rank_dpo", "plackett_luce"] = "tree_po"
    """Weighted mean of pairwise losses, sum of pairwise losses by gain and rank, or the likelihood of the ranking."""
    beta: float = 0.1
    """Strength of the pull to the reference; per token where gains are means, so larger there."""
    scores: str | None = None
    """Which of the table's scores ranks the answers; default: the only one."""
    length_average: bool = True
    """Gains as means over tokens (weighted by the table's spans) instead of sums."""
    weighting: Literal["lambda", "uniform"] = "lambda"
    """`tree_po`: what swapping two answers would cost, or all pairs alike."""
    prefix: Literal["shared", "plain"] = "shared"
    """One row per prompt with its answers behind it, or one row per answer; equal results."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning or effect."""
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.objective != "tree_po" and self.weighting != "lambda":
            raise ValueError(f"weighting has no effect with objective '{self.objective}'; remove it")


class VlmList(AnswerTrainer):
    """See the module's head."""

    Config = VlmListConfig
    batches: ClassVar[str] = "vlm_lists"
    stored_reference: ClassVar[bool] = True

    def training_step(self, batch: BranchBatch, ctx: StepContext) -> StepOutput:
        batch = batch.to(ctx.device)
        found = self.scores(batch)
        scores, weight = self.ranked(found, batch), batch.weight
        options = {"weighting": self.config.weighting} if self.config.objective == "tree_po" else {}
        losses = get_objective(self.config.objective)(scores, beta=self.config.beta, **options)
        metrics = {"weight": weight.sum(), "loss": weighted_mean(losses.detach(), weight), **list_metrics(scores, weight)}
        metrics["answer_length"] = weighted_mean(found.length, weight[batch.record])
        return StepOutput(loss=(losses * weight).sum() / len(batch), metrics=metrics)

    def ranked(self, found: AnswerScores, batch: BranchBatch) -> RankedScores:
        """Scored answers as lists with their utilities.

        Raises:
            ConfigError: the table has no such scores, or several and none is named.
        """
        size = self._tokens(batch) if self.config.length_average else torch.ones_like(found.length)
        policy, there = batch.table(found.policy / size)
        reference = None if found.reference is None else batch.table(found.reference / size)[0]
        utilities, _ = batch.table(self._utilities(batch), fill=float("nan"))
        known = there & ~torch.isnan(utilities)
        return RankedScores(policy=policy, reference=reference, utilities=utilities.nan_to_num(), mask=known)

    def _tokens(self, batch: BranchBatch) -> Tensor:
        """What the tokens of every answer weigh together. ``[R]``"""
        if batch.tok_weight is None:
            return batch.lengths.float().clamp_min(1)
        weights = (batch.tok_weight * (batch.seg > 0)).flatten()
        total = weights.new_zeros(batch.num_answers).index_add(0, batch.flat.flatten(), weights)
        return total.clamp_min(torch.finfo(torch.float32).tiny)

    def _utilities(self, batch: BranchBatch) -> Tensor:
        name, held = self.config.scores, sorted(batch.scores)
        if name is None:
            if len(held) != 1:
                said = f"scores of {', '.join(held)}; name one" if held else "no scores"
                raise ConfigError(f"method.scores: the table holds {said}")
            name = held[0]
        if name not in batch.scores:
            raise ConfigError(f"method.scores: the table holds no scores of '{name}' (it holds: {', '.join(held) or 'none'})")
        return batch.scores[name]
