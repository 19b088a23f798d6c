"""TEMPLE: temporal preference learning of a video model in stages (arXiv:2503.16929; lscpku/TEMPLE).

Each stage is direct alignment on pairs whose rejected answer tells a perturbed clip, from strong perturbations, which are easy
to tell apart, to weak ones; fine-tuning on answers comes last ("Pre-SFT alignment") or wherever the settings put it. All stages
are one run: one adapter, one folder, one sequence of steps.

- The adapter is carried over from stage to stage. The release merges it into the weights after every stage and starts a new
  one; carried over, its rank is that of the whole curriculum, and what is exported is one adapter.
- At the end of a stage the reference becomes the policy of that moment, so that every stage begins with a margin of zero, and
  the optimiser's averages and the schedule start again, as separate runs of the release do. `reference: {name: adapter_off}`
  keeps the starting weights as the reference of all stages instead (ours: the total drift then is bounded by one beta).
- The rows of a stage are drawn in an order that depends on seed, stage and table alone.

Deliberate departures: vision tower and projector stay frozen in the fine-tuning stage too (the release trains them there), so
that features can be stored; the objective is a setting, `robust` with label_smoothing 0.1 to 0.25 being a remedy for pairs that
a weak perturbation left alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from mmalign.branches import BranchBatch
from mmalign.config import Section
from mmalign.models.reference import MovingReference
from mmalign.trainers.base import Parts, RateSpan, Stateful
from mmalign.trainers.vlm_dpo import VlmDPO, VlmDPOConfig
from mmalign.trainers.vlm_sft import answers_output
from mmalign.types import StepContext, StepOutput


class StageConfig(Section):
    """One stage of the curriculum."""

    name: str
    """How messages and metrics name it, for example r16 or sft."""
    loss: Literal["pairs", "answers"] = "pairs"
    """`pairs`: the method's objective; `answers`: fine-tuning on the chosen or only answer."""
    rows: str | None = None
    """Rows of the table whose column `stage` says this; default: all rows."""
    manifest: str | None = None
    """Another table for this stage; default: `data.manifest`."""
    steps: int
    """Optimiser steps of the stage."""
    lr: float | None = None
    """Peak learning rate of the stage; default `optim.lr`."""
    warmup_steps: int | None = None
    """Default `optim.warmup_steps`; the schedule runs once in every stage."""

    def model_post_init(self, context: Any) -> None:
        """Refuse what cannot run."""
        if self.steps < 1:
            raise ValueError(f"stage '{self.name}': steps must be at least 1, got {self.steps}")
        if (self.lr is not None and self.lr <= 0) or (self.warmup_steps is not None and self.warmup_steps < 0):
            raise ValueError(f"stage '{self.name}': lr must be positive and warmup_steps not negative")


class TempleConfig(VlmDPOConfig):
    """Settings of the curriculum; those of `vlm_dpo` hold for its stages of pairs."""

    name: str = "temple"
    stages: tuple[StageConfig, ...] = Field(default_factory=tuple)
    """In the order in which they run; their steps add up to `optim.steps`."""

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def model_post_init(self, context: Any) -> None:
        """Refuse a curriculum without meaning."""
        super().model_post_init(context)
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"stages: at least one is needed, and their names must differ, got {names}")
        if all(stage.loss == "answers" for stage in self.stages):
            raise ValueError("stages: none trains on pairs; use method 'vlm_sft'")

    def span(self, step: int) -> tuple[int, RateSpan]:
        """Number of the stage that a step belongs to (the last one's for steps beyond), and its stretch of steps."""
        first = 0
        for number, stage in enumerate(self.stages):
            if step < first + stage.steps or number + 1 == len(self.stages):
                return number, RateSpan(first=first, steps=stage.steps, lr=stage.lr, warmup_steps=stage.warmup_steps)
            first += stage.steps
        raise AssertionError("a curriculum has stages")


class Temple(VlmDPO):
    """See the module's head."""

    Config = TempleConfig
    batches: ClassVar[str] = "vlm_stages"
    stored_reference: ClassVar[bool] = False
    moving_reference: ClassVar[bool] = True

    config: TempleConfig

    def __init__(self, config: TempleConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.module: nn.Module = parts.policy
        self._optimizers: Mapping[str, Optimizer] = {}

    def build_optimizers(self, build: Callable[[Sequence[Tensor]], Optimizer]) -> Mapping[str, Optimizer]:
        self._optimizers = super().build_optimizers(build)
        return self._optimizers

    def rate_span(self, step: int) -> RateSpan:
        return self.config.span(step)[1]

    def training_step(self, batch: BranchBatch, ctx: StepContext) -> StepOutput:
        number, _ = self.config.span(ctx.step)
        if self.config.stages[number].loss == "answers":
            batch = batch.to(ctx.device)
            out = answers_output(self.scores(batch, reference=False), batch)
        else:
            out = super().training_step(batch, ctx)
        stage = torch.full_like(out.metrics["loss"], float(number))
        return StepOutput(loss=out.loss, metrics={**out.metrics, "stage": stage}, optimizer=out.optimizer)

    def after_step(self, ctx: StepContext) -> None:
        """At the end of a stage that another follows: the reference moves up, the optimiser starts afresh."""
        done = ctx.step + 1
        if done >= self.config.steps or self.config.span(ctx.step)[0] == self.config.span(done)[0]:
            return
        if isinstance(self.reference, MovingReference):
            self.reference.renew(self.module)
        for optimizer in self._optimizers.values():
            optimizer.state.clear()

    def extra_state(self) -> Mapping[str, Stateful]:
        return {"stage_reference": self.reference} if isinstance(self.reference, MovingReference) else {}
