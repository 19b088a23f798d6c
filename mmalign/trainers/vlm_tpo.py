"""Triple preference optimisation (arXiv:2405.16681): a preference without reference, and the likelihood of a gold answer.

The gold answer is the table's column `reference`, one more branch behind the prompt of its pair: three answers cost one prompt.
With `length_average` the preference is on means over tokens with the target margin `gamma` (TPO-L in the authors' code and in
TRL), which enters as ``-log sigmoid(beta difference - gamma)``. The authors use beta 0.01, alpha 1 and, for TPO-L, gamma 0.5.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from mmalign.branches import BranchBatch
from mmalign.config import Section
from mmalign.objectives import get_objective
from mmalign.objectives.reduce import weighted_mean
from mmalign.trainers.answers import AnswerTrainer
from mmalign.types import PairScores, StepContext, StepOutput


class VlmTPOConfig(Section):
    """Settings of triple preference optimisation."""

    name: str = "vlm_tpo"
    beta: float = 0.01
    """Steepness of the preference, per unit of log-probability."""
    alpha: float = 1.0
    """Weight of the gold answer's negative log-likelihood per token."""
    length_average: bool = False
    """The preference on means over tokens (TPO-L) instead of sums."""
    gamma: float = 0.0
    """Target margin of the preference, not divided by beta (TPO-L)."""
    prefix: Literal["shared", "plain"] = "shared"
    """One row per prompt with its answers behind it, or one row per answer; equal results."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.beta <= 0 or self.alpha < 0 or self.gamma < 0:
            raise ValueError("beta must be positive, alpha and gamma not negative")
        if self.gamma and not self.length_average:
            raise ValueError("gamma has no effect without length_average (TPO-L); remove it")


class VlmTPO(AnswerTrainer):
    """See the module's head."""

    Config = VlmTPOConfig
    batches: ClassVar[str] = "vlm_triples"
    needs_reference: ClassVar[bool] = False

    def training_step(self, batch: BranchBatch, ctx: StepContext) -> StepOutput:
        config, batch = self.config, batch.to(ctx.device)
        found = self.scores(batch, reference=False)
        if any(count != 3 for count in batch.counts):
            raise ValueError("vlm_tpo needs three answers in every record: chosen, rejected, gold")
        chosen, rejected, gold = (found.policy[number::3] for number in range(3))
        lengths = [found.length[number::3].clamp_min(1) for number in range(3)]
        scores = PairScores(
            policy_chosen=chosen, policy_rejected=rejected, reference_chosen=None, reference_rejected=None,
            chosen_length=lengths[0], rejected_length=lengths[1],
        )  # fmt: skip
        anchor = -gold / lengths[2]
        losses = get_objective("triple_po")(
            scores, beta=config.beta, anchor=anchor, alpha=config.alpha, length_average=config.length_average,
            gamma=config.gamma,
        )  # fmt: skip
        told = {
            "gold_nll": weighted_mean(anchor.detach(), batch.weight),
            "gold_length": weighted_mean(torch.as_tensor(lengths[2]), batch.weight),
        }
        return self.pair_output(losses, scores, batch.weight, metrics=told)
