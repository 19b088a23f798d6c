"""RankDPO (arXiv:2410.18013): a preference for every pair of a ranked list of pictures, weighted by gain and rank.

There is no public code; what the paper leaves open is a setting here, with its default in plain words:

- The pictures of a list share timestep and noise (`share_noise`); the paper's algorithm 2 has a noise for each picture.
- Ranks come from the labels (`rank_source`), as the text says; the caption of its figure 2 reads like the policy's ranks.
- The discount's logarithm is natural (`log_base`), tied pictures share the mean of their ranks (`tie`), and the pairs of a
  list are summed (`reduction`).
- Errors are means over the latent with a factor one half, so `beta` is in the units of ``diffusion_dpo``.
- Utilities are win rates over the table's rewards (section 3 of the paper), counted when a batch is used: a table needs
  scores alone, and a picture that cannot be read counts nowhere.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from torch import Tensor

from mmalign.models.diffusion.lists import list_scores
from mmalign.objectives import get_objective
from mmalign.trainers.base import ModelTrainer
from mmalign.trainers.lists import ListSection, list_output, list_utilities, missing_rewards
from mmalign.types import RankedBatch, StepContext, StepOutput


class RankDPOConfig(ListSection):
    """Settings of RankDPO."""

    name: str = "rank_dpo"
    log_base: Literal["e", "2"] = "e"
    """Of the discount 1 / log(1 + rank); multiplies the loss by a constant."""
    rank_source: Literal["label", "model"] = "label"
    """Ranks in the weights from the labels, or from the policy's present order."""
    tie: Literal["mid", "min", "order"] = "mid"
    """Tied pictures share the mean of their ranks, share the best of them, or stand in the order of the table."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the pairs of a list."""


class RankDPO(ModelTrainer):
    """See the module's head."""

    Config = RankDPOConfig
    batches: ClassVar[str] = "lists"
    config: RankDPOConfig

    def training_step(self, batch: RankedBatch, ctx: StepContext) -> StepOutput:
        config = self.config
        scores = list_scores(
            self.family, self.policy, self.reference, batch, ctx, utilities=self.utilities(batch).to(ctx.device),
            share_noise=config.share_noise, images_per_forward=config.images_per_forward,
        )  # fmt: skip
        losses = get_objective("rank_dpo")(
            scores, beta=config.beta, log_base=config.log_base, rank_source=config.rank_source, tie=config.tie,
            reduction=config.reduction,
        )  # fmt: skip
        return list_output(losses, scores, batch, ctx, again=bool(config.images_per_forward))

    @classmethod
    def lacking_scores(cls, config: RankDPOConfig, held: Collection[str]) -> str:
        return missing_rewards(config.rewards, held)

    def utilities(self, batch: RankedBatch) -> Tensor:
        """See ``list_utilities``."""
        return list_utilities(batch, self.config.rewards, self.config.utilities)
