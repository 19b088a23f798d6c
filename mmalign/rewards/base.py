"""The seam between rewards and the code that feeds them.

A reward is either an `EncodingBackend` (images and prompts are encoded apart, so each distinct one is encoded once and
equal encoders are shared between rewards) or a `DirectBackend` (a function of a picture and its prompt).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.errors import RewardError
from mmalign.rewards.cards import Card
from mmalign.rewards.clip_net import VisionTower
from mmalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Encoded prompts: tensors whose first axis is the prompt, and which prompts were cut."""

    tensors: tuple[Tensor, ...]  # [n, ...] each
    truncated: Tensor  # [n] bool

    def rows(self, index: Tensor) -> Texts:
        """The chosen prompts, in order."""
        return Texts(
            tensors=tuple(value[index.to(value.device, non_blocking=True)] for value in self.tensors),
            truncated=self.truncated[index.cpu()],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a `DirectBackend` said of a batch."""

    values: Tensor  # [n] float32, NaN where there is no score
    errors: tuple[str | None, ...]
    """A reason code where there is no score: ``unparseable``, ``no_target``, ..."""
    truncated: tuple[bool, ...] = ()
    raw: tuple[Any, ...] = ()
    """What was behind each score, such as a judge's reply; plain data."""


User = str | tuple[tuple[str, float], ...] | None
"""Whose reward a row asks for: a name, a mixture of names with shares that sum to 1, or nobody in particular."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserNote:
    """What a reward says of a row's user before anything is computed."""

    reason: str | None = None
    """Reason code where the row cannot be scored for this user."""
    message: str | None = None
    flags: tuple[str, ...] = ()
    """What a person should know about a row that is scored all the same."""


class Backend(ABC):
    """One loaded reward."""

    card: Card
    device: torch.device = torch.device("cpu")
    reads_user: bool = False
    """Whether a row's user decides its score."""

    def about_user(self, user: User) -> UserNote:
        """Whether a row can be scored for this user; only asked where `reads_user`."""
        return UserNote()

    def user_key(self, user: str | None) -> str:
        """How stored scores name a user; only asked where `reads_user`."""
        return user or ""

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def cosine_unit(self) -> float:
        """What a difference of 1 in the cosine of two embeddings is worth in this score; 0 where it is no such multiple."""
        return 0.0

    def record(self) -> Mapping[str, Any]:
        """What beyond the card decides the numbers (weights hash, precision, options): plain data for the outputs."""
        return {}


class EncodingBackend(Backend):
    """A reward whose images and prompts are encoded separately. All methods run on `device`."""

    preprocess: Preprocess
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    image_key: str
    """Backends with equal keys and equal preprocessing get one image encoding."""
    text_key: str
    """Backends with equal keys get one text encoding; empty when the prompt is not used."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised float32 pixels ``[n, 3, s, s]`` -> ``[n, ...]``."""

    @abstractmethod
    def encode_texts(self, prompts: Sequence[str]) -> Texts:
        """Prompts -> encodings."""

    @abstractmethod
    def pair(self, images: Tensor, texts: Texts | None) -> Tensor:
        """Row i of both -> float32 scores ``[n]``. Each row depends on itself only."""

    def pair_for(self, images: Tensor, texts: Texts | None, users: Sequence[User]) -> Tensor:
        """As `pair`, each row for its user. Only a reward that `reads_user` makes a difference."""
        return self.pair(images, texts)

    @property
    def image_tower(self) -> VisionTower | None:
        """The tower `encode_images` runs, whose first blocks may be shared with other rewards; None: it runs another network."""
        return None

    @property
    def reads_first(self) -> bool:
        """Whether `finish_images` reads the first state alone, so that the last block need not make the others."""
        return False

    def finish_images(self, states: Tensor) -> Tensor:
        """What `encode_images` makes of the states after the last block of `image_tower`: ``[n, 1 + patches, width]``, or
        ``[n, 1, width]`` where `reads_first`, -> ``[n, ...]``.

        Raises:
            RewardError: the reward has no such tower.
        """
        raise RewardError(f"reward '{self.name}' has no image tower")

    def bytes_per_image(self) -> int:
        """Memory one picture takes inside the image encoder, in bytes; 0 when it is not known."""
        return 0

    def embedding(self, images: Tensor) -> Tensor | None:
        """The image embedding to hand out with details ``[n, d]``, where there is one."""
        return None


class DirectBackend(Backend):
    """A reward that is a function of a picture and its prompt."""

    @abstractmethod
    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Answers:
        """Upright RGB pictures and prompts -> one answer each."""

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Differentiable scores of ``[N, 3, H, W]`` in [0, 1]; most such rewards have none.

        Raises:
            RewardError: always, unless a backend defines it.
        """
        raise RewardError(f"reward '{self.name}' is not differentiable: it reads pictures, not tensors")


class FunctionBackend(DirectBackend):
    """A plain function as a reward.

    Args:
        function: (uint8 pictures ``[N, H, W, 3]``, captions) -> ``[N]``; called once per picture size.
        card: its data sheet.
        size: (height, width) every picture must have; another size is the row error ``wrong_size``.
    """

    def __init__(
        self,
        function: Callable[[np.ndarray, Sequence[str]], Any],
        card: Card,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.function, self.card, self.size = function, card, size

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Answers:
        values = torch.full((len(images),), torch.nan)
        errors: list[str | None] = [None] * len(images)
        by_size: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(images):
            size = (image.height, image.width)
            if self.size is not None and size != self.size:
                errors[row] = "wrong_size"
            else:
                by_size.setdefault(size, []).append(row)
        for rows in by_size.values():
            stack = np.stack([np.asarray(images[row], dtype=np.uint8) for row in rows])
            found = torch.as_tensor(np.asarray(self.function(stack, [prompts[row] for row in rows]), dtype=np.float32))
            if found.shape != (len(rows),):
                raise RewardError(f"reward '{self.name}' returned shape {tuple(found.shape)} for {len(rows)} pictures")
            values[torch.tensor(rows)] = found
        return Answers(values=values, errors=tuple(errors))


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """Scores with everything known about each row."""

    values: Tensor  # [n] float32 on the CPU, NaN where not ok
    ok: Tensor  # [n] bool
    truncated: Tensor  # [n] bool: the prompt was longer than the text encoder reads
    errors: tuple[str | None, ...]
    """Reason code per row, None where scored."""
    messages: tuple[str | None, ...]
    """The reason for people."""
    flags: tuple[tuple[str, ...], ...]
    """What had to be done to the picture (alpha, 16bit, exif_rotated, ...) and ``empty_prompt``."""
    embeddings: Tensor | None = None  # [n, d] float32 on the CPU
    raw: tuple[Any, ...] = ()
    components: Mapping[str, Tensor] = field(default_factory=dict)
    """For combined rewards: the scores behind the value, [n] each."""
