"""One denoising evaluation of a batch of pairs: the paragraph that every pairwise diffusion method shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmalign.diffusion.noise import NoiseSource
from mmalign.diffusion.scores import pair_scores, prediction_scores
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.diffusion.inputs import pair_inputs
from mmalign.models.reference import Reference, StoredReference
from mmalign.types import PairBatch, PairScores, StepContext


def denoising_scores(
    family: DiffusionFamily,
    policy: nn.Module,
    reference: Reference | None,
    noise: NoiseSource,
    batch: PairBatch,
    ctx: StepContext,
    *,
    inverted_by: str = "reference",
    users: tuple[Tensor, Tensor] | None = None,
) -> PairScores:
    """Scores of policy and reference on a batch of pairs, chosen and rejected in one forward of each. ``[B]`` each.

    Args:
        policy: the prepared module; gradients flow through it alone.
        reference: None for objectives without one.
        noise: where the noise comes from; asks a network only if it inverts.
        inverted_by: 'reference' or 'policy': the network that an inverting source asks, without gradients.
        users: embeddings and weights of the pairs' users, as ``Conditioning`` holds them; the policy is asked for them, the
            reference never.
    """
    if isinstance(reference, StoredReference):
        scores = denoising_scores(family, policy, None, noise, batch, ctx, inverted_by="policy", users=users)
        if batch.reference is None:
            raise ValueError("a precomputed reference needs batches that bring its scores")
        chosen, rejected = batch.reference.to(ctx.device, non_blocking=True).unbind(1)
        return replace(scores, reference_chosen=chosen, reference_rejected=rejected)
    inputs = pair_inputs(family, batch, ctx)
    process, t, cond = family.process, inputs.t, inputs.cond
    personal = cond if users is None else cond.with_user(*(torch.cat([value, value]) for value in users))

    def on_policy(x_t: Tensor, at: Tensor) -> Tensor:
        return family.predict(policy, x_t, at, personal)

    def on_reference(x_t: Tensor, at: Tensor) -> Tensor:
        if reference is None:
            raise ValueError("a noise source that asks the reference needs one")
        return reference(lambda module: family.predict(module, x_t, at, cond))

    ask = on_policy if inverted_by == "policy" else on_reference
    noisy, drawn = noise(process, inputs.latents, t, inputs.gaussian, ask)
    return pair_scores(
        lambda: on_policy(noisy, t),
        None if reference is None else lambda: on_reference(noisy, t),
        process.target(inputs.latents, drawn, t),
        process.weight(t),
    )


def stored_scores(
    family: DiffusionFamily, evaluate: Callable[[Callable[[nn.Module], Tensor]], Tensor], batch: PairBatch, ctx: StepContext
) -> Tensor:
    """A network's scores of a batch of stored draws under Gaussian noise, for keeping. ``[B, 2]`` float32.

    Args:
        evaluate: asks the network as a ``models.reference.Reference`` does.
    """
    inputs = pair_inputs(family, batch, ctx)
    process, t, cond = family.process, inputs.t, inputs.cond
    noisy = process.add_noise(inputs.latents, inputs.gaussian, t)
    with torch.no_grad():
        prediction = evaluate(lambda module: family.predict(module, noisy, t, cond))
        target = process.target(inputs.latents, inputs.gaussian, t)
        chosen, rejected = prediction_scores(prediction, target, process.weight(t)).chunk(2)
    return torch.stack([chosen, rejected], 1)
