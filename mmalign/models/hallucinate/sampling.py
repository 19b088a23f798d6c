"""Bias-driven hallucination sampling: the rejected answer is what the model says where it sees next to nothing.

Algorithm 1 of arXiv:2407.02477, appendix E. In every round one mask of image tokens is drawn for a record; each sentence of the
reference is cut at a random place, and the model goes on from there to the end of a sentence, having read the true sentences
before it. The last of several rounds writes a whole answer. The first answer that is unlike enough is taken. Choices and
departures:

- Sentences are cut in front of a word, every place equally likely, the first word included, so that something is always written.
- Of what the last round wrote, an answer that equals the reference, or is as alike as before, gives no pair and is counted; the
  published algorithm returns it.
- *Yes* and *no* are swapped as whole words alone.
- Placeholders of pictures are never written, and positions are those of the whole prompt, whatever is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mmalign import rng
from mmalign.branches import BranchRecord, EncodedExample
from mmalign.models.hallucinate.masks import hidden_tokens, image_positions
from mmalign.models.hallucinate.noise import noisy_record
from mmalign.models.hallucinate.sentences import cut_places, sentence_end, split_sentences, swap_yes_no
from mmalign.models.hallucinate.settings import BdhsSettings
from mmalign.models.hallucinate.similarity import Similarity
from mmalign.models.vlm.continuing import Draft, continue_answers
from mmalign.models.vlm.encoding import spread
from mmalign.models.vlm.errors import VlmDataError
from mmalign.models.vlm.generation import text_so_far

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeUp:
    """What became of one record."""

    text: str
    """The answer made up; of no use where `reason` is set."""
    reason: str = ""
    """Why there is none: a name of ``mmalign.data.reasons``."""
    detail: str = ""
    round: int = 0
    """In which round it was made, from 1."""
    guided: bool = True
    """Whether it keeps the beginnings of the reference's sentences."""
    similarity: float = float("nan")
    """To the reference."""
    image_tokens: int = 0
    hidden: int = 0
    """Image tokens, and how many of them were hidden in that round."""
    cuts: tuple[int, ...] = ()
    """Characters kept of every sentence, where guided."""
    swapped: tuple[int, ...] = ()
    """Numbers of the sentences whose yes or no was swapped."""

    def meta(self) -> dict[str, Any]:
        """All of it but the text, as plain JSON."""
        return {
            "round": self.round, "guided": self.guided, "similarity": round(self.similarity, 6),
            "image_tokens": self.image_tokens, "hidden": self.hidden, "cuts": list(self.cuts), "swapped": list(self.swapped),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sentence:
    """Where one sentence is gone on from."""

    draft: int
    """Number of its draft among its record's."""
    cut: int
    """Number of its cut among its draft's."""
    kept: str
    """Its own beginning."""
    behind: str
    """White space between it and the next."""
    swapped: bool


@dataclass(slots=True, kw_only=True)
class _Work:
    """One record in one round."""

    number: int
    example: EncodedExample
    image_tokens: int
    hide: torch.Tensor
    drafts: list[Draft] = field(default_factory=list)
    sentences: list[_Sentence] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    step: int = 0
    batch_size: int = 8


def make_up(
    family: VlmFamily, module: nn.Module, records: Sequence[BranchRecord], references: Sequence[str], *, settings: BdhsSettings,
    similarity: Similarity, generation: Generation,
) -> list[MadeUp]:  # fmt: skip
    """An answer made up for every record.

    Args:
        family, module: as for ``VlmFamily.generate``; the module may be a policy in training.
        records: prompts with their media; ids are unique, and every draw belongs to (seed, step, id, round).
        references: the answer of each that is to be unlike.

    Raises:
        ModelError: a model in which tokens cannot be hidden.
    """
    maker = _Maker(family, records, references, settings, generation)
    found: dict[int, MadeUp] = {}
    for round_ in range(1, settings.rounds + 1):
        guided = settings.guided and (settings.rounds == 1 or round_ < settings.rounds)
        works = []
        for number in [number for number in range(len(records)) if number not in found]:
            try:
                works.append(maker.plan(number, round_, guided=guided))
            except VlmDataError as error:
                found[number] = MadeUp(text="", reason=error.reason, detail=error.detail)
        texts = maker.write(module, works, guided=guided)
        alike = similarity.compare(texts, [references[work.number].strip() for work in works])
        for work, text, value in zip(works, texts, alike, strict=True):
            made = maker.judged(work, text, value, round_, guided=guided)
            if not made.reason or round_ == settings.rounds:
                found[work.number] = made
    return [found[number] for number in range(len(records))]


class _Maker:
    """Plans, writes and judges the answers of a round; what does not change from round to round is kept."""

    def __init__(
        self, family: VlmFamily, records: Sequence[BranchRecord], references: Sequence[str], settings: BdhsSettings,
        generation: Generation,
    ) -> None:  # fmt: skip
        self.family, self.records, self.references = family, records, [text.strip() for text in references]
        self.settings, self.generation = settings, generation
        self._examples: dict[int, EncodedExample] = {}
        self._spread: dict[int, tuple[torch.Tensor, list[tuple[int, int]]]] = {}

    def plan(self, number: int, round_: int, *, guided: bool) -> _Work:
        """Mask, noise and cuts of one record in one round.

        Raises:
            VlmDataError: the model cannot read the record.
        """
        name = f"{self.records[number].id}#{round_}"
        example = self._example(number, name)
        prefix = example.rows[0].prefix
        count = int(image_positions(self.family, prefix).sum())
        share, strategy = self.settings.share(count), self.settings.strategy
        hide = hidden_tokens(self.family, prefix, share, self._stream("mask", name), strategy=strategy)
        work = _Work(number=number, example=example, image_tokens=count, hide=hide)
        if guided:
            self._cut(work, name)
        else:
            empty = torch.zeros(0, dtype=torch.int64)
            work.drafts.append(Draft(example=example, given=empty, cuts=(0,), names=(name,), hide=hide))
        return work

    def write(self, module: nn.Module, works: Sequence[_Work], *, guided: bool) -> list[str]:
        """The answers of one round."""
        drawn, family = self.generation, self.family

        def enough(ids: Sequence[int]) -> bool:
            return sentence_end(text_so_far(family, ids)) is not None

        made = continue_answers(
            family, module, [draft for work in works for draft in work.drafts],
            max_new_tokens=self.settings.sentence_tokens if guided else drawn.max_new_tokens, temperature=drawn.temperature,
            top_p=drawn.top_p, seed=drawn.seed, step=drawn.step, batch_size=drawn.batch_size, stop=enough if guided else None,
        )  # fmt: skip
        texts, place = [], 0
        for work in works:
            own = made[place : place + len(work.drafts)]
            place += len(work.drafts)
            texts.append(self._joined(work, own) if guided else text_so_far(family, own[0][0]).strip())
        return texts

    def judged(self, work: _Work, text: str, value: float, round_: int, *, guided: bool) -> MadeUp:
        """The answer, with the reason why it is none."""
        settings, reference, reason, detail = self.settings, self.references[work.number], "", ""
        if not text:
            reason, detail = "empty_answer", "the model ended its answer at once"
        elif " ".join(text.split()) == " ".join(reference.split()):
            reason, detail = "identical_responses", f"equal to the reference after {round_} rounds"
        elif value >= settings.max_similarity and not (settings.keep_similar and round_ == settings.rounds):
            reason, detail = "too_similar", f"similarity {value:.4f} after {round_} rounds, limit {settings.max_similarity:g}"
        return MadeUp(
            text=text, reason=reason, detail=detail, round=round_, guided=guided, similarity=value,
            image_tokens=work.image_tokens, hidden=int(work.hide.sum()), cuts=tuple(len(item.kept) for item in work.sentences),
            swapped=tuple(place for place, item in enumerate(work.sentences) if item.swapped),
        )  # fmt: skip

    def _stream(self, purpose: str, name: str) -> np.random.Generator:
        return rng.numpy_stream(self.generation.seed, f"bdhs/{purpose}", self.generation.step, name)

    def _example(self, number: int, name: str) -> EncodedExample:
        """The encoded question; under noise a new one in every round."""
        if self.settings.noise_steps:
            noisy = noisy_record(self.records[number], self.settings.noise_steps, self._stream("noise", name))
            return self.family.encode(noisy, training=False)
        if number not in self._examples:
            self._examples[number] = self.family.encode(self.records[number], training=False)
        return self._examples[number]

    def _cut(self, work: _Work, name: str) -> None:
        """Drafts and sentences of a reference: one draft for all true beginnings, and one for each swapped sentence."""
        record, text, draw = self.records[work.number], self.references[work.number], self._stream("cut", name)
        if work.number not in self._spread:
            self._spread[work.number] = spread(self.family, record, text)
        ids, places = self._spread[work.number]
        spans = split_sentences(text)
        shared: list[tuple[int, str]] = []
        swaps: list[Draft] = []
        for number, span in enumerate(spans):
            swap, where = draw.random(2).tolist()
            other = swap_yes_no(text[slice(*span)]) if swap < self.settings.swap_yes_no else None
            behind = text[span[1] : spans[number + 1][0]] if number + 1 < len(spans) else ""
            stream = f"{name}.{number}"
            if other is None:
                tokens, kept = _place(text, span, places, where)
                work.sentences.append(_Sentence(draft=0, cut=len(shared), kept=kept, behind=behind, swapped=False))
                shared.append((tokens, stream))
                continue
            changed = text[: span[0]] + other
            own, own_places = spread(self.family, record, changed)
            tokens, kept = _place(changed, (span[0], len(changed)), own_places, where)
            swaps.append(Draft(example=work.example, given=own, cuts=(tokens,), names=(stream,), hide=work.hide))
            work.sentences.append(_Sentence(draft=len(swaps), cut=0, kept=kept, behind=behind, swapped=True))
        cuts, names = tuple(tokens for tokens, _ in shared), tuple(stream for _, stream in shared)
        work.drafts = [Draft(example=work.example, given=ids, cuts=cuts, names=names, hide=work.hide), *swaps]

    def _joined(self, work: _Work, made: Sequence[Sequence[Sequence[int]]]) -> str:
        """The sentences put together again, each with its new end."""
        out = ""
        for item in work.sentences:
            draft, new = work.drafts[item.draft], made[item.draft][item.cut]
            given = draft.given[: draft.cuts[item.cut]].tolist()
            before, whole = text_so_far(self.family, given), text_so_far(self.family, [*given, *new])
            more = whole[len(before) :] if whole.startswith(before) else text_so_far(self.family, new)
            end = sentence_end(more)
            more = more.rstrip() if end is None else more[:end]
            # White space at the cut belongs to the tokens that are kept or to those written, as the tokenizer has it.
            kept = item.kept if before[-1:].isspace() else item.kept.rstrip()
            out += (kept + more if kept else more.lstrip()) + item.behind
        return out.strip()


def _place(text: str, span: tuple[int, int], places: Sequence[tuple[int, int]], where: float) -> tuple[int, str]:
    """Tokens of the text kept before one of a sentence's cuts, and the sentence's own characters among them.

    Args:
        where: in [0, 1): which cut, every one equally likely.
    """
    cuts = cut_places(text, span, places)
    if not cuts:  # a sentence of marks alone, within one token: it is written anew from its beginning
        cuts = [(next((number for number, (_, last) in enumerate(places) if last > span[0]), len(places)), span[0])]
    tokens, characters = cuts[int(where * len(cuts))]
    return tokens, text[span[0] : characters]
