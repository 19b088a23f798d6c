"""Stored reference scores: what the reference policy says of each row's stored draws, computed once.

A row with K stored draws meets the same K timesteps, noises, crops and captions again and again, so the reference's two
errors of each draw are 2 K numbers a row. A run that reads them needs neither the reference's forward pass nor its weights.
The reference is a function handed in: nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mmalign.data.cache import Cache
from mmalign.data.mediaindex import MediaIndex
from mmalign.data.order import Slot
from mmalign.data.tables import PairTable
from mmalign.errors import DataError
from mmalign.types import PairBatch

if TYPE_CHECKING:
    from mmalign.data.pair_loader import PairLoader

KIND = "referr"


def reference_key(table: PairTable, media: MediaIndex, row: int, draw: int) -> str:
    """The cache key of one row's draw: whatever of the row its score depends on."""
    pictures = [media.picture(row, side).sha256 for side in (0, 1)]
    return "\x1f".join([str(table.value(row, "id")), table.prompt(row), *pictures, str(draw)])


def needed_references(
    table: PairTable, media: MediaIndex, rows: Sequence[int] | np.ndarray, draws: int
) -> Iterator[tuple[str, Slot]]:
    """Every (key, place) that training will ask for: draw 0 of all rows first, as the epochs take them."""
    for draw in range(draws):
        for row in rows:
            yield reference_key(table, media, int(row), draw), Slot(row=int(row), epoch=draw)


def fill_references(
    cache: Cache, loader: PairLoader, score: Callable[[PairBatch], Tensor], *, progress: bool = True
) -> int:
    """Store the reference's scores of all of a loader's rows and draws; returns how many were new.

    Batches have the loader's batch size, which is the run's: kernels round differently for other shapes.

    Args:
        score: a batch to the reference's scores, ``[B, 2]`` float32 (chosen, rejected).

    Raises:
        DataError: no stored draws, a picture that cannot be read any more, or a score that is not finite.
    """
    media = require_facts(loader.media, loader.draws)
    rows = loader.order.rows

    def run(slots: list[Slot]) -> dict[str, Tensor]:
        before = len(loader.masked)
        batch = loader.read(slots)
        if len(loader.masked) > before:
            lost = loader.masked[before]
            raise DataError(
                f"{lost.where} (id {lost.id}): {lost.column}: {lost.reason}: {lost.detail}; it passed the check and cannot "
                f"be read now. Run 'mmalign data check' again"
            )
        return {"scores": score(batch)}

    report = cache.fill(
        needed_references(loader.table, media, rows, loader.draws), run, batch_size=loader.batch_size,
        progress=progress, total=len(rows) * loader.draws,
    )  # fmt: skip
    if report.refused:
        name = report.refused[0].split("\x1f")[0]
        raise DataError(
            f"the reference's error is not finite for {len(report.refused)} draws, first of row '{name}'; use model.dtype=fp32 "
            f"or bf16, or run 'mmalign data check' for latents that are not finite"
        )
    return report.stored


def require_references(cache: Cache, table: PairTable, media: MediaIndex | None, rows: np.ndarray, draws: int) -> None:
    """Refuse to train from a cache that lacks scores of the table.

    Raises:
        DataError: no media facts, no stored draws, or scores missing.
    """
    facts = require_facts(media, draws)
    missing = cache.missing(key for key, _ in needed_references(table, facts, rows, draws))
    if missing:
        raise DataError(
            f"{cache.folder}: {len(missing)} reference scores of this table are not in the cache; fill it with the settings "
            f"of this run"
        )


def require_facts(media: MediaIndex | None, draws: int) -> MediaIndex:
    """The media facts of a table whose rows have stored draws."""
    if draws < 1:
        raise DataError("stored reference scores need stored draws: set data.draws to how many each row has, e.g. 8")
    if media is None:
        raise DataError(
            "stored reference scores are found by the pictures' hashes: run the check first (data.check: required or online)"
        )
    return media
