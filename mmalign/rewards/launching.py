"""A window of rows whose encoders have been started, and the scores on their way back from the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmalign.rewards.base import Backend, EncodingBackend, Texts, User, UserNote
from mmalign.rewards.reading import Window

Encoded = dict[str, tuple[dict[bytes, int], Tensor]]
"""By encoder and preprocessing: the row of each picture, and the encodings."""


@dataclass(frozen=True, slots=True)
class Part:
    """Scores of some rows, on their way to the processor's memory until the events of their window are done."""

    rows: list[int]
    """Numbers in the whole table."""
    values: Tensor  # [n] float32
    truncated: Tensor  # [n] bool
    vectors: Tensor | None  # [n, d] float32


@dataclass(slots=True)
class Launched:
    """A window whose encoders have been started; on a GPU they may still be running."""

    window: Window
    prompts: Sequence[str]
    users: Sequence[User]
    rows: list[int] = field(default_factory=list)
    """Those whose picture could be read."""
    readable: list[int] = field(default_factory=list)
    """Of these, those whose prompt is a text."""
    notes: dict[str, dict[int, UserNote]] = field(default_factory=dict)
    """By reward that reads users: what it says of those of the rows it could otherwise score."""
    scored: dict[str, list[Part]] = field(default_factory=dict)
    """By reward."""
    done: list[torch.cuda.Event] = field(default_factory=list)

    def usable(self, backend: Backend) -> list[int]:
        """The rows that a reward can score."""
        rows = self.readable if backend.card.needs_prompt else self.rows
        if not backend.reads_user:
            return rows
        if backend.name not in self.notes:
            self.notes[backend.name] = {row: backend.about_user(self.users[row]) for row in rows}
        return [row for row, note in self.notes[backend.name].items() if note.reason is None]


def windows(rows: int, size: int) -> list[tuple[int, int]]:
    """Spans of rows that are read together: two batches each, the first ones smaller so that encoders start soon."""
    spans: list[tuple[int, int]] = []
    length = max(1, size // 4)
    while not spans or spans[-1][1] < rows:
        start = spans[-1][1] if spans else 0
        spans.append((start, min(rows, start + length)))
        length = min(2 * size, 2 * length)
    return spans if rows else []


def pair_rows(
    backend: EncodingBackend,
    started: Launched,
    rows: list[int],
    images: tuple[dict[bytes, int], Tensor],
    texts: tuple[dict[str, int], Texts] | None,
    embeddings: bool,
) -> Part:
    """Scores of some rows of a window by one reward, not waited for.

    Args:
        rows: numbers in the window.
        images, texts: where each distinct picture and prompt lies, and the encodings.
        embeddings: whether image embeddings are wanted too.
    """
    window, (places, features) = started.window, images
    index = torch.tensor([places[window.digests[row]] for row in rows])
    text: Texts | None = None
    if texts is not None:
        text = texts[1].rows(torch.tensor([texts[0][started.prompts[row]] for row in rows]))
    with torch.inference_mode():
        chosen = features[index.to(features.device, non_blocking=True)]
        values = backend.pair_for(chosen, text, [started.users[row] for row in rows]).float().to("cpu", non_blocking=True)
        vectors = backend.embedding(chosen) if embeddings else None
        if vectors is not None:
            vectors = vectors.float().to("cpu", non_blocking=True)
    truncated = text.truncated if text is not None else torch.zeros(len(rows), dtype=torch.bool)
    return Part([window.start + row for row in rows], values, truncated, vectors)
