"""Judges of answers that know what is in the embedded worlds' pictures and films: exact, free, and blind to style.

Each reads the truth from a record's ``meta`` (column `meta` of the table) and returns one score per answer, higher is better,
None where the answer cannot be judged. ``mmalign.rewards`` names them.

    record.meta["scene"]: key of a board (``BoardF1``, ``BoardFaithful``)
    record.meta["reference"]: reference report (``ReportScore``, ``ReportLengthControlled``); NOT A MEDICAL DEVICE
    record.meta["clip"]: key of a clip (``ClipOrder``)

Not for: the measures of a whole set with intervals (``hallucination``, ``clip_questions``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from mmalign.branches import BranchRecord, Judgement
from mmalign.errors import DataError
from mmalign.world.clip_questions import check_order
from mmalign.world.clips import parse_clip_key
from mmalign.world.hallucination import CaptionCheck, check_caption
from mmalign.world.report_judge import ReportVerdict, judge_report
from mmalign.world.scenes import parse_key


def truth(record: BranchRecord, name: str) -> str:
    """What a record's `meta` says.

    Raises:
        DataError: it does not say.
    """
    value = record.meta.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"row '{record.id}': meta.{name} is needed by this judge; tables of the embedded worlds have it"
        )
    return value


def _check(record: BranchRecord, answer: str) -> CaptionCheck:
    try:
        return check_caption(answer, parse_key(truth(record, "scene")))
    except ValueError as error:
        raise DataError(f"row '{record.id}': meta.scene: {error}") from error


class BoardF1:
    """F1 of the objects that a description names, in [0, 1], less a hundredth for each one in a wrong place.

    The embedded pairs are made with it (``mmalign demo --method vlm_dpo``). A description of which nothing is read scores 0: it
    names nothing that is there.
    """

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        found = [_check(record, answer) for record, answer in zip(records, answers, strict=True)]
        return [check.f1 - 0.01 * check.misplaced for check in found]


class BoardFaithful:
    """Share of the objects named that are there, in [0, 1] (1 minus CHAIR_i of the description); None if none is named."""

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        found = [_check(record, answer) for record, answer in zip(records, answers, strict=True)]
        return [check.found / check.named if check.named else None for check in found]


class ReportScore:
    """GREEN-style score of a report against its reference, in [0, 1]; None for a report of which nothing is read."""

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        return [found.score for found in self.judge(records, answers)]

    def judge(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[Judgement]:
        """Scores with GREEN's counts and the errors in words; sentences that no rule reads are named too."""
        return [
            self._one(judge_report(truth(record, "reference"), answer))
            for record, answer in zip(records, answers, strict=True)
        ]

    def _one(self, found: ReportVerdict) -> Judgement:
        parts = {"matched": float(found.matched), **{name: float(count) for name, count in asdict(found.errors).items()}}
        parts |= {"unread": float(len(found.unread)), "verbosity": found.verbosity}
        notes = (*found.notes, *(f"not read: {sentence}" for sentence in found.unread))
        score = self._value(found)
        return Judgement(score=score, parts=parts, notes=notes, reason=None if score is not None else "unreadable")

    def _value(self, found: ReportVerdict) -> float | None:
        return found.score


class ReportLengthControlled(ReportScore):
    """The same divided by the verbosity where the report is longer than its reference (LC-GREEN)."""

    def _value(self, found: ReportVerdict) -> float | None:
        return found.length_controlled_score


class ClipOrder:
    """Share of pairs of events that a caption names in the right order, in [0, 1]; None with fewer than two events named."""

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        scores: list[float | None] = []
        for record, answer in zip(records, answers, strict=True):
            try:
                clip = parse_clip_key(truth(record, "clip"))
            except ValueError as error:
                raise DataError(f"row '{record.id}': meta.clip: {error}") from error
            scores.append(check_order(answer, clip).order)
        return scores
