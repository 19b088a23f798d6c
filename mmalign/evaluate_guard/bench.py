"""What a mask does to a user: fine-tune under it on a domain it was not learnt from, and score held-out pictures.

The user's run goes through the one training loop with the very guard that the `freezing` section uses. Every arm sees the
same rows in the same order and is scored on the same pictures with the same noise, so arms differ by their mask alone.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from mmalign.config import Section
from mmalign.data.domains import draw_rows, open_domains
from mmalign.engine.loop import Callbacks, Loop
from mmalign.engine.settings import OptimConfig, RunConfig
from mmalign.errors import DataError
from mmalign.experiment.domains import encode_rows
from mmalign.freezing import FreezeMask, guard
from mmalign.freezing.masked import ROLES
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.diffusion.captioned import CaptionedBatch, denoising_losses
from mmalign.trainers.base import Parts, Trainer
from mmalign.types import StepContext, StepOutput

TEST_BATCH = 32


class Denoising(Trainer):
    """The user: plain denoising of captioned pictures."""

    Config = Section
    needs_reference = False

    def __init__(self, parts: Parts) -> None:
        self.family, self.policy = parts.family, parts.policy

    @classmethod
    def build(cls, config: Any, parts: Parts) -> Self:
        return cls(parts)

    def training_step(self, batch: CaptionedBatch, ctx: StepContext) -> StepOutput:
        loss = denoising_losses(self.family, self.policy, batch, ctx, purpose="user/").mean()
        return StepOutput(loss=loss, metrics={"weight": loss.detach() * 0 + len(batch), "loss": loss.detach()})


class _Rows:
    """Batches of one domain, found by step alone."""

    def __init__(self, rows: CaptionedBatch, *, optim: OptimConfig, seed: int) -> None:
        self.rows, self.optim, self.seed = rows, optim, seed

    def micro_batches(self, start_step: int) -> Iterator[tuple[int, int, CaptionedBatch]]:
        step, size = start_step, self.optim.batch_size
        while True:
            for micro in range(self.optim.accumulate):
                first = (step * self.optim.accumulate + micro) * size
                found = draw_rows(len(self.rows), first=first, count=size, seed=self.seed, purpose="user/rows")
                yield step, micro, self.rows.pick(torch.from_numpy(found))
            step += 1

    def epoch(self, step: int) -> float:
        return step * self.optim.batch_size * self.optim.accumulate / len(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A fine-tuned network and what that cost."""

    network: nn.Module
    cpu_seconds_per_step: float
    state_bytes: int
    """Gradients and optimiser state of what was trained."""
    trained_parameters: int


class GuardBench:
    """Encoded domains and a base network to fine-tune again and again.

    Args:
        family: its network is copied, never trained.
        manifest: a table of domains with the splits ``adapt`` and ``test``.
        draws: noise draws per held-out picture; all arms share them.

    Raises:
        DataError: a split or role is missing, or a picture cannot be read.
    """

    def __init__(self, family: DiffusionFamily, manifest: str | Path, *, side: int, folder: Path, draws: int = 2) -> None:
        self.family, self.folder, self.draws, self.side = family, folder, draws, side
        table = open_domains(manifest, progress=False)
        self.domains = table.domains("test")
        self.fingerprint = table.fingerprint
        self.splits: dict[str, dict[str, CaptionedBatch]] = {}
        self.prompts: dict[str, list[str]] = {}
        for split in ("adapt", "test"):
            self.splits[split] = {}
            for role, rows in table.rows(split).items():
                found, problems = encode_rows(family, table, rows, side)
                if problems:
                    first = problems[0]
                    raise DataError(f"{manifest}: {first.id}: {first.reason}: {first.detail}; an evaluation skips no picture")
                self.splits[split][role] = found
                if split == "test":
                    self.prompts[role] = [table[row].prompt for row in rows]
        self.test_rows = table.rows("test")
        self.table = table

    def adapt(
        self, mask: FreezeMask | None, role: str, *, optim: OptimConfig, seed: int,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> Adapted:  # fmt: skip
        """Fine-tune a fresh copy of the base on the split ``adapt`` of a domain, under a mask if one is given.

        Args:
            prepare: changes the copy before the user gets it (an edit that the publisher made).

        Raises:
            KeyboardInterrupt: a signal stopped the user, of whom nothing may be scored then.
        """
        from accelerate import Accelerator

        policy = self.family.copy_network().float()
        if prepare is not None:
            prepare(policy)
        policy.requires_grad_(True)
        held = None if mask is None else guard(policy, mask, verify_every=0)
        free = [value for value in policy.parameters() if value.requires_grad]
        seconds = 0.0
        if free and optim.steps:
            work = self.folder / "work" / f"{role}-{seed}-{os.getpid()}"  # two evaluations may share a folder
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            parts = Parts(family=self.family, policy=policy, reference=None, steps=optim.steps)
            run = RunConfig(name="user", seed=seed, log_every=max(1, optim.steps), save_every=max(1, optim.steps))
            loop = Loop(Denoising(parts), Accelerator(cpu=self.family.device.type == "cpu"), optim=optim, run=run, folder=work)
            begin = time.process_time()
            result = loop.fit(_Rows(self.splits["adapt"][role], optim=optim, seed=seed), Callbacks())
            seconds = (time.process_time() - begin) / optim.steps
            shutil.rmtree(work, ignore_errors=True)
            if result.interrupted:  # the loop ends politely; a half-trained user would look like a mask that prevents a lot
                raise KeyboardInterrupt(f"the {role} user had {result.step} of {optim.steps} steps; run again to go on")
        if held is not None:
            held.verify().require("after the user's fine-tuning")
            held.release()
        count = sum(value.numel() for value in free)
        return Adapted(
            network=policy.requires_grad_(False).eval(), cpu_seconds_per_step=seconds, state_bytes=12 * count,
            trained_parameters=count,
        )  # fmt: skip

    @torch.no_grad()
    def test_losses(self, network: nn.Module, role: str) -> np.ndarray:
        """Mean denoising error of every held-out picture of a domain over the fixed draws. float64 ``[N]``"""
        rows = self.splits["test"][role]
        total = np.zeros(len(rows))
        for draw in range(self.draws):
            ctx = StepContext(step=draw, seed=0, device=self.family.device)
            for start in range(0, len(rows), TEST_BATCH):
                part = torch.arange(start, min(start + TEST_BATCH, len(rows)))
                losses = denoising_losses(self.family, network, rows.pick(part), ctx, purpose="test/")
                total[start : start + len(part)] += losses.double().cpu().numpy()
        return total / self.draws

    def test_pictures(self, role: str, *, captions: Sequence[str] | None = None) -> np.ndarray:
        """Held-out pictures of a domain at the model's side, uint8 ``[N, H, W, 3]``: all, or one for each caption in turn."""
        from mmalign.data.sources import prepare
        from mmalign.media import DEFAULT, read_bytes

        rows = list(self.test_rows[role])
        if captions is not None:
            left: dict[str, list[int]] = {}
            for row, prompt in zip(rows, self.prompts[role], strict=True):
                left.setdefault(prompt, []).append(row)
            rows = [left[caption][sum(earlier == caption for earlier in captions[:place]) % len(left[caption])]
                    for place, caption in enumerate(captions)]  # fmt: skip
        pictures = []
        for row in rows:
            data, source = read_bytes(self.table[row].image)
            found = prepare(
                data, source=source, resolution=(self.side, self.side), crop="center", flip=False, limits=DEFAULT
            )
            pictures.append((found.pixels.permute(1, 2, 0).numpy() * 127.5 + 128).clip(0, 255).astype(np.uint8))
        return np.stack(pictures)

    def base_losses(self) -> dict[str, np.ndarray]:
        """Of the published network, before any fine-tuning."""
        network = self.family.copy_network()
        return {role: self.test_losses(network, role) for role in ROLES}
