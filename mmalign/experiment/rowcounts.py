"""What became of the rows of a run: used, left out by reason, masked while training; the same on any number of processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmalign.data.pair_loader import MAX_MASKED, MaskedRow
from mmalign.data.reasons import QUARANTINE
from mmalign.engine.checkpoint import read_checkpoint
from mmalign.errors import DataError
from mmalign.experiment.inputs import Inputs

PART = "rows"
"""Name of a checkpoint's part."""


class RowCounts:
    """The counts of one run, over all processes and over everything before a resume.

    Which rows are usable is decided from the table before the first step, alike on every process. What fails later is known to
    the process whose row it was, so every method here but `news` has to be called on all processes.

    Args:
        accelerator: an ``accelerate.Accelerator``.
    """

    def __init__(self, inputs: Inputs, accelerator: Any) -> None:
        self.inputs, self.accelerator = inputs, accelerator
        self._earlier: list[MaskedRow] = []
        self._all: list[MaskedRow] = []
        self._told = ""

    def state(self, step: int) -> dict[str, Any]:
        """Plain values for a checkpoint after `step` steps; what later steps met does not belong to it."""
        self.gather(step)
        return {"used": self._used, "reasons": self._reasons, "masked": [asdict(row) for row in self._all]}

    def restore(self, checkpoint: Path) -> None:
        """Go on counting where a checkpoint was taken."""
        if any(checkpoint.glob(f"{PART}*")):  # older ones have none
            self._earlier = self._all = [MaskedRow(**row) for row in read_checkpoint(checkpoint, PART)["masked"]]

    def gather(self, step: int | None = None) -> Sequence[MaskedRow]:
        """Rows masked by any process, each once a step, in order; with `step`, in the steps before it."""
        mine = [row for row in self.inputs.loader.masked if step is None or row.step < step]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            mine = gather_object(mine)
        whole = {(row.step, row.id, row.column): row for row in (*self._earlier, *mine)}
        self._all = [whole[key] for key in sorted(whole)]
        return self._all

    def masked(self, step: int) -> int:
        """How many rows of a step, counted from 0, this process masked."""
        return sum(row.step == step for row in self.inputs.loader.masked)

    def refuse_too_many(self, step: int) -> None:
        """Stop every process at the same step where all of them together, before a resume too, have masked too many rows.

        Raises:
            DataError: more different rows than `MAX_MASKED`; lists them.
        """
        different = {row.id: row for row in self.gather(step)}
        if len(different) > MAX_MASKED:
            listed = "\n".join(
                f"  {row.where} (id {row.id}): {row.column}: {row.reason}: {row.detail}" for row in different.values()
            )
            raise DataError(
                f"step {step}: {len(different)} rows could not be read while training (limit {MAX_MASKED}); the last checkpoint "
                f"is intact. Bring the files back and go on with --resume, or run 'mmalign data check' and start anew:\n{listed}"
            )

    def news(self, title: str) -> str | None:
        """A line for people, of what was gathered last; None where it would say what the last one said."""
        text = self._text()
        if text == self._told:
            return None
        self._told = text
        return f"{title}: {text}"

    def _text(self) -> str:
        parts = [f"{self._used} of {self.inputs.checked.total} rows used"]
        reasons = [
            f"{number} {reason} {'quarantined' if reason in QUARANTINE else 'noted, used' if reason == 'conflict' else 'dropped'}"
            for reason, number in self._reasons.items()
        ]
        if reasons:
            parts.append(", ".join(reasons))
        if self._all:
            counts = Counter(row.reason for row in {row.id: row for row in self._all}.values())
            parts.append("masked while training: " + ", ".join(f"{number} {reason}" for reason, number in counts.items()))
        return "; ".join(parts)

    @property
    def _used(self) -> int:
        people = self.inputs.people
        return len(self.inputs.checked.rows if people is None else people.rows) - len(self.inputs.cache_problems)

    @property
    def _reasons(self) -> dict[str, int]:
        late = Counter(problem.reason for problem in self.inputs.cache_problems)
        return dict(Counter(self.inputs.dropped) + late)


__all__ = ["PART", "RowCounts"]
