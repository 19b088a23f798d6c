"""Why rows are not used: the fixed reasons, what each does, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from mmalign.media import IMAGE_REASONS, VIDEO_REASONS

if TYPE_CHECKING:
    from mmalign.data.tables import Table

QUARANTINE: Final = (
    *IMAGE_REASONS,
    *VIDEO_REASONS,
    "label_out_of_range",
    "contradictory_label",
    "non_finite_score",
    "empty_prompt",
    "nonfinite_latent",
    "changed_image",
    "placeholder_count_mismatch",
    "missing_chosen",
    "missing_rejected",
    "empty_chosen",
    "empty_rejected",
    "different_prompts",
    "bad_turns",
    "empty_answer",
    "placeholder_in_answer",
    "missing_media",
    "undecodable_media",
    "placeholder_mismatch",
    "template",
)
"""Defects: the row is bad, is listed, and counts against the bad-row limit."""

DROP: Final = (
    "no_label",
    "tie",
    "identical_images",
    "duplicate",
    "aspect_ratio",
    "min_side",
    "below_margin",
    "too_few",
    "identical_responses",
    "too_similar",
    "not_longer",
    "contained",
    "length_ratio",
    "low_confidence",
    "aspect_mismatch",
    "upscale",
    "short_video",
    "too_long",
    "prompt_too_long",
    "other_stage",
    "disliked",
    "no_score",
    "length_balance",
    "no_report",
    "no_reference",
)
"""Sound rows that a policy leaves out: listed and counted, but not held against the table."""

NOTES: Final = ("conflict",)
"""Counted only; the rows are used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row that is not used, and why. Both of its pictures are left out together."""

    file: str
    row: int
    """Number of the row in its file, from 0; for JSONL the line, from 1."""
    id: str
    column: str
    reason: str
    detail: str
    head: str = ""
    """SHA-256 of the first 64 bytes of the picture or clip that was refused; '' where there is none, or none could be read."""

    @classmethod
    def at(cls, table: Table, row: int, *, column: str, reason: str, detail: str, head: str = "") -> Problem:
        """A problem of one row of a table."""
        file, number = table.file_and_number(row)
        name = str(table.value(row, "id"))
        return cls(file=file, row=number, id=name, column=column, reason=reason, detail=detail, head=head)

    @property
    def action(self) -> str:
        return "quarantine" if self.reason in QUARANTINE else "drop"

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "action": self.action}


def count(problems: Iterable[Problem]) -> dict[str, int]:
    """Rows by reason, in the fixed order of the reasons."""
    found: dict[str, int] = {}
    for problem in problems:
        found[problem.reason] = found.get(problem.reason, 0) + 1
    return {reason: found[reason] for reason in (*QUARANTINE, *DROP) if reason in found}


def reasons_table(counts: Mapping[str, int], *, total: int, used: int) -> str:
    """The counts as aligned text, for the terminal and for error messages."""
    lines = [("rows", "", f"{total}"), ("used", "", f"{used}")]
    for reason, number in counts.items():
        action = "quarantined" if reason in QUARANTINE else "dropped" if reason in DROP else "noted, used"
        lines.append((reason, action, f"{number}"))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in lines)
