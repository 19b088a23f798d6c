"""Objectives on answers that differ in length: functions of ``PairScores`` with lengths, one float32 loss per pair.

Scores are sums of token log-probabilities; lengths count the tokens of an answer, its end token included. What is averaged over
tokens takes scores without lengths for such averages already. Nothing here has a meaning for diffusion scores.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.types import PairScores


def lengths_of(scores: PairScores, objective: str) -> tuple[Tensor, Tensor]:
    """Lengths of chosen and rejected as float32, at least 1. ``[B]`` each.

    Raises:
        ValueError: scores without lengths.
    """
    if scores.chosen_length is None or scores.rejected_length is None:
        raise ValueError(f"{objective} needs the lengths of both answers; these scores have none")
    return scores.chosen_length.float().clamp_min(1), scores.rejected_length.float().clamp_min(1)


def per_token(scores: PairScores) -> PairScores:
    """The same scores as means over the tokens of their answer; scores without lengths are such means as they stand.

    Raises:
        ValueError: lengths of one side alone.
    """
    if scores.chosen_length is None and scores.rejected_length is None:
        return scores
    chosen, rejected = lengths_of(scores, "a mean over tokens")

    def mean(total: Tensor | None, length: Tensor) -> Tensor | None:
        return None if total is None else total.float() / length

    return replace(
        scores, policy_chosen=scores.policy_chosen.float() / chosen, policy_rejected=scores.policy_rejected.float() / rejected,
        reference_chosen=mean(scores.reference_chosen, chosen), reference_rejected=mean(scores.reference_rejected, rejected),
    )  # fmt: skip


def ln_dpo(scores: PairScores, *, beta: float) -> Tensor:
    """DPO on log-ratios averaged over tokens. Returns ``[B]``.

    ``-log sigmoid(beta (mean ratio of chosen - mean ratio of rejected))``. `beta` must be about the mean length times that of
    ``dpo`` for an equal pull. Source: arXiv:2407.15229 (the form is confirmed at second hand, by libraries that name the paper).
    """
    return -F.logsigmoid(beta * per_token(scores).margin())


def lc_dpo(scores: PairScores, *, beta: float, alpha: float) -> Tensor:
    """DPO with the length difference in its logit. Returns ``[B]``.

    ``-log sigmoid(beta margin + alpha (|chosen| - |rejected|))``: a longer chosen answer gets
    part of its margin for nothing, so that length alone earns less gradient. `alpha` is per token; 0 is plain DPO.
    Source: arXiv:2403.19159 (R-DPO), as used by arXiv:2410.07025; the smoothed branch of
    StanfordMIMI/CheXalign has the wrong sign before the length and is not followed.
    """
    chosen, rejected = lengths_of(scores, "lc_dpo")
    return -F.logsigmoid(beta * scores.margin() + alpha * (chosen - rejected))


def simpo(scores: PairScores, *, beta: float, gamma: float) -> Tensor:
    """Mean log-probabilities against each other with a target margin, no reference. Returns ``[B]``.

    ``-log sigmoid(beta (mean of chosen - mean of rejected) - gamma)``. Source: arXiv:2405.14734 eq. 6. Libraries that take
    ``gamma / beta`` from the difference before it is scaled compute the same. Reference scores are not looked at.
    """
    means = per_token(scores)
    difference = means.policy_chosen.float() - means.policy_rejected.float()
    return -F.logsigmoid(beta * difference - gamma)


def nll(scores: PairScores) -> Tensor:
    """Negative log-likelihood of the chosen answer per token: the anchor of RPO and MPO, and plain fine-tuning. ``[B]``.

    Source: arXiv:2404.19733 eq. 2 (added to DPO with a weight) and arXiv:2411.10442 (the generation loss of MPO).
    """
    return -per_token(scores).policy_chosen.float()


def triple_po(
    scores: PairScores, *, beta: float, anchor: Tensor, alpha: float = 1.0, length_average: bool = False, gamma: float = 0.0
) -> Tensor:
    """Triple preference optimisation: a preference without reference, and likelihood of a gold answer. Returns ``[B]``.

    ``-log sigmoid(beta (log p(chosen) - log p(rejected))) + alpha NLL(gold)``. Source: arXiv:2405.16681.

    Args:
        anchor: negative log-likelihood of the gold answer per token ``[B]``.
        length_average: the preference on means over tokens (TPO-L in the authors' code).
        gamma: target margin, subtracted inside the sigmoid and not divided by beta (TPO-L).
    """
    if length_average:
        scores = per_token(scores)
    difference = scores.policy_chosen.float() - scores.policy_rejected.float()
    return -F.logsigmoid(beta * difference - gamma) + alpha * anchor.float()


def desensitised_weights(place: Tensor, shorter: Tensor, *, alpha: float) -> Tensor:
    """Token weights of LD-DPO: 1 up to the shorter answer's length, `alpha` beyond. Float32, the shape of `place`.

    Source: arXiv:2409.06411. To be applied to policy and reference alike.

    Args:
        place: of every token in its answer, from 0.
        shorter: tokens of the shorter answer of the pair that the token belongs to, the shape of `place`.
        alpha: weight of the excess, in [0, 1]; 1 is plain DPO.

    Raises:
        ValueError: `alpha` outside that range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"ld_dpo: alpha must be in [0, 1], got {alpha}")
    return torch.where(place < shorter, 1.0, alpha)
