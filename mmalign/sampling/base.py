"""What an answer sampler is: rows of a table in, rows of a new table or named refusals out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from mmalign.branches import BranchRecord
from mmalign.config import Section
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from mmalign.branches import EncodedExample
    from mmalign.models.vlm.base import VlmFamily
    from mmalign.sampling.settings import SamplingConfig

T = TypeVar("T")


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

    Raises:
        ConfigError: the sampler cannot use the generator of the file.
        MissingExtraError: the generator is not installed.
    """

    Config: ClassVar[type[Section]]
    """Its settings; a section with ``name: str``."""
    MAKES: ClassVar[Literal["pairs", "lists"]]
    GENERATORS: ClassVar[tuple[str, ...]] = ("transformers",)
    """Whose answers it can use; one that asks through `ask` alone can use those of `vllm` as well."""

    def __init__(self, config: Any, job: SamplingConfig, family: VlmFamily) -> None:
        from mmalign.models.vlm.vllm_engine import VllmGenerator

        self.config, self.job, self.family = config, job, family
        if job.generator not in self.GENERATORS:
            raise ConfigError(
                f"generator: sampler '{config.name}' works with {', '.join(self.GENERATORS)}, not with '{job.generator}'"
            )
        self.engine = VllmGenerator(family, job.vllm, adapters=False) if job.generator == "vllm" else None

    @abstractmethod
    def sample(self, records: Sequence[BranchRecord]) -> list[SampledRow | Refused]:
        """Rows of some records, in their order; every record gives at least one row or one refusal.

        Args:
            records: of one part of the table; ids are unique in the whole table.
        """

    def ask(
        self, records: Sequence[BranchRecord], *, samples: int = 1, temperature: float | None = None
    ) -> tuple[list[BranchRecord], list[list[str]], list[Refused]]:
        """Answers under the settings of the file, by its generator.

        Args:
            records: their prompts; answers are not read.
            samples: answers per prompt.
            temperature: instead of the file's.

        Returns:
            the records whose prompt the model can read, `samples` answers to each, and refusals of the others.
        """
        job = self.job
        how: dict[str, Any] = {
            "max_new_tokens": job.max_new_tokens, "temperature": job.temperature if temperature is None else temperature,
            "top_p": job.top_p, "seed": job.seed, "samples": samples, "repetition_penalty": job.repetition_penalty,
        }  # fmt: skip
        if self.engine is not None:
            good, prompts, refused = _readable(records, self.engine.prompt)
            asked = [(record.id, prompt) for record, prompt in zip(good, prompts, strict=True)]
            return good, self.engine.answer(None, asked, **how), refused
        good, examples, refused = encode_prompts(self.family, records)
        found = self.family.generate(self.family.network, examples, batch_size=job.batch_size, **how)
        return good, found, refused

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
    return _readable(records, lambda record: family.encode(record, training=False))


def _readable(
    records: Sequence[BranchRecord], read: Callable[[BranchRecord], T]
) -> tuple[list[BranchRecord], list[T], list[Refused]]:
    from mmalign.models.vlm.errors import VlmDataError

    good, found, refused = [], [], []
    for record in records:
        try:
            found.append(read(record))
            good.append(record)
        except VlmDataError as error:
            refused.append(Refused(id=record.id, reason=error.reason, detail=error.detail))
    return good, found, refused
