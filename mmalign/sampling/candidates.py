"""Several answers to every question: what judges rank, and best-of-n pairs are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from mmalign.branches import BranchRecord
from mmalign.config import Section
from mmalign.rewards.answers import ANSWER_JUDGES, load_judge
from mmalign.sampling.base import AnswerSampler, Refused, SampledRow


class CandidatesConfig(Section):
    """Settings of plain sampling."""

    name: str = "candidates"
    samples: int = 4
    """Answers per question."""
    judges: tuple[str, ...] = ()
    """Who scores them: names of `mmalign.rewards.answers.ANSWER_JUDGES`, or package.module:Class."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, got {self.samples}")
        for judge in self.judges:
            if judge.partition(":")[0] not in ANSWER_JUDGES:
                raise ValueError(f"judges: {ANSWER_JUDGES.unknown(judge)}")


class Candidates(AnswerSampler):
    """See the module's head. Answers that say nothing are left out and counted; a list needs two that say something."""

    Config: ClassVar[type[Section]] = CandidatesConfig
    MAKES: ClassVar[Literal["pairs", "lists"]] = "lists"
    GENERATORS: ClassVar[tuple[str, ...]] = ("transformers", "vllm")

    def __init__(self, config: CandidatesConfig, job: Any, family: Any) -> None:
        super().__init__(config, job, family)
        self.judges = {name: load_judge(name) for name in config.judges}

    def score_names(self) -> tuple[str, ...]:
        return tuple(self.judges)

    def sample(self, records: Sequence[BranchRecord]) -> list[SampledRow | Refused]:
        good, found, refused = self.ask(records, samples=self.config.samples)
        made: dict[str, SampledRow | Refused] = {item.id: item for item in refused}
        for record, texts in zip(good, found, strict=True):
            made[record.id] = self._row(record, [text for text in texts if text.strip()])
        return [made[record.id] for record in records]

    def _row(self, record: BranchRecord, texts: list[str]) -> SampledRow | Refused:
        asked = self.config.samples
        if len(texts) < 2:
            return Refused(id=record.id, reason="too_few", detail=f"{len(texts)} of {asked} answers say anything")
        scores = {name: judge.score([record] * len(texts), texts) for name, judge in self.judges.items()}
        unscored = sum(value is None for values in scores.values() for value in values)
        meta = {"sampled": asked, "empty": asked - len(texts), "distinct": len(set(texts)), "unscored": unscored}
        return SampledRow(id=record.id, record=record, answers=tuple(texts), scores=scores, meta=meta)

    @classmethod
    def figures(cls, metas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        answers = sum(meta["sampled"] - meta["empty"] for meta in metas)
        return {
            "answers": float(answers), "empty_answers": float(sum(meta["empty"] for meta in metas)),
            "distinct_share": sum(meta["distinct"] for meta in metas) / max(1, answers),
            "unscored_answers": float(sum(meta["unscored"] for meta in metas)),
        }  # fmt: skip
