"""Hidden states where answers are predicted: for objectives on whole distributions, and on what layers give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmalign.branches import BranchBatch, VisionFeatures
from mmalign.models.vlm.forward import inner, run
from mmalign.models.vlm.layout import Layout

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStates:
    """States at the Nt positions that predict answer tokens, in the order of a layout."""

    hidden: Tensor  # [Nt, D] what the output layer reads
    layers: Tensor | None  # [layers, Nt, D] behind every layer, without gradient; None unless asked for
    head: nn.Module
    """The output layer."""
    target: Tensor  # [Nt] the tokens
    flat: Tensor  # [Nt] number of the answer
    offset: Tensor  # [Nt] place in the answer

    def table(self, values: Tensor, batch: BranchBatch) -> Tensor:
        """Values of tokens ``[Nt]`` as ``[R, L]``, 0 behind an answer's end."""
        shape = (batch.num_answers, batch.max_length)
        return values.new_zeros(shape).index_put((self.flat, self.offset), values)


class _Keep(nn.Module):
    """Stands in for the output layer: hidden states at the positions asked for."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[self.layout.rows, self.layout.columns]


def answer_states(
    family: VlmFamily, module: nn.Module, batch: BranchBatch, *, prefix: Literal["shared", "plain"],
    vision: VisionFeatures | None = None, layers: bool = False,
) -> AnswerStates:  # fmt: skip
    """One forward pass as for log-probabilities, kept before the output layer.

    Args:
        layers: also what every layer of the language model gives.

    Raises:
        ModelError: `shared` where it would not be exact.
    """
    network = inner(module)
    found: list[Tensor] = []
    places: list[Layout] = []

    def make(layout: Layout) -> nn.Module:
        places.append(layout)
        return _Keep(layout)

    with _watched(_decoder_layers(family, module), places, found) if layers else _nothing():
        layout, _, hidden = run(family, module, batch, prefix=prefix, vision=vision, hide=None, make=make)
    return AnswerStates(
        hidden=hidden, layers=torch.stack(found) if layers else None, head=network.lm_head, target=layout.target,
        flat=layout.flat, offset=layout.offset,
    )  # fmt: skip


def _decoder_layers(family: VlmFamily, module: nn.Module) -> nn.ModuleList:
    for part in family.parts(module)["language"]:
        layers = part._modules.get("layers") if isinstance(part, nn.Module) else None
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(f"the language model of {family.config.path} has no list of layers")


@contextmanager
def _watched(layers: nn.ModuleList, places: list[Layout], found: list[Tensor]) -> Iterator[None]:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found.append(states.detach()[places[0].rows, places[0].columns])

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
