"""What methods share that make their pairs as they go: records as batches, what became of each row, and the step on it.

A row that gives no pair adds nothing to the step: its loss is zero and it still counts in the mean, so that a method that finds
few pairs teaches little. What was made and what became of it is written line by line to the run folder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.branches import Answer, BranchRecord
from mmalign.objectives.reduce import weighted_mean
from mmalign.trainers.answers import AnswerTrainer
from mmalign.trainers.base import Parts
from mmalign.trainers.vlm_dpo import VlmDPO
from mmalign.types import StepContext, StepOutput

NOTHING = Answer(text=".")
"""What stands for an answer in a row that adds nothing; no gradient comes from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordBatch:
    """Records as they are in the table: what becomes of them depends on the policy."""

    ids: tuple[str, ...]
    records: tuple[BranchRecord, ...]
    weight: Tensor  # [N] float32

    def __len__(self) -> int:
        return len(self.ids)


def collate_records(records: Sequence[BranchRecord]) -> RecordBatch:
    """A batch of records."""
    return RecordBatch(
        ids=tuple(record.id for record in records), records=tuple(records),
        weight=torch.tensor([record.weight for record in records]),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What became of one row."""

    record: BranchRecord
    """With the answers that are trained on, chosen first."""
    source: str
    """Where its pair came from; one of the method's `SOURCES`."""
    counts: bool = True
    """Whether there is a pair."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """What else the run folder keeps of it."""

    def line(self, step: int) -> dict[str, Any]:
        """What the run folder keeps of it."""
        pair = [answer.text for answer in self.record.answers] if self.counts else []
        return {"step": step + 1, "id": self.record.id, "source": self.source, **self.said, "pair": pair}


class ChosenPairs(AnswerTrainer):
    """Parent of methods that choose a row's pair anew in every step. A subclass says how (`choose`)."""

    batches: ClassVar[str] = "vlm_records"
    SOURCES: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__(config, parts)
        self.buffer = parts.buffer
        self.pairs = VlmDPO(config, parts)

    @classmethod
    def wants_reference(cls, config: Any) -> bool:
        return VlmDPO.wants_reference(config)

    @abstractmethod
    def choose(self, records: Sequence[BranchRecord], ctx: StepContext) -> list[Choice]:
        """The pair of every row."""

    def measures(self, choices: Sequence[Choice], weight: Tensor) -> dict[str, Tensor]:
        """Further metrics of a step. Default: none."""
        return {}

    def training_step(self, batch: RecordBatch, ctx: StepContext) -> StepOutput:
        choices = self.choose(batch.records, ctx)
        self.write(choices, ctx)
        weight = batch.weight.to(ctx.device)
        counts = torch.tensor([float(choice.counts) for choice in choices], device=ctx.device)
        pairs = self.family.collate([self.family.encode(choice.record) for choice in choices]).to(ctx.device)
        scores = self.scores(pairs).pair(pairs)
        losses = self.pairs.losses(scores, pairs) * counts
        made = self.shares(choices, weight) | self.measures(choices, weight)
        return self.pair_output(losses, scores, weight, paired=counts, metrics=made)

    def write(self, choices: Sequence[Choice], ctx: StepContext) -> None:
        """Put what became of the rows into the run folder."""
        if self.buffer is not None:
            self.buffer.add(ctx.step, [choice.line(ctx.step) for choice in choices])

    def shares(self, choices: Sequence[Choice], weight: Tensor) -> dict[str, Tensor]:
        """Share of the rows by where their pair came from."""
        return {
            f"share_{source}": weighted_mean(
                torch.tensor([float(choice.source == source) for choice in choices], device=weight.device), weight
            )
            for source in self.SOURCES
        }
