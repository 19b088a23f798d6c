"""The reference policy: what the policy is held against. One seam for image and language models.

Always without dropout and gradients, on the unwrapped module, and everything restored when the call raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmalign.config import Section
from mmalign.errors import ModelError
from mmalign.models.adapters import adapters_off, has_active_dropout
from mmalign.registry import Registry


class Reference(Protocol):
    """Evaluates a function of a module on the reference policy."""

    def __call__(self, evaluate: Callable[[nn.Module], Tensor]) -> Tensor:
        """`evaluate(module)` on the reference, without gradients."""


@runtime_checkable
class MovingReference(Reference, Protocol):
    """A reference that can become what the policy is at a later moment, and that a checkpoint must keep then."""

    def renew(self, policy: nn.Module) -> None:
        """Become what the unwrapped policy is now."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class CopyConfig(Section):
    """A frozen copy of the starting weights: for full fine-tuning. Costs one more network of memory."""

    name: str = "copy"


class AdapterOffConfig(Section):
    """The policy with its LoRA adapters switched off: no memory, exactly the starting weights."""

    name: str = "adapter_off"


class FrozenAdapterConfig(Section):
    """The LoRA adapters as they were at the start, on the same network: for going on from an adapter of an earlier run."""

    name: str = "frozen_adapter"
    path: str | None = None
    """Folder with the adapter (written by `mmalign export --format peft`) that policy and reference start from; rank, alpha and
    targets must be those of `tuning`. Default: a fresh adapter, which is the same as 'adapter_off'."""


class PrecomputedConfig(Section):
    """The starting weights, asked once for every stored draw (`data.draws`) before training: no pass, no memory in the run."""

    name: str = "precomputed"


class NoReferenceConfig(Section):
    """No reference policy, for objectives that need none."""

    name: str = "none"


REFERENCES: Registry[type[Section]] = Registry("reference")
REFERENCES.add("copy", CopyConfig, summary="a frozen copy of the starting weights")
REFERENCES.add("adapter_off", AdapterOffConfig, summary="the policy with its adapters switched off")
REFERENCES.add("frozen_adapter", FrozenAdapterConfig, summary="the adapters as they were at the start")
REFERENCES.add("precomputed", PrecomputedConfig, summary="scores of stored draws, computed once and cached")
REFERENCES.add("none", NoReferenceConfig, summary="no reference policy")


class CopyReference:
    """A separate frozen network."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)

    def __call__(self, evaluate: Callable[[nn.Module], Tensor]) -> Tensor:
        with torch.no_grad():
            return evaluate(self.module)

    def renew(self, policy: nn.Module) -> None:
        """Become what the unwrapped policy is now."""
        with torch.no_grad():
            for own, other in zip(self.module.parameters(), policy.parameters(), strict=True):
                own.copy_(other)

    def state_dict(self) -> dict[str, Any]:
        return {name: value.detach() for name, value in self.module.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, value in self.module.named_parameters():
                value.copy_(state[name])


class AdapterOffReference:
    """The unwrapped policy without its adapters.

    Args:
        policy: the module that carries the adapters, before any distributed wrapper.
    """

    def __init__(self, policy: nn.Module) -> None:
        with adapters_off(policy):
            pass  # fails here, not in the first step, when there is no adapter
        self.policy = policy
        # Modes are left alone where they mean nothing: diffusers' blocks choose other memory layouts in training mode, after
        # which other kernels round differently, and a fresh adapter would not have a margin of exactly zero.
        self.switch = has_active_dropout(policy)

    def __call__(self, evaluate: Callable[[nn.Module], Tensor]) -> Tensor:
        was_training = self.policy.training and self.switch
        try:
            if was_training:
                self.policy.eval()
            with torch.no_grad(), adapters_off(self.policy):
                return evaluate(self.policy)
        finally:
            if was_training:
                self.policy.train()


class FrozenAdapterReference:
    """The unwrapped policy with its adapters as they are now. Costs a copy of the adapters.

    Args:
        policy: the module that carries the adapters, before any distributed wrapper.

    Raises:
        ModelError: it carries none.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self.switch = has_active_dropout(policy)
        adapters = [value for name, value in policy.named_parameters() if "lora_" in name]
        if not adapters:
            raise ModelError("reference 'frozen_adapter' needs tuning.name 'lora': there is no adapter to keep")
        self.held = [(value, value.detach().clone()) for value in adapters]

    def renew(self, policy: nn.Module) -> None:
        """Become what the unwrapped policy's adapters are now."""
        self.held = [(value, value.detach().clone()) for value, _ in self.held]

    def state_dict(self) -> dict[str, Any]:
        return {str(number): kept for number, (_, kept) in enumerate(self.held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.held = [(value, state[str(number)].to(value.device)) for number, (value, _) in enumerate(self.held)]

    def __call__(self, evaluate: Callable[[nn.Module], Tensor]) -> Tensor:
        was_training = self.policy.training and self.switch
        # Storage changes hands, nothing is written: a graph that already holds the trained tensors stays valid.
        moved = [value.data for value, _ in self.held]
        try:
            if was_training:
                self.policy.eval()
            for value, kept in self.held:
                value.data = kept.to(value.device)
            with torch.no_grad():
                return evaluate(self.policy)
        finally:
            for (value, _), trained in zip(self.held, moved, strict=True):
                value.data = trained
            if was_training:
                self.policy.train()


class UntrainedReference:
    """The policy itself, asked before its first step.

    Its weights want gradients, and kernels fold a product differently for such weights: a copy would differ by rounding.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    def __call__(self, evaluate: Callable[[nn.Module], Tensor]) -> Tensor:
        was_training = self.policy.training
        try:
            if was_training and has_active_dropout(self.policy):
                self.policy.eval()
            with torch.no_grad():
                return evaluate(self.policy)
        finally:
            self.policy.train(was_training)


class StoredReference:
    """Stands where a reference would: its scores come with the batch, and it cannot be asked anything else."""

    def __call__(self, evaluate: Callable[[nn.Module], Tensor]) -> Tensor:
        raise TypeError("a precomputed reference holds scores and no network to ask")
