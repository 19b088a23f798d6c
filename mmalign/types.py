"""The data that crosses seams: records, batches, conditioning, scores, step outputs.

Frozen, keyword-only dataclasses with the shape of every tensor beside its field. Nothing here loads, computes a loss
or knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """Where a picture is: a file, or encoded bytes held in a table. Exactly one of the two is set."""

    path: str | None = None
    data: bytes | None = None
    label: str = ""
    """How messages name it: file name, or table and row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """One preference between two pictures of the same prompt."""

    id: str
    prompt: str
    chosen: ImageRef
    rejected: ImageRef
    p_chosen: float = 1.0
    """Probability that `chosen` is preferred, in [0.5, 1]; 0.5 is a tie."""
    user: str | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Reward name -> (chosen, rejected)."""
    weight: float = 1.0
    group: str | None = None
    """Ranking or prompt group of the source, for per-prompt balance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedRecord:
    """A prompt with K candidate pictures and what rewards said of them."""

    id: str
    prompt: str
    images: tuple[ImageRef, ...]
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    user: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What was done to a picture before training; SDXL is conditioned on it. Pixels, (height, width) or (top, left)."""

    original: Tensor  # [B, 2] int64: size of the file
    crop: Tensor  # [B, 2] int64: top left corner of the crop in the resized picture
    target: Tensor  # [B, 2] int64: size of the crop

    def to(self, device: torch.device | str) -> Geometry:
        return Geometry(original=self.original.to(device), crop=self.crop.to(device), target=self.target.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """A VAE posterior, before the model's scaling and shift factors: mean and standard deviation."""

    mean: Tensor  # [B, C, h, w] float32
    std: Tensor  # [B, C, h, w] float32

    def to(self, device: torch.device | str) -> Moments:
        return Moments(mean=self.mean.to(device, non_blocking=True), std=self.std.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a batch of pairs: pixels, or the cached moments of their latents, never both."""

    geometry: Geometry
    pixels: Tensor | None = None  # [B, 3, H, W] float32 in [-1, 1]
    moments: Moments | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """What the loader yields for pairs of pictures. A row masked at run time has weight 0."""

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    """As the model should read them: a caption dropped for guidance training is already ''."""
    chosen: Side
    rejected: Side
    p_chosen: Tensor  # [B] float32
    weight: Tensor  # [B] float32
    users: tuple[str | None, ...]
    scores: Mapping[str, Tensor]  # reward -> [B, 2] float32 (chosen, rejected)
    text: Mapping[str, Tensor] | None = None
    """Cached text-encoder outputs by name, [B, ...] each; None when prompts are to be encoded."""
    draws: tuple[int, ...] | None = None
    """Number of each row's stored draw: timestep and noise are those of the draw. None: they are those of the step."""
    reference: Tensor | None = None
    """Stored reference scores of these draws, [B, 2] float32 (chosen, rejected)."""
    user: Tensor | None = None
    """Embedding of each row's user, [B, rows, dim] float32, or [B] int64 places in the policy's own table of users."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What a prompt became, ready for a denoiser. Row i belongs to sample i."""

    tokens: Tensor  # [B, L, D]
    pooled: Tensor | None = None  # [B, P]
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # [B, ...] each
    user: Tensor | None = None
    """[B, S, rows, dim] embeddings of S users each (or [B, S] int64 places in the denoiser's own table). Their own field with
    their own attention, never appended to `tokens`."""
    user_weights: Tensor | None = None
    """[B, S] weight of each of these users; 0 adds nothing to the sample. Set together with `user`."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply a function to every tensor."""
        return Conditioning(
            tokens=function(self.tokens),
            pooled=None if self.pooled is None else function(self.pooled),
            extras={name: function(value) for name, value in self.extras.items()},
            user=None if self.user is None else function(self.user),
            user_weights=None if self.user_weights is None else function(self.user_weights),
        )

    def repeat(self, times: int) -> Conditioning:
        """The whole batch repeated `times` times one after the other: rows 0..B-1, 0..B-1, ..."""
        return self.map(lambda value: value.repeat(times, *([1] * (value.ndim - 1))))

    def with_user(self, user: Tensor, weights: Tensor | None = None) -> Conditioning:
        """For these users; weights are 1 unless given."""
        ones = torch.ones(user.shape[:2], device=user.device) if weights is None else weights
        return replace(self, user=user, user_weights=ones)


def concatenate(first: Conditioning, second: Conditioning) -> Conditioning:
    """Rows of `first`, then rows of `second`."""

    def both(left: Tensor | None, right: Tensor | None) -> Tensor | None:
        if left is None or right is None:
            if left is not right:
                raise ValueError("one side of a batch has conditioning that the other lacks")
            return None
        return torch.cat([left, right])

    return Conditioning(
        tokens=torch.cat([first.tokens, second.tokens]),
        pooled=both(first.pooled, second.pooled),
        extras={name: torch.cat([value, second.extras[name]]) for name, value in first.extras.items()},
        user=both(first.user, second.user),
        user_weights=both(first.user_weights, second.user_weights),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """The waist of the house: four score vectors, higher is better, float32.

    For diffusion a score is minus half the mean squared error (``diffusion.scores.prediction_scores``); for language it
    is a log-probability. The reference scores are None for objectives without a reference.
    """

    policy_chosen: Tensor  # [B]
    policy_rejected: Tensor  # [B]
    reference_chosen: Tensor | None = None  # [B]
    reference_rejected: Tensor | None = None  # [B]
    chosen_length: Tensor | None = None  # [B], language only
    rejected_length: Tensor | None = None  # [B], language only

    def margin(self) -> Tensor:
        """(policy - reference) of chosen minus that of rejected; without a reference, the policy's difference. [B]"""
        chosen, rejected = self.policy_chosen.float(), self.policy_rejected.float()
        if self.reference_chosen is None or self.reference_rejected is None:
            return chosen - rejected
        return (chosen - self.reference_chosen.float()) - (rejected - self.reference_rejected.float())


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedScores:
    """Scores of K candidates per prompt, with the utilities that rank them."""

    policy: Tensor  # [B, K]
    reference: Tensor | None  # [B, K]
    utilities: Tensor  # [B, K], higher is better
    mask: Tensor | None = None  # [B, K] bool, False = absent

    def gain(self) -> Tensor:
        """Policy minus reference (the implicit reward before beta). [B, K]"""
        return self.policy.float() if self.reference is None else self.policy.float() - self.reference.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one micro-batch gave: a loss to differentiate and detached metrics that stay on the device."""

    loss: Tensor  # scalar float32
    metrics: Mapping[str, Tensor]  # scalars, detached
    optimizer: str = "main"
    """Which of the trainer's named optimisers this loss feeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """Where in the run a micro-batch is: all that randomness may depend on besides the sample's id."""

    step: int
    """The optimiser step under way, from 0."""
    seed: int
    device: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedBatch:
    """What the loader yields for ranked lists: B prompts with up to K pictures each."""

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    """As the model should read them: a caption dropped for guidance training is already ''."""
    images: Side
    """B x K pictures, those of the first prompt first; absent ones are zeros."""
    mask: Tensor  # [B, K] bool, False = absent
    weight: Tensor  # [B] float32
    scores: Mapping[str, Tensor]  # reward -> [B, K] float32; 0 where absent
    text: Mapping[str, Tensor] | None = None
    """Cached text-encoder outputs by name, [B, ...] each; None when prompts are to be encoded."""

    def __len__(self) -> int:
        return len(self.ids)
