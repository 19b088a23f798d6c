"""Several loaded rewards behind one score: `Ensemble`, and the expressions that name one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import RewardError
from mmalign.rewards.base import Details
from mmalign.rewards.cards import Card
from mmalign.rewards.combining import Combined, checked_weights, combine
from mmalign.rewards.errors import InputError
from mmalign.rewards.inputs import as_prompts, as_sequence, as_users
from mmalign.rewards.scorer import ScorerSet, Users


class Ensemble:
    """Several loaded rewards behind one score.

    The value of a picture depends on the other candidates of its prompt in the same call, except under ``linear`` and
    ``zscore_ref``.
    """

    def __init__(
        self,
        scorers: ScorerSet,
        weights: Mapping[str, float] | None = None,
        *,
        normalize: str = "win_rate",
        missing: str = "error",
        temperature: float = 1.0,
        references: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.scorers, self.normalize, self.missing = scorers, normalize, missing
        self.temperature, self.references = temperature, references
        self.weights = checked_weights(scorers.cards, weights, normalize)
        self.name = "+".join(f"{weight:g}*{name}" for name, weight in self.weights.items())

    def record(self) -> dict[str, Any]:
        """What decides the numbers: plain data for outputs."""
        return {
            "weights": self.weights, "normalize": self.normalize, "missing": self.missing,
            "temperature": self.temperature, "references": dict(self.references or {}),
            "rewards": {backend.name: dict(backend.record()) for backend in self.scorers.backends},
        }  # fmt: skip

    @property
    def cards(self) -> dict[str, Card]:
        """The data sheets of the rewards inside."""
        return self.scorers.cards

    def combine(
        self,
        images: Any,
        prompts: str | Sequence[str] | None = None,
        groups: Sequence[Any] | None = None,
        **options: Any,
    ) -> Combined:
        """Scores with their components; candidates of one prompt are one group unless `groups` says otherwise."""
        rows = as_sequence(images)
        on_error = "raise" if self.missing == "error" else "nan"
        found = self.scorers.score(rows, prompts, on_error=on_error, **options)
        return self._combined(found, as_prompts(prompts, len(rows)) if groups is None else groups)

    def score(
        self,
        images: Any,
        prompts: str | Sequence[str] | None = None,
        *,
        batch_size: int | None = None,
        details: bool = False,
        on_error: str | None = None,
        progress: Callable[[int], None] | None = None,
        users: Users = None,
    ) -> Any:
        """The combined value, float32 ``[N]``; with `details`, `Details` whose `components` are the single scores.

        `on_error`: as in `Scorer.score`; by default ``raise`` if `missing` is ``error``, else ``nan``. Under ``nan`` a row that
        no rule can combine is NaN.
        """
        rows = as_sequence(images)
        chosen = on_error or ("raise" if self.missing == "error" else "nan")
        found = self.scorers.score(
            rows, prompts, batch_size=batch_size, details=True, on_error=chosen, progress=progress, users=users
        )
        missing = "drop_row" if chosen == "nan" and self.missing == "error" else self.missing
        values = {name: item.values for name, item in found.items()}
        combined = self._combined(values, as_prompts(prompts, len(rows)), missing)
        return _details(found, combined) if details else combined.values

    def prefer(
        self, images_0: Any, images_1: Any, prompts: str | Sequence[str] | None = None, users: Users = None
    ) -> Tensor:
        """P(first preferred) ``[N]``: sigmoid of the difference for ``linear`` and ``zscore_ref``, else the weighted share of
        rewards that prefer the first (ties half)."""
        first, second = as_sequence(images_0), as_sequence(images_1)
        if len(first) != len(second):
            raise InputError(f"{len(first)} first images but {len(second)} second ones")
        count = len(first)
        texts, whose = as_prompts(prompts, count), as_users(users, count)
        if self.normalize in ("linear", "zscore_ref"):
            both = self.combine([*first, *second], [*texts, *texts], users=[*whose, *whose]).values
            return torch.sigmoid(both[:count] - both[count:])
        found = self.scorers.score([*first, *second], [*texts, *texts], users=[*whose, *whose])
        votes = combine(found, [*range(count)] * 2, weights=self.weights, normalize="win_rate", missing=self.missing)
        return votes.values[:count]

    def rank(
        self, candidates: Sequence[Any], prompts: str | Sequence[str] | None = None, users: Users = None
    ) -> Tensor:
        """Values of the candidates of each list, compared within it: float32 ``[N, K]``, NaN-padded."""
        lists = [as_sequence(row) for row in candidates]
        texts, whose = as_prompts(prompts, len(lists)), as_users(users, len(lists))
        owners = [index for index, row in enumerate(lists) for _ in row]
        flat = self.combine(
            [image for row in lists for image in row], [texts[index] for index in owners], owners,
            users=[whose[index] for index in owners],
        ).values  # fmt: skip
        out = torch.full((len(lists), max((len(row) for row in lists), default=0)), torch.nan)
        start = 0
        for index, row in enumerate(lists):
            out[index, : len(row)] = flat[start : start + len(row)]
            start += len(row)
        return out

    def _combined(self, scores: Mapping[str, Tensor], groups: Sequence[Any], missing: str | None = None) -> Combined:
        return combine(
            scores, groups, weights=self.weights, normalize=self.normalize, missing=missing or self.missing,
            temperature=self.temperature, references=self.references,
        )  # fmt: skip

    def score_tensor(
        self, pixels01: Tensor, prompts: str | Sequence[str] | None = None, users: Users = None
    ) -> Tensor:
        """Differentiable weighted sum; only for ``linear`` and ``zscore_ref``, the others compare candidates.

        Raises:
            RewardError: another normalisation, or a reward without a gradient.
        """
        if self.normalize not in ("linear", "zscore_ref"):
            raise RewardError(f"'{self.normalize}' ranks candidates and has no gradient; use linear or zscore_ref")
        total = torch.zeros(len(pixels01), device=pixels01.device)
        for name, weight in self.weights.items():
            values = self.scorers[name].score_tensor(pixels01, prompts, users).to(total.device)
            if self.normalize == "zscore_ref":
                mean, deviation = (self.references or {})[name]
                values, weight = (values - mean) / deviation, weight / sum(self.weights.values())
            total = total + weight * values
        return total


def _details(found: Mapping[str, Details], combined: Combined) -> Details:
    """Details of a combination: a row without a value has the first reason among its rewards."""
    items = list(found.values())
    ok = ~combined.values.isnan()
    rows = range(len(combined.values))

    def reason(row: int, texts: Sequence[Sequence[str | None]]) -> str | None:
        return None if ok[row] else next((text[row] for text in texts if text[row] is not None), "nonfinite")

    return Details(
        values=combined.values,
        ok=ok,
        truncated=torch.stack([item.truncated for item in items]).any(dim=0),
        errors=tuple(reason(row, [item.errors for item in items]) for row in rows),
        messages=tuple(reason(row, [item.messages for item in items]) for row in rows),
        flags=tuple(tuple(dict.fromkeys(flag for item in items for flag in item.flags[row])) for row in rows),
        components=combined.components,
    )


def parse_expression(text: str) -> dict[str, float]:
    """``"0.5*pickscore + 0.5*hpsv2.1"`` -> weights by name.

    Raises:
        RewardError: not a sum of WEIGHT*NAME, or a name twice.
    """
    out: dict[str, float] = {}
    for term in text.split("+"):
        number, star, name = (part.strip() for part in term.partition("*"))
        if not star:
            number, name = "1", number
        try:
            weight = float(number)
        except ValueError as error:
            raise RewardError(f"'{term.strip()}' is not WEIGHT*NAME in '{text}'") from error
        if not name or name in out:
            raise RewardError(f"'{text}': every term needs a name, once")
        out[name] = weight
    return out
