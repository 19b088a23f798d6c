"""Which findings a report names, and how two reports agree on them: the finding-level F1 of report generation.

An extractor reads texts and says of each which of its labels it asserts. The embedded ones are rules for synthetic reports; for
real ones name a class of your own (``package.module:Class``), for example around a CheXbert checkpoint: a labeller decides what
the F1 means, so none is chosen for you. NOT A MEDICAL DEVICE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mmalign.branches import BranchRecord, Judgement
from mmalign.errors import RewardError
from mmalign.registry import Registry
from mmalign.rewards.answers import JudgeRequest, Loads, reference_text


class FindingExtractor(Protocol):
    """Reads reports; made without arguments by its entry in the table."""

    labels: tuple[str, ...]
    """Every label it knows."""

    def extract(self, texts: Sequence[str]) -> list[frozenset[str] | None]:
        """The labels that each text asserts; None for a text that cannot be read."""


EXTRACTORS: Registry[Any] = Registry("finding extractor")
for _name, _target, _summary in (
    ("cxr-findings", "mmalign.world.extractors:StudyFindings", "synthetic reports: kind, side and extent of every finding"),
    ("cxr-kinds", "mmalign.world.extractors:StudyKinds", "synthetic reports: kinds of findings alone"),
):  # fmt: skip
    EXTRACTORS.add(_name, _target, summary=_summary)


def load_extractor(name: str) -> FindingExtractor:
    """The extractor of that name, or of ``package.module:Class``.

    Raises:
        ConfigError: unknown name, with the nearest known one. RewardError: what the name leads to is no extractor.
    """
    made = EXTRACTORS.get(name)
    if not isinstance(made, type) or not {"extract", "labels"} <= set(dir(made)):
        raise RewardError(f"'{name}' is no extractor: a class with labels and a method extract(texts) is needed")
    found: FindingExtractor = made()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingCounts:
    """True and false positives and negatives of candidates against references: integers ``[N, labels]``."""

    labels: tuple[str, ...]
    both: np.ndarray
    only_candidate: np.ndarray
    only_reference: np.ndarray
    unreadable: int
    """Candidates that could not be read; they count as reports without findings."""

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Per report, numerator and denominator of the micro F1: ``2 TP`` and ``2 TP + FP + FN`` over all labels. ``[N]``
        each."""
        top = 2 * self.both.sum(1)
        return top, top + self.only_candidate.sum(1) + self.only_reference.sum(1)

    def rates(self) -> dict[str, float]:
        """``precision``, ``recall``, ``micro_f1``, and ``macro_f1`` over the labels that occur; 0 where nothing is counted."""
        both, extra, missed = (values.sum(0) for values in (self.both, self.only_candidate, self.only_reference))
        whole = 2 * both + extra + missed
        there = whole > 0
        return {
            "precision": _share(both.sum(), both.sum() + extra.sum()), "recall": _share(both.sum(), both.sum() + missed.sum()),
            "micro_f1": _share(2 * both.sum(), whole.sum()),
            "macro_f1": float(np.mean(2 * both[there] / whole[there])) if there.any() else 0.0,
        }  # fmt: skip


def count_findings(extractor: FindingExtractor, references: Sequence[str], candidates: Sequence[str]) -> FindingCounts:
    """Compare candidates with references, report by report.

    Raises:
        RewardError: a reference that cannot be read, or a label that the extractor did not announce.
    """
    wanted, said = extractor.extract(references), extractor.extract(candidates)
    for number, found in enumerate(wanted):
        if found is None:
            raise RewardError(f"the extractor cannot read the reference report {number}: {references[number][:80]!r}")
    real, given = _table(extractor.labels, wanted), _table(extractor.labels, said)
    return FindingCounts(
        labels=tuple(extractor.labels), both=real & given, only_candidate=given & ~real & 1, only_reference=real & ~given & 1,
        unreadable=sum(found is None for found in said),
    )  # fmt: skip


def _table(labels: Sequence[str], found: Sequence[frozenset[str] | None]) -> np.ndarray:
    table = np.zeros((len(found), len(labels)), np.int64)
    places = {label: place for place, label in enumerate(labels)}
    for row, names in enumerate(found):
        for name in names or ():
            if name not in places:
                raise RewardError(f"the extractor found '{name}', which is none of its labels")
            table[row, places[name]] = 1
    return table


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


class FindingF1:
    """``findings:<extractor>``: F1 of a report's findings against its reference's; 1 where both assert none.

    None where the report cannot be read or there is no reference.
    """

    def __init__(self, extractor: FindingExtractor) -> None:
        self.extractor = extractor

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        return [found.score for found in self.judge(records, answers)]

    def judge(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[Judgement]:
        return [self._one(reference_text(record), answer) for record, answer in zip(records, answers, strict=True)]

    def _one(self, reference: str | None, answer: str) -> Judgement:
        if reference is None:
            return Judgement(score=None, reason="no_reference")
        wanted, said = self.extractor.extract([reference, answer])
        if wanted is None or said is None:
            return Judgement(score=None, reason="unreadable")
        extra, missed = sorted(said - wanted), sorted(wanted - said)
        whole = 2 * len(said & wanted) + len(extra) + len(missed)
        notes = (*(f"false finding: {name}" for name in extra), *(f"missing finding: {name}" for name in missed))
        parts = {"matched": float(len(said & wanted)), "false_finding": float(len(extra)), "missing_finding": float(len(missed))}
        return Judgement(score=2 * len(said & wanted) / whole if whole else 1.0, parts=parts, notes=notes)


def _finding_f1(argument: str, request: JudgeRequest) -> FindingF1:
    request.take()
    if not argument:
        raise RewardError(f"name the extractor: findings:<name> (known: {', '.join(EXTRACTORS.names())})")
    return FindingF1(load_extractor(argument))


FINDING_F1 = Loads(_finding_f1)
