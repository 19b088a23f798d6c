"""A new user's embedding learned from their pairs, everything else frozen: few-shot, by the loss of Diffusion-DPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign import rng
from mmalign.data.sources import prepare, stack_pixels
from mmalign.diffusion.noise import GaussianNoise
from mmalign.errors import ConfigError
from mmalign.media import DEFAULT, read_bytes
from mmalign.models.diffusion.pairs import denoising_scores
from mmalign.models.reference import UntrainedReference
from mmalign.models.users.adapter import UserAdapter, adapter_of
from mmalign.objectives import get_objective
from mmalign.types import ImageRef, PairBatch, PairRecord, Side, StepContext

if TYPE_CHECKING:
    from mmalign.experiment.opening import OpenRun

RATE = 0.05
MOST = 16
"""Pairs of one step."""


def fit_user(
    run: OpenRun, records: Sequence[PairRecord], *, steps: int, start: Tensor | None = None, seed: int = 0, rate: float = RATE
) -> Tensor:
    """The embedding under which the run's model prefers what the pairs do. float32 ``[rows, dim]``

    With prototypes the weights of a mixture are learned, otherwise the embedding itself; AdamW, pairs in turn, the
    reference is the same network for nobody. The result depends on the pairs, the start and the seed.

    Args:
        start: where to begin; default: the mean of the trained users (equal weights of the prototypes).
        rate: learning rate, in units of standardised embeddings.

    Raises:
        ConfigError: no steps or no pairs, or a run that trained more than the users' attention, whose base is another network.
    """
    if steps < 1 or not records:
        raise ConfigError(f"fitting a user needs pairs and steps, got {len(records)} and {steps}")
    adapter = adapter_of(run.aligned)
    assert adapter is not None
    wanted = [value for value in run.aligned.parameters() if value.requires_grad]
    run.aligned.requires_grad_(False)
    weights = torch.zeros(adapter.settings.prototypes) if adapter.settings.prototypes and start is None else None
    if weights is not None:
        free = weights.to(run.family.device).requires_grad_(True)
    else:
        first = start if start is not None else adapter.embeddings(torch.arange(adapter.settings.users)).mean(0)
        free = first.detach().to(run.family.device, torch.float32).clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([free], lr=rate, weight_decay=0.0)
    batches = [_batch(run, records[at : at + MOST]) for at in range(0, len(records), MOST)]
    reference = UntrainedReference(run.aligned)
    try:
        for step in range(steps):
            batch = batches[step % len(batches)]
            ctx = StepContext(step=step, seed=rng.key(seed, "fit-user"), device=run.family.device)
            one = _embedding(adapter, free, weights is not None)
            users = one.expand(len(batch), 1, *one.shape), torch.ones(len(batch), 1, device=run.family.device)
            scores = denoising_scores(run.family, run.aligned, reference, GaussianNoise(), batch, ctx, users=users)
            loss = get_objective("dpo")(scores, beta=run.config.method.model_dump()["beta"]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for value in wanted:
            value.requires_grad_(True)
    with torch.no_grad():
        return _embedding(adapter, free, weights is not None).detach().cpu()


def _embedding(adapter: UserAdapter, free: Tensor, mixture: bool) -> Tensor:
    return torch.einsum("k,krd->rd", free.softmax(0), adapter.prototypes) if mixture else free


def _batch(run: OpenRun, records: Sequence[PairRecord]) -> PairBatch:
    """Pairs as the loader of the run would bring them, latents encoded once."""
    family = run.family
    side = run.config.data.resolution or family.latent_shape[1] * family.latent_factor

    def one(pictures: Sequence[ImageRef]) -> Side:
        read = [read_bytes(picture) for picture in pictures]
        stacked = stack_pixels(
            [prepare(data, source=source, resolution=(side, side), crop="center", flip=False, limits=DEFAULT)
             for data, source in read], (side, side))  # fmt: skip
        assert stacked.pixels is not None
        return Side(geometry=stacked.geometry, moments=family.encode_images(stacked.pixels))

    prompts = tuple(record.prompt for record in records)
    return PairBatch(
        ids=tuple(record.id for record in records), prompts=prompts,
        chosen=one([record.chosen for record in records]), rejected=one([record.rejected for record in records]),
        p_chosen=torch.tensor([record.p_chosen for record in records]), weight=torch.ones(len(records)),
        users=tuple(record.user for record in records), scores={}, text=family.encode_prompts(prompts),
    )  # fmt: skip
