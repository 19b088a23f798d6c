"""One forward pass from a batch to log-probabilities: media once, prompts once, logits of answer tokens alone.

The module's own forward runs, so that distributed wrappers and adapters work as always; its output layer is replaced for
the call by one that reads only the positions that predict answers and turns them into log-probabilities chunk by chunk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from mmalign.branches import BranchBatch, BranchLogps, MediaBatch, VisionFeatures
from mmalign.errors import ModelError
from mmalign.models.vlm.kernels import carrying
from mmalign.models.vlm.layout import Layout, block_mask, build, dense_mask, padding_mask
from mmalign.objectives.sequence import chunked_log_probs

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmFamily

H = TypeVar("H", bound=nn.Module)
CHUNK_BYTES = 128 * 2**20
FLEX_BLOCK = 128
MASKABLE = {"full_attention", "sliding_attention"}
"""Kinds of layers whose mixing of tokens a mask fully decides."""
SWITCHING_ROPE = {"dynamic", "longrope"}
"""Position encodings that change with the length of the whole row."""


class AnswerHead(nn.Module):
    """Stands in for the output layer during one call: hidden states ``[B, T, D]`` to log-probabilities ``[Nt]``."""

    def __init__(self, head: nn.Module, layout: Layout, chunk: int, *, mean_logits: bool) -> None:
        super().__init__()
        self.head = head
        self.layout = layout
        self.chunk = chunk
        self.wants_mean = mean_logits
        self.mean: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        picked = hidden[self.layout.rows, self.layout.columns]
        head = self.head
        if type(head) is nn.Linear:
            chunk = self.chunk or max(16, CHUNK_BYTES // (4 * head.out_features))
            if self.wants_mean:
                with torch.no_grad():
                    self.mean = picked.float() @ head.weight.float().mean(0)
                    self.mean = self.mean if head.bias is None else self.mean + head.bias.float().mean()
            return chunked_log_probs(picked, self.layout.target, head.weight, bias=head.bias, chunk=chunk)
        if self.wants_mean:
            with torch.no_grad():
                self.mean = torch.cat([head(rows).float().mean(-1) for rows in picked.split(256)])
        return chunked_log_probs(picked, self.layout.target, head, chunk=self.chunk or 256)


def inner(module: nn.Module) -> Any:
    """The network inside distributed and compiled wrappers."""
    from torch._dynamo import OptimizedModule
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(module, OptimizedModule):
            module = module._orig_mod
        else:
            return module


@contextmanager
def answer_head(network: Any, head: nn.Module) -> Iterator[None]:
    """Put the head in the output layer's place, and the output layer back however the call ends."""
    before = network.lm_head
    network.lm_head = head
    try:
        yield
    finally:
        network.lm_head = before


def log_probs(
    family: VlmFamily, module: nn.Module, batch: BranchBatch, *, prefix: Literal["shared", "plain"],
    vision: VisionFeatures | None, per_token: bool, hide: Tensor | None, mean_logits: bool,
) -> BranchLogps:  # fmt: skip
    """See ``VlmFamily.log_probs``."""
    network = inner(module)

    def make(layout: Layout) -> AnswerHead:
        return AnswerHead(network.lm_head, layout, family.config.chunk, mean_logits=mean_logits)

    layout, head, tokens = run(family, module, batch, prefix=prefix, vision=vision, hide=hide, make=make)
    return _reduce(batch, layout, tokens, head.mean, per_token)


def run(
    family: VlmFamily, module: nn.Module, batch: BranchBatch, *, prefix: Literal["shared", "plain"],
    vision: VisionFeatures | None, hide: Tensor | None, make: Callable[[Layout], H],
) -> tuple[Layout, H, Tensor]:  # fmt: skip
    """One forward pass: the layout, what stood in for the output layer, and what it gave.

    Args:
        make: what takes the output layer's place, from the layout.

    Raises:
        ModelError: `shared` where it would not be exact.
    """
    flex = family.config.attention == "flex"
    layout = build(
        batch, prefix, pack=family.config.row_tokens if prefix == "shared" else 0, hide=hide,
        multiple=FLEX_BLOCK if flex else 1,
    )  # fmt: skip
    if not layout.single:
        _require_sharable(family, layout)
    network = inner(module)
    if vision is None and (batch.media.image or batch.media.video):
        vision = vision_features(family, module, batch.media)
    inputs: dict[str, Any] = {
        "input_ids": layout.input_ids, "position_ids": layout.position_ids, "use_cache": False,
        **attention_inputs(family, layout),
    }  # fmt: skip
    found = {}
    if vision is not None and (layout.images or layout.videos):
        found = encoder_outputs(family, vision, layout.images, layout.videos)
    head = make(layout)
    with answer_head(network, head), family.autocast():
        given: Tensor = module(**inputs, **media_inputs(network, found)).logits
    return layout, head, given


def _reduce(batch: BranchBatch, layout: Layout, tokens: Tensor, mean: Tensor | None, per_token: bool) -> BranchLogps:
    answers = batch.num_answers
    length = batch.lengths.float()
    weighted = tokens if layout.weight is None else tokens * layout.weight
    total = tokens.new_zeros(answers).index_add(0, layout.flat, weighted)
    table = mask = average = None
    if per_token:
        shape = (answers, batch.max_length)
        table = tokens.new_zeros(shape).index_put((layout.flat, layout.offset), tokens)
        mask = torch.arange(shape[1], device=tokens.device)[None] < batch.lengths[:, None]
    if mean is not None:
        average = mean.new_zeros(answers).index_add(0, layout.flat, mean) / length.clamp_min(1)
    return BranchLogps(sum=total, length=length, tokens=table, mask=mask, mean_logits=average)


# Attention


def attention_inputs(family: VlmFamily, layout: Layout) -> dict[str, Any]:
    """The mask arguments of the model's forward."""
    blocks = family.blocks(layout)
    kinds, window = layer_kinds(family)
    slides = "sliding_attention" in kinds and not (window or 0) >= layout.input_ids.shape[1]
    if family.splits and blocks is None and layout.hidden is None and not slides:
        # The same object for every kind of layer: within the window all kinds are one.
        mask = carrying(layout.plan, layout.input_ids.device)
        wants_mapping = _takes_mapping(family) and "sliding_attention" in kinds
        return {"attention_mask": {"full_attention": mask, "sliding_attention": mask} if wants_mapping else mask}
    if layout.single and blocks is None:
        # The library's own causal pass, which counts windows in tokens of the row: the same where a row holds one answer.
        return {"attention_mask": padding_mask(layout)}
    flex = family.config.attention == "flex" and blocks is None

    def made(width: int | None) -> Any:
        if flex:
            return block_mask(layout, window=width)
        # Added to the scores: a mask of bools would be turned into one in every layer, and kept for each backward pass.
        return _additive(dense_mask(layout, window=width, blocks=blocks), family)

    if "sliding_attention" not in kinds:
        return {"attention_mask": made(None)}
    if layout.input_ids.shape[1] <= (window or 0) and blocks is None:
        window = None
    if kinds == {"sliding_attention"} and not _takes_mapping(family):
        return {"attention_mask": made(window)}
    return {"attention_mask": {"full_attention": made(None), "sliding_attention": made(window)}}


def _additive(mask: Tensor, family: VlmFamily) -> Tensor:
    dtype = family.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def layer_kinds(family: VlmFamily) -> tuple[set[str], int | None]:
    """Kinds of the language model's layers, and the window of those that slide."""
    values = family.text_config.to_dict()
    window = values.get("sliding_window")
    kinds = set(values.get("layer_types") or ())
    if not kinds:
        kinds = {"sliding_attention"} if window is not None else {"full_attention"}
    return kinds, window


def _takes_mapping(family: VlmFamily) -> bool:
    """Mistral takes one mask; models with kinds of layers take one per kind."""
    return bool(family.text_config.to_dict().get("layer_types"))


def unsharable(family: VlmFamily) -> str | None:
    """See ``VlmFamily.unsharable``."""
    kinds, _ = layer_kinds(family)
    other = kinds - MASKABLE
    if other:
        return f"its {', '.join(sorted(other))} layers carry a state that no mask can fork at the end of the prompt"
    if family.config.attention == "flash":
        return "flash attention cannot express the mask of branches; use model.attention: sdpa or flex"
    return None


def _require_sharable(family: VlmFamily, layout: Layout) -> None:
    reason = unsharable(family)
    rope = family.text_config.to_dict().get("rope_parameters") or {}
    if reason is None and rope.get("rope_type") in SWITCHING_ROPE:
        limit = rope.get("original_max_position_embeddings") or family.text_config.max_position_embeddings
        if layout.input_ids.shape[1] > limit:
            reason = f"its position encoding switches beyond {limit} tokens of a row"
    if reason is not None:
        raise ModelError(f"method.prefix: shared is not exact for {family.config.path}: {reason}; or use method.prefix: plain")


# Vision


def shares_vision(family: VlmFamily, module: nn.Module) -> bool:
    """See ``VlmFamily.shares_vision``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = family.parts(module)
    for part in (*parts["vision"], *parts["projector"]):
        values = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        if any(value.requires_grad for value in values):
            return False
        if isinstance(part, nn.Module) and any(isinstance(layer, BaseTunerLayer) for layer in part.modules()):
            return False
    return True


def vision_features(family: VlmFamily, module: nn.Module, media: MediaBatch) -> VisionFeatures:
    """See ``VlmFamily.vision_features``."""
    network = inner(module)
    dtype = next(network.parameters()).dtype

    def encoded(kind: str, tensors: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...]]:
        if not tensors:
            return (), ()
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        features, deep = family.encode_units(network.model, kind, cast)
        return tuple(features), tuple(deep)

    frozen = torch.no_grad() if shares_vision(family, module) else nullcontext()
    with frozen, family.autocast():
        image, image_deep = encoded("image", media.image)
        video, video_deep = encoded("video", media.video)
    return VisionFeatures(image=image, video=video, image_deep=image_deep, video_deep=video_deep)


def media_inputs(network: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The argument by which a network's forward takes features in place of pixels.

    Raises:
        ModelError: the installed transformers has no such argument, and would leave the media out in silence.
    """
    if not found:
        return {}
    if "mm_encoder_outputs" not in inspect.signature(type(network).forward).parameters:
        import transformers

        raise ModelError(
            f"{type(network).__name__} of transformers {transformers.__version__} takes no ready features of pictures and "
            "clips; pip install 'transformers>=5.18'"
        )
    return {"mm_encoder_outputs": dict(found)}


def encoder_outputs(
    family: VlmFamily, vision: VisionFeatures, images: Sequence[int], videos: Sequence[int]
) -> dict[str, Any]:
    """Features in the order of the placeholders of a pass, as the model's forward takes them."""
    out = {}
    for kind, numbers, features, deep in (
        ("image", images, vision.image, vision.image_deep),
        ("video", videos, vision.video, vision.video_deep),
    ):
        if numbers:
            out[kind] = family.pooled(kind, [features[n] for n in numbers], [deep[n] for n in numbers] if deep else [])
    return out
