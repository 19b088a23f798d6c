"""A rule-based judge of reports on synthetic studies: six kinds of error counted, as GREEN counts them.

GREEN (arXiv:2405.03595): matched findings divided by matched findings plus clinically significant errors. The six kinds are
false finding, missing finding, wrong location, wrong severity, invented comparison and omitted comparison. Where GREEN asks a
language model, these rules compare two readings of ``reports.read_report``, so the same two texts always get the same counts.

NOT A MEDICAL DEVICE: see ``radiology``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass

from mmalign.world.radiology import HEART, Finding
from mmalign.world.reports import HEART_WORDS, plain_name, read_report


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportErrors:
    """Counts of GREEN's six kinds of error, in its order (a) to (f)."""

    false_finding: int
    missing_finding: int
    wrong_location: int
    wrong_severity: int
    invented_comparison: int
    omitted_comparison: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportVerdict:
    """``score`` is matched / (matched + errors) in [0, 1], or None where the candidate cannot be read.

    ``unread`` are the candidate's sentences that were not read. ``words`` and ``reference_words`` are for length ratios.
    """

    matched: int
    errors: ReportErrors
    unread: tuple[str, ...]
    words: int
    reference_words: int
    is_readable: bool
    notes: tuple[str, ...] = ()
    """Every error in words, for example ``false finding: small left nodule``."""

    @property
    def score(self) -> float | None:
        if not self.is_readable:
            return None
        # Two reports that both say that all is normal agree: nothing is matched and nothing is wrong.
        return self.matched / (self.matched + self.errors.total) if self.matched + self.errors.total else 1.0

    @property
    def verbosity(self) -> float:
        """Words of the candidate per word of the reference."""
        return self.words / max(1, self.reference_words)

    @property
    def length_controlled_score(self) -> float | None:
        """The score divided by the verbosity where that exceeds 1 (LC-GREEN)."""
        return None if self.score is None else self.score / max(1.0, self.verbosity)


def judge_report(reference: str, candidate: str) -> ReportVerdict:
    """Compare a candidate with a reference report.

    Each finding of the candidate is matched once: exactly; else one of the same kind and side (wrong severity); else one
    of the same kind (wrong location); else it is false. A finding said twice is false the second time. A candidate in which not
    one sentence is read has no score: such an answer is a failure to be counted, not a bad report.

    Raises:
        ValueError: the reference has sentences that are not of this world, so nothing can be compared with it.
    """
    wanted, said = read_report(reference), read_report(candidate)
    if wanted.unread:
        raise ValueError(f"the reference report has sentences that cannot be read: {list(wanted.unread)}")
    left = Counter(wanted.findings)
    rest: list[Finding] = []
    matched = 0
    for finding in said.findings:
        if left[finding]:
            left[finding] -= 1
            matched += 1
        else:
            rest.append(finding)
    severity, rest = _absorb(left, rest, lambda a, b: (a.kind, a.side) == (b.kind, b.side))
    location, rest = _absorb(left, rest, lambda a, b: a.kind == b.kind)
    told, true = Counter(said.changes), Counter(wanted.changes)
    invented, omitted = list((told - true).elements()), list((true - told).elements())
    missing = list(left.elements())
    notes = [f"false finding: {_words(finding)}" for finding in rest]
    notes += [f"missing finding: {_words(finding)}" for finding in missing]
    notes += [f"wrong location: {_words(found)} for {_words(meant)}" for found, meant in location]
    notes += [f"wrong severity: {_words(found)} for {_words(meant)}" for found, meant in severity]
    notes += [f"invented comparison: {_change(change)}" for change in invented]
    notes += [f"omitted comparison: {_change(change)}" for change in omitted]
    return ReportVerdict(
        matched=matched,
        errors=ReportErrors(
            false_finding=len(rest),
            missing_finding=len(missing),
            wrong_location=len(location),
            wrong_severity=len(severity),
            invented_comparison=len(invented),
            omitted_comparison=len(omitted),
        ),
        unread=said.unread,
        words=len(candidate.split()),
        reference_words=len(reference.split()),
        is_readable=bool(said.findings or said.denied or said.changes),
        notes=tuple(notes),
    )


def _words(finding: Finding) -> str:
    if finding.kind == HEART:
        return f"{HEART_WORDS[finding.extent]} enlarged heart"
    return f"{finding.extent} {plain_name(finding)}"


def _change(change: tuple[str, str, str]) -> str:
    kind, side, how = change
    return f"{' '.join(filter(None, (side, kind)))} {how}"


def _absorb(
    left: Counter[Finding], rest: list[Finding], alike: Callable[[Finding, Finding], bool]
) -> tuple[list[tuple[Finding, Finding]], list[Finding]]:
    """Pair each remaining finding with a remaining reference finding that is alike; returns pairs and those still alone."""
    pairs, alone = [], []
    for finding in rest:
        partner = next((other for other in left if left[other] and alike(finding, other)), None)
        if partner is None:
            alone.append(finding)
        else:
            left[partner] -= 1
            pairs.append((finding, partner))
    return pairs, alone
