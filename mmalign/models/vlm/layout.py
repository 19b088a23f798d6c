"""How the prompts and answers of a batch lie in the rows of one forward pass, and who may look at whom.

Shared: one row per prompt, its answers as branches behind it. Plain: one row per answer. Packed: several shared rows in
one. A token sees the earlier tokens of its own prompt and of its own branch; positions of every branch go on where the
prompt ends (the attention rule of prefix sharing; arXiv:2410.20305 does this for text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmalign.branches import BranchBatch
from mmalign.models.vlm.kernels import Document, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Rows of a forward pass with where each answer token's prediction is read."""

    input_ids: Tensor  # [B', T']
    position_ids: Tensor  # [B', T'] or [3, B', T']
    document: Tensor  # [B', T'] int32: number of the prompt's row in the batch, -1 padding
    branch: Tensor  # [B', T'] int32: 0 prefix, k >= 1 branch k, -1 padding
    place: Tensor  # [B', T'] int32: place in prefix + own branch, as if the answer stood alone
    types: Tensor | None  # [B', T']
    hidden: Tensor | None  # [B', T'] bool: keys that nobody sees
    rows: Tensor  # [Nt]: row of every target's prediction
    columns: Tensor  # [Nt]
    target: Tensor  # [Nt]
    weight: Tensor | None  # [Nt]
    flat: Tensor  # [Nt]: number of the answer
    offset: Tensor  # [Nt]: place in the answer
    images: tuple[int, ...]
    """Image units in the order of their placeholders, row by row."""
    videos: tuple[int, ...]
    single: bool
    """One prompt and at most one branch in every row: an ordinary causal pass."""
    plan: Plan
    """The same as plain numbers, row by row."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A prompt's row of the batch, or part of it, laid into a row of the pass."""

    row: int
    branches: tuple[int, ...]
    """Numbers of the branches, from 0."""


def build(
    batch: BranchBatch, prefix: Literal["shared", "plain"], *, pack: int = 0, multiple: int = 1, hide: Tensor | None = None
) -> Layout:
    """Lay a batch out.

    Args:
        batch: on any device; its lengths are plain numbers, so nothing waits for a GPU.
        prefix: shared or plain.
        pack: most tokens of a row that holds several prompts; 0 does not pack.
        multiple: pad rows to a multiple of this.
        hide: [B, T] bool of the batch.
    """
    rows = _plan(batch, prefix, pack)
    width = batch.input_ids.shape[1]
    columns: list[list[np.ndarray]] = [[], [], [], []]
    """Source, document, branch and place of every token, row by row."""
    reads: list[np.ndarray] = []
    aims: list[np.ndarray] = []
    for number, pieces in enumerate(rows):
        begun = 0
        parts: list[list[np.ndarray]] = [[], [], [], []]
        for piece in pieces:
            source, branch, place = _piece(batch, piece)
            parts[0].append(source + piece.row * width)
            parts[1].append(np.full(len(source), piece.row))
            parts[2].append(branch)
            parts[3].append(place)
            for places, targets in _targets(batch, piece):
                reads.append(np.stack([np.full(len(places), number), places + begun]))
                aims.append(targets + piece.row * batch.target.shape[1])
            begun += len(source)
        for column, found in zip(columns, parts, strict=True):
            column.append(np.concatenate(found))
    length = -(-max(map(len, columns[0])) // multiple) * multiple
    device = batch.input_ids.device
    index = _padded(columns[0], length, 0).to(device)
    document = _padded(columns[1], length, -1).to(device, torch.int32)
    read = torch.from_numpy(np.concatenate(reads, axis=1) if reads else np.zeros((2, 0), np.int64)).to(device)
    aim = torch.from_numpy(np.concatenate(aims) if aims else np.zeros(0, np.int64)).to(device)
    padding = document < 0
    used = [piece.row for pieces in rows for piece in pieces]
    return Layout(
        input_ids=batch.input_ids.flatten()[index], position_ids=batch.position_ids.flatten(-2)[..., index],
        document=document, branch=_padded(columns[2], length, -1).to(device, torch.int32),
        place=_padded(columns[3], length, 0).to(device, torch.int32),
        types=None if batch.token_types is None else batch.token_types.flatten()[index].masked_fill(padding, 0),
        hidden=None if hide is None else hide.flatten()[index] & ~padding,
        rows=read[0], columns=read[1], target=batch.target.flatten()[aim],
        weight=None if batch.tok_weight is None else batch.tok_weight.flatten()[aim],
        flat=batch.flat.flatten()[aim], offset=batch.offset.flatten()[aim],
        images=_units(batch.media.image_rows, used), videos=_units(batch.media.video_rows, used),
        single=all(len(pieces) == 1 and len(pieces[0].branches) <= 1 for pieces in rows),
        plan=Plan([_documents(batch, pieces) for pieces in rows]),
    )  # fmt: skip


def _plan(batch: BranchBatch, prefix: str, pack: int) -> list[list[_Piece]]:
    whole = [_Piece(row, tuple(range(len(lengths)))) for row, lengths in enumerate(batch.branch_lengths)]
    if prefix == "plain":
        return [[_Piece(piece.row, (branch,))] for piece in whole for branch in piece.branches]
    if pack <= 0:
        return [[piece] for piece in whole]
    rows: list[tuple[int, list[_Piece]]] = []
    for piece in whole:  # first fit, in the batch's order
        size = batch.prefix_lengths[piece.row] + sum(batch.branch_lengths[piece.row])
        for number, (filled, pieces) in enumerate(rows):
            if filled + size <= pack:
                rows[number] = (filled + size, [*pieces, piece])
                break
        else:
            rows.append((size, [piece]))
    return [pieces for _, pieces in rows]


def _documents(batch: BranchBatch, pieces: Sequence[_Piece]) -> list[Document]:
    """What the prompts of a row take up, in order."""
    found: list[Document] = []
    for piece in pieces:
        lengths = tuple(batch.branch_lengths[piece.row][k] for k in piece.branches)
        start = found[-1].stop if found else 0
        found.append(Document(start, batch.prefix_lengths[piece.row], lengths))
    return found


def _starts(batch: BranchBatch, row: int) -> list[int]:
    """Column of the batch where each branch of a row starts."""
    before = np.cumsum([batch.prefix_lengths[row], *batch.branch_lengths[row]])
    return [int(value) for value in before[:-1]]


def _piece(batch: BranchBatch, piece: _Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of the batch's row in order, their branch numbers, and their places."""
    prefix, lengths, starts = batch.prefix_lengths[piece.row], batch.branch_lengths[piece.row], _starts(batch, piece.row)
    spans = [np.arange(prefix), *[starts[k] + np.arange(lengths[k]) for k in piece.branches]]
    branch = [np.zeros(prefix, int), *[np.full(lengths[k], k + 1) for k in piece.branches]]
    place = [np.arange(prefix), *[prefix + np.arange(lengths[k]) for k in piece.branches]]
    return np.concatenate(spans), np.concatenate(branch), np.concatenate(place)


def _targets(batch: BranchBatch, piece: _Piece) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per branch: columns of the piece whose states predict it, and its columns among the batch row's targets."""
    prefix, lengths = batch.prefix_lengths[piece.row], batch.branch_lengths[piece.row]
    found, begun = [], prefix
    for k in piece.branches:
        first = sum(lengths[:k])
        columns = np.concatenate([[prefix - 1], begun + np.arange(lengths[k] - 1)]).astype(np.int64)
        found.append((columns[: lengths[k]], first + np.arange(lengths[k])))
        begun += lengths[k]
    return found


def _padded(rows: Sequence[np.ndarray], length: int, fill: int) -> Tensor:
    out = np.full((len(rows), length), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return torch.from_numpy(out)


def _units(rows: Sequence[Sequence[int]], used: Sequence[int]) -> tuple[int, ...]:
    return tuple(unit for row in used for unit in rows[row])


def padding_mask(layout: Layout) -> Tensor:
    """[B', T'] int64, 1 at keys that may be seen: all that an ordinary causal pass needs."""
    seen = layout.document >= 0
    return (seen if layout.hidden is None else seen & ~layout.hidden).long()


def dense_mask(layout: Layout, *, window: int | None = None, blocks: Tensor | None = None) -> Tensor:
    """[B', 1, T', T'] bool: the attention rule in full.

    Args:
        layout: the rows.
        window: most tokens between a query and a key plus one, counted as if every answer stood alone.
        blocks: [B', T'] numbers of pictures whose tokens see each other in both directions; -1 elsewhere.
    """
    index = torch.arange(layout.input_ids.shape[1], device=layout.input_ids.device)
    allowed = (index[None, :] <= index[:, None])[None]
    if window is not None:
        allowed = allowed & (layout.place[:, :, None] - layout.place[:, None, :] < window)
    if blocks is not None:
        allowed = allowed | ((blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, None, :] >= 0))
    key_branch = layout.branch[:, None, :]
    allowed = allowed & (layout.document[:, :, None] == layout.document[:, None, :])
    allowed = allowed & ((key_branch == 0) | (key_branch == layout.branch[:, :, None]))
    if layout.hidden is not None:
        allowed = allowed & ~layout.hidden[:, None, :]
    # Padding sees itself, and a hidden token too: a row without any key would be no number in some kernels.
    itself = (layout.document < 0) if layout.hidden is None else (layout.document < 0) | layout.hidden
    alone = itself[:, :, None] & (index[None, :] == index[:, None])[None]
    return (allowed | (alone & ~allowed.any(-1, keepdim=True)))[:, None]


def block_mask(layout: Layout, *, window: int | None = None) -> object:
    """The same rule for FlexAttention, which skips blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    document, branch, place = layout.document, layout.branch, layout.place
    hidden = torch.zeros_like(document, dtype=torch.bool) if layout.hidden is None else layout.hidden

    def rule(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (document[b, q] == document[b, k]) & ((branch[b, k] == 0) | (branch[b, k] == branch[b, q]))
        seen = (k <= q) & own & ~hidden[b, k]
        if window is not None:
            seen = seen & (place[b, q] - place[b, k] < window)
        return seen | ((q == k) & ((document[b, q] < 0) | hidden[b, q]))

    rows, length = document.shape
    return create_block_mask(rule, rows, None, length, length, device=str(document.device))
