"""Reports on radiographs aligned without human feedback (CheXalign, arXiv:2410.07025). NOT A MEDICAL DEVICE.

A fine-tuned report model writes several candidates for each study, a judge compares each with the radiologist's own report,
and the best and the worst become a pair (``mmalign generate``, ``annotate`` and ``data pairs``; docs/chest_xray.md). This file
is the last step: one of the study's five objectives on those pairs. In plain words:

- ``dpo``, ``ipo`` (means over tokens, as the authors' trainer has it), ``orpo`` (without a reference; `beta` is its lambda).
- ``lc_dpo`` adds `alpha` per token of length difference inside the sigmoid; the authors' code calls it "rdpo". Its
  label-smoothing branch there has the sign of the length term wrong; label smoothing is not offered here.
- ``kto`` takes both answers of a pair as one liked and one disliked row, against the mean of mismatched answers (``likes``).

Judges reward length where it finds more, so look at the lengths beside every score: the metrics `chosen_length` and
`rejected_length`, and the length-controlled figures of ``mmalign evaluate``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from mmalign.branches import BranchBatch
from mmalign.config import Section
from mmalign.objectives import get_objective
from mmalign.objectives.lengths import per_token
from mmalign.trainers.answers import AnswerTrainer
from mmalign.trainers.likes import likes_output
from mmalign.types import StepContext, StepOutput

NOTICE = (
    "Not a medical device: reports written by this model are research output and must not be used to diagnose or treat anyone."
)
LENGTH_WEIGHT = 0.05
"""`alpha` of the authors' configuration for ``lc_dpo``, per token."""


class CxrDPOConfig(Section):
    """Settings of the alignment of reports."""

    name: str = "cxr_dpo"
    objective: Literal["dpo", "lc_dpo", "ipo", "kto", "orpo"] = "dpo"
    """The five algorithms of the study."""
    beta: float = 0.1
    """Strength of the pull to the reference; for `ipo` its tau, for `orpo` the weight of the odds ratio."""
    alpha: float | None = None
    """`lc_dpo`: weight of the length difference per token; 0.05 where not given."""
    prefix: Literal["shared", "plain"] = "shared"
    """One row per study with both reports behind it, or one row per report; equal results."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning or effect."""
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.alpha is not None and self.objective != "lc_dpo":
            raise ValueError(f"alpha has no effect with objective '{self.objective}'; remove it")
        if self.alpha is not None and self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")


class CxrDPO(AnswerTrainer):
    """See the module's head."""

    Config = CxrDPOConfig
    batches: ClassVar[str] = "vlm_pairs"
    stored_reference: ClassVar[bool] = True
    notice: ClassVar[str] = NOTICE

    @classmethod
    def wants_reference(cls, config: CxrDPOConfig) -> bool:
        return config.objective != "orpo"

    @classmethod
    def wants_mismatched(cls, config: CxrDPOConfig) -> bool:
        return config.objective == "kto"

    def training_step(self, batch: BranchBatch, ctx: StepContext) -> StepOutput:
        config, batch = self.config, batch.to(ctx.device)
        scores = self.scores(batch)
        if config.objective == "kto":
            # A row holds the chosen report, the rejected one, and a report of another study.
            return likes_output(
                scores, batch, labelled=batch.answer < 2, liked=batch.answer == 0, beta=config.beta, mismatched=True
            )
        pairs = scores.pair(batch)
        read = per_token(pairs) if config.objective == "ipo" else pairs
        alpha = LENGTH_WEIGHT if config.alpha is None else config.alpha
        extra = {"alpha": alpha} if config.objective == "lc_dpo" else {}
        losses = torch.as_tensor(get_objective(config.objective)(read, beta=config.beta, **extra))
        return self.pair_output(losses, pairs, batch.weight)
