"""Pairs from made-up answers (BDHS, arXiv:2407.02477): the reference is chosen, what the model says half blind is rejected."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from mmalign.branches import BranchRecord
from mmalign.config import Section
from mmalign.models.hallucinate.sampling import Generation, make_up
from mmalign.models.hallucinate.settings import BdhsSettings
from mmalign.models.hallucinate.similarity import load_similarity
from mmalign.sampling.base import AnswerSampler, Refused, SampledRow, encode_prompts


class BdhsConfig(BdhsSettings):
    """Settings of `bdhs`."""

    name: str = "bdhs"
    reference: Literal["table", "model"] = "table"
    """The chosen answer: the table's (of pairs the chosen, of lists the first), or the model's own most likely one."""


class MadeUpPairs(AnswerSampler):
    """Parent of samplers whose rejected answers a model makes up: a subclass says with which settings and from what it sees."""

    MAKES: ClassVar[Literal["pairs", "lists"]] = "pairs"

    def __init__(self, config: Any, job: Any, family: Any) -> None:
        super().__init__(config, job, family)
        self.made_up = self.settings()
        self.similarity = load_similarity(self.made_up.encoder, family.device)

    @abstractmethod
    def settings(self) -> BdhsSettings:
        """How answers are made up."""

    def seen(self, record: BranchRecord) -> BranchRecord:
        """What the model is asked. Default: the record itself."""
        return record

    def sample(self, records: Sequence[BranchRecord]) -> list[SampledRow | Refused]:
        chosen, refused = references(self, records, own=self.config.reference == "model")
        asked = [record for record in records if record.id in chosen]
        job = self.job
        made = make_up(
            self.family, self.family.network, [self.seen(record) for record in asked], [chosen[record.id] for record in asked],
            settings=self.made_up, similarity=self.similarity, generation=Generation(
                max_new_tokens=job.max_new_tokens, temperature=job.temperature, top_p=job.top_p, seed=job.seed,
                batch_size=job.batch_size,
            ),
        )  # fmt: skip
        found: dict[str, SampledRow | Refused] = {item.id: item for item in refused}
        for record, item in zip(asked, made, strict=True):
            if item.reason:
                found[record.id] = Refused(id=record.id, reason=item.reason, detail=item.detail)
                continue
            meta = {**item.meta(), "measure": self.similarity.name}
            found[record.id] = SampledRow(id=record.id, record=record, answers=(chosen[record.id], item.text), meta=meta)
        return [found[record.id] for record in records]

    @classmethod
    def figures(cls, metas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        rounds = max(int(meta["round"]) for meta in metas)
        tokens = sum(meta["image_tokens"] for meta in metas)
        return {
            **{f"made_in_round_{number}": sum(meta["round"] == number for meta in metas) / len(metas)
               for number in range(1, rounds + 1)},
            "guided_share": sum(bool(meta["guided"]) for meta in metas) / len(metas),
            "hidden_share": sum(meta["hidden"] for meta in metas) / max(1, tokens),
            "mean_similarity": sum(meta["similarity"] for meta in metas) / len(metas),
        }  # fmt: skip


class Bdhs(MadeUpPairs):
    """See the module's head."""

    Config: ClassVar[type[Section]] = BdhsConfig

    def settings(self) -> BdhsSettings:
        found: BdhsSettings = self.config
        return found


def references(sampler: AnswerSampler, records: Sequence[BranchRecord], *, own: bool) -> tuple[dict[str, str], list[Refused]]:
    """The chosen answer of every record by id, and refusals of records that have none.

    Args:
        own: the model's most likely answer instead of the table's.
    """
    if not own:
        return {record.id: record.answers[0].text for record in records if record.answers}, [
            Refused(id=record.id, reason="missing_chosen", detail="the row has no answer; set sampler.reference: model")
            for record in records
            if not record.answers
        ]
    good, examples, refused = encode_prompts(sampler.family, records)
    told = sampler.family.generate(
        sampler.family.network, examples, max_new_tokens=sampler.job.max_new_tokens, temperature=0.0,
        batch_size=sampler.job.batch_size,
    )  # fmt: skip
    said = {record.id: texts[0] for record, texts in zip(good, told, strict=True)}
    refused += [
        Refused(id=name, reason="empty_chosen", detail="the model says nothing") for name, text in said.items() if not text
    ]
    return {name: text for name, text in said.items() if text}, refused
