"""Preferences between answers: records of vision-language data, and the batch that every such method consumes.

A record is one prompt (messages with pictures and clips) with one or more answers: one for supervised or unpaired data,
two for a pair (chosen first), more for a list. A batch holds every prompt once, its answers as branches behind it, and
every distinct picture or clip once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.types import ImageRef


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRef:
    """Where a clip is: a file, encoded bytes, or its frames as pictures. Exactly one of the three is set."""

    path: str | None = None
    data: bytes | None = None
    frames: tuple[ImageRef, ...] = ()
    """The clip as pictures, in order: no further sampling is done."""
    fps: float | None = None
    """Frames per second of `frames`; of a file, the rate to sample at (None: the model's settings)."""
    start: float | None = None
    """First second to use, of a file."""
    end: float | None = None
    """Last second to use, of a file."""
    order: tuple[int, ...] = ()
    """Numbers among the sampled frames, in the order shown: a perturbed version of the clip. Empty: as it is."""
    label: str = ""
    """How messages name it."""


MediaRef = ImageRef | VideoRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of a message: text, or the picture or clip number `media` of the record."""

    text: str | None = None
    media: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of the prompt."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer of the assistant to the prompt."""

    text: str
    label: float | None = None
    """1 desirable, 0 undesirable; None: not said (in a pair, the order says it)."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Judge or reward name -> score, higher is better."""
    spans: tuple[tuple[int, int, float], ...] = ()
    """(first character, end, token weight); characters outside every span weigh 1."""
    media: tuple[MediaRef, ...] | None = None
    """Pictures and clips that replace the record's for this answer: such records share no prefix."""
    messages: tuple[Message, ...] | None = None
    """The prompt that this answer belongs to, where it is not the record's; about the same media."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchRecord:
    """One prompt with its answers. In a pair the chosen answer comes first."""

    id: str
    messages: tuple[Message, ...]
    answers: tuple[Answer, ...]
    media: tuple[MediaRef, ...] = ()
    p_chosen: float = 1.0
    """Probability that the first answer of a pair is preferred, in [0.5, 1]."""
    weight: float = 1.0
    margin: float = 0.0
    """A target margin of the pair, for objectives that read one."""
    stage: int = 0
    """Number of the curriculum stage."""
    group: str | None = None
    """Group of prompts, for evaluation by group."""
    joint: bool = False
    """Whether an answer's branch holds the words of its prompt behind the media as well, to be scored with it."""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a judge says of one answer. Either a score or a reason why there is none, never a guess."""

    score: float | None
    """Higher is better."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the score is made of, by name: counts, lengths."""
    notes: tuple[str, ...] = ()
    """What is wrong with the answer, in words."""
    reason: str | None = None
    """One word of a fixed list where there is no score."""
    raw: str = ""
    """The judge's own words, where it is a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What a vision tower reads in one piece: a picture, a tile of one, or a clip, as the processor made it."""

    kind: Literal["image", "video"]
    tensors: Mapping[str, Tensor]
    """The processor's names -> tensors of this unit alone."""
    digest: str
    """Of kind and tensors: equal units are encoded once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """A prefix with the branches that share it, on the CPU."""

    prefix: Tensor  # [P] int64, media placeholders expanded
    branches: tuple[Tensor, ...]  # [L_k] int64 each, turn end included
    weights: tuple[Tensor | None, ...]  # [L_k] float32 each
    answers: tuple[int, ...]
    """Which answers of the record the branches are."""
    positions: Tensor  # [P + sum L] or [3, P + sum L] int64: every branch goes on where the prefix ends
    token_types: Tensor | None  # [P + sum L] int64: 0 text, 1 image, 2 video; None for families without
    units: tuple[Unit, ...]
    """In the order of their placeholders in the prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedExample:
    """A record after all its CPU work: usually one row; a record whose answers share no prefix has one row per answer."""

    id: str
    rows: tuple[EncodedRow, ...]
    p_chosen: float
    weight: float
    margin: float
    labels: tuple[float, ...]
    """Per answer; not a number where the record does not say."""
    scores: Mapping[str, tuple[float, ...]]
    """Judge or reward -> one value per answer."""
    stage: int = 0
    group: str | None = None
    flags: tuple[str, ...] = ()
    """What was special: 'own_media' or 'own_prompt' (unshared), 'border' (tokens would merge across the border), 'truncated'."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows in the shared layout: what batches are balanced by."""
        return sum(len(row.prefix) + sum(map(len, row.branches)) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaBatch:
    """Every distinct unit of a batch once, with where each is used."""

    image: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors for the family's image encoder, distinct units only; empty without pictures."""
    video: Mapping[str, Tensor] = field(default_factory=dict)
    image_rows: tuple[tuple[int, ...], ...] = ()
    """Per row of the batch: numbers of its image units, in placeholder order."""
    video_rows: tuple[tuple[int, ...], ...] = ()
    image_digests: tuple[str, ...] = ()
    """Per distinct image unit: the key of its features in a cache."""
    video_digests: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> MediaBatch:
        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}

        return replace(self, image=move(self.image), video=move(self.video))


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchBatch:
    """N records in B rows (B = N unless some share no prefix), R answers in all, right padded.

    A row is prefix, branch 1, branch 2, ... The flat order of the R answers is by record, then by answer, whatever the
    rows are: every per-answer tensor here and every result of a model has it.
    """

    ids: tuple[str, ...]  # N
    input_ids: Tensor  # [B, T] int64
    branch_id: Tensor  # [B, T] int16: -1 padding, 0 prefix, k >= 1 branch k
    position_ids: Tensor  # [B, T] or [3, B, T] int64
    token_types: Tensor | None  # [B, T] int64
    pred_index: Tensor  # [B, M] int64: the hidden state that predicts target j
    target: Tensor  # [B, M] int64: answer tokens of all branches
    seg: Tensor  # [B, M] int64: branch (1..K) of each target, 0 padding
    flat: Tensor  # [B, M] int64: number in the flat order (0..R-1) of the answer a target belongs to; 0 at padding
    offset: Tensor  # [B, M] int64: place of the target in its answer; 0 at padding
    tok_weight: Tensor | None  # [B, M] float32
    media: MediaBatch
    prefix_lengths: tuple[int, ...]  # B
    branch_lengths: tuple[tuple[int, ...], ...]  # B x K_i
    branch_flat: tuple[tuple[int, ...], ...]  # B x K_i: number of each branch in the flat order
    record: Tensor  # [R] int64: which record an answer belongs to
    answer: Tensor  # [R] int64: its number in the record; 0 is the chosen one of a pair
    lengths: Tensor  # [R] int64: tokens of each answer, turn end included
    p_chosen: Tensor  # [N] float32
    weight: Tensor  # [N] float32
    margin: Tensor  # [N] float32
    label: Tensor  # [R] float32: 1 desirable, 0 undesirable, NaN not said
    scores: Mapping[str, Tensor]  # reward -> [R] float32, NaN where absent
    counts: tuple[int, ...]  # N: answers of each record
    groups: tuple[str | None, ...]  # N
    stages: tuple[int, ...]  # N
    unshared: int = 0
    """Records of this batch whose answers have rows of their own."""

    def __len__(self) -> int:
        """Number of records, as the loop counts rows."""
        return len(self.ids)

    @property
    def num_answers(self) -> int:
        return len(self.record)

    @property
    def max_length(self) -> int:
        """Tokens of the longest answer."""
        return max((length for row in self.branch_lengths for length in row), default=0)

    def table(self, values: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Flat values ``[R, ...]`` as ``[N, K, ...]`` with a bool mask ``[N, K]``; absent answers hold `fill`."""
        shape = (len(self.ids), max(self.counts))
        mask = torch.zeros(shape, dtype=torch.bool, device=values.device)
        mask[self.record, self.answer] = True
        out = values.new_full((*shape, *values.shape[1:]), fill)
        return out.index_put((self.record, self.answer), values), mask

    def pair(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Flat values ``[R, ...]`` of pairs as (chosen ``[N, ...]``, rejected ``[N, ...]``).

        Raises:
            ValueError: a record has not exactly two answers.
        """
        if any(count != 2 for count in self.counts):
            raise ValueError("pair() needs two answers in every record")
        return values[0::2], values[1::2]

    def map(self, move: Callable[[Tensor], Tensor]) -> BranchBatch:
        """Apply a function to every tensor outside `media`."""
        changed: dict[str, Any] = {
            name: move(value)
            for name in self.__dataclass_fields__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **changed, scores={name: move(value) for name, value in self.scores.items()})

    def to(self, device: torch.device | str) -> BranchBatch:
        moved = self.map(lambda value: value.to(device, non_blocking=True))
        return replace(moved, media=self.media.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchLogps:
    """Log-probabilities of the R answers of a batch, float32, in the batch's flat order."""

    sum: Tensor  # [R]: over the answer's tokens (times tok_weight where the batch has one)
    length: Tensor  # [R] float32: tokens, turn end included
    tokens: Tensor | None = None  # [R, L] unweighted, 0 behind an answer's end
    mask: Tensor | None = None  # [R, L] bool
    mean_logits: Tensor | None = None
    """[R] or None: mean over the answer's positions and the vocabulary of the raw logits (a TRL metric)."""

    def average(self) -> Tensor:
        """Per token. [R]"""
        return self.sum / self.length.clamp_min(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFeatures:
    """Projected features of every distinct unit of a batch, as the language model takes them in."""

    image: tuple[Tensor, ...] = ()  # [n_i, D] each, by unit number
    video: tuple[Tensor, ...] = ()
    image_deep: tuple[tuple[Tensor, ...], ...] = ()
    """Per unit, the features [n_i, D] added to deeper layers (Qwen3-VL); empty for other families."""
    video_deep: tuple[tuple[Tensor, ...], ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> VisionFeatures:
        return VisionFeatures(
            image=tuple(map(change, self.image)),
            video=tuple(map(change, self.video)),
            image_deep=tuple(tuple(map(change, layers)) for layers in self.image_deep),
            video_deep=tuple(tuple(map(change, layers)) for layers in self.video_deep),
        )

    def detach(self) -> VisionFeatures:
        return self.map(Tensor.detach)
