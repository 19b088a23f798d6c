"""Fitting a PAL head on embeddings: all users together, or one new user with everything else frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from mmalign import rng
from mmalign.errors import TrainingError
from mmalign.objectives import get_objective
from mmalign.rewards.pal.network import PalHead
from mmalign.rewards.pal.settings import PalOptimConfig
from mmalign.types import PairScores

PRIOR_FLOOR = 0.25
"""Variance that a new user's logits may have at least in every direction, however alike the known users are."""
SCALE_LR = 0.2
"""Learning rate of the logarithm of the scale, as a share of that of the maps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Pairs as embeddings. Pictures and prompts are stored once; pairs name their rows."""

    pictures: Tensor  # [P, d] float32
    texts: Tensor  # [T, d] float32
    chosen: Tensor  # [n] int64, rows of pictures
    rejected: Tensor  # [n] int64
    prompt: Tensor  # [n] int64, rows of texts
    user: Tensor  # [n] int64, rows of the users' table
    p_chosen: Tensor  # [n] float32 in [0.5, 1]
    weight: Tensor  # [n] float32

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: Tensor | Sequence[int]) -> Choices:
        """Some of the pairs; the embeddings are shared."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        names = ("chosen", "rejected", "prompt", "user", "p_chosen", "weight")
        return replace(self, **{name: getattr(self, name)[index] for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What came of a fit."""

    logits: Tensor  # [U, K]
    epoch: int
    """The epoch that was kept, from 1; 0 is the head as it was made."""
    epochs: int
    """Epochs that were run."""
    train_loss: Sequence[float] = field(default_factory=tuple)
    validation_loss: Sequence[float] = field(default_factory=tuple)
    """After every epoch; the first entry is before any."""


def margins(head: PalHead, choices: Choices, weights: Tensor) -> Tensor:
    """Reward of chosen minus that of rejected for users with mixture weights ``[n, K]``: ``[n]``."""
    texts = choices.texts[choices.prompt] if head.shape.needs_prompt else None
    ideal = head.ideal(weights, head.prototypes(texts))
    chosen = head.near(head.place(choices.pictures[choices.chosen], texts), ideal)
    return chosen - head.near(head.place(choices.pictures[choices.rejected], texts), ideal)


def losses(margin: Tensor, p_chosen: Tensor, loss: str) -> Tensor:
    """Hinge max(0, 1 - margin), or logistic; a label p counts p times, and 1 - p times the other way round. ``[n]``

    On PAL-A's margin the hinge is the paper's max(0, 1 - y y_hat), with its scale at 1.
    """
    one_way, other = (PairScores(policy_chosen=value, policy_rejected=torch.zeros_like(value)) for value in (margin, -margin))
    if loss == "logistic":
        out: Tensor = get_objective("dpo")(one_way, beta=1.0, label_smoothing=1 - p_chosen)
        return out
    hinge = get_objective("hinge")
    mixed: Tensor = p_chosen * hinge(one_way, beta=1.0) + (1 - p_chosen) * hinge(other, beta=1.0)
    return mixed


def first_logits(users: Sequence[str], prototypes: int, *, noise: float, seed: int) -> Tensor:
    """Where training starts: noise that depends on a user's name, not on the order of users. ``[U, K]``"""
    return noise * rng.normal(list(users), (prototypes,), seed=seed, purpose="pal/users")


def fit(head: PalHead, logits: Tensor, train: Choices, validation: Choices, *, loss: str, settings: PalOptimConfig,
        seed: int) -> Fit:  # fmt: skip
    """Train head and users' logits ``[U, K]`` on pairs; the head is left at the epoch with the lowest validation loss.

    Raises:
        TrainingError: a loss that is not finite.
    """
    users = nn.Parameter(logits.detach().clone().float())
    groups = parameter_groups(head, users, settings)
    optimiser = torch.optim.AdamW(groups)
    count, total = len(train), train.weight.sum().clamp(min=1e-9)
    seen = [validation_loss(head, users, validation, loss)]
    trained: list[float] = []
    best, kept = 0, _state(head, users)
    for epoch in range(1, settings.epochs + 1):
        order = torch.from_numpy(rng.numpy_stream(seed, "pal/order", epoch).permutation(count))
        summed = 0.0
        for start in range(0, count, settings.batch_size):
            part = train.take(order[start : start + settings.batch_size])
            weights = torch.softmax(users[part.user], dim=-1)
            each = losses(margins(head, part, weights), part.p_chosen, loss) * part.weight
            # The prior counts once per epoch, so it is spread over the pairs.
            apart = (users - users.mean(dim=0)).square().sum()
            value = each.sum() / part.weight.sum().clamp(min=1e-9) + 0.5 * settings.user_prior * apart / total
            if not torch.isfinite(value):
                raise TrainingError(f"the loss of epoch {epoch} is not finite; use a lower optim.lr")
            optimiser.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            summed += float(each.detach().sum())
        trained.append(summed / float(total))
        seen.append(validation_loss(head, users, validation, loss))
        if seen[-1] < seen[best]:
            best, kept = epoch, _state(head, users)
        if epoch - best >= settings.patience:
            break
    head.load_state_dict(kept[0])
    return Fit(logits=kept[1], epoch=best, epochs=len(trained), train_loss=trained, validation_loss=seen)


def parameter_groups(head: PalHead, users: nn.Parameter, settings: PalOptimConfig) -> list[dict[str, object]]:
    """Every parameter in exactly one group."""
    maps = [value for name, value in head.named_parameters() if name != "log_scale"]
    return [
        {"params": maps, "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": [users], "lr": settings.user_lr, "weight_decay": 0.0},
        {"params": [head.log_scale], "lr": SCALE_LR * settings.lr, "weight_decay": 0.0},
    ]


def validation_loss(head: PalHead, users: Tensor, choices: Choices, loss: str) -> float:
    """Weighted mean loss of pairs of known users."""
    found = losses(predict(head, choices, torch.softmax(users.detach(), dim=-1)), choices.p_chosen, loss)
    return float((found * choices.weight).sum() / choices.weight.sum().clamp(min=1e-9))


def predict(head: PalHead, choices: Choices, weights: Tensor, *, batch: int = 4096) -> Tensor:
    """Margins of pairs under the users' mixture weights ``[U, K]``, without gradients: ``[n]``."""
    found = []
    with torch.no_grad():
        for start in range(0, len(choices), batch):
            part = choices.take(torch.arange(start, min(start + batch, len(choices))))
            found.append(margins(head, part, weights[part.user]))
    return torch.cat(found) if found else torch.zeros(0)


def _state(head: PalHead, users: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {name: value.detach().clone() for name, value in head.state_dict().items()}, users.detach().clone()


# ---------------------------------------------------------------------- one new user


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """What the known users say about a new one before the first choice: a normal prior on logits."""

    centre: Tensor  # [K] float64, logits of the users' mean mixture
    precision: Tensor  # [K, K] float64

    @property
    def weights(self) -> Tensor:
        """The mixture of a user of whom nothing is known: the mean of the known users' weights. ``[K]`` float32"""
        return torch.softmax(self.centre, dim=-1).float()

    @classmethod
    def of(cls, logits: Tensor) -> Population:
        """From the logits ``[U, K]`` of the known users."""
        values = logits.detach().double()
        centre = torch.softmax(values, dim=-1).mean(dim=0).clamp(min=1e-12).log()
        centre = centre - centre.mean()
        apart = values - values.mean(dim=-1, keepdim=True) - centre
        spread = apart.T @ apart / len(values) + PRIOR_FLOOR * torch.eye(values.shape[1], dtype=torch.float64)
        return cls(centre=centre, precision=torch.linalg.inv(spread))


def fit_user(head: PalHead, choices: Choices, population: Population, *, loss: str = "logistic", steps: int = 40) -> Tensor:
    """The logits ``[K]`` of one user from that user's pairs alone; nothing of the head moves.

    The most probable logits under the pairs and the population's prior, by L-BFGS from the population and from the side of
    each prototype. The released code takes 20 passes of AdamW from zero instead, which on a handful of pairs hardly moves.
    No pairs: the population.
    """
    if len(choices) == 0 or head.shape.prototypes == 1 or float(choices.weight.sum()) == 0:
        return population.centre.float()
    texts = choices.texts[choices.prompt] if head.shape.needs_prompt else None
    with torch.no_grad():
        places = [head.place(choices.pictures[rows], texts) for rows in (choices.chosen, choices.rejected)]
        prototypes = head.prototypes(texts)

    def cost(logits: Tensor) -> Tensor:
        ideal = head.ideal(torch.softmax(logits, dim=-1).float()[None], prototypes)
        margin = head.near(places[0], ideal) - head.near(places[1], ideal)
        apart = logits - population.centre
        fits = (losses(margin, choices.p_chosen, loss) * choices.weight).sum().double()
        return fits + 0.5 * apart @ population.precision @ apart

    starts = [population.centre, *(population.centre + 2 * side for side in torch.eye(head.shape.prototypes).double())]
    frozen = [value.requires_grad for value in head.parameters()]
    head.requires_grad_(False)
    try:
        found = [_minimise(cost, start, steps) for start in starts]
    finally:
        for value, state in zip(head.parameters(), frozen, strict=True):
            value.requires_grad_(state)
    best = min(found, key=lambda item: item[0] if math.isfinite(item[0]) else math.inf)
    return best[1].float()


def _minimise(cost, start: Tensor, steps: int) -> tuple[float, Tensor]:  # type: ignore[no-untyped-def]
    logits = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=steps, tolerance_change=1e-7, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value: Tensor = cost(logits)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(cost(logits)), logits.detach()


# ---------------------------------------------------------------------- accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of pairs ordered as labelled; ties are left out, an equal reward counts one half."""

    pairs: int
    micro: float
    """Over pairs."""
    macro: float
    """Mean over users of each user's share."""
    by_user: Sequence[float] = ()
    """In the order of the users' rows, those with pairs only."""


def accuracy(margin: Tensor, choices: Choices) -> Accuracy:
    """Accuracy of margins ``[n]`` on pairs. NaN for both shares where there are none."""
    counted = (choices.p_chosen > 0.5) & (choices.weight > 0)
    right = torch.where(margin > 0, 1.0, torch.where(margin == 0, 0.5, 0.0))[counted].double().numpy()
    users = choices.user[counted].numpy()
    if len(right) == 0:
        return Accuracy(pairs=0, micro=math.nan, macro=math.nan)
    each = [float(right[users == user].mean()) for user in np.unique(users)]
    return Accuracy(pairs=len(right), micro=float(right.mean()), macro=float(np.mean(each)), by_user=tuple(each))
