"""A network under a soft mask: every named tensor carries part of a simulated user's change, and one score each says how much.

FreezeAsGuard (arXiv:2405.17472): theta_i = theta_pre_i + (1 - m_i) D_i, where D is what a user's fine-tuning adds. The weights
are rebuilt from (theta_pre, D, m) at every step, so that no rounding piles up, and everything that moves is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmalign.errors import ConfigError
from mmalign.freezing.names import canonical, is_added, published
from mmalign.freezing.relaxation import project_mean, tangent

Role = Literal["illegal", "innocent"]
ROLES: tuple[Role, Role] = ("illegal", "innocent")


class MaskedNetwork(nn.Module):
    """Wraps a frozen network; its forward runs the network with the user's change let through by ``1 - m``.

    Without adapters the change is a displacement of every named tensor. With LoRA adapters attached it is the adapters of
    the layers they sit on, and the mask is over the weights of those layers.

    Args:
        network: the published network, adapters attached or not; gets no gradient itself, except its adapters.
        ratio: weighted mean of the mask, or None to hold it at zero (nothing frozen).
        temperature: of the squashing, see ``relaxation.project_mean``.
        by_parameters: whether the mean is over parameters instead of tensors.
        start: initial scores ``[N]``; default all zero.

    Raises:
        ConfigError: a network that recomputes activations, which would recompute them with the published weights.
    """

    def __init__(
        self, network: nn.Module, *, ratio: float | None, temperature: float, by_parameters: bool = False,
        start: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        recomputing = [part for part in network.modules() if part.__dict__.get("gradient_checkpointing") is True]
        if recomputing:
            raise ConfigError("model.gradient_checkpointing: freeze_as_guard rebuilds the weights at each step, which a "
                              "recomputed forward would not see; switch it off")  # fmt: skip
        self.network, self.ratio, self.temperature = network, ratio, temperature
        values = published(network)
        adapters = {name: value for name, value in network.named_parameters() if is_added(name) and "lora_" in name}
        network.requires_grad_(False)
        self._ups: dict[str, str] = {}
        if adapters:
            ups = {_layer_of(name): name for name in adapters if ".lora_B." in name}
            self._ups = {f"{layer}.weight": ups[layer] for layer in sorted(ups)}
            self.names = tuple(self._ups)
            for value in adapters.values():
                value.requires_grad_(True)
            self.displacement = nn.ParameterList()
        else:
            self.names = tuple(values)
            self.displacement = nn.ParameterList(torch.zeros_like(value, dtype=torch.float32) for value in values.values())
        self._adapters = adapters
        self._first = {name: value.detach().clone() for name, value in adapters.items()}
        self._paths = {canonical(name): name for name, _ in network.named_parameters() if not is_added(name)}
        self.sizes = {name: values[name].numel() for name in self.names}
        self.shapes = {name: tuple(value.shape) for name, value in values.items()}
        scores = torch.zeros(len(self.names)) if start is None else start.float().clone()
        self.scores = nn.Parameter(scores.to(next(iter(values.values())).device))
        share = torch.tensor([float(self.sizes[name]) for name in self.names])
        weights = share / share.sum() if by_parameters else torch.full_like(share, 1 / len(share))
        self.register_buffer("weights", weights.to(self.scores.device), persistent=False)
        self.weights: Tensor

    def user_parameters(self) -> list[Tensor]:
        """What the simulated user trains."""
        return [*self.displacement, *self._adapters.values()]

    @torch.no_grad()
    def restart(self) -> None:
        """The user begins again from the published weights."""
        for value in self.displacement:
            value.zero_()
        for name, value in self._adapters.items():
            value.copy_(self._first[name])

    def soft_mask(self) -> Tensor:
        """The mask as it is, ``[N]`` in [0, 1], without gradient."""
        scores = self.scores.detach()
        if self.ratio is None:
            return torch.zeros_like(scores)
        return project_mean(scores, self.ratio, temperature=self.temperature, weights=self.weights)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        # Straight through the squashing: with m(1 - m) in the way, a saturated score could never come back.
        passed = 1 - (self.soft_mask() + self.scores - self.scores.detach())
        state: dict[str, Tensor] = {}
        if self._ups:
            for index, name in enumerate(self.names):
                up = self._ups[name]
                state[up] = passed[index] * self._adapters[up]
        else:
            base = published(self.network)
            for index, (name, moved) in enumerate(zip(self.names, self.displacement, strict=True)):
                state[self._paths[name]] = base[name] + passed[index] * moved
        return functional_call(self.network, state, inputs, options)


def _layer_of(adapter: str) -> str:
    """The layer that an adapter's tensor belongs to: ``a.to_q.lora_B.default.weight`` is of ``a.to_q``."""
    return canonical(adapter.split(".lora_")[0])


class MaskOptimizer(torch.optim.Optimizer):
    """Moves the scores of a `MaskedNetwork`: up where freezing costs the illegal user more than the innocent one.

    A step is told whose loss its gradient is of. dL/dm_i, minus the sum over tensor i of the user's change times gradient, is
    what freezing it costs that user. An average per role is divided by what that user gained before the mask took a side: the
    sum of the absolute costs after the first `settle` steps of each role, during which scores stay. From then on the unit
    is fixed, so that neither role rules by having the larger loss, and a user who has all he needs asks for little, while one
    who is being frozen out asks for more at every step. The difference, without what would change the ratio and divided
    by its root mean square, is the step. The rate is its own: nothing of `optim` reaches it.

    Args:
        scores, weights: of the masked network.
        rate: change of a typical score per step.
        decay: of the averages per role; None averages everything, takes the unit anew at every step and sets the scores to the
            plain difference of shares instead of moving them (one-shot saliency).
        innocent_weight: how much the innocent user's cost counts.
        settle: mask steps of each role that set its unit.
    """

    role: Role = "illegal"

    def __init__(
        self, scores: nn.Parameter, weights: Tensor, *, rate: float, decay: float | None, innocent_weight: float = 1.0,
        settle: int = 1,
    ) -> None:  # fmt: skip
        super().__init__([scores], {"lr": rate})
        self.weights, self.rate, self.decay, self.innocent_weight = weights, rate, decay, innocent_weight
        self.settle = max(1, settle)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        (scores,) = self.param_groups[0]["params"]
        if scores.grad is None:
            return
        state = self.state[scores]
        if not state:
            for role in ROLES:
                state[role] = torch.zeros_like(scores)
                state[f"{role}_steps"], state[f"{role}_unit"] = (torch.zeros((), device=scores.device) for _ in range(2))
        state[f"{self.role}_steps"] += 1
        steps = state[f"{self.role}_steps"]
        part = 1 / steps if self.decay is None else torch.clamp(1 / steps, min=1 - self.decay)
        state[self.role].lerp_(scores.grad, part)
        settling = (steps <= self.settle) | (self.decay is None)
        state[f"{self.role}_unit"] = torch.where(settling, state[self.role].abs().sum(), state[f"{self.role}_unit"])
        illegal, innocent = (state[role] / state[f"{role}_unit"].clamp(min=1e-30) for role in ROLES)
        direction = illegal - self.innocent_weight * innocent
        if self.decay is None:
            scores.copy_(direction)
            return
        settled = (state["illegal_steps"] >= self.settle) & (state["innocent_steps"] >= self.settle)
        direction = tangent(direction, self.weights * len(scores))
        scores.add_(direction / direction.square().mean().sqrt().clamp(min=1e-30) * settled, alpha=self.rate)


class GradientMeter(torch.optim.Optimizer):
    """An optimiser that moves nothing and keeps the mean absolute gradient of every tensor: the magnitude baseline."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(list(tensors), {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for value in self.param_groups[0]["params"]:
            if value.grad is not None:
                state = self.state[value]
                state["sum"] = state.get("sum", torch.zeros((), device=value.device)) + value.grad.abs().mean()

    def magnitudes(self) -> list[float]:
        """Per tensor, in order."""
        zero = torch.zeros(())
        return [float(self.state[value].get("sum", zero)) for value in self.param_groups[0]["params"]]
