"""The file that says which answers to make: the sampler's own section, and what all samplers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mmalign.config import Section, Variants, decode, load_yaml
from mmalign.config.files import Resolved
from mmalign.models.vlm import VLM_FAMILIES
from mmalign.models.vlm.vllm_engine import VllmOptions
from mmalign.sampling import ANSWER_SAMPLERS


class SamplingConfig(Section):
    """Which answers to make."""

    sampler: Annotated[Section, Variants(ANSWER_SAMPLERS, "sampler")]
    """How; a name alone stands for that sampler with its defaults."""
    model: Annotated[Section, Variants(VLM_FAMILIES, "model")]
    """Who answers."""
    manifest: str
    """Table of questions, or of answers to them (see docs/methods_on_answers.md)."""
    max_rows: int | None = None
    """Use the first rows alone."""
    seed: int = 0
    out: str
    """Folder of the new table."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Share of the probability that is sampled from, most likely tokens first."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    batch_size: int = 16
    """Answers made at a time; no answer depends on it but through rounding."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the answer so far become less likely."""
    generator: Literal["transformers", "vllm"] = "transformers"
    """Who runs the model: transformers, or vLLM (extra `vllm`; samplers `candidates` and `temple`), whose answers depend on its
    kernels and batches."""
    vllm: VllmOptions = Field(default_factory=lambda: VllmOptions(gpu_memory_utilization=0.9))
    """What vLLM may use, where it generates."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rows_per_part: int = 64
    """What an interruption can cost at most."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must not be negative, and top_p in (0, 1]")
        if min(self.max_new_tokens, self.batch_size, self.rows_per_part) < 1:
            raise ValueError("max_new_tokens, batch_size and rows_per_part must be at least 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {self.max_rows}")


def load_sampling(path: str | Path, overrides: Sequence[str] = ()) -> SamplingConfig:
    """Read and check a file of settings.

    Raises:
        ConfigError: all problems in one error.
    """
    return decode(SamplingConfig, _with_named_sampler(load_yaml(path, list(overrides))), str(path))


def asks_for_answers(path: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a file for ``mmalign generate`` is about answers rather than pictures: it has a key ``sampler``.

    Raises:
        ConfigError: the file cannot be read.
    """
    return "sampler" in load_yaml(path, list(overrides)).values


def _with_named_sampler(resolved: Resolved) -> Resolved:
    """``sampler: bdhs`` as ``sampler: {name: bdhs}``, in every file and in the overrides."""

    def opened(values: Mapping[str, Any]) -> dict[str, Any]:
        named = values.get("sampler")
        return {**values, "sampler": {"name": named}} if isinstance(named, str) else dict(values)

    layers = tuple(replace(layer, values=opened(layer.values)) for layer in resolved.layers)
    return replace(resolved, values=opened(resolved.values), layers=layers)
