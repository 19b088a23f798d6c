"""Supervised fine-tuning of a vision-language model on answers: the start of most recipes and the control of every comparison.

The loss of a record is the mean negative log-likelihood over the tokens of its answer (arXiv:2304.08485 section 4.2; there the
mean runs over all tokens of a batch, which makes long answers count more, and rows depend on their neighbours). Of a pair the
chosen answer alone is used, and the rejected one is not even encoded.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mmalign.branches import BranchBatch
from mmalign.config import Section
from mmalign.objectives.reduce import weighted_mean
from mmalign.trainers.answers import AnswerScores, AnswerTrainer
from mmalign.types import StepContext, StepOutput


class VlmSFTConfig(Section):
    """Settings of fine-tuning on answers."""

    name: str = "vlm_sft"
    prefix: Literal["shared", "plain"] = "shared"
    """Without a second answer both are one row per prompt; kept so that all methods on answers take the setting."""


class VlmSFT(AnswerTrainer):
    """See the module's head."""

    Config = VlmSFTConfig
    batches: ClassVar[str] = "vlm_chosen"
    needs_reference: ClassVar[bool] = False

    def training_step(self, batch: BranchBatch, ctx: StepContext) -> StepOutput:
        batch = batch.to(ctx.device)
        return answers_output(self.scores(batch, reference=False), batch)


def answers_output(scores: AnswerScores, batch: BranchBatch) -> StepOutput:
    """Loss and metrics of scored single answers: mean negative log-likelihood per token of each record."""
    losses, weight = -scores.policy / scores.length.clamp_min(1), batch.weight
    metrics = {
        "weight": weight.sum(), "loss": weighted_mean(losses.detach(), weight),
        "chosen_length": weighted_mean(scores.length, weight),
    }  # fmt: skip
    return StepOutput(loss=(losses * weight).sum() / len(batch), metrics=metrics)
