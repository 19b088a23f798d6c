"""Finding extractors for synthetic reports: the rules of ``reports.read_report``, with labels of two grains. NOT A MEDICAL
DEVICE."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.world.radiology import EXTENTS, HEART, KINDS, LUNG_KINDS, SIDES, Finding
from mmalign.world.reports import read_report


class StudyFindings:
    """Labels are findings in full, for example ``small left effusion`` and ``large cardiomegaly``."""

    labels: tuple[str, ...] = (
        *(f"{extent} {HEART}" for extent in EXTENTS),
        *(f"{extent} {side} {kind}" for kind in LUNG_KINDS for side in SIDES for extent in EXTENTS),
    )

    def extract(self, texts: Sequence[str]) -> list[frozenset[str] | None]:
        """None for a text of which no sentence is read."""
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> frozenset[str] | None:
        found = read_report(text)
        if not (found.findings or found.denied or found.changes):
            return None
        return frozenset(self.label(finding) for finding in found.findings)

    def label(self, finding: Finding) -> str:
        """The label of one finding."""
        return " ".join(filter(None, (finding.extent, finding.side, finding.kind)))


class StudyKinds(StudyFindings):
    """Labels are kinds of findings alone."""

    labels: tuple[str, ...] = KINDS

    def label(self, finding: Finding) -> str:
        return finding.kind
