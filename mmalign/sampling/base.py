"""What an answer sampler is: rows of a table in, rows of a new table or named refusals out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mmalign.branches import BranchRecord
from mmalign.config import Section

if TYPE_CHECKING:
    from mmalign.branches import EncodedExample
    from mmalign.models.vlm.base import VlmFamily
    from mmalign.sampling.settings import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRow:
    """One row of the new table."""

    id: str
    """Unique in the new table; a sampler that makes one row per record keeps the record's id."""
    record: BranchRecord
    """Whose messages and media become the row's prompt, images and videos; its answers are not read."""
    answers: tuple[str, ...]
    """Of a pair: chosen, rejected. Of a list: two or more. None is empty."""
    scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Judge -> one number per answer, None where it could not say."""
    stage: int | None = None
    group: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON: how the answers came about. What the record's own meta says is kept beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A record that gave no row, and why: a name of ``mmalign.data.reasons``."""

    id: str
    reason: str
    detail: str


class AnswerSampler(ABC):
    """Makes answers with one loaded model.

    Every draw must be a function of (``job.seed``, a purpose, the record's id): parts are made in any order, by any number of
    processes, and again after an interruption.

    Args:
        config: the sampler's own section of the file.
        job: the whole file: seed, temperature, batch size and so on.
        family: the loaded model.
    """

    Config: ClassVar[type[Section]]
    """Its settings; a section with ``name: str``."""
    MAKES: ClassVar[Literal["pairs", "lists"]]

    def __init__(self, config: Any, job: SamplingConfig, family: VlmFamily) -> None:
        self.config, self.job, self.family = config, job, family

    @abstractmethod
    def sample(self, records: Sequence[BranchRecord]) -> list[SampledRow | Refused]:
        """Rows of some records, in their order; every record gives at least one row or one refusal.

        Args:
            records: of one part of the table; ids are unique in the whole table.
        """

    def score_names(self) -> tuple[str, ...]:
        """Names in the column `scores`."""
        return ()

    @classmethod
    def figures(cls, metas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Figures for the report, from the meta of all rows made (so that resumed and sharded runs say the same)."""
        return {}


def encode_prompts(
    family: VlmFamily, records: Sequence[BranchRecord]
) -> tuple[list[BranchRecord], list[EncodedExample], list[Refused]]:
    """The records whose prompt the model can read, their encodings, and refusals of the others."""
    from mmalign.models.vlm.errors import VlmDataError

    good, examples, refused = [], [], []
    for record in records:
        try:
            examples.append(family.encode(record, training=False))
            good.append(record)
        except VlmDataError as error:
            refused.append(Refused(id=record.id, reason=error.reason, detail=error.detail))
    return good, examples, refused
