"""What methods on ranked lists of pictures share: the settings of a list's step, its utilities, and what a step reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.config import Section
from mmalign.errors import ConfigError
from mmalign.objectives.reduce import accuracy, pair_metrics, weighted_mean
from mmalign.objectives.utilities import win_rates
from mmalign.registry import did_you_mean
from mmalign.trainers.pairwise import evaluations
from mmalign.types import PairScores, RankedBatch, RankedScores, StepContext, StepOutput


class ListSection(Section):
    """Settings that every method on ranked lists has."""

    name: str
    beta: float = 5000.0
    """Strength of the pull to the reference, in the units of Diffusion-DPO's released scripts."""
    rewards: tuple[str, ...] = ()
    """Whose scores rank the pictures (column `scores` of the table); empty: all of them."""
    utilities: Literal["win_rate", "scores"] = "win_rate"
    """'win_rate': share of comparisons won over the rewards; 'scores': one reward's own scores, which should lie in [0, 1]."""
    share_noise: bool = True
    """One noise for all pictures of a list, or one for each."""
    images_per_forward: int = 0
    """0: all pictures of a batch at once. A number bounds memory by so many pictures, for one more forward each."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.images_per_forward < 0:
            raise ValueError(f"images_per_forward must not be negative, got {self.images_per_forward}")
        if self.utilities == "scores" and len(self.rewards) != 1:
            raise ValueError("utilities 'scores' takes the scores of exactly one reward: name it in rewards")


def list_utilities(batch: RankedBatch, rewards: Sequence[str], how: str) -> Tensor:
    """One number per picture, higher is better; 0 where absent. ``[B, K]`` on the CPU.

    Args:
        rewards: whose scores; empty: all that the table holds.
        how: 'win_rate' over all of them, or 'scores' of the one.

    Raises:
        ConfigError: the table lacks a reward's scores.
    """
    if problem := missing_rewards(rewards, batch.scores):
        raise ConfigError(problem)
    names = tuple(rewards) or tuple(batch.scores)
    if how == "scores":
        return torch.where(batch.mask, batch.scores[names[0]], 0.0)
    return win_rates(torch.stack([batch.scores[name] for name in names]), batch.mask)


def missing_rewards(rewards: Sequence[str], held: Collection[str]) -> str:
    """What a table with scores of `held` lacks for ranking by `rewards` (empty: by all it has); '' where nothing."""
    if not held:
        return "method.rewards: the table's column 'scores' holds no scores; add them with 'mmalign annotate'"
    for name in rewards:
        if name not in held:
            return f"method.rewards: the table's column 'scores' holds no scores of '{name}'{did_you_mean(name, held)}"
    return ""


def list_output(losses: Tensor, scores: RankedScores, batch: RankedBatch, ctx: StepContext, *, again: bool) -> StepOutput:
    """The step's loss and metrics from one loss per list. ``[B]``

    `again`: whether the policy was asked once more, without keeping activations.
    """
    weight = batch.weight.to(ctx.device, non_blocking=True)
    pictures = int(batch.mask.sum()) / len(batch)
    metrics = {
        "weight": weight.sum(), "loss": weighted_mean(losses.detach(), weight), **list_metrics(scores, weight),
        "evaluations": evaluations(ctx, pictures=pictures, forward=2 if again else 1, gradient=1),
    }  # fmt: skip
    return StepOutput(loss=(losses * weight).sum() / len(batch), metrics=metrics)


def list_metrics(scores: RankedScores, weight: Tensor) -> dict[str, Tensor]:
    """What pairwise methods report, on each list's best against its worst, and ``list_accuracy`` over all ordered pairs."""
    with torch.no_grad():
        mask = torch.ones_like(scores.utilities, dtype=torch.bool) if scores.mask is None else scores.mask
        best = torch.where(mask, scores.utilities, -torch.inf).argmax(1, keepdim=True)
        worst = torch.where(mask, scores.utilities, torch.inf).argmin(1, keepdim=True)

        def at(values: Tensor | None, place: Tensor) -> Tensor | None:
            return None if values is None else values.detach().gather(1, place)[:, 0]

        ends = PairScores(
            policy_chosen=scores.policy.detach().gather(1, best)[:, 0], reference_chosen=at(scores.reference, best),
            policy_rejected=scores.policy.detach().gather(1, worst)[:, 0], reference_rejected=at(scores.reference, worst),
        )  # fmt: skip
        gains, utilities = scores.gain(), scores.utilities
        ordered = (utilities[:, :, None] > utilities[:, None, :]) & mask[:, :, None] & mask[:, None, :]
        right = (accuracy(gains[:, :, None] - gains[:, None, :]) * ordered).sum((1, 2)) / ordered.sum((1, 2)).clamp_min(1)
        return {**pair_metrics(ends, weight), "list_accuracy": weighted_mean(right, weight)}
