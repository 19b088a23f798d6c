"""FreezeAsGuard (arXiv:2405.17472): learn which named tensors to freeze so that illegal fine-tuning comes out poor.

A simulated user fine-tunes; a mask says how much of each tensor's change survives; the mask moves to where it costs the
illegal user more than the innocent one. Two named optimisers take turns: ``user`` and ``mask``.

Departures from the paper and from the released code (pittisl/FreezeAsGuard), in plain words:

- Two users by default, one for each domain, who take turns from the published weights (`users: separate`): that is what
  happens after release. The paper's single user trains on both domains at once (`users: joint`); his change of a tensor is
  a compromise, so its cost to either domain says less about either.
- Each domain's costs are divided by what its user gained before the mask took a side, so that scores follow the gradient of
  (share of the illegal gain prevented) - `innocent_weight` x (share of the innocent gain prevented). Raw losses let the
  domain with the larger loss decide. Dividing by the present sum of costs would give an innocent user who has all he needs
  as loud a voice as one who is being frozen out; with a fixed unit he asks for more as the mask takes more from him.
- The ratio is exact at every step by projection, not by a penalty; where it counts parameters, a tensor has to earn its size, and
  those of the highest score per parameter are frozen. One step of the released penalty saturates nearly all
  scores, after which the mask is its random start; here all scores start equal.
- The score moves by the gradient with respect to the mask itself, so that a saturated tensor can still change sides.
- The user trains with the run's optimiser, as an attacker would; the released simulation uses plain SGD at a rate that
  hardly moves the weights.
- Batches hold equally many rows of both domains by construction; the mask file has names and hashes instead of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mmalign import rng
from mmalign.config import Section
from mmalign.freezing.baselines import attention_scores, random_scores
from mmalign.freezing.mask import FreezeMask
from mmalign.freezing.masked import ROLES, GradientMeter, MaskedNetwork, MaskOptimizer, Role
from mmalign.freezing.relaxation import jaccard, top_names
from mmalign.models.diffusion.captioned import DomainBatch, denoising_losses
from mmalign.trainers.base import Parts, Trainer
from mmalign.types import StepContext, StepOutput

_SETTLE = 5
"""Mask steps that set a domain's unit where the user never begins again."""


class FreezeAsGuardConfig(Section):
    """Settings of mask learning and of its baselines."""

    name: str = "freeze_as_guard"
    ratio: float
    """Share to freeze, in [0, 1]."""
    count: Literal["tensors", "parameters"] = "tensors"
    """What `ratio` counts. Both shares are always reported."""
    scheme: Literal["learned", "saliency", "gradient", "attention", "random", "none"] = "learned"
    """'learned'; 'saliency': one fine-tuning, no feedback from the mask; 'gradient': mean absolute gradient on illegal data at
    the published weights; 'attention': attention weights first; 'random'; 'none' freezes nothing. The last three need no
    steps."""
    users: Literal["separate", "joint"] = "separate"
    """One user for each domain in turn, or one on both."""
    temperature: float = 0.2
    """Of the squashing from scores to soft masks."""
    mask_lr: float = 0.1
    """Change of a typical score per mask step."""
    user_steps: int = 4
    """User steps before each mask step."""
    episode: int = 20
    """User steps before the user begins again from the published weights; a multiple of `user_steps`. 0: never (`joint` only)."""
    decay: float = 0.9
    """Of the averages of each domain's costs."""
    innocent_weight: float = 0.3
    """How much a share of an innocent user's gain counts against one of an illegal user's; 1 gives cautious masks. 0.3 was the
    better of the two on persons and papers that no mask is learnt from or reported on (docs/freezing.md)."""
    start: Literal["equal", "random"] = "equal"
    """Scores at the start. 'random' (uniform in [0, 1), as released) shows how much of a mask is its start."""
    mask_seed: int | None = None
    """Seed of random scores; default: run.seed as far as the trainer knows it, 0."""

    def model_post_init(self, context: Any) -> None:
        """Refuse what cannot run or has no effect."""
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {self.ratio}")
        if self.scheme == "none" and self.ratio:
            raise ValueError("scheme 'none' freezes nothing; set ratio to 0")
        for name in ("temperature", "mask_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.innocent_weight < 0:
            raise ValueError(f"innocent_weight must not be negative, got {self.innocent_weight}")
        if self.user_steps < 1:
            raise ValueError(f"user_steps must be at least 1, got {self.user_steps}")
        if self.episode < 0 or self.episode % self.user_steps:
            raise ValueError(f"episode must be a multiple of user_steps ({self.user_steps}), got {self.episode}")
        if self.users == "separate" and not self.episode:
            raise ValueError("users 'separate' take turns, so episode must be positive")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Whose step it is."""

    mask: bool
    role: Role
    """Whose loss is taken; with a joint user, whose cost a mask step measures."""
    last: bool
    """Whether the user begins again after this step."""


class FreezeAsGuard(Trainer):
    """See the module's head."""

    Config = FreezeAsGuardConfig
    batches = "domains"
    needs_reference = False

    def __init__(self, config: FreezeAsGuardConfig, parts: Parts) -> None:
        self.config, self.family = config, parts.family
        held = config.ratio if config.scheme == "learned" else None
        start = None
        self.masked = MaskedNetwork(
            parts.policy, ratio=held, temperature=config.temperature, by_parameters=config.count == "parameters"
        )
        if config.start == "random":
            start = rng.uniform(self.masked.names, seed=config.mask_seed or 0, purpose="freeze-mask/start").float()
            with torch.no_grad():
                self.masked.scores.copy_(start)
        self.first = self._named(self.masked.scores.tolist())
        self.policy: nn.Module = self.masked
        self.user: torch.optim.Optimizer | None = None
        self.mask: MaskOptimizer | None = None

    @classmethod
    def build(cls, config: FreezeAsGuardConfig, parts: Parts) -> Self:
        return cls(config, parts)

    # Optimisers

    def parameter_groups(self) -> Mapping[str, Sequence[Tensor]]:
        return {"user": self.masked.user_parameters(), "mask": [self.masked.scores]}

    def build_optimizers(
        self, build: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    ) -> Mapping[str, torch.optim.Optimizer]:
        """The run's own optimiser for the user; the mask's is of its own kind."""
        config, tensors = self.config, self.masked.user_parameters()
        self.user = GradientMeter(tensors) if config.scheme == "gradient" else build(tensors)
        self.mask = MaskOptimizer(
            self.masked.scores, self.masked.weights, rate=config.mask_lr,
            decay=config.decay if config.scheme == "learned" else None, innocent_weight=config.innocent_weight,
            settle=config.episode // config.user_steps or _SETTLE,
        )  # fmt: skip
        return {"user": self.user, "mask": self.mask}

    # Steps

    def turn(self, step: int) -> Turn:
        """Whose turn a step is: a pure function of its number, so that a resume goes on with the same turn."""
        config = self.config
        block, within = divmod(step, config.user_steps + 1)
        mask = within == config.user_steps
        blocks = config.episode // config.user_steps
        number = block // blocks if config.users == "separate" else block
        last = mask and bool(blocks) and (block + 1) % blocks == 0
        return Turn(mask=mask, role=ROLES[number % 2], last=last)

    def training_step(self, batch: DomainBatch, ctx: StepContext) -> StepOutput:
        turn, config = self.turn(ctx.step), self.config
        rows = {"illegal": batch.illegal, "innocent": batch.innocent}
        roles: tuple[Role, ...] = (turn.role,) if config.users == "separate" or turn.mask else ROLES
        if config.scheme == "gradient":
            roles = ("illegal",)
        losses = {
            role: denoising_losses(self.family, self.policy, rows[role], ctx, purpose=f"freeze/{role}/").mean() for role in roles
        }
        loss = torch.stack(list(losses.values())).mean()
        soft = self.masked.soft_mask()
        metrics = {"weight": loss.detach() * 0 + len(batch), "loss": loss.detach()}
        metrics |= {f"{role}_loss": value.detach() for role, value in losses.items()}
        metrics["mask_softness"] = (soft * (1 - soft)).mean()
        if self.mask is not None:
            self.mask.role = turn.role
        return StepOutput(loss=loss, metrics=metrics, optimizer="mask" if turn.mask else "user")

    def after_step(self, ctx: StepContext) -> None:
        if self.turn(ctx.step).last and self.user is not None and self.config.scheme != "gradient":
            self.masked.restart()
            self.user.state.clear()

    # The mask

    def _named(self, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.masked.names, values, strict=True))

    def scores(self) -> dict[str, float]:
        """What tensors are ranked by, as it stands."""
        config, masked = self.config, self.masked
        if config.scheme in ("random", "none"):
            return random_scores(masked.names, seed=config.mask_seed or 0)
        if config.scheme == "attention":
            return attention_scores({name: masked.shapes[name] for name in masked.names}, seed=config.mask_seed or 0)
        if isinstance(self.user, GradientMeter):
            return self._named(self.user.magnitudes())
        return self._named(masked.scores.tolist())

    def artefact(self) -> FreezeMask:
        """The hard mask of the present scores, at exactly the wanted ratio."""
        scores, masked = self.scores(), self.masked
        sizes = masked.sizes if self.config.count == "parameters" else None
        if sizes is not None and self.config.scheme in ("learned", "saliency"):  # what a share of the gain costs in parameters
            scores = {name: value / sizes[name] for name, value in scores.items()}
        frozen = top_names(scores, self.config.ratio, sizes=sizes)
        begun = top_names(self.first, self.config.ratio, sizes=sizes)
        masked.restart()  # adapters at their start add nothing; displacements never touched the network
        return FreezeMask.of(
            masked.network, frozen, scores=scores,
            recipe={
                "method": self.config.model_dump(mode="json"), "candidates": len(masked.names),
                "overlap_with_start": jaccard(frozen, begun),
            },
        )  # fmt: skip
