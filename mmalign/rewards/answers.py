"""Judges of answers: how good is what a model said about a picture or clip? Used by online training and by evaluation.

A judge sees the whole record: prompt, media, and what the table knows of the truth (``record.meta``). It answers None where it
cannot say, which is never the same as a low score.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mmalign.branches import BranchRecord
from mmalign.errors import RewardError
from mmalign.registry import Registry


class AnswerJudge(Protocol):
    """Scores answers; made without arguments by its entry in the table."""

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        """One number per answer, higher is better; None where the judge cannot say."""


ANSWER_JUDGES: Registry[type] = Registry("answer judge")
for _name, _target, _summary in (
    ("overlap", "mmalign.rewards.answers:Overlap", "F1 of words shared with the reference answer"),
    ("brevity", "mmalign.rewards.answers:Brevity", "minus the number of words: shows what a judge that reads length alone does"),
    ("verbosity", "mmalign.rewards.answers:Verbosity", "the number of words: the control of every length exploit"),
    ("board-f1", "mmalign.world.answer_judges:BoardF1", "objects of the embedded world's scene that are named, and no others"),
    ("cxr-report", "mmalign.world.answer_judges:ReportScore", "findings of a synthetic report that match the reference's"),
    ("cxr-report-lc", "mmalign.world.answer_judges:ReportLengthControlled", "the same, divided by how much longer the report is"),
    ("clip-order", "mmalign.world.answer_judges:ClipOrder", "share of event pairs of a synthetic clip told in their order"),
    ("board-faithful", "mmalign.world.answer_judges:BoardFaithful", "share of named objects that the embedded world's scene has"),
    ("prefer", "mmalign.rewards.preference:PreferenceJudge", "prefer:<model>, which compares two answers in both orders"),
    ("prefer-api", "mmalign.rewards.preference:PreferenceJudge", "prefer-api:<url>#<model>, the same behind an endpoint"),
):  # fmt: skip
    ANSWER_JUDGES.add(_name, _target, summary=_summary)

MODEL_JUDGES = ("prefer", "prefer-api")
"""Kinds of judges that name a model behind a colon."""

_WORD = re.compile(r"\w+")


def load_judge(name: str, options: Mapping[str, Any] | None = None) -> AnswerJudge:
    """The judge of that name, of ``package.module:Class``, or a model's (``prefer:<model>``, ``prefer-api:<url>#<model>``).

    Args:
        options: of a model's judge (``mmalign.rewards.preference.PreferenceOptions``).

    Raises:
        ConfigError: unknown name, with the nearest known one.
        RewardError: what the name leads to is no judge, or takes no options.
    """
    kind, _, argument = name.partition(":")
    if kind in MODEL_JUDGES:
        from mmalign.rewards.preference import load_preference

        return load_preference(kind, argument, options or {})
    if options:
        raise RewardError(f"the judge '{name}' takes no options; models do ({', '.join(MODEL_JUDGES)})")
    made = ANSWER_JUDGES.get(name)
    if not isinstance(made, type) or "score" not in dir(made):
        raise RewardError(f"'{name}' is no judge of answers: a class with a method score(records, answers) is needed")
    judge: AnswerJudge = made()
    return judge


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return _WORD.findall(text.lower())


class Overlap:
    """F1 of the words shared with the reference answer, in [0, 1] (ROUGE-1, W04-1013)."""

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        return [self._one(record, answer) for record, answer in zip(records, answers, strict=True)]

    def _one(self, record: BranchRecord, answer: str) -> float | None:
        reference = record.meta.get("reference") or (record.answers[0].text if record.answers else None)
        if not isinstance(reference, str) or not words(reference):
            return None
        said, wanted = Counter(words(answer)), Counter(words(reference))
        shared = sum((said & wanted).values())
        return 2 * shared / (sum(said.values()) + sum(wanted.values()))


class Brevity:
    """Minus the number of words."""

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        return [-float(len(words(answer))) for answer in answers]


class Verbosity:
    """The number of words."""

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        return [float(len(words(answer))) for answer in answers]
