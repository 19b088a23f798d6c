"""The contract between a method and the loop. A method owns no loop, no files and no devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from mmalign.config import Section
from mmalign.types import StepContext, StepOutput


class Stateful(Protocol):
    """Anything a checkpoint must keep beyond weights and optimisers: tensors and plain data."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an experiment hands to a method. A method takes what it needs."""

    family: Any
    """The model family (``models.diffusion.base.DiffusionFamily`` for image methods)."""
    policy: nn.Module
    """The module to train, adapters attached."""
    reference: Any
    """``models.reference.Reference``, or None."""
    steps: int
    """Length of the run in optimiser steps."""
    buffer: Any = None
    """Where methods that generate write what was generated (``experiment.vlm_buffer.OnlineBuffer``), or None."""
    features: Any = None
    """Stored vision features (``models.stored_answers.VisionStore``), or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSpan:
    """A stretch of a run over which the learning-rate schedule runs once."""

    first: int
    """Its first step, counted from 0."""
    steps: int
    lr: float | None = None
    """Peak rate; None: `optim.lr`."""
    warmup_steps: int | None = None
    """None: `optim.warmup_steps`."""


class Trainer(ABC):
    """One method: what is trained, and what one step computes."""

    Config: ClassVar[type[Section]]
    batches: ClassVar[str] = "pairs"
    """What the loader must yield."""
    needs_reference: ClassVar[bool] = True
    moving_reference: ClassVar[bool] = False
    """Whether the reference becomes the policy of a later moment during the run."""
    stored_reference: ClassVar[bool] = False
    """Whether the reference's scores of stored draws are all it needs of the reference (`reference: precomputed`)."""

    notice: ClassVar[str] = ""
    """What everyone who runs the method, or reads its page, must be told."""

    policy: nn.Module
    """The only module that receives gradients; the loop replaces it by its prepared (wrapped) form."""

    @classmethod
    @abstractmethod
    def build(cls, config: Any, parts: Parts) -> Self:
        """Assemble the method from its settings and the experiment's parts."""

    @abstractmethod
    def training_step(self, batch: Any, ctx: StepContext) -> StepOutput:
        """The loss of one micro-batch: sum over rows of weight x loss, divided by the number of rows."""

    @classmethod
    def wants_reference(cls, config: Any) -> bool:
        """Whether the method with these settings compares with a reference."""
        return cls.needs_reference

    @classmethod
    def wants_mismatched(cls, config: Any) -> bool:
        """Whether rows need an answer of another row behind their own (the reference point of KTO)."""
        return False

    @classmethod
    def lacking_scores(cls, config: Any, held: Collection[str]) -> str:
        """What is wrong with a table whose column `scores` holds these rewards, in words with the remedy; '' where nothing is.

        Asked by `mmalign check` and before the first step, so that nobody waits for a step to learn it.
        """
        return ""

    @classmethod
    def users(cls, config: Any) -> Any:
        """Settings of the users the method trains for (``models.users.settings.UsersConfig``), or None: it knows no users."""
        return None

    def parameter_groups(self) -> Mapping[str, Sequence[Tensor]]:
        """Named optimisers with what they train; usually just ``main``."""
        return {"main": [parameter for parameter in self.policy.parameters() if parameter.requires_grad]}

    def build_optimizers(self, build: Callable[[Sequence[Tensor]], Optimizer]) -> Mapping[str, Optimizer]:
        """The named optimisers over `parameter_groups`; `build` makes the configured one. Default: that one for each."""
        return {name: build(tensors) for name, tensors in self.parameter_groups().items()}

    def rate_span(self, step: int) -> RateSpan | None:
        """Which stretch the schedule runs over at a step; None (the default): the whole run."""
        return None

    def artefact(self) -> Any:
        """What the method made instead of trained weights, or None. With one, no weights are sampled, exported or compared."""
        return None

    def after_step(self, ctx: StepContext) -> None:
        """Called when the optimiser has moved. Default: nothing."""

    def extra_state(self) -> Mapping[str, Stateful]:
        """What a checkpoint must keep beyond weights and optimisers. Default: nothing."""
        return {}


class ModelTrainer(Trainer):
    """Holds what a method is given: its settings, the family, the policy and (where it has one) the reference."""

    config: Any

    def __init__(self, config: Any, parts: Parts) -> None:
        self.config = config
        self.family = parts.family
        self.policy = parts.policy
        self.reference = parts.reference

    @classmethod
    def build(cls, config: Any, parts: Parts) -> Self:
        return cls(config, parts)
