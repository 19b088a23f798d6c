"""One name per tensor, whatever wraps the module: distributed wrappers, compilers and peft add parts to names."""

from __future__ import annotations

import re

from torch import Tensor, nn

from mmalign.errors import ModelError

_PREFIXES = re.compile(
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|base_model\.model\.)+"
)
_INSIDE = re.compile(
    r"\.(?:base_layer|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|original_module)(?=\.)"
)
_ADDED = re.compile(
    r"(?:^|\.)(?:lora_|hada_|lokr_|ia3_|oft_|boft_|vera_|vblora_|trainable_tokens_|modules_to_save\.|user_adapter\.)"
)


def canonical(name: str) -> str:
    """The published name of a tensor: ``module.unet.to_q.base_layer.weight`` is ``unet.to_q.weight``."""
    return _INSIDE.sub("", _PREFIXES.sub("", name))


def is_added(name: str) -> bool:
    """Whether a tensor belongs to an adapter and not to the published network."""
    return _ADDED.search(name) is not None


def published(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the published network by their own names; those of adapters are left out.

    Raises:
        ModelError: two parameters have the same published name.
    """
    found: dict[str, nn.Parameter] = {}
    for name, value in module.named_parameters():
        if is_added(name):
            continue
        own = canonical(name)
        if own in found:
            raise ModelError(
                f"two tensors of {type(module).__name__} are named '{own}'; guard the network itself, unwrapped"
            )
        found[own] = value
    return found


def published_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for a state dictionary."""
    return {canonical(name): value for name, value in state.items() if not is_added(name)}


_KINDS = (
    ("self-attention", re.compile(r"\.attn1\.|\.attn\.(?:to_|add_)|\.to_[qkv]\.|\.to_out\.")),
    ("cross-attention", re.compile(r"\.attn2\.|\.add_[qkv]_proj|\.to_add_out")),
    ("feed-forward", re.compile(r"\.ff(?:_context)?\.|\.mlp\.")),
    ("projection", re.compile(r"\.proj_(?:in|out)\.|^proj_out\.")),
    ("time", re.compile(r"time_emb|^add_embedding\.|time_text_embed|\.time_emb_proj")),
    ("shortcut", re.compile(r"\.conv_shortcut\.")),
    ("convolution", re.compile(r"(?:^|\.)conv\w*\.|pos_embed\.proj")),
    ("embedding", re.compile(r"embed")),
)
_BLOCK = re.compile(r"^((?:down|up)_blocks\.\d+|mid_block|transformer_blocks\.\d+|single_transformer_blocks\.\d+)\.")


def kind(name: str, ndim: int) -> str:
    """What a tensor does, for plots and for the attention-only baseline: 'norm and bias' for vectors, else its layer."""
    if ndim < 2:
        return "norm and bias"
    if ".attn2." in name:
        return "cross-attention"
    return next((label for label, pattern in _KINDS if pattern.search(f".{name}" if name[0] != "." else name)), "other")


def block(name: str) -> str:
    """Where a tensor lies: 'down 0', 'mid', 'up 1', 'block 7', 'in' or 'out'."""
    found = _BLOCK.match(name)
    if found is None:
        return "out" if name.startswith(("conv_norm_out", "conv_out", "norm_out", "proj_out")) else "in"
    head, _, number = found[1].partition(".")
    word = {"down_blocks": "down", "up_blocks": "up", "mid_block": "mid"}.get(head, "block")
    return f"{word} {number}".strip()


def block_order(label: str) -> tuple[int, int]:
    """Sort key: the order in which data passes, in which the middle lies before the way up."""
    word, _, number = label.partition(" ")
    place = {"in": 0, "down": 1, "mid": 2, "block": 2, "up": 3, "out": 4}[word]
    return place, int(number or 0)
