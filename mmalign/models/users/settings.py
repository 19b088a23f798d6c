"""Settings of the users that a personalised method trains for."""

from __future__ import annotations

from typing import Any, Literal

from mmalign.config import Section


class UsersConfig(Section):
    """Where the embedding of a user comes from."""

    source: Literal["encoded", "table", "prototypes"] = "encoded"
    """encoded: a frozen network reads some of a user's pairs, so that new users need no training; table: a free embedding per
    user, learned with the model; prototypes: per user a mixture of a few learned embeddings. New users of the last two are
    fitted to their pairs with everything else frozen."""
    encoder: Literal["clip", "vlm", "vlm_difference"] = "clip"
    """clip: features of the chosen picture minus those of the rejected one, by a CLIP; vlm: one prompt with all the pairs, read
    by a vision-language model, which describes the user (arXiv:2501.06655); vlm_difference: its hidden states on the chosen
    picture minus those on the rejected one."""
    path: str | None = None
    """Of the encoder: a local folder in the transformers layout, or a hub id."""
    shots: int = 4
    """Pairs that an embedding is made from while training; a pair is never among those of its own embedding."""
    groups: int = 20
    """With `encoder: vlm`: most embeddings of a user, from disjoint groups of `shots` pairs."""
    new_tokens: int = 1024
    """With `encoder: vlm`: most tokens of the description whose last token is the embedding."""
    instructions: str = (
        "One person preferred one picture of each of these pairs. Describe both pictures of each pair, say how they differ in "
        "style, quality and aesthetics, and end with a profile of this person's taste."
    )
    """With `encoder: vlm`: what the model is told to do behind the pairs."""
    rows: int = 4
    """With `table` and `prototypes`: tokens of a user."""
    dim: int = 64
    """With `table` and `prototypes`: width of an embedding."""
    prototypes: int = 8
    sampling: Literal["pairs", "uniform", "sqrt"] = "pairs"
    """How often a user is met: by the number of their pairs, all alike, or by its square root."""

    def model_post_init(self, context: Any) -> None:
        """Refuse what cannot work."""
        if self.source == "encoded" and not self.path:
            raise ValueError("path: the encoder's folder or hub id is needed with source 'encoded'")
        for name in ("shots", "groups", "rows", "dim", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.source == "prototypes" and self.prototypes < 2:
            raise ValueError(f"prototypes must be at least 2, got {self.prototypes}: one is no mixture")
