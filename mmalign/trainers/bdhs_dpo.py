"""DPO with rejected answers that the policy makes up half blind (BDHS-DPO, arXiv:2407.02477 section 3.4): offline, online, mixed.

No judge and no second model: the table's answer is chosen, and what the model says with most of the picture hidden is rejected.
`offline` is the weight of the table's own rejected answers, which ``mmalign generate`` with ``sampler: bdhs`` makes:

- 1 trains on them alone, as `vlm_dpo` does (offline BDHS);
- 0 makes an answer up from the current policy in every step and never reads the table's (online BDHS);
- between, each row draws which of the two it takes (`combine: drawn`, the paper's Mixed-DPO), or takes both with that weight
  (`combine: averaged`, the paper's average over two rejected answers that share the chosen one).

A row whose made-up answer equals the reference, or stays too like it, adds nothing to the step (of averaged rows, that part
does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmalign import rng
from mmalign.branches import Answer, BranchRecord
from mmalign.config import Section
from mmalign.models.hallucinate.sampling import Generation, MadeUp, make_up
from mmalign.models.hallucinate.settings import BdhsSettings
from mmalign.models.hallucinate.similarity import load_similarity
from mmalign.objectives.reduce import weighted_mean
from mmalign.trainers.base import Parts
from mmalign.trainers.choices import NOTHING, Choice, ChosenPairs, RecordBatch
from mmalign.trainers.vlm_dpo import VlmDPOConfig
from mmalign.types import PairScores, StepContext, StepOutput


class BdhsDPOConfig(VlmDPOConfig):
    """Settings of BDHS-DPO; those of `vlm_dpo`, and how answers are made up."""

    name: str = "bdhs_dpo"
    offline: float = 1.0
    """Weight of the table's rejected answers, in [0, 1]: 1 offline, 0 online, between mixed; above 0 it needs pairs."""
    combine: Literal["drawn", "averaged"] = "drawn"
    """Mixed: every row draws one of the two rejected answers, or takes both with their weights."""
    made_up: BdhsSettings = Field(default_factory=BdhsSettings)
    """How answers are made up, online and mixed."""
    temperature: float = 1.0
    """Of the answers made up."""
    top_p: float = 1.0
    """Share of the probability that is sampled from, most likely tokens first."""
    max_new_tokens: int = 128
    """Most tokens of an answer that is made up as a whole."""
    generation_batch: int = 16
    """Answers, or parts of answers, made at a time."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning or effect."""
        super().model_post_init(context)
        if not 0 <= self.offline <= 1:
            raise ValueError(f"offline must be in [0, 1], got {self.offline}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or min(self.max_new_tokens, self.generation_batch) < 1:
            raise ValueError("temperature must not be negative, top_p in (0, 1], max_new_tokens and generation_batch at least 1")
        if self.combine == "averaged" and self.offline in (0, 1):
            raise ValueError("combine: averaged has no effect with offline 0 or 1; remove it")
        if self.offline < 1 and (self.objective in ("ld_dpo", "modpo") or self.soft_labels):
            raise ValueError("ld_dpo, modpo and soft_labels read what answers made up do not have; use another objective")


class BdhsDPO(ChosenPairs):
    """See the module's head."""

    Config: ClassVar[type[Section]] = BdhsDPOConfig
    batches: ClassVar[str] = "vlm_answered"
    SOURCES: ClassVar[tuple[str, ...]] = ("made_up", "offline", "averaged", "none")

    def __init__(self, config: BdhsDPOConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.similarity = load_similarity(config.made_up.encoder if config.offline < 1 else None, parts.family.device)

    def training_step(self, batch: RecordBatch, ctx: StepContext) -> StepOutput:
        if self.config.offline == 1:
            return self._as_they_are(batch, ctx)
        if self.config.combine == "averaged":
            return self._averaged(batch, ctx)
        return super().training_step(batch, ctx)

    def choose(self, records: Sequence[BranchRecord], ctx: StepContext) -> list[Choice]:
        """The table's pair, or its chosen answer and one that the policy makes up."""
        drawn = rng.uniform([record.id for record in records], seed=ctx.seed, purpose="offline", step=ctx.step).tolist()
        online = [number for number, value in enumerate(drawn) if value >= self.config.offline]
        made = dict(zip(online, self.made_up([records[number] for number in online], ctx), strict=True))
        return [
            self._online(record, made[number]) if number in made else Choice(record=record, source="offline")
            for number, record in enumerate(records)
        ]

    def made_up(self, records: Sequence[BranchRecord], ctx: StepContext) -> list[MadeUp]:
        """What the current policy makes up for every record."""
        config = self.config
        return make_up(
            self.family, self.policy, records, [record.answers[0].text for record in records], settings=config.made_up,
            similarity=self.similarity, generation=Generation(
                max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, seed=ctx.seed,
                step=ctx.step, batch_size=config.generation_batch,
            ),
        )  # fmt: skip

    def measures(self, choices: Sequence[Choice], weight: Tensor) -> dict[str, Tensor]:
        """Of rows with an answer made up: in which round it was made on average (0 for the others)."""
        rounds = [float(choice.said.get("made_up", {}).get("round", 0)) for choice in choices]
        return {"rounds": weighted_mean(torch.tensor(rounds, device=weight.device), weight)}

    @staticmethod
    def _online(record: BranchRecord, made: MadeUp) -> Choice:
        said = {"made_up": {**made.meta(), "reason": made.reason}}
        if made.reason:
            return Choice(record=replace(record, answers=(NOTHING, NOTHING)), source="none", counts=False, said=said)
        pair = (record.answers[0], Answer(text=made.text))
        return Choice(record=replace(record, answers=pair, p_chosen=1.0), source="made_up", said=said)

    def _as_they_are(self, batch: RecordBatch, ctx: StepContext) -> StepOutput:
        """A step on the table's pairs; the same numbers as `vlm_dpo`."""
        pairs = self.family.collate([self.family.encode(record) for record in batch.records]).to(ctx.device)
        return self.pairs.training_step(replace(pairs, weight=batch.weight.to(ctx.device)), ctx)

    def _averaged(self, batch: RecordBatch, ctx: StepContext) -> StepOutput:
        """A step on the chosen answer against both rejected ones, which share one pass over the prompt."""
        choices = []
        for record, made in zip(batch.records, self.made_up(batch.records, ctx), strict=True):
            extra = () if made.reason else (Answer(text=made.text),)
            said = {"made_up": {**made.meta(), "reason": made.reason}}
            grown = replace(record, answers=(*record.answers, *extra))
            choices.append(Choice(record=grown, source="averaged" if extra else "offline", said=said))
        self.write(choices, ctx)
        config, weight = self.config, batch.weight.to(ctx.device)
        rows = self.family.collate([self.family.encode(choice.record) for choice in choices]).to(ctx.device)
        scores = self.scores(rows)
        first = torch.tensor([0, *rows.counts[:-1]], device=ctx.device).cumsum(0)
        both = torch.tensor([float(count == 3) for count in rows.counts], device=ctx.device)
        table, made_up = scores.compare(first, first + 1), scores.compare(first, first + 1 + both.long())
        losses = config.offline * self.pairs.losses(table, rows)
        losses = losses + (1 - config.offline) * both * self.pairs.losses(made_up, rows)
        told = {"made_up_margin": self._margin(made_up, weight * both)}
        told |= self.shares(choices, weight) | self.measures(choices, weight)
        return self.pair_output(losses, table, weight, metrics=told)

    def _margin(self, scores: PairScores, weight: Tensor) -> Tensor:
        """Mean reward margin over the rows with an answer made up."""
        return weighted_mean(self.config.beta * scores.margin().detach(), weight)
