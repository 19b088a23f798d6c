"""Plain fine-tuning on the chosen pictures: the control of every comparison, and the start of some methods.

The loss is the denoising error of the chosen picture (arXiv:2006.11239 eq. 14 in the model's own parameterisation). Rejected
pictures are not denoised at all.
"""

from __future__ import annotations

from mmalign.config import Section
from mmalign.models.diffusion.inputs import pair_inputs
from mmalign.objectives.reduce import weighted_mean
from mmalign.trainers.base import ModelTrainer
from mmalign.trainers.pairwise import evaluations
from mmalign.types import PairBatch, StepContext, StepOutput


class DiffusionSFTConfig(Section):
    """Settings of plain fine-tuning on the winners."""

    name: str = "diffusion_sft"


class DiffusionSFT(ModelTrainer):
    """See the module's head."""

    Config = DiffusionSFTConfig
    needs_reference = False

    def training_step(self, batch: PairBatch, ctx: StepContext) -> StepOutput:
        family, inputs = self.family, pair_inputs(self.family, batch, ctx)
        t = inputs.t
        noisy = family.process.add_noise(inputs.latents, inputs.gaussian, t)
        target = family.process.target(inputs.latents, inputs.gaussian, t)
        size, weight = len(batch), batch.weight.to(ctx.device, non_blocking=True)
        chosen = inputs.cond.map(lambda value: value[:size])
        prediction = family.predict(self.policy, noisy[:size], t[:size], chosen)
        losses = (prediction.float() - target[:size]).square().flatten(1).mean(1) * family.process.weight(t[:size])
        metrics = {
            "weight": weight.sum(), "loss": weighted_mean(losses.detach(), weight),
            "evaluations": evaluations(ctx, pictures=1, forward=0, gradient=1),
        }  # fmt: skip
        return StepOutput(loss=(losses * weight).sum() / size, metrics=metrics)
