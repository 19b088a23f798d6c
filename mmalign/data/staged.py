"""Several loaders one after the other: the stages of a curriculum as one stream of steps.

A step means the same thing after a resume, at any stage. Not for mixing tables within a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from mmalign.data.files import canonical_hash
from mmalign.data.pair_loader import MaskedRow
from mmalign.data.vlm_loader import VlmLoader
from mmalign.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedOrder:
    """What identifies the order of all stages."""

    fingerprint: str


class StagedLoader:
    """The micro-batches of stage after stage.

    Args:
        loaders: one per stage.
        steps: optimiser steps of each.

    Raises:
        DataError: no stage, or another number of lengths than of stages.
    """

    def __init__(self, loaders: Sequence[VlmLoader], steps: Sequence[int]) -> None:
        if not loaders or len(loaders) != len(steps):
            raise DataError(f"{len(loaders)} stages with {len(steps)} lengths")
        self.loaders, self.steps = tuple(loaders), tuple(steps)
        self.order = StagedOrder(
            fingerprint=canonical_hash(
                {"stages": [[loader.order.fingerprint, count] for loader, count in zip(loaders, steps, strict=True)]}
            )
        )

    @property
    def masked(self) -> list[MaskedRow]:
        """Rows that had weight 0 in a batch, over all stages, with the steps of the run."""
        found, first = [], 0
        for number, (loader, count) in enumerate(zip(self.loaders, self.steps, strict=True)):
            # A stage's loader is asked for one batch more than the stage has, which nobody trains on.
            own = [row for row in loader.masked if row.step < count or number + 1 == len(self.steps)]
            found += [replace(row, step=first + row.step) for row in own]
            first += count
        return found

    def place(self, step: int) -> tuple[int, int]:
        """Number of the stage that a step belongs to, and the step's number in it; the last stage goes on without end."""
        for number, count in enumerate(self.steps[:-1]):
            if step < count:
                return number, step
            step -= count
        return len(self.steps) - 1, step

    def epoch(self, step: int) -> float:
        """Passes over the rows of each stage, added up."""
        stage, inner = self.place(step)
        before = sum(self.loaders[number].epoch(self.steps[number]) for number in range(stage))
        return before + self.loaders[stage].epoch(inner)

    def step_ids(self, step: int) -> tuple[str, ...]:
        """Row ids of a whole global batch."""
        stage, inner = self.place(step)
        return self.loaders[stage].step_ids(inner)

    def micro_batches(self, start_step: int = 0) -> Iterator[tuple[int, int, Any]]:
        """Endless (step, micro-batch number, batch), starting at any step at no cost."""
        stage, inner = self.place(start_step)
        first = start_step - inner
        while True:
            last = self.steps[stage] if stage + 1 < len(self.steps) else None
            with closing(self.loaders[stage].micro_batches(inner)) as stream:  # type: ignore[type-var]
                for step, micro, batch in stream:
                    if last is not None and step >= last:
                        break
                    yield first + step, micro, batch
            first, stage, inner = first + self.steps[stage], stage + 1, 0
