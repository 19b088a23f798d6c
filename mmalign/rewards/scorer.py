"""What users hold: one loaded reward (`Scorer`), or several that share their work (`ScorerSet`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mmalign.media import PLAIN, Colours, Limits
from mmalign.rewards.base import Backend, Details, DirectBackend, EncodingBackend, User, UserNote
from mmalign.rewards.cards import Card
from mmalign.rewards.engine import Engine
from mmalign.rewards.errors import InputError, ScoringError
from mmalign.rewards.inputs import SCORED, as_prompts, as_sequence, as_users, check_range
from mmalign.rewards.preprocess import normalise

Progress = Callable[[int], None]
Users = str | Mapping[str, float] | Sequence[User | Mapping[str, float]] | None


class Scorer:
    """One loaded reward. Scores are float32 on the CPU, higher is better."""

    def __init__(
        self,
        backend: Backend,
        *,
        workers: int | None = None,
        limits: Limits = SCORED,
        compile: bool = False,
        colours: Colours = PLAIN,
        decode_workers: int = 0,
    ) -> None:
        self.backend = backend
        self.engine = Engine(
            [backend], workers=workers, limits=limits, compile=compile, colours=colours, decode_workers=decode_workers
        )

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def card(self) -> Card:
        return self.backend.card

    @property
    def cards(self) -> dict[str, Card]:
        return {self.name: self.card}

    @property
    def backends(self) -> list[Backend]:
        return [self.backend]

    @overload
    def score(self, images: Any, prompts: str | Sequence[str] | None = None, *, batch_size: int | None = None,
              details: Literal[False] = False, on_error: str = "raise", progress: Progress | None = None,
              users: Users = None) -> Tensor: ...  # fmt: skip
    @overload
    def score(self, images: Any, prompts: str | Sequence[str] | None = None, *, batch_size: int | None = None,
              details: Literal[True], on_error: str = "raise", progress: Progress | None = None,
              users: Users = None) -> Details: ...  # fmt: skip
    def score(
        self,
        images: Any,
        prompts: str | Sequence[str] | None = None,
        *,
        batch_size: int | None = None,
        details: bool = False,
        on_error: str = "raise",
        progress: Progress | None = None,
        users: Users = None,
    ) -> Tensor | Details:
        """Score pictures against prompts.

        Args:
            images: PIL images, paths, encoded bytes, uint8 arrays [H, W, 3], tensors [3, H, W], `ImageRef`s, rows of a
                `datasets` image column, or one tensor [N, 3, H, W] (uint8, or float in [0, 1], rounded to 8 bits).
            prompts: one text for all, or one per picture; may be left out for rewards that read none.
            details: return `Details` (values, ok, truncated, errors, flags, embeddings) instead of the values.
            on_error: ``raise``, or ``nan``: a row that cannot be scored is NaN with a reason, never 0.
            users: for rewards that differ between people: a name for all rows, or per row a name, None or a mixture
                ``{name: share}``. Other rewards do not read it.

        Returns:
            float32 ``[N]`` on the CPU, or `Details`.

        Raises:
            InputError: lengths that differ (also a ValueError), values out of range, a missing prompt.
            ScoringError: a row cannot be scored and `on_error` is ``raise``.
        """
        rows = as_sequence(images, clip=self.engine.reader.colours.clip)
        texts = _prompts_for([self.backend], prompts, len(rows))
        found = self.engine.run(
            rows, texts, batch_size=batch_size, on_error=on_error, embeddings=details, progress=progress,
            users=as_users(users, len(rows)),
        )[self.name]  # fmt: skip
        return found if details else found.values

    def prefer(
        self, images_0: Any, images_1: Any, prompts: str | Sequence[str] | None = None, users: Users = None
    ) -> Tensor:
        """P(first preferred) = sigmoid(score_0 - score_1): float32 ``[N]``.

        The difference is taken in the reward's own units (for PickScore these are logits, as in arXiv:2305.01569 eq. 1).
        """
        clip = self.engine.reader.colours.clip
        first, second = as_sequence(images_0, clip=clip), as_sequence(images_1, clip=clip)
        if len(first) != len(second):
            raise InputError(f"{len(first)} first images but {len(second)} second ones")
        texts = _prompts_for([self.backend], prompts, len(first))
        whose = as_users(users, len(first))
        scores = self.score([*first, *second], [*texts, *texts], users=[*whose, *whose])
        return torch.sigmoid(scores[: len(first)] - scores[len(first) :])

    def rank(
        self, candidates: Sequence[Any], prompts: str | Sequence[str] | None = None, users: Users = None
    ) -> Tensor:
        """Scores of the candidates of each prompt: float32 ``[N, K]``; shorter lists are padded with NaN."""
        lists = [as_sequence(row, clip=self.engine.reader.colours.clip) for row in candidates]
        texts = _prompts_for([self.backend], prompts, len(lists))
        whose = as_users(users, len(lists))
        flat = self.score(
            [image for row in lists for image in row],
            [text for row, text in zip(lists, texts, strict=True) for _ in row],
            users=[user for row, user in zip(lists, whose, strict=True) for _ in row],
        )
        out = torch.full((len(lists), max((len(row) for row in lists), default=0)), torch.nan)
        start = 0
        for index, row in enumerate(lists):
            out[index, : len(row)] = flat[start : start + len(row)]
            start += len(row)
        return out

    def score_tensor(
        self, pixels01: Tensor, prompts: str | Sequence[str] | None = None, users: Users = None
    ) -> Tensor:
        """Differentiable scores of float pixels ``[N, 3, H, W]`` in [0, 1]: float32 ``[N]`` on the reward's device.

        Raises:
            InputError: another shape, or values outside [0, 1].
            RewardError: the reward has no gradient, or does not know a user.
        """
        if pixels01.ndim != 4 or pixels01.shape[1] != 3:
            raise InputError(f"score_tensor needs [N, 3, H, W], got {tuple(pixels01.shape)}")
        check_range(pixels01)
        values = pixels01.float() / 255 if pixels01.dtype == torch.uint8 else pixels01.float()
        texts = _prompts_for([self.backend], prompts, len(values))
        backend, whose = self.backend, as_users(users, len(values))
        for row, note in enumerate(backend.about_user(user) if backend.reads_user else UserNote() for user in whose):
            if note.reason is not None:
                raise ScoringError(row, note.reason, note.message or "")
        if isinstance(backend, DirectBackend):
            return backend.score_pixels(values, texts)
        if not isinstance(backend, EncodingBackend):
            raise InputError(f"reward '{self.name}' cannot score tensors")
        pixels = normalise(backend.preprocess.from_tensor(values.to(backend.device)), backend.mean, backend.std)
        encoded = None
        if backend.text_key:
            distinct = list(dict.fromkeys(texts))
            with torch.no_grad():
                encoded = backend.encode_texts(distinct).rows(torch.tensor([distinct.index(text) for text in texts]))
        return backend.pair_for(backend.encode_images(pixels), encoded, whose)


class ScorerSet:
    """Several rewards over the same rows: files are decoded once, equal preprocessing and encoders are shared."""

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        workers: int | None = None,
        limits: Limits = SCORED,
        compile: bool = False,
        colours: Colours = PLAIN,
        decode_workers: int = 0,
    ) -> None:
        self.backends = list(backends)
        self.engine = Engine(
            self.backends, workers=workers, limits=limits, compile=compile, colours=colours, decode_workers=decode_workers
        )

    @property
    def cards(self) -> dict[str, Card]:
        return {backend.name: backend.card for backend in self.backends}

    def __getitem__(self, name: str) -> Scorer:
        for backend in self.backends:
            if backend.name == name:
                engine = self.engine
                made = Scorer(backend, workers=engine.workers, limits=engine.limits, compile=engine.compile,
                              colours=engine.reader.colours)  # fmt: skip
                made.engine.reader.decoders = engine.reader.decoders
                return made
        raise KeyError(name)

    def score(
        self,
        images: Any,
        prompts: str | Sequence[str] | None = None,
        *,
        batch_size: int | None = None,
        details: bool = False,
        on_error: str = "raise",
        progress: Progress | None = None,
        users: Users = None,
    ) -> dict[str, Any]:
        """As `Scorer.score`, for every reward: ``{name: Tensor [N]}``, or ``{name: Details}`` with `details`."""
        rows = as_sequence(images, clip=self.engine.reader.colours.clip)
        texts = _prompts_for(self.backends, prompts, len(rows))
        found = self.engine.run(
            rows, texts, batch_size=batch_size, on_error=on_error, embeddings=details, progress=progress,
            users=as_users(users, len(rows)),
        )  # fmt: skip
        return dict(found) if details else {name: item.values for name, item in found.items()}

    def rank(
        self, candidates: Sequence[Any], prompts: str | Sequence[str] | None = None, users: Users = None
    ) -> dict[str, Tensor]:
        """As `Scorer.rank`, for every reward."""
        return {backend.name: self[backend.name].rank(candidates, prompts, users) for backend in self.backends}

    def prefer(
        self, images_0: Any, images_1: Any, prompts: str | Sequence[str] | None = None, users: Users = None
    ) -> dict[str, Tensor]:
        """As `Scorer.prefer`, for every reward."""
        return {
            backend.name: self[backend.name].prefer(images_0, images_1, prompts, users) for backend in self.backends
        }


def _prompts_for(backends: Sequence[Backend], prompts: str | Sequence[str] | None, count: int) -> list[str]:
    needing = [backend.name for backend in backends if backend.card.needs_prompt]
    if prompts is None and needing:
        raise InputError(
            f"{', '.join(needing)} need{'s' if len(needing) == 1 else ''} a prompt; prompt-free rewards: "
            "aesthetic, aesthetic-v1-l14, brightness, saturation, jpeg-size"
        )
    return as_prompts(prompts, count)
