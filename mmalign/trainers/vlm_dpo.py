"""Direct alignment of a vision-language model on pairs of answers (DPO, arXiv:2305.18290, and its relatives).

One forward pass holds prompt, chosen and rejected answer, with the prompt's pictures encoded once (`prefix: shared`); the
objective is a setting, because all of them read the same scores. Choices in plain words:

- Scores are sums of token log-probabilities in float32 over the answer, its end-of-turn token included. ``ipo`` and ``ln_dpo``
  use means over tokens (for ``ipo`` that is `length_average`, as common libraries do; the paper's formula has sums).
- ``robust`` is the unbiased correction of arXiv:2403.00409; label smoothing with ``dpo`` is the conservative form.
- `nll_weight` adds the chosen answer's negative log-likelihood per token (RPO, MPO); `mix` adds whole objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmalign.branches import BranchBatch
from mmalign.config import Section
from mmalign.errors import ConfigError
from mmalign.objectives import get_objective
from mmalign.objectives.lengths import per_token
from mmalign.trainers.answers import AnswerTrainer, weigh_excess
from mmalign.types import PairScores, StepContext, StepOutput

Objective = Literal[
    "dpo", "ipo", "hinge", "robust", "ln_dpo", "lc_dpo", "ld_dpo", "simpo", "orpo", "kto", "bco", "nca", "sppo_hard", "exo_pair",
    "apo_zero", "apo_down", "discopop", "flex_dpo", "modpo",
]  # fmt: skip
READS: Mapping[str, tuple[str, ...]] = {
    "dpo": ("label_smoothing", "soft_labels"), "robust": ("label_smoothing",), "exo_pair": ("label_smoothing",),
    "ld_dpo": ("label_smoothing", "soft_labels", "alpha"), "lc_dpo": ("alpha",), "simpo": ("gamma",),
    "flex_dpo": ("beta_rejected",), "modpo": ("margin_weights", "own_weight"), "ipo": ("length_average",),
}  # fmt: skip
"""Which settings an objective reads beyond beta."""
NEEDS: Mapping[str, tuple[str, ...]] = {
    "lc_dpo": ("alpha",), "ld_dpo": ("alpha",), "simpo": ("gamma",), "flex_dpo": ("beta_rejected",),
    "modpo": ("margin_weights",), "robust": ("label_smoothing",),
}  # fmt: skip
WITHOUT_REFERENCE = ("simpo", "orpo")


class VlmDPOConfig(Section):
    """Settings of direct alignment on pairs of answers."""

    name: str = "vlm_dpo"
    objective: Objective = "dpo"
    """What is computed from the four log-probabilities of a pair; see `mmalign list objectives`."""
    beta: float = 0.1
    """Strength of the pull to the reference; for `ipo` its tau, for `orpo` the weight of the odds ratio."""
    prefix: Literal["shared", "plain"] = "shared"
    """One row per prompt with both answers behind it, or one row per answer; equal results."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, in [0, 0.5) (`dpo`, `ld_dpo`, `robust`, `exo_pair`)."""
    soft_labels: bool = False
    """Use each pair's p_chosen as its label instead of 1 (`dpo`, `ld_dpo`)."""
    gamma: float | None = None
    """Target margin of `simpo`, not divided by beta."""
    alpha: float | None = None
    """`lc_dpo`: weight of the length difference per token; `ld_dpo`: weight of tokens beyond the shorter answer."""
    beta_rejected: float | None = None
    """Pull of the rejected side in `flex_dpo`, a little below beta."""
    length_average: bool = True
    """`ipo` on means over tokens instead of sums."""
    margin_weights: dict[str, float] = Field(default_factory=dict)
    """`modpo`: weights of the other rewards, whose scores the table holds."""
    own_weight: float = 1.0
    """`modpo`: weight of this objective."""
    nll_weight: float = 0.0
    """Weight of the chosen answer's negative log-likelihood per token, added to the objective."""
    mix: dict[str, float] = Field(default_factory=dict)
    """Further objectives by weight, e.g. {bco: 0.2}; they read the same settings."""

    @property
    def objectives(self) -> dict[str, float]:
        """All objectives in force with their weights."""
        return {self.objective: 1.0, **self.mix}

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning or effect."""
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.nll_weight < 0 or any(weight <= 0 for weight in self.mix.values()):
            raise ValueError("nll_weight must not be negative, and weights in mix must be positive")
        known = Objective.__args__  # type: ignore[attr-defined]
        for name in self.mix:
            if name not in known or name in ("ld_dpo", self.objective):
                raise ValueError(f"mix: '{name}' cannot be added to '{self.objective}' (known: {', '.join(known)})")
        read = {setting for name in self.objectives for setting in READS.get(name, ())}
        defaults = {name: field.get_default(call_default_factory=True) for name, field in type(self).model_fields.items()}
        for name in sorted({setting for settings in READS.values() for setting in settings} - read):
            if self.__dict__[name] != defaults[name]:
                raise ValueError(f"{name} has no effect with objective '{self.objective}'; remove it")
        for name in self.objectives:
            for setting in NEEDS.get(name, ()):
                if self.__dict__[setting] == defaults[setting]:
                    raise ValueError(f"objective '{name}' needs the setting {setting}")
        if self.soft_labels and self.label_smoothing:
            raise ValueError("soft_labels works without label_smoothing")


class VlmDPO(AnswerTrainer):
    """See the module's head."""

    Config = VlmDPOConfig
    batches: ClassVar[str] = "vlm_pairs"
    stored_reference: ClassVar[bool] = True

    @classmethod
    def wants_reference(cls, config: Any) -> bool:
        return any(name not in WITHOUT_REFERENCE for name in config.objectives)

    def training_step(self, batch: BranchBatch, ctx: StepContext) -> StepOutput:
        config, batch = self.config, batch.to(ctx.device)
        if config.objective == "ld_dpo" and config.alpha is not None:
            batch = weigh_excess(batch, config.alpha)
        scores = self.scores(batch).pair(batch)
        return self.pair_output(self.losses(scores, batch), scores, batch.weight)

    def losses(self, scores: PairScores, batch: BranchBatch) -> Tensor:
        """The configured sum of objectives, one loss per pair. ``[N]``"""
        config = self.config
        total = sum(weight * self._one(name, scores, batch) for name, weight in config.objectives.items())
        if config.nll_weight:
            total = total + config.nll_weight * get_objective("nll")(scores)
        return torch.as_tensor(total)

    def _one(self, name: str, scores: PairScores, batch: BranchBatch) -> Tensor:
        """One objective with the settings it reads. ``[N]``"""
        config, extra = self.config, dict[str, Any]()
        if name in ("dpo", "ld_dpo"):
            extra["label_smoothing"] = 1 - batch.p_chosen if config.soft_labels else config.label_smoothing
        elif name in ("robust", "exo_pair"):
            extra["label_smoothing"] = config.label_smoothing or 1e-3
        elif name == "lc_dpo":
            extra["alpha"] = config.alpha
        elif name == "simpo":
            extra["gamma"] = config.gamma
        elif name == "flex_dpo":
            extra["beta_rejected"] = config.beta_rejected
        elif name == "modpo":
            extra |= {"margins": self._margins(batch), "own_weight": config.own_weight,
                      "weights": torch.tensor(list(config.margin_weights.values()), device=batch.weight.device)}  # fmt: skip
        if name == "ipo" and config.length_average:
            scores = per_token(scores)
        return get_objective("dpo" if name == "ld_dpo" else name)(scores, beta=config.beta, **extra)

    def _margins(self, batch: BranchBatch) -> Tensor:
        """Chosen minus rejected of every reward that ``modpo`` holds against this one. ``[N, J]``"""
        margins = []
        for name in self.config.margin_weights:
            if name not in batch.scores:
                raise ConfigError(f"method.margin_weights: the table holds no scores of '{name}'")
            chosen, rejected = batch.pair(batch.scores[name])
            margins.append(chosen - rejected)
        return torch.stack(margins, 1)
