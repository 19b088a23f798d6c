"""Diffusion-LPO (arXiv:2510.01540): the likelihood of a whole ranked list of pictures under Plackett-Luce.

The best picture is chosen among all, the second best among the rest, and so on; for two pictures this is Diffusion-DPO. Known
to us from its description; its code was not read. Our choices:

- The pictures of a list share timestep and noise (`share_noise`), as in Diffusion-DPO.
- Errors are means over the latent with a factor one half, so `beta` is in the units of ``diffusion_dpo``.
- Utilities are those of ``rank_dpo``; pictures that tie stand at each other's level, whatever their order in the table.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from mmalign.models.diffusion.lists import list_scores
from mmalign.objectives import get_objective
from mmalign.trainers.base import ModelTrainer
from mmalign.trainers.lists import ListSection, list_output, list_utilities, missing_rewards
from mmalign.types import RankedBatch, StepContext, StepOutput


class PlackettLuceConfig(ListSection):
    """Settings of Diffusion-LPO. Utilities give the order alone."""

    name: str = "plackett_luce"


class PlackettLuce(ModelTrainer):
    """See the module's head."""

    Config = PlackettLuceConfig
    batches: ClassVar[str] = "lists"
    config: PlackettLuceConfig

    @classmethod
    def lacking_scores(cls, config: PlackettLuceConfig, held: Collection[str]) -> str:
        return missing_rewards(config.rewards, held)

    def training_step(self, batch: RankedBatch, ctx: StepContext) -> StepOutput:
        config = self.config
        utilities = list_utilities(batch, config.rewards, config.utilities).to(ctx.device)
        scores = list_scores(
            self.family, self.policy, self.reference, batch, ctx, utilities=utilities, share_noise=config.share_noise,
            images_per_forward=config.images_per_forward,
        )  # fmt: skip
        losses = get_objective("plackett_luce")(scores, beta=config.beta)
        return list_output(losses, scores, batch, ctx, again=bool(config.images_per_forward))
