"""The two heads of PAL: a reward is how near a picture lies to what a user would like best.

Each user has logits v ``[K]``; their softmax mixes K prototypes that all users share into one ideal point. PAL-A's prototypes
are points, PAL-B's are functions of the prompt (arXiv:2406.08469; RamyaLab/pluralistic-alignment, pal_rm_a and pal_rm_b).

Deliberate departures, all for frozen picture embeddings: inputs are L2-normalised first, so their scale is irrelevant; the
maps are residual with a last layer of zeros, so an untrained PAL-B with its scale at the encoder's *is* the encoder's own
reward (CLIP, PickScore); PAL-A's distance has a scale too, 1 in the paper, because distances of unit vectors are small against
a margin of 1. The reward is always higher for the nearer picture: the released "dist" variants are left minus right, and their
logistic form pushes the preferred one away.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.errors import ModelError

VARIANTS = ("a", "b")
INPUTS = ("image", "both")
MIXINGS = ("f(Pw)", "f(P)w", "Pw")
MAX_SCALE = 100.0
"""The scale of either head is cut here, as in CLIP."""
FIRST_SCALE = 1 / 0.07
"""CLIP's scale at its start: PAL-B's where the encoder states none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """What a head is, apart from its weights."""

    variant: str
    """``a``: ideal points; ``b``: ideal points that depend on the prompt."""
    width: int
    """Numbers of an embedding of the encoder."""
    prototypes: int
    hidden: int
    """Width inside every residual map; 0 leaves the maps out, so the preference space is the encoder's own."""
    input: str = "image"
    """PAL-A only: ``image``, or ``both`` for picture and prompt side by side."""
    mixing: str = "f(Pw)"
    """PAL-A only: in which order prototypes P are mapped by f and mixed by w."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}, expected one of {', '.join(known)}"
            for name, value, known in (
                ("variant", self.variant, VARIANTS), ("input", self.input, INPUTS), ("mixing", self.mixing, MIXINGS),
            )
            if value not in known
        ]  # fmt: skip
        if self.variant == "b" and (self.input, self.mixing) != ("image", "f(Pw)"):
            problems.append("input and mixing belong to variant a; variant b reads the prompt in its prototypes")
        if min(self.width, self.prototypes) < 1 or self.hidden < 0:
            problems.append("width and prototypes must be at least 1, hidden at least 0")
        if problems:
            raise ModelError("a PAL head: " + "; ".join(problems))

    @property
    def space(self) -> int:
        """Dimensions of the preference space."""
        return 2 * self.width if self.input == "both" else self.width

    @property
    def needs_prompt(self) -> bool:
        return self.variant == "b" or self.input == "both"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Residual(nn.Module):
    """x + (W2 gelu(W1 x + b1) + b2) / (hidden sqrt(width)). W2 and b2 start at zero: the identity.

    The divisor makes a step of Adam move a unit vector by about half the learning rate whatever the widths are.

    Args:
        width: of x.
        hidden: 0 makes it the identity for good.
        generator: W1 is drawn from it.
    """

    def __init__(self, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden, self.gain = hidden, 1 / (max(1, hidden) * math.sqrt(width))
        if hidden:
            self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
            with torch.no_grad():
                self.inner.weight.normal_(0, 1.0, generator=generator)  # unit vectors come in: unit variance inside
                for value in (self.inner.bias, self.outer.weight, self.outer.bias):
                    value.zero_()

    def forward(self, values: Tensor) -> Tensor:
        if not self.hidden:
            return values
        out: Tensor = values + self.gain * self.outer(nn.functional.gelu(self.inner(values)))
        return out


class PalHead(nn.Module):
    """Either head, in float32.

    Args:
        shape: what to build.
        scale: where the learned scale starts.
        seed: of the first weights.
    """

    def __init__(self, shape: HeadShape, *, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not 0 < scale <= MAX_SCALE * 1.001:
            raise ModelError(f"a PAL head's scale is in (0, {MAX_SCALE:g}], got {scale}")
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.items = Residual(shape.space, shape.hidden, generator)
        """The map f of pictures."""
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        if shape.variant == "a":
            self.points = nn.Parameter(torch.randn(shape.prototypes, shape.space, generator=generator))
            with torch.no_grad():
                self.points.div_(self.points.norm(dim=-1, keepdim=True))
        else:
            self.guides = nn.ModuleList(
                Residual(shape.width, shape.hidden, generator) for _ in range(shape.prototypes)
            )  # the maps g_k of prompts

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def prototypes(self, texts: Tensor | None) -> Tensor:
        """What users' weights mix: ``[n, K, space]`` for prompts ``[n, d]`` (b), ``[K, space]`` for all prompts (a)."""
        if self.shape.variant == "b":
            prompts = _unit(_needed(texts))
            return torch.stack([guide(prompts) for guide in self.guides], dim=1)
        return self.items(self.points) if self.shape.mixing == "f(P)w" else self.points

    def ideal(self, weights: Tensor, prototypes: Tensor) -> Tensor:
        """The ideal points ``[n, space]`` of users with mixture weights ``[n, K]`` for the prompts behind `prototypes`.

        A single row of weights is one user's for all prompts; for PAL-A the result then has one row too.
        """
        if self.shape.variant == "b":
            return (weights[..., None] * prototypes).sum(dim=1)
        mixed = weights @ prototypes
        return self.items(mixed) if self.shape.mixing == "f(Pw)" else mixed

    def place(self, images: Tensor, texts: Tensor | None = None) -> Tensor:
        """Where pictures ``[n, d]`` lie in the preference space: ``[n, space]``."""
        pictures = _unit(images)
        if self.shape.input == "both":
            # Divided by the root of two, so that what comes in is a unit vector again.
            pictures = torch.cat([pictures, _unit(_needed(texts))], dim=-1) / math.sqrt(2)
        return self.items(pictures)

    def near(self, places: Tensor, ideal: Tensor) -> Tensor:
        """Rewards ``[n]`` of places for ideal points, ``[n, space]`` each: scaled cosine (b), scaled minus distance (a)."""
        if self.shape.variant == "b":
            return self.scale * (_unit(places) * _unit(ideal)).sum(dim=-1)
        return -self.scale * (places - ideal).norm(dim=-1)

    def forward(self, images: Tensor, texts: Tensor | None, weights: Tensor) -> Tensor:
        """Rewards ``[n]`` of pictures ``[n, d]`` for prompts ``[n, d]`` and users with mixture weights ``[n, K]``."""
        return self.near(self.place(images, texts), self.ideal(weights, self.prototypes(texts)))

    def parameter_count(self) -> int:
        return sum(value.numel() for value in self.parameters())


def _needed(texts: Tensor | None) -> Tensor:
    if texts is None:
        raise ModelError("this PAL head reads the prompt")
    return texts


def _unit(vectors: Tensor) -> Tensor:
    """L2-normalised; a vector of zeros gives NaN, which ends up as a row without a score."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, vectors / norms, torch.nan)
