"""Judges of answers: how good is what a model said about a picture or clip? Used by online training and by evaluation.

A judge sees the whole record: prompt, media, and what the table knows of the truth (``record.meta``). It answers None where it
cannot say, which is never the same as a low score.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mmalign.branches import BranchRecord, Judgement
from mmalign.errors import RewardError
from mmalign.registry import Registry, did_you_mean


class AnswerJudge(Protocol):
    """Scores answers; made without arguments by its entry in the table.

    A judge that knows more than a score has a second method, ``judge(records, answers) -> list[Judgement]``. A judge that takes
    an argument behind its name (``green:<model>``) is an entry with the attribute ``LOADS``: ``function(argument, request)``.
    """

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        """One number per answer, higher is better; None where the judge cannot say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeRequest:
    """What a judge with an argument gets to be made."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    replies: Path | None = None
    """File in which a model's replies are kept; None: in memory."""

    def take(self, **defaults: Any) -> dict[str, Any]:
        """The options of this judge over their defaults; text is read as the kind of the default.

        Raises:
            RewardError: an option it does not have, or a value of another kind.
        """
        found = dict(defaults)
        for name, value in self.options.items():
            if name not in defaults:
                raise RewardError(f"judge '{self.name}' has no option '{name}'{did_you_mean(name, defaults)}")
            found[name] = self._value(name, value, defaults[name])
        return found

    def _value(self, name: str, value: Any, default: Any) -> Any:
        if value == "none":
            return None
        if not isinstance(value, str) or default is None or isinstance(default, str):
            return value
        try:
            return type(default)(value)
        except ValueError as error:
            raise RewardError(f"judge '{self.name}': {name} is {value!r}, expected a number") from error


ANSWER_JUDGES: Registry[Any] = Registry("answer judge")
for _name, _target, _summary in (
    ("overlap", "mmalign.rewards.answers:Overlap", "F1 of words shared with the reference answer"),
    ("brevity", "mmalign.rewards.answers:Brevity", "minus the number of words: shows what a judge that reads length alone does"),
    ("verbosity", "mmalign.rewards.answers:Verbosity", "the number of words: the control of every length exploit"),
    ("board-f1", "mmalign.world.answer_judges:BoardF1", "objects of the embedded world's scene that are named, and no others"),
    ("cxr-report", "mmalign.world.answer_judges:ReportScore", "findings of a synthetic report that match the reference's"),
    ("cxr-report-lc", "mmalign.world.answer_judges:ReportLengthControlled", "the same, divided by how much longer the report is"),
    ("clip-order", "mmalign.world.answer_judges:ClipOrder", "share of event pairs of a synthetic clip told in their order"),
    ("green", "mmalign.rewards.green:LOCAL", "green:<model>: errors of a report as a chat model counts them (GREEN)"),
    ("green-api", "mmalign.rewards.green:ENDPOINT", "green-api:http://host:port/v1#model: the same behind an endpoint"),
    ("findings", "mmalign.rewards.findings:FINDING_F1", "findings:<extractor>: F1 of the findings that a report names"),
    ("lc", "mmalign.rewards.answers:LENGTH_CONTROLLED", "lc:<judge>: its score over how much longer a text is"),
    ("board-faithful", "mmalign.world.answer_judges:BoardFaithful", "share of named objects that the embedded world's scene has"),
    ("prefer", "mmalign.rewards.preference:PreferenceJudge", "prefer:<model>, which compares two answers in both orders"),
    ("prefer-api", "mmalign.rewards.preference:PreferenceJudge", "prefer-api:<url>#<model>, the same behind an endpoint"),
):  # fmt: skip
    ANSWER_JUDGES.add(_name, _target, summary=_summary)

MODEL_JUDGES = ("prefer", "prefer-api")
"""Kinds of judges that name a model behind a colon."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Loads:
    """An entry of the table for judges that take an argument behind a colon."""

    make: Any
    """``function(argument, request) -> AnswerJudge``."""


def load_judge(name: str, options: Mapping[str, Any] | None = None, *, replies: Path | None = None) -> AnswerJudge:
    """The judge of that name, of ``package.module:Class``, or a model's (``green:<model>``, ``prefer-api:<url>#<model>``, ...).

    Args:
        options: of a model's judge.
        replies: file in which the replies of judges of reports that are models are kept, so that none is asked for twice.

    Args:
        options: settings of a judge with an argument.
        replies: file in which the replies of a judge that is a model are kept, so that none is asked for twice.

    Raises:
        ConfigError: unknown name, with the nearest known one. RewardError: what the name leads to is no judge, takes no options,
            or cannot be loaded. ModelError: its model cannot be loaded.
    """
    head, _, argument = name.partition(":")
    if head in MODEL_JUDGES:
        from mmalign.rewards.preference import load_preference

        return load_preference(head, argument, options or {})
    made = ANSWER_JUDGES.get(head if head in ANSWER_JUDGES.names() else name)
    if isinstance(made, Loads):
        judge: AnswerJudge = made.make(argument, JudgeRequest(name=head, options=dict(options or {}), replies=replies))
        return judge
    if options:
        raise RewardError(f"the judge '{name}' takes no options; judges that are models do")
    if not isinstance(made, type) or "score" not in dir(made):
        raise RewardError(f"'{name}' is no judge of answers: a class with a method score(records, answers) is needed")
    return made()  # type: ignore[return-value]


def require_judge(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a name that leads to no judge, without loading a model. Raises as `load_judge`."""
    head, _, argument = name.partition(":")
    made = ANSWER_JUDGES.get(head) if head in ANSWER_JUDGES.names() else None
    if not isinstance(made, Loads):  # made at once, or when first asked
        load_judge(name, options)
    elif not argument:
        raise RewardError(f"judge '{head}' needs a name behind a colon; see 'mmalign list judges'")
    elif made is LENGTH_CONTROLLED:
        require_judge(argument)


def judgements(judge: AnswerJudge, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[Judgement]:
    """What a judge says of answers: its judgements, or those of its scores where it has no more to say."""
    if hasattr(judge, "judge"):
        found: list[Judgement] = judge.judge(records, answers)
        return found
    return [
        Judgement(score=score, reason=None if score is not None else "no_score") for score in judge.score(records, answers)
    ]


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


def reference_text(record: BranchRecord) -> str | None:
    """The reference answer: ``meta.reference``, or the one answer of a row that has one."""
    given = record.meta.get("reference")
    if isinstance(given, str) and given.strip():
        return given
    return record.answers[0].text if given is None and len(record.answers) == 1 else None


class LengthControlled:
    """Another judge's score divided by how much longer than its reference an answer is, in words (arXiv:2410.07025, LC-GREEN).

    ``score / max(1, words / words of the reference)``: shorter answers gain nothing. None where there is no reference.
    """

    def __init__(self, inner: AnswerJudge) -> None:
        self.inner = inner

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        return [found.score for found in self.judge(records, answers)]

    def judge(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[Judgement]:
        found = judgements(self.inner, records, answers)
        return [self._one(*row) for row in zip(records, answers, found, strict=True)]

    def _one(self, record: BranchRecord, answer: str, found: Judgement) -> Judgement:
        reference = reference_text(record)
        if reference is None or not reference.split():
            return replace(found, score=None, reason=found.reason or "no_reference")
        verbosity = len(answer.split()) / len(reference.split())
        score = None if found.score is None else found.score / max(1.0, verbosity)
        return replace(found, score=score, parts={**found.parts, "verbosity": verbosity})


def _length_controlled(argument: str, request: JudgeRequest) -> LengthControlled:
    if not argument:
        raise RewardError("name the judge whose score is to be controlled: lc:<judge>")
    return LengthControlled(load_judge(argument, options=request.options, replies=request.replies))


LENGTH_CONTROLLED = Loads(_length_controlled)
