"""Results of one reward, filled row by row in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmalign.rewards.base import Details, UserNote
from mmalign.rewards.errors import ScoringError


class ResultTable:
    """Results of one reward, filled row by row."""

    def __init__(self, count: int) -> None:
        self.values = torch.full((count,), torch.nan)
        self.truncated = torch.zeros(count, dtype=torch.bool)
        self.errors: list[str | None] = [None] * count
        self.messages: list[str | None] = [None] * count
        self.flags: list[tuple[str, ...]] = [()] * count
        self.raw: list[Any] = []
        self.embeddings: Tensor | None = None

    def set_row(self, row: int, reason: str | None, message: str | None, flags: tuple[str, ...]) -> None:
        self.errors[row], self.messages[row], self.flags[row] = reason, message, flags

    def note_users(self, start: int, notes: Mapping[int, UserNote]) -> None:
        """Write down what is said of the users of a window's rows."""
        for row, note in notes.items():
            at = start + row
            self.flags[at] += note.flags
            if note.reason is not None:
                self.errors[at], self.messages[at] = note.reason, note.message

    def set_scores(self, rows: list[int], scores: Tensor, truncated: Tensor) -> None:
        index = torch.tensor(rows)
        finite = torch.isfinite(scores)
        self.values[index] = torch.where(finite, scores, torch.nan)
        self.truncated[index] = truncated
        for row, good in zip(rows, finite.tolist(), strict=True):
            if not good:
                self.errors[row], self.messages[row] = "nonfinite", "the network gave no finite score"

    def set_embeddings(self, rows: list[int], vectors: Tensor) -> None:
        if self.embeddings is None:
            self.embeddings = torch.full((len(self.values), vectors.shape[1]), torch.nan)
        self.embeddings[torch.tensor(rows)] = vectors

    def raise_first(self, start: int, count: int, name: str) -> None:
        for row in range(start, min(start + count, len(self.errors))):
            reason = self.errors[row]
            if reason is not None:
                raise ScoringError(row, reason, f"{name}: {self.messages[row]}")

    def details(self) -> Details:
        return Details(
            values=self.values,
            ok=torch.tensor([reason is None for reason in self.errors], dtype=torch.bool),
            truncated=self.truncated,
            errors=tuple(self.errors),
            messages=tuple(self.messages),
            flags=tuple(self.flags),
            embeddings=self.embeddings,
            raw=tuple(self.raw),
        )
