"""Prompts that are longer than the text encoders read: what is cut is said, or such rows are left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmalign.data.fill import distinct_prompts
from mmalign.data.reasons import Problem
from mmalign.data.tables import prompts_of
from mmalign.models.diffusion.base import DiffusionFamily

if TYPE_CHECKING:
    from mmalign.data import CheckResult, PairTable
    from mmalign.experiment.settings import DataConfig

BATCH = 1024


def judge_prompts(
    settings: DataConfig, family: DiffusionFamily, table: PairTable, checked: CheckResult
) -> tuple[CheckResult, str | None]:
    """The rows a run may use, and a line for people where prompts are cut.

    Raises:
        DataError: long prompts are to be left out and no row remains.
    """
    lost = _lost(family, distinct_prompts(table, checked.rows, 0.0))
    if not lost:
        return checked, None
    read = prompts_of(table, checked.rows)
    long = np.flatnonzero(pc.is_in(read, value_set=pa.array(list(lost), type=read.type)).to_numpy())
    rows, prompts = checked.rows[long], read.take(pa.array(long)).to_pylist()
    if settings.long_prompts == "cut":
        share = f"{len(rows)} of {len(checked.rows)} rows have prompts that no text encoder reads whole"
        first = f"first {table.where(int(rows[0]))}: the last {lost[prompts[0]]} tokens are cut"
        return checked, f"{share} ({first}); data.long_prompts=drop leaves such rows out"
    problems = tuple(
        Problem.at(
            table, int(row), column="prompt", reason="prompt_too_long",
            detail=f"{lost[prompt]} tokens more than the text encoder that reads most of it can take",
        )
        for row, prompt in zip(rows, prompts, strict=True)
    )  # fmt: skip
    return replace(checked, rows=np.delete(checked.rows, long), problems=(*checked.problems, *problems)).demand(), None


def _lost(family: DiffusionFamily, prompts: list[str]) -> dict[str, int]:
    """Long prompts with the tokens that are lost of each."""
    found: dict[str, int] = {}
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        found |= {prompt: number for prompt, number in zip(some, family.tokens_cut(some), strict=True) if number}
    return found


__all__ = ["judge_prompts"]
