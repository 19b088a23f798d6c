"""Who pictures are made for: one user, a mixture, or a push away from everybody, for every row of a batch.

Three meanings of a mixture sum_i w_i u_i, which are not the same:

- ``embedding``: one user whose embedding is sum_i w_i E_i: cheapest; the projection is not linear.
- ``attention``: sum_i w_i times the added attention of user i in every layer: one evaluation.
- ``prediction``: sum_i w_i times the prediction for user i: one evaluation per user, exactly affine in w; the score of the
  geometric mixture of the noisy marginals.

Guidance g over the user: base + g (personal - base), as guidance over the prompt does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmalign.errors import ModelError
from mmalign.models.users.adapter import UserAdapter, adapter_of

Mode = Literal["embedding", "attention", "prediction"]
MODES: tuple[Mode, ...] = ("embedding", "attention", "prediction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Persons:
    """Row i of a batch of pictures is for the mixture in row i. A row of zero weights is for nobody: the base model."""

    embeddings: Tensor  # [B, S, rows, dim]
    weights: Tensor  # [B, S], summing to 1 where the row is for somebody
    scale: Tensor  # [B] strength of the added attention; 0 is the base model to the last bit
    guidance: float = 1.0
    mode: Mode = "prediction"

    def __len__(self) -> int:
        return len(self.embeddings)

    def rows(self, which: slice | Sequence[int]) -> Persons:
        """Some of the rows."""
        return replace(self, embeddings=self.embeddings[which], weights=self.weights[which], scale=self.scale[which])

    def repeated(self, times: int) -> Persons:
        """Every row `times` times in a row, as pipelines repeat prompts for several pictures each."""
        return replace(
            self, embeddings=self.embeddings.repeat_interleave(times, 0), weights=self.weights.repeat_interleave(times, 0),
            scale=self.scale.repeat_interleave(times, 0),
        )  # fmt: skip

    def parts(self) -> list[tuple[float | Tensor, Tensor, Tensor]]:
        """(coefficient, embeddings ``[B, S', rows, dim]``, weights ``[B, S']``) whose predictions are to be added up.

        Coefficients are numbers, or one per row; they sum to 1 in every row.
        """
        g, strength = self.guidance, self.scale[:, None]
        someone = (self.weights != 0).any(1).to(self.weights.dtype)[:, None]
        if self.mode == "embedding":
            mean = torch.einsum("bs,bsrd->brd", self.weights, self.embeddings)[:, None]
            found: list[tuple[float | Tensor, Tensor, Tensor]] = [(g, mean, strength * someone)]
        elif self.mode == "attention" or self.weights.shape[1] == 1:
            found = [(g, self.embeddings, strength * self.weights)]
        else:
            found = [
                (g * self.weights[:, one], self.embeddings[:, one : one + 1], strength * someone)
                for one in range(self.weights.shape[1])
            ]
            nobody = 1 - g * self.weights.sum(1)
            if bool((nobody != 0).any()):
                found.append((nobody, self.embeddings[:, :1], torch.zeros_like(strength)))
            return found
        if g != 1.0:
            found.append((1.0 - g, found[0][1], torch.zeros_like(found[0][2])))
        return found


def persons(
    mixtures: Sequence[Sequence[tuple[Tensor, float]]], *, scale: float | Sequence[float] = 1.0, guidance: float = 1.0,
    mode: Mode = "prediction",
) -> Persons:  # fmt: skip
    """One row per picture, each a list of (embedding ``[rows, dim]``, weight); an empty list is for nobody.

    Raises:
        ModelError: every row is empty, weights that do not sum to 1, an unknown mode, or not one scale per row.
    """
    if mode not in MODES:
        raise ModelError(f"mode '{mode}' is not one of {', '.join(MODES)}")
    width = max((len(mixture) for mixture in mixtures), default=0)
    first = next((embedding for mixture in mixtures for embedding, _ in mixture), None)
    if first is None:
        raise ModelError("no row has a user; call the plain pipeline instead")
    embeddings = torch.zeros(len(mixtures), width, *first.shape)
    weights = torch.zeros(len(mixtures), width)
    for row, mixture in enumerate(mixtures):
        total = sum(weight for _, weight in mixture)
        if mixture and abs(total - 1) > 1e-6:
            raise ModelError(f"the weights of a mixture must sum to 1, those of row {row + 1} sum to {total:g}")
        for place, (embedding, weight) in enumerate(mixture):
            if embedding.shape != first.shape:
                raise ModelError(f"embeddings of one call must be alike, got {list(first.shape)} and {list(embedding.shape)}")
            embeddings[row, place], weights[row, place] = embedding.float(), weight
    scales = torch.tensor([float(scale)] * len(mixtures) if isinstance(scale, int | float) else [float(one) for one in scale])
    if len(scales) != len(mixtures):
        raise ModelError(f"{len(scales)} user scales for {len(mixtures)} rows; give one for all or one for each")
    return Persons(embeddings=embeddings, weights=weights, scale=scales, guidance=guidance, mode=mode)


@contextmanager
def made_for(network: nn.Module, who: Persons) -> Iterator[None]:
    """Inside the block every evaluation of the network is for these rows.

    A pipeline with guidance over the prompt evaluates two rows per picture; the unprompted ones are for nobody.

    Raises:
        ModelError: the network carries no user adapter; on evaluation: neither one nor two rows per picture.
    """
    adapter = adapter_of(network)
    if adapter is None:
        raise ModelError("this network carries no user adapter; load one with mmalign.models.users.load")
    if not bool(((who.weights != 0).any(1) & (who.scale != 0)).any()) or who.guidance == 0:
        yield  # for nobody: the network as it is, to the last bit
        return
    original = network.forward
    parts = who.parts()
    positive_first = type(network).__name__ == "StableCascadeUNet"

    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = len(args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"])
        outputs, total = [], None
        for coefficient, embeddings, weights in parts:
            factor, users, at = _spread(coefficient, embeddings, weights, rows, positive_first)
            out = _evaluate(network, adapter, original, args, kwargs, users, at)
            outputs.append(out)
            value = _tensor(out)
            if len(parts) == 1 and isinstance(coefficient, float) and coefficient == 1.0:
                return out
            share = factor.to(value.device, torch.float32).reshape(-1, *([1] * (value.ndim - 1))) * value.float()
            total = share if total is None else total + share
        assert total is not None
        return _like(outputs[0], total.to(_tensor(outputs[0]).dtype))

    network.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del network.forward


def _spread(
    coefficient: float | Tensor, embeddings: Tensor, weights: Tensor, rows: int, positive_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients, embeddings and weights for the rows of one evaluation."""
    size = len(embeddings)
    factor = torch.full((size,), coefficient) if isinstance(coefficient, float) else coefficient
    if rows == size:
        return factor, embeddings, weights
    if rows != 2 * size:
        raise ModelError(
            f"the network was asked for {rows} rows where {size} pictures are made: a user per row cannot be told; prompts, "
            f"users and pictures per prompt must match"
        )
    nobody = torch.zeros_like(weights)
    both = [weights, nobody] if positive_first else [nobody, weights]
    return torch.cat([factor, factor]), torch.cat([embeddings, embeddings]), torch.cat(both)


def _evaluate(
    network: Any, adapter: UserAdapter, original: Any, args: Any, kwargs: dict[str, Any], users: Tensor, weights: Tensor
) -> Any:
    """One evaluation of the network for these users."""
    device = next(adapter.parameters()).device
    words = {**kwargs, "user": (users.to(device), weights.to(device))}
    args, words = adapter.before_forward(network, args, words)
    try:
        return original(*args, **words)
    finally:
        adapter.after_forward(network, args, None)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample  # type: ignore[no-any-return]


def _like(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else type(output)(sample=value)
