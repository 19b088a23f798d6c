"""PPD (arXiv:2501.06655): Diffusion-DPO for many users at once, whose policy has one more input, the user.

    max_pi  E_u E_x [ r_u(c, x) ] - beta KL( pi(x | c, u) || pi_ref(x | c) )

Per pair it is Diffusion-DPO's loss: the policy's errors are those for the pair's user, the reference's those for nobody. The user
comes in by an attention of its own beside the one over the prompt (``models.users``), which alone is trained unless
`tuning` says otherwise; the reference is then the same network without a user, at no memory.

Departures and choices, since the paper's diffusion stage was never released: values of the added attention start at zero, so
that policy and reference agree before the first step; `beta` is in the units of the released Diffusion-DPO scripts; user dropout
drops the added attention (`null: base`), so that nobody's model is exactly the base, or puts a zero embedding in the user's place
(`null: population`), which then learns what most users like.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmalign import rng
from mmalign.config import Section
from mmalign.diffusion.noise import GaussianNoise
from mmalign.models.diffusion.inputs import position
from mmalign.models.diffusion.pairs import denoising_scores
from mmalign.models.users.settings import UsersConfig
from mmalign.objectives import get_objective
from mmalign.trainers.pairwise import PairTrainer
from mmalign.types import PairBatch, PairScores, StepContext, StepOutput


class PersonalizedDPOConfig(Section):
    """Settings of PPD."""

    name: str = "personalized_dpo"
    beta: float = 5000.0
    """Strength of the pull to the reference, in the units of the released Diffusion-DPO scripts (2000 for SD1.5)."""
    soft_labels: bool = False
    """Use each pair's p_chosen as its label instead of 1."""
    users: UsersConfig
    """Where embeddings come from, and the attention over them."""
    user_dropout: float = 0.1
    """Share of the rows whose user is left out, in [0, 1)."""
    null: Literal["base", "population"] = "base"
    """What stands for nobody: the base model, or an embedding of zeros."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without effect."""
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.user_dropout < 1:
            raise ValueError(f"user_dropout must be in [0, 1), got {self.user_dropout}")
        if self.null == "population" and self.users.source != "encoded":
            raise ValueError("null 'population' replaces an embedding by zeros, which a table of users has none of; use 'base'")


class PersonalizedDPO(PairTrainer):
    """See the module's head."""

    Config = PersonalizedDPOConfig
    stored_reference = True

    config: PersonalizedDPOConfig

    @classmethod
    def users(cls, config: PersonalizedDPOConfig) -> UsersConfig:
        return config.users

    def training_step(self, batch: PairBatch, ctx: StepContext) -> StepOutput:
        users, kept = self.with_dropout(batch, ctx)
        scores = denoising_scores(self.family, self.policy, self.reference, GaussianNoise(), batch, ctx, users=users)
        flipped = 1 - batch.p_chosen.to(ctx.device, non_blocking=True) if self.config.soft_labels else 0.0
        losses = get_objective("dpo")(scores, beta=self.config.beta, label_smoothing=flipped)
        return self.output(losses, scores, batch, ctx, metrics=told(scores, kept, batch))

    def with_dropout(self, batch: PairBatch, ctx: StepContext) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Embeddings ``[B, 1, rows, dim]`` (or places ``[B, 1]``) and weights ``[B, 1]``, and which rows kept their user ``[B]``.

        Raises:
            ValueError: the batch brings no users.
        """
        if batch.user is None:
            raise ValueError("personalized_dpo needs batches that bring their users' embeddings")
        uniform = rng.uniform(batch.ids, seed=ctx.seed, purpose="user-dropout", step=position(batch, ctx))
        kept = (uniform >= self.config.user_dropout).to(ctx.device)
        user = batch.user.to(ctx.device, non_blocking=True)[:, None]
        if self.config.null == "population":
            return (user * kept[:, None, None, None], torch.ones(len(batch), 1, device=ctx.device)), kept
        return (user, kept[:, None].float()), kept


def told(scores: PairScores, kept: Tensor, batch: PairBatch) -> dict[str, Tensor]:
    """Accuracy over the rows that kept their user, and how many users the batch mixes."""
    right = (scores.margin() > 0).float() + 0.5 * (scores.margin() == 0).float()
    counted = kept.float()
    mean = (right * counted).sum() / counted.sum().clamp(min=1)
    return {
        "user_accuracy": mean.detach(),
        "users_in_batch": torch.tensor(float(len(set(batch.users))), device=mean.device),
    }
