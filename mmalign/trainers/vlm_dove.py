"""DOVE (arXiv:2404.00530): preferences between whole conversations, so that answers to different instructions can be compared.

log p(instruction, answer) takes the place of log p(answer | instruction) in DPO. What is given is the picture or clip: the shared
prompt ends behind its last medium, and each branch is the rest of its own prompt with its answer, scored token by token. So two
different questions about one picture still read the picture once. Placeholders of media are never scored, for nothing predicts
them. The rejected answer's own instruction is the table's column `rejected_prompt`; without it both sides have the row's prompt,
and the instruction's tokens cancel. A prompt with words in front of its media shares no prefix with one of other words.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mmalign.branches import BranchBatch
from mmalign.config import Section
from mmalign.objectives import get_objective
from mmalign.trainers.answers import AnswerTrainer
from mmalign.types import StepContext, StepOutput


class VlmDoveConfig(Section):
    """Settings of preferences between conversations."""

    name: str = "vlm_dove"
    beta: float = 0.1
    """Strength of the pull to the reference."""
    prefix: Literal["shared", "plain"] = "shared"
    """The media once for both conversations, or one row per conversation; equal results."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")


class VlmDove(AnswerTrainer):
    """See the module's head."""

    Config = VlmDoveConfig
    batches: ClassVar[str] = "vlm_joint"
    stored_reference: ClassVar[bool] = True

    def training_step(self, batch: BranchBatch, ctx: StepContext) -> StepOutput:
        batch = batch.to(ctx.device)
        scores = self.scores(batch).pair(batch)
        # The branches hold instruction and answer, so that their sum is the joint log-ratio of ``objectives.logratios.dove``.
        return self.pair_output(get_objective("dpo")(scores, beta=self.config.beta), scores, batch.weight)
