"""What a fit of PAL is told. Reading it loads nothing heavy."""

from __future__ import annotations

from typing import Any, Literal

from mmalign.config import Section


class HeadConfig(Section):
    """Which head, and how large."""

    variant: Literal["a", "b"] = "b"
    """a: ideal points shared by all prompts; b: ideal points that follow the prompt."""
    prototypes: int = 4
    """Shared ideal points K. More than there are tastes does no harm; 1 is a single Bradley-Terry head for everybody."""
    hidden: int | None = None
    """Width inside the residual maps; default: the encoder's width. 0: no maps, mixtures in the encoder's own space."""
    input: Literal["image", "both"] = "image"
    """Variant a only: both puts the prompt's embedding beside the picture's."""
    mixing: Literal["f(Pw)", "f(P)w", "Pw"] = "f(Pw)"
    """Variant a only: in which order prototypes are mapped and mixed."""
    scale: float | None = None
    """Where the learned scale starts; default: the encoder's own for b, 1/0.07 for a. The paper's a has 1."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.prototypes < 1 or (self.hidden or 0) < 0:
            raise ValueError("head: prototypes must be at least 1 and hidden at least 0")
        if self.variant == "b" and (self.input, self.mixing) != ("image", "f(Pw)"):
            raise ValueError("head: input and mixing belong to variant a; b reads the prompt in its prototypes")
        if self.scale is not None and not 0 < self.scale <= 100:
            raise ValueError(f"head: scale must be in (0, 100], got {self.scale}")


class PalOptimConfig(Section):
    """How it is fitted."""

    loss: Literal["hinge", "logistic"] | None = None
    """Default: hinge for variant a, logistic for b, as in the paper."""
    lr: float = 0.01
    """Of the maps and points. Maps are scaled so that this is relative to the length of an embedding, at any width."""
    user_lr: float = 0.05
    """Of the users' logits. The released code has 5e-3 for one pass over far more pairs."""
    weight_decay: float = 0.01
    batch_size: int = 256
    epochs: int = 60
    """At most; see patience."""
    patience: int = 8
    """Epochs without a lower validation loss before it stops; the best epoch is kept."""
    user_prior: float = 2.0
    """Pull of a user's logits to the mean of all: half of this times their squared distance, in pairs. Keeps the weights of users
    with few pairs near everybody's."""
    noise: float = 0.5
    """Deviation of the first logits. Zero would leave all prototypes with one gradient."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if min(self.batch_size, self.epochs, self.patience) < 1:
            raise ValueError("optim: batch_size, epochs and patience must be at least 1")
        if min(self.lr, self.user_lr) <= 0 or min(self.weight_decay, self.user_prior, self.noise) < 0:
            raise ValueError("optim: lr and user_lr must be above 0, weight_decay, user_prior and noise at least 0")


class PalConfig(Section):
    """A fit of PAL from a table of pairs with user names."""

    encoder: str = "pickscore"
    """A reward that compares a picture's vector with a prompt's: pickscore, clipscore, hpsv2.1, tiny-clip, ..."""
    encoder_path: str | None = None
    """Local weights of the encoder."""
    pairs: str
    """Table of pairs with the column user, or the folder of votes that mmalign arena writes."""
    out: str
    """Folder of the head to write."""
    head: HeadConfig = HeadConfig()
    optim: PalOptimConfig = PalOptimConfig()
    validation: float = 0.15
    """Share of the prompts (of the pairs, where there are fewer than 20 prompts) that only decides when to stop."""
    compare: bool = True
    """Fit the head with one prototype as well, and state both accuracies."""
    hash_users: bool = True
    """Keep hashes of the users' names in the folder instead of the names."""
    seed: int = 0
    device: str | None = None
    """Default: CUDA where there is one."""
    dtype: str | None = None
    """Precision of the encoder: fp32, bf16, fp16."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if not 0 < self.validation < 0.9:
            raise ValueError(f"validation: a share in (0, 0.9), got {self.validation}")
