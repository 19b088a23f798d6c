"""The added attention of a user in one attention layer of a denoiser: same query, same output projection, a softmax of its own.

    Z = [softmax(Q K^T / sqrt(d)) V  +  sum_s w_s softmax(Q K_s'^T / sqrt(d)) V_s'] W_o       K_s' = U_s W_k',  V_s' = U_s W_v'

with one set of user tokens U_s per user of a mixture, weighted by w_s (arXiv:2501.06655, decoupled cross-attention as in
arXiv:2308.06721). Appending the tokens to the text's would be another model: they would compete for one unit of attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class UserTokens:
    """What the added attention reads. Row i belongs to sample i."""

    tokens: Tensor  # [B, S, n, D]: S sets (users of a mixture) of n tokens
    weights: Tensor  # [B, S]; 0 adds nothing

    def __len__(self) -> int:
        return len(self.tokens)


class UserLayer(nn.Module):
    """Keys and values of the user tokens for one attention layer.

    The value projection starts at zero, so that the policy is its reference before the first step. Copies of the text's
    projections, as usual for picture prompts, would start it elsewhere.

    Args:
        width: of the tokens.
        inner: heads x size of a head of the layer.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.to_k_user = nn.Linear(width, inner, bias=False)
        self.to_v_user = nn.Linear(width, inner, bias=False)

    def forward(self, query: Tensor, user: UserTokens, heads: int, norm: nn.Module | None) -> Tensor:
        """What is added before the output projection.

        Args:
            query: the layer's own. ``[B, L, inner]``
            norm: the layer's norm of its queries' heads, or None.

        Raises:
            ModelError: not one row of user tokens per sample.
        """
        if len(user) != len(query):
            raise ModelError(
                f"{len(user)} rows of user tokens for {len(query)} samples: every sample needs its own user; call the pipeline "
                f"through mmalign.personalize, which repeats and orders them"
            )
        q = _heads(query, heads)
        q = q if norm is None else norm(q)
        total: Tensor | None = None
        for one in range(user.tokens.shape[1]):
            tokens = user.tokens[:, one].to(self.to_k_user.weight.dtype)
            keys, values = _heads(self.to_k_user(tokens), heads), _heads(self.to_v_user(tokens), heads)
            found = torch.nn.functional.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype))
            found = found * user.weights[:, one].to(q.dtype)[:, None, None, None]
            total = found if total is None else total + found
        assert total is not None
        return total.transpose(1, 2).flatten(2)


def _heads(value: Tensor, heads: int) -> Tensor:
    """``[B, L, heads * d]`` to ``[B, heads, L, d]``."""
    return value.unflatten(2, (heads, -1)).transpose(1, 2)


class UserProcessor:
    """A layer's own attention processor with the user's attention added before the output projection.

    The inner processor does what it did, with any kernel: it is handed the layer behind a stand-in that notes the query and
    adds to what reaches the output projection. Without user tokens it is called as before, on the layer itself.

    Args:
        inner: the processor that the layer had.
        layer: the user's projections for this layer.
        context: where tokens come from that the network does not hand down (``UserAdapter``).
    """

    def __init__(self, inner: Any, layer: UserLayer, context: Any) -> None:
        self.inner, self.layer, self.context = inner, layer, context

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, ip_hidden_states: UserTokens | None = None,
    ) -> Any:  # fmt: skip
        """`ip_hidden_states` is the name under which diffusers hands such tokens down to its attention layers."""
        user = self.context.held if ip_hidden_states is None else ip_hidden_states
        given = {} if temb is None else {"temb": temb}
        words = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask, **given}
        if user is None:
            return self.inner(attn, hidden_states, **words)
        return self.inner(_WithUser(attn, self.layer, user), hidden_states, **words)


class _WithUser:
    """Stands for an attention layer during one call of its processor."""

    def __init__(self, attn: Any, layer: UserLayer, user: UserTokens) -> None:
        self._attn, self._layer, self._user = attn, layer, user
        self._query: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_q(self, hidden: Tensor) -> Tensor:
        """The layer's own query, noted."""
        self._query = self._attn.to_q(hidden)
        return self._query

    @property
    def to_out(self) -> list[Any]:
        """The layer's own output, its projection after the addition."""
        return [self._project, *self._attn.to_out[1:]]

    def _project(self, hidden: Tensor) -> Tensor:
        if self._query is None:
            raise ModelError("this attention processor computes its query in a way that user attention cannot follow; "
                             "undo fuse_qkv_projections or choose model.attention: sdpa")  # fmt: skip
        added = self._layer(self._query, self._user, self._attn.heads, self._attn.norm_q)
        return self._attn.to_out[0](hidden + added.to(hidden.dtype))  # type: ignore[no-any-return]
