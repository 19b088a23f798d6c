"""KTO of a vision-language model (arXiv:2402.01306): answers that were liked or disliked one by one.

The reference point is the mean log-ratio of answers held against other prompts. Here the mismatched answer is one more branch
behind the row's own prompt, so that it costs its own tokens and neither a second prompt nor a second look at the pictures. It is
the answer of the next row of the optimiser step with another prompt, whatever the micro-batches are; the mean is over the
micro-batch on all processes. Pairs serve as well: their chosen answer is liked, their rejected one disliked.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from mmalign.branches import BranchBatch
from mmalign.config import Section
from mmalign.trainers.answers import AnswerScores, AnswerTrainer
from mmalign.trainers.likes import likes_output
from mmalign.types import StepContext, StepOutput


class VlmKTOConfig(Section):
    """Settings of KTO on answers."""

    name: str = "vlm_kto"
    beta: float = 0.1
    """Steepness of the value function, per unit of log-probability."""
    prefix: Literal["shared", "plain"] = "shared"
    """One row per prompt with its answers behind it, or one row per answer; equal results."""
    desirable_weight: float = 1.0
    """Weight of liked answers; the paper wants desirable x liked to be 1 to 4/3 of undesirable x disliked."""
    undesirable_weight: float = 1.0
    """Weight of disliked answers."""
    reference_point: Literal["mismatched", "zero"] = "mismatched"
    """What a log-ratio is held against: the mean of mismatched answers, at least 0; or 0, which saves their branches."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.desirable_weight < 0 or self.undesirable_weight < 0:
            raise ValueError("desirable_weight and undesirable_weight must not be negative")


class VlmKTO(AnswerTrainer):
    """See the module's head."""

    Config = VlmKTOConfig
    batches: ClassVar[str] = "vlm_labelled"

    def training_step(self, batch: BranchBatch, ctx: StepContext) -> StepOutput:
        batch = batch.to(ctx.device)
        return self.output(self.scores(batch), batch)

    @classmethod
    def wants_mismatched(cls, config: VlmKTOConfig) -> bool:
        return config.reference_point == "mismatched"

    def output(self, scores: AnswerScores, batch: BranchBatch) -> StepOutput:
        """Loss and metrics of scored answers. A record's loss is the mean over its labelled answers."""
        config = self.config
        return likes_output(
            scores, batch, labelled=~torch.isnan(batch.label), liked=batch.label == 1, beta=config.beta,
            mismatched=config.reference_point == "mismatched", desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )  # fmt: skip
