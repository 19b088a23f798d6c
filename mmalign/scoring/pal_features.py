"""A table of pairs with user names as embeddings of a reward's encoder, each distinct picture and prompt encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.errors import DataError
from mmalign.types import ImageRef, PairRecord

if TYPE_CHECKING:
    from mmalign.data import PairTable
    from mmalign.rewards.dual import DualEncoder
    from mmalign.rewards.pal.fitting import Choices
    from mmalign.rewards.scorer import Scorer

ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A row that is not used."""

    where: str
    id: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Featured:
    """The usable pairs of a table."""

    choices: Choices
    users: Sequence[str]
    """Their names; `choices.user` counts in it."""
    ids: Sequence[str]
    prompts: Sequence[str]
    """`choices.prompt` counts in it."""
    encoder_margin: Tensor
    """What the encoder's own reward says: chosen minus rejected. [n]"""
    left_out: Sequence[LeftOut]
    fingerprint: str


class _Gatherer:
    """Rows of embeddings, each distinct key once."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.vectors: list[Tensor] = []

    def fresh(self, keys: Sequence[str]) -> list[int]:
        """Places in `keys` of those not seen before, the first of each."""
        seen: set[str] = set()
        out = []
        for place, key in enumerate(keys):
            if key not in self.rows and key not in seen:
                seen.add(key)
                out.append(place)
        return out

    def add(self, keys: Sequence[str], vectors: Tensor) -> None:
        for key, vector in zip(keys, vectors, strict=True):
            self.rows[key] = len(self.vectors)
            self.vectors.append(vector.clone())

    def stack(self, width: int) -> Tensor:
        return torch.stack(self.vectors) if self.vectors else torch.zeros(0, width)


def embed_table(path: str | Path, encoder: DualEncoder, *, only: str | None = None, progress: bool = True) -> Featured:
    """Encode a table of pairs.

    Rows of weight 0 (skipped in the arena) and rows without a user are left out and listed, as are those whose pictures cannot
    be read.

    Args:
        only: this user's rows alone; the others are not listed.

    Raises:
        DataError: no such table, a row that cannot be used, or no usable row.
    """
    from mmalign.data import open_table
    from mmalign.data.progress import progress_bar
    from mmalign.rewards.pal.fitting import Choices
    from mmalign.rewards.scorer import Scorer

    table = open_table(path)
    scorer = Scorer(encoder)
    pictures, texts = _Gatherer(), _Gatherer()
    users: dict[str, int] = {}
    kept: list[tuple[str, str, PairRecord, str, str]] = []
    left_out: list[LeftOut] = []
    with progress_bar("Encoding pairs", len(table), enabled=progress) as advance:
        for start in range(0, len(table), ROWS_AT_ONCE):
            part = range(start, min(start + ROWS_AT_ONCE, len(table)))
            records = list(_records(table, part, only, left_out))
            bad = _encode_pictures(scorer, records, pictures)
            _encode_texts(encoder, [record.prompt for _, record, _ in records], texts)
            for where, record, keys in records:
                problem = next((bad[key] for key in keys if key in bad), None)
                if problem is not None:
                    left_out.append(LeftOut(where=where, id=record.id, reason=problem[0], detail=problem[1]))
                    continue
                # The bytes of pictures are not kept: a row's record without them.
                user = str(record.user)
                users.setdefault(user, len(users))
                kept.append((where, user, _bare(record), *keys))
            advance(len(part))
    if not kept:
        raise DataError(f"{path}: {_nothing(only, len(table), left_out)}")
    width = encoder.net.shape.embedding
    choices = Choices(
        pictures=pictures.stack(width), texts=texts.stack(width),
        chosen=torch.tensor([pictures.rows[row[3]] for row in kept]),
        rejected=torch.tensor([pictures.rows[row[4]] for row in kept]),
        prompt=torch.tensor([texts.rows[row[2].prompt] for row in kept]),
        user=torch.tensor([users[row[1]] for row in kept]),
        p_chosen=torch.tensor([row[2].p_chosen for row in kept], dtype=torch.float32),
        weight=torch.tensor([row[2].weight for row in kept], dtype=torch.float32),
    )  # fmt: skip
    return Featured(
        choices=choices, users=list(users), ids=[row[2].id for row in kept], prompts=list(texts.rows),
        encoder_margin=_encoder_margin(encoder, choices), left_out=left_out, fingerprint=table.fingerprint,
    )  # fmt: skip


Entry = tuple[str, PairRecord, tuple[str, str]]


def _records(table: PairTable, rows: range, only: str | None, left_out: list[LeftOut]) -> list[Entry]:
    out: list[Entry] = []
    for row in rows:
        record, where = table[row], table.where(row)
        if only is not None and record.user != only:
            continue
        if record.user is None or record.weight == 0:
            reason, detail = ("no_user", "the column user is empty") if record.user is None else ("no_weight", "weight is 0")
            left_out.append(LeftOut(where=where, id=record.id, reason=reason, detail=detail))
            continue
        out.append((where, record, (_key(record.chosen), _key(record.rejected))))
    return out


def _key(image: ImageRef) -> str:
    if image.data is not None:
        return hashlib.blake2b(image.data, digest_size=16).hexdigest()
    return image.path or ""


def _encode_pictures(scorer: Scorer, records: Sequence[Entry], gathered: _Gatherer) -> Mapping[str, tuple[str, str]]:
    """Encode pictures not seen before; returns key -> (reason, detail) of those that cannot be."""
    images = [image for _, record, _ in records for image in (record.chosen, record.rejected)]
    prompts = [record.prompt for _, record, _ in records for _ in range(2)]
    keys = [key for _, _, both in records for key in both]
    places = gathered.fresh(keys)
    if not places:
        return {}
    details = scorer.score(
        [images[place] for place in places], [prompts[place] for place in places], details=True, on_error="nan"
    )
    good = [row for row in range(len(places)) if details.ok[row]]
    if good and details.embeddings is not None:
        gathered.add([keys[places[row]] for row in good], details.embeddings[torch.tensor(good)])
    return {
        keys[place]: (str(details.errors[row]), str(details.messages[row]))
        for row, place in enumerate(places) if not details.ok[row]
    }  # fmt: skip


def _encode_texts(encoder: DualEncoder, prompts: Sequence[str], gathered: _Gatherer, batch: int = 64) -> None:
    new = [prompts[place] for place in gathered.fresh(prompts)]
    for start in range(0, len(new), batch):
        part = new[start : start + batch]
        with torch.inference_mode():
            gathered.add(part, encoder.encode_texts(part).tensors[0].float().cpu())


def _bare(record: PairRecord) -> PairRecord:
    return PairRecord(id=record.id, prompt=record.prompt, chosen=ImageRef(), rejected=ImageRef(), p_chosen=record.p_chosen,
                      user=record.user, weight=record.weight)  # fmt: skip


def _nothing(only: str | None, rows: int, left_out: Sequence[LeftOut]) -> str:
    if only is not None and not left_out:
        return f"none of its {rows} rows is of the user '{only}'"
    counts: dict[str, int] = {}
    for item in left_out:
        counts[item.reason] = counts.get(item.reason, 0) + 1
    told = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    return f"none of its {rows} rows can be used ({told}); PAL needs pairs with the column user"


def _encoder_margin(encoder: DualEncoder, choices: Choices, batch: int = 4096) -> Tensor:
    from mmalign.rewards.base import Texts

    def values(rows: Tensor, prompt: Tensor) -> Tensor:
        texts = Texts(tensors=(choices.texts[prompt].to(encoder.device),), truncated=torch.zeros(len(rows), dtype=torch.bool))
        return encoder.pair(choices.pictures[rows].to(encoder.device), texts).float().cpu()

    out = []
    with torch.inference_mode():
        for start in range(0, len(choices), batch):
            part = choices.take(torch.arange(start, min(start + batch, len(choices))))
            out.append(values(part.chosen, part.prompt) - values(part.rejected, part.prompt))
    return torch.cat(out)
