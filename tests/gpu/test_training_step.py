"""What only a GPU shows: bfloat16 steps, the fused optimiser, caches, and agreement with the CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.engine.loop import Callbacks, Loop
from mmalign.engine.settings import OptimConfig, RunConfig
from mmalign.models.adapters import attach_lora
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.reference import AdapterOffReference, CopyReference
from mmalign.trainers.base import Parts
from mmalign.trainers.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from mmalign.types import PairBatch, StepContext
from tests.fixtures.batches import cached, gradients, lora_policy, pair_batch
from tests.fixtures.tiny import VARIANTS, load

Folders = Callable[[str], Path]
pytestmark = pytest.mark.gpu
every_variant = pytest.mark.parametrize("variant", VARIANTS)
LOG2 = math.log(2)


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def context(step: int = 3) -> StepContext:
    return StepContext(step=step, seed=7, device=cuda())


def trainer(family: DiffusionFamily, policy: nn.Module, beta: float, reference: Any = None) -> DiffusionDPO:
    parts = Parts(family=family, policy=policy, reference=reference or AdapterOffReference(policy), steps=4)
    return DiffusionDPO.build(DiffusionDPOConfig(beta=beta), parts)


@every_variant
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_fresh_adapter_gives_exactly_log_2(tiny_folder: Folders, variant: str, dtype: str) -> None:
    family = load(variant, tiny_folder(variant), device=cuda(), dtype=dtype)
    family.network.to(family.dtype)
    out = trainer(family, lora_policy(family), 5000.0).training_step(pair_batch(3), context())
    assert out.loss.item() == pytest.approx(LOG2, abs=1e-6) and out.metrics["accuracy"].item() == 0.5
    assert out.loss.dtype is torch.float32


def test_full_bfloat16_training_against_a_copy_starts_at_log_2(tiny_folder: Folders) -> None:
    family = load("sd1", tiny_folder("sd1"), device=cuda(), dtype="bf16")
    reference = CopyReference(family.copy_network())
    policy = family.network.float().requires_grad_(True)
    out = trainer(family, policy, 5000.0, reference).training_step(pair_batch(2), context())
    assert out.loss.item() == pytest.approx(LOG2, abs=1e-6)


@every_variant
def test_a_step_agrees_with_the_cpu(tiny_folder: Folders, variant: str) -> None:
    """Draws are made on the CPU, so both devices see the same noise; the rest differs by summation order."""
    found = []
    for device in (torch.device("cpu"), cuda()):
        family = load(variant, tiny_folder(variant), device=device)
        policy = lora_policy(family)
        with torch.no_grad():  # the same move on both devices
            generator = torch.Generator().manual_seed(1)
            for value in policy.parameters():
                if value.requires_grad:
                    value.add_(0.1 * torch.randn(value.shape, generator=generator).to(device))
        out = trainer(family, policy, 50.0).training_step(pair_batch(2), StepContext(step=3, seed=7, device=device))
        out.loss.backward()
        found.append((out.loss.item(), {name: value.cpu() for name, value in gradients(policy).items()}))
    (loss, expected), (on_gpu, grads) = found
    assert on_gpu == pytest.approx(loss, rel=1e-3)
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=2e-2, atol=1e-3 * largest)


@every_variant
def test_a_bfloat16_step_is_close_to_a_float32_step(tiny_folder: Folders, variant: str) -> None:
    losses, directions = [], []
    for dtype in ("fp32", "bf16"):
        family = load(variant, tiny_folder(variant), device=cuda(), dtype=dtype)
        policy = lora_policy(family)
        # On an H200 with torch 2.11 the kernel preferred for bfloat16 gives gradients that are no numbers for the heads of 16
        # that these tiny FLUX folders have (real ones have 128); the other two give what they should.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = trainer(family, policy, 20.0).training_step(pair_batch(4), context())
            out.loss.backward()
        grads = gradients(policy)
        assert all(value.dtype is torch.float32 and torch.isfinite(value).all() for value in grads.values())
        losses.append(out.metrics["policy_chosen"].item())
        directions.append(torch.cat([value.flatten() for value in grads.values()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert torch.cosine_similarity(directions[0], directions[1], dim=0) > 0.95


@every_variant
def test_cached_equals_uncached(tiny_folder: Folders, variant: str) -> None:
    family = load(variant, tiny_folder(variant), device=cuda())
    policy = lora_policy(family)
    with torch.no_grad():
        for value in policy.parameters():
            if value.requires_grad:
                value.add_(0.1)
    method, batch = trainer(family, policy, 20.0), pair_batch(3)
    fresh, stored = (
        method.training_step(value, context()).loss.item() for value in (batch, on_cpu(cached(batch, family)))
    )
    assert stored == pytest.approx(fresh, rel=1e-4)


def on_cpu(batch: PairBatch) -> PairBatch:
    """As a loader yields it: everything on the CPU."""
    from dataclasses import replace

    assert batch.text is not None and batch.chosen.moments is not None and batch.rejected.moments is not None
    return replace(
        batch, text={name: value.cpu() for name, value in batch.text.items()},
        chosen=replace(batch.chosen, moments=batch.chosen.moments.to("cpu")),
        rejected=replace(batch.rejected, moments=batch.rejected.moments.to("cpu")),
    )  # fmt: skip


class Stream:
    """The same four rows in every step."""

    def epoch(self, step: int) -> float:
        return float(step)

    def micro_batches(self, start_step: int) -> Iterator[tuple[int, int, PairBatch]]:
        step = start_step
        while True:
            yield step, 0, pair_batch(2)
            yield step, 1, pair_batch(2, first=2)
            step += 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_short_run_through_the_loop_with_the_fused_optimiser(
    tiny_folder: Folders, tmp_path: Path, dtype: str
) -> None:
    from accelerate import Accelerator

    family = load("sd1", tiny_folder("sd1"), device=cuda(), dtype=dtype)
    family.network.to(family.dtype)
    targets = family.lora_targets["attention"]
    policy = attach_lora(family.network, rank=4, alpha=4.0, targets=targets, seed=0)
    frozen = {name: value.clone() for name, value in policy.named_parameters() if not value.requires_grad}
    method = trainer(family, policy, 500.0)
    optim = OptimConfig(lr=1e-3, steps=6, batch_size=2, accumulate=2, ema_decay=0.9)
    loop = Loop(method, Accelerator(), optim=optim, run=RunConfig(name="gpu", log_every=1), folder=tmp_path)
    assert loop.optimizers["main"].param_groups[0]["fused"]
    result = loop.fit(Stream(), Callbacks())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.step == 6 and lines[0]["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert lines[-1]["margin"] != 0 and all(math.isfinite(line["loss"]) for line in lines)
    assert all(torch.equal(value, frozen[name]) for name, value in policy.named_parameters() if name in frozen)
    assert all(value.grad is None for name, value in policy.named_parameters() if name in frozen)


def test_fused_adamw_moves_as_the_plain_one() -> None:
    from mmalign.engine.optim import build_optimizer

    weights = [torch.linspace(-1, 1, 64, device=device).requires_grad_(True) for device in ("cpu", cuda())]
    config = OptimConfig(lr=0.01, steps=5, weight_decay=0.1)
    plain = torch.optim.AdamW(
        [weights[0]], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=False
    )
    optimizers = [plain, build_optimizer([weights[1]], config)]
    assert optimizers[1].param_groups[0]["fused"]
    for step in range(5):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.sin(torch.arange(64.0, device=weight.device) + step)
            optimizer.step()
    torch.testing.assert_close(weights[1].detach().cpu(), weights[0].detach(), rtol=1e-5, atol=1e-6)


def test_sampling_on_the_gpu_is_close_to_the_cpu(tiny_folder: Folders) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = []
    for device in (torch.device("cpu"), cuda()):
        family = load("sd1", tiny_folder("sd1"), device=device)
        prompts = ("a red star", "")
        pictures.append(family.sample(family.network, prompts, noise, steps=3, guidance=3.0, batch_size=2).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 2
