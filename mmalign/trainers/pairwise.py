"""What every method on pairs of pictures does around its loss: ask the networks once, reduce, count the cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmalign.diffusion.noise import GaussianNoise, NoiseSource
from mmalign.models.diffusion.pairs import denoising_scores
from mmalign.models.reference import StoredReference
from mmalign.objectives.reduce import reduce_pairs
from mmalign.trainers.base import ModelTrainer
from mmalign.types import PairBatch, PairScores, StepContext, StepOutput

FORWARD = 1
GRADIENT = 3
"""Network evaluations of one picture: a forward pass, and a forward with its backward pass (about two forward passes)."""


class PairTrainer(ModelTrainer):
    """A method that needs the four scores of a pair: a subclass turns them into one loss per pair."""

    def scores(
        self, batch: PairBatch, ctx: StepContext, *, noise: NoiseSource | None = None, inverted_by: str = "reference"
    ) -> PairScores:
        """Policy and (where there is one) reference on both pictures. Plain Gaussian noise unless another source is given."""
        return denoising_scores(
            self.family, self.policy, self.reference, noise or GaussianNoise(), batch, ctx, inverted_by=inverted_by
        )

    def output(
        self, losses: Tensor, scores: PairScores, batch: PairBatch, ctx: StepContext, *, inversion: int = 0,
        metrics: Mapping[str, Tensor] | None = None,
    ) -> StepOutput:  # fmt: skip
        """The step's loss and metrics.

        Args:
            losses: one per pair. ``[B]``
            inversion: network calls without gradient that found the noise; they are told as ``network_calls`` with the rest.
            metrics: what the method reports of its own.
        """
        out = reduce_pairs(losses, scores, batch.weight.to(ctx.device, non_blocking=True))
        asked = 0 if self.reference is None or isinstance(self.reference, StoredReference) else 1
        told = {"evaluations": evaluations(ctx, pictures=2, forward=inversion + asked, gradient=1)}
        if inversion:
            told["network_calls"] = torch.full((), float(inversion + asked + 1), device=ctx.device)
        return replace(out, metrics={**out.metrics, **(metrics or {}), **told})


def evaluations(ctx: StepContext, *, pictures: float, forward: int, gradient: int) -> Tensor:
    """The metric ``evaluations``: network evaluations that one row of a batch cost. Scalar on the device.

    A picture without gradient counts 1, with gradient 3. Recomputed activations, VAE and text encoder are not counted.
    """
    return torch.full((), pictures * (FORWARD * forward + GRADIENT * gradient), device=ctx.device)
