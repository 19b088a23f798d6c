"""PAL's users after the fit: add one from a few pairs, forget one, and measure known and new ones on other pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmalign import rng
from mmalign.errors import RewardError
from mmalign.rewards.pal.fitting import Accuracy, accuracy, fit_user, predict
from mmalign.rewards.pal.folder import PalFolder
from mmalign.scoring.pal import SINGLE, left_out_lines, open_encoder
from mmalign.scoring.pal_features import Featured, LeftOut, embed_table

if TYPE_CHECKING:
    from mmalign.rewards.dual import DualEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class UserReport:
    """What came of fitting one user."""

    user: str
    pairs: int
    weights: Sequence[float]
    train: float
    """Share of the user's own pairs that the fitted weights order as labelled; NaN where all are ties."""
    population: float
    """The same for the population's weights."""
    left_out: Sequence[LeftOut]

    def __str__(self) -> str:
        shares = ", ".join(f"{value:.3f}" for value in self.weights)
        lines = [f"user '{self.user}': weights {shares} from {self.pairs} pairs"]
        if not math.isnan(self.train):
            lines.append(f"  orders {self.train:.3f} of these pairs as labelled, the population {self.population:.3f}")
        return "\n".join(lines + left_out_lines(self.left_out, None))


def add_user(place: str | Path, pairs: str | Path, user: str, *, encoder_path: str | None = None, device: str | None = None,
             dtype: str | None = None, progress: bool = True) -> UserReport:  # fmt: skip
    """Fit a new user on that user's rows of a table and write the weights into the head's folder.

    Raises:
        DataError: the table has no usable row of the user.
        RewardError: the user was fitted together with the head.
    """
    folder = PalFolder.load(Path(place))
    encoder = _encoder_of(folder, encoder_path, device, dtype)
    featured = embed_table(pairs, encoder, only=user, progress=progress)
    logits = fit_user(folder.head, featured.choices, folder.population, loss=folder.loss)
    folder.put(user, logits)
    folder.save(Path(place))
    weights = torch.softmax(logits, dim=-1)
    own, everybody = (
        accuracy(predict(folder.head, featured.choices, value[None]), featured.choices).micro
        for value in (weights, folder.population.weights)
    )
    return UserReport(user=user, pairs=len(featured.choices), weights=weights.tolist(), train=own, population=everybody,
                      left_out=featured.left_out)  # fmt: skip


def forget_user(place: str | Path, user: str) -> None:
    """Remove a user's weights from a head's folder, and from the head with one prototype beside it.

    Raises:
        RewardError: not known.
    """
    folder = PalFolder.load(Path(place))
    folder.remove(user)
    folder.save(Path(place))
    single = Path(place) / SINGLE
    if single.is_dir():
        other = PalFolder.load(single)
        if other.has(user):
            other.remove(user)
            other.save(single)


def _encoder_of(folder: PalFolder, path: str | None, device: str | None, dtype: str | None) -> DualEncoder:
    encoder = open_encoder(str(folder.encoder["name"]), path or folder.encoder.get("path"), device, dtype)
    if encoder.identity != folder.encoder["weights"]:
        raise RewardError(
            f"the head was fitted on '{folder.encoder['name']}' with weights {folder.encoder['weights']}, but those found are "
            f"{encoder.identity}; name the right ones with --encoder-path"
        )
    return encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Accuracy on pairs that the fit did not see."""

    known: Mapping[str, Accuracy]
    """Arm -> accuracy on pairs of known users; empty where there are none."""
    new: Mapping[str, Mapping[int, Accuracy]]
    """Arm -> number of the user's pairs that were fitted on -> accuracy on the others."""
    left_out: Sequence[LeftOut]

    def __str__(self) -> str:
        lines = []
        if self.known:
            lines.append("known users: pairs, accuracy, mean of users")
            lines += [f"  {arm:<16} {found.pairs:>6}  {found.micro:.3f}  {found.macro:.3f}" for arm, found in self.known.items()]
        if self.new:
            lines.append("new users, fitted on n of their pairs: accuracy on their other pairs (users)")
            for arm, row in self.new.items():
                told = "  ".join(f"{n}: {found.micro:.3f} ({len(found.by_user)})" for n, found in row.items())
                lines.append(f"  {arm:<16} {told}")
        return "\n".join(lines + left_out_lines(self.left_out, None))


def measure_pal(place: str | Path, pairs: str | Path, *, shots: Sequence[int] = (0, 4, 8, 16, 32), seed: int = 0,
             encoder_path: str | None = None, device: str | None = None, dtype: str | None = None, progress: bool = True,
             ) -> Measured:  # fmt: skip
    """Measure a head on a table. Known users are scored as they are; each new one is fitted on the first n of half of their
    pairs, drawn by the seed, and measured on the other half, the same for every n. Nothing is written.

    Raises:
        DataError: the table has no usable row.
    """
    folder = PalFolder.load(Path(place))
    arms = {f"{folder.head.shape.prototypes} prototypes": folder}
    if (Path(place) / SINGLE).is_dir():
        arms = {"one prototype": PalFolder.load(Path(place) / SINGLE), **arms}
    encoder = _encoder_of(folder, encoder_path, device, dtype)
    featured = embed_table(pairs, encoder, progress=progress)
    return measure(arms, featured, shots=shots, seed=seed)


def measure(arms: Mapping[str, PalFolder], featured: Featured, *, shots: Sequence[int], seed: int) -> Measured:
    """`measure_pal` on embeddings."""
    choices, folder = featured.choices, list(arms.values())[-1]
    known = torch.tensor([folder.has(name) for name in featured.users])[choices.user]
    seen: dict[str, Accuracy] = {}
    rows = torch.nonzero(known).flatten()
    if len(rows):
        part = choices.take(rows)
        seen["encoder"] = accuracy(featured.encoder_margin[rows], part)
        for arm, each in arms.items():
            weights = torch.stack([_weights(each, name) for name in featured.users])
            seen[arm] = accuracy(predict(each.head, part, weights), part)
    support, query = halves(featured, ~known, seed)
    new: dict[str, dict[int, Accuracy]] = {}
    for n in shots if query else ():
        able = [user for user in query if len(support[user]) >= n]
        if not able:
            continue
        asked = torch.cat([query[user] for user in able])
        part = choices.take(asked)
        new.setdefault("encoder", {})[n] = accuracy(featured.encoder_margin[asked], part)
        for arm, each in arms.items():
            weights = each.population.weights.repeat(len(featured.users), 1)
            for user in able if n else ():
                logits = fit_user(each.head, choices.take(support[user][:n]), each.population, loss=each.loss)
                weights[user] = torch.softmax(logits, dim=-1)
            new.setdefault(arm, {})[n] = accuracy(predict(each.head, part, weights), part)
    return Measured(known=seen, new=new, left_out=featured.left_out)


def _weights(folder: PalFolder, name: str) -> torch.Tensor:
    return folder.weights(name) if folder.has(name) else folder.population.weights


def halves(featured: Featured, rows: torch.Tensor, seed: int) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Per user, two halves of their rows in an order of the seed and the pairs' ids alone. Ties are in neither."""
    choices = featured.choices
    counted = rows & (choices.p_chosen > 0.5)
    support: dict[int, torch.Tensor] = {}
    query: dict[int, torch.Tensor] = {}
    for user in torch.unique(choices.user[counted]).tolist():
        own = torch.nonzero(counted & (choices.user == user)).flatten().tolist()
        own.sort(key=lambda row: rng.key(seed, "pal/halves", 0, featured.ids[row]))
        middle = len(own) // 2
        if middle:
            support[user], query[user] = torch.tensor(own[:middle]), torch.tensor(own[middle:])
    return support, query
