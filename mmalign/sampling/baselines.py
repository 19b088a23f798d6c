"""What hiding image tokens has to be better than: no picture at all, a picture under noise, and words exchanged without looking.

The first two write a whole answer where `guided` is false, or go on from the beginnings of the reference's sentences as `bdhs`
does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from mmalign import rng
from mmalign.branches import BranchRecord, Message
from mmalign.config import Section
from mmalign.models.hallucinate.language import WordSwaps
from mmalign.models.hallucinate.noise import STEPS
from mmalign.models.hallucinate.settings import BdhsSettings
from mmalign.sampling.base import AnswerSampler, Refused, SampledRow
from mmalign.sampling.bdhs import MadeUpPairs, references


class NoImageConfig(Section):
    """Settings of `no_image`."""

    name: str = "no_image"
    reference: Literal["table", "model"] = "table"
    """The chosen answer; as for `bdhs`."""
    guided: bool = False
    """Keep the beginning of each sentence of the reference."""
    rounds: int = 1
    """Most tries; as for `bdhs`."""
    max_similarity: float = 0.97
    """An answer this alike to the reference is tried again, and used after the last round unless it is equal."""
    encoder: str | None = None
    """Folder of a sentence-transformers model that compares answers; none: counts of words."""

    def settings(self) -> BdhsSettings:
        """The same as settings of the sampling that hides."""
        return BdhsSettings(
            rho=0.0, rounds=self.rounds, max_similarity=self.max_similarity, keep_similar=True, encoder=self.encoder,
            guided=self.guided,
        )  # fmt: skip

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        self.settings()


class NoImage(MadeUpPairs):
    """The rejected answer is what the model says to the question without its pictures and clips."""

    Config: ClassVar[type[Section]] = NoImageConfig

    def settings(self) -> BdhsSettings:
        found: BdhsSettings = self.config.settings()
        return found

    def seen(self, record: BranchRecord) -> BranchRecord:
        return without_media(record)


class NoisyImageConfig(NoImageConfig):
    """Settings of `noisy_image`."""

    name: str = "noisy_image"
    noise_steps: int = 500
    """Diffusion noise on the picture, in steps of 1 to 999; POVID's default."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if not 1 <= self.noise_steps <= STEPS:
            raise ValueError(f"noise_steps must be in 1 to {STEPS}, got {self.noise_steps}")
        super().model_post_init(context)

    def settings(self) -> BdhsSettings:
        return super().settings().model_copy(update={"noise_steps": self.noise_steps})


class NoisyImage(NoImage):
    """The rejected answer is what the model says to the picture under noise (POVID, arXiv:2402.11411)."""

    Config: ClassVar[type[Section]] = NoisyImageConfig

    def seen(self, record: BranchRecord) -> BranchRecord:
        return record


class WordSwapConfig(Section):
    """Settings of `word_swap`."""

    name: str = "word_swap"
    reference: Literal["table", "model"] = "table"
    """The chosen answer; as for `bdhs`."""
    share: float = 0.3
    """Of the words that can be exchanged, how many are, in (0, 1]; at least one."""
    learn_from: int = 2000
    """Rows of the table whose answers say which words may stand where."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if not 0 < self.share <= 1 or self.learn_from < 1:
            raise ValueError("share must be in (0, 1], and learn_from at least 1")


class WordSwap(AnswerSampler):
    """The rejected answer is the chosen one with words exchanged for others of the table that have the same neighbours."""

    Config: ClassVar[type[Section]] = WordSwapConfig
    MAKES: ClassVar[Literal["pairs", "lists"]] = "pairs"

    def __init__(self, config: WordSwapConfig, job: Any, family: Any) -> None:
        super().__init__(config, job, family)
        self.words = WordSwaps(_answers(job.manifest, config.learn_from))

    def sample(self, records: Sequence[BranchRecord]) -> list[SampledRow | Refused]:
        chosen, refused = references(self, records, own=self.config.reference == "model")
        found: dict[str, SampledRow | Refused] = {item.id: item for item in refused}
        for record in records:
            if record.id not in chosen:
                continue
            draw = rng.numpy_stream(self.job.seed, "word_swap", 0, record.id)
            text, count = self.words.spoil(chosen[record.id], self.config.share, draw)
            found[record.id] = (
                SampledRow(id=record.id, record=record, answers=(chosen[record.id], text), meta={"exchanged": count})
                if count
                else Refused(id=record.id, reason="identical_responses", detail="no word of it has another in its place")
            )
        return [found[record.id] for record in records]

    @classmethod
    def figures(cls, metas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {"exchanged_words": sum(meta["exchanged"] for meta in metas) / len(metas)}


def without_media(record: BranchRecord) -> BranchRecord:
    """The question alone."""
    messages = tuple(
        Message(role=message.role, parts=tuple(part for part in message.parts if part.media is None))
        for message in record.messages
    )
    return replace(record, messages=messages, media=())


def _answers(manifest: str, most: int) -> list[str]:
    """First answers of a table; rows that cannot be used are listed elsewhere."""
    from mmalign.data.vlm import open_vlm
    from mmalign.data.vlm_rows import RowProblem
    from mmalign.errors import DataError

    table = open_vlm(manifest, progress=False)
    found = []
    for row in range(min(most, len(table))):
        try:
            record = table.record(row)
        except (RowProblem, DataError):
            continue
        found += [answer.text for answer in record.answers[:1]]
    return found
