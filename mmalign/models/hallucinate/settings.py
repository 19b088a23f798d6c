"""How answers are made up; read by the sampler of tables and by the trainer that samples as it goes."""

from __future__ import annotations

from typing import Any, Literal

from mmalign.config import Section

VISIBLE = 29
"""Image tokens that stay visible where nothing is said: one in a hundred of the 2,880 that LLaVA-1.6 has, as in the paper."""


class BdhsSettings(Section):
    """Settings of bias-driven hallucination sampling (arXiv:2407.02477 section 3.4)."""

    rho: float | None = None
    """Share of the image tokens that are hidden, in [0, 1]; the paper's final value is 0.99."""
    visible_tokens: int | None = None
    """Instead of `rho`: how many image tokens stay visible; default 29, which is 0.99 of the paper's model."""
    strategy: Literal["random", "exact", "run"] = "random"
    """random: every token by itself; exact: this share of them; run: this share as one stretch."""
    rounds: int = 5
    """Most tries; the last of several makes a whole answer without the reference's beginning of each sentence."""
    max_similarity: float = 0.97
    """An answer this alike to the reference, or more, is tried again."""
    keep_similar: bool = False
    """Use what is still as alike after the last round; otherwise such a row gives nothing. Equal answers never are used."""
    encoder: str | None = None
    """Folder of a sentence-transformers model that compares answers; none: counts of words (see docs/bdhs.md)."""
    guided: bool = True
    """Keep the beginning of each sentence of the reference; false makes whole answers in every round."""
    noise_steps: int = 0
    """Diffusion noise on the pictures besides, in steps of 0 to 999 (500 in the paper's comparison)."""
    sentence_tokens: int = 64
    """Most new tokens of a sentence."""
    swap_yes_no: float = 0.5
    """Probability that a sentence's leading yes becomes no, or the reverse."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.rho is not None and self.visible_tokens is not None:
            raise ValueError("set rho or visible_tokens, not both")
        if self.rho is not None and not 0 <= self.rho <= 1:
            raise ValueError(f"rho must be in [0, 1], got {self.rho}")
        if self.visible_tokens is not None and self.visible_tokens < 0:
            raise ValueError(f"visible_tokens must not be negative, got {self.visible_tokens}")
        if self.rounds < 1 or self.sentence_tokens < 1:
            raise ValueError("rounds and sentence_tokens must be at least 1")
        if not -1 <= self.max_similarity <= 1.01 or not 0 <= self.swap_yes_no <= 1:
            raise ValueError("max_similarity must be in [-1, 1] (or a little above, to try once), swap_yes_no in [0, 1]")
        if not 0 <= self.noise_steps <= 999:
            raise ValueError(f"noise_steps must be in 0 to 999, got {self.noise_steps}")

    def share(self, tokens: int) -> float:
        """Share of `tokens` image tokens to hide."""
        if self.rho is not None:
            return self.rho
        visible = VISIBLE if self.visible_tokens is None else self.visible_tokens
        return max(0.0, 1 - visible / tokens) if tokens else 0.0
