"""How alike two answers are, to tell a made-up answer from one that says the same in other words.

With a folder of sentence-transformers it is the cosine of sentence embeddings, read by transformers alone; without one, the
cosine of the counts of words and of pairs of neighbouring words. The embedded measure sees words, not meaning: a paraphrase
looks unlike, and one changed word in thirty looks alike. It needs no download, and is right where answers are made from
templates.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from mmalign.errors import ModelError

_WORD: Final = re.compile(r"\w+")
POOLINGS: Final = ("cls", "mean", "max", "mean_sqrt_len", "lasttoken")


class Similarity(Protocol):
    """Compares answers pair by pair."""

    name: str

    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Cosine of each pair, in [-1, 1]."""


class WordSimilarity:
    """The embedded measure: cosine of counts of words and of neighbouring pairs, case aside."""

    name = "words"

    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        return [_cosine(_counts(one), _counts(other)) for one, other in zip(first, second, strict=True)]


def _counts(text: str) -> Counter[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return Counter([*((word,) for word in words), *pairwise(words)])


def _cosine(one: Counter[tuple[str, ...]], other: Counter[tuple[str, ...]]) -> float:
    norm = math.sqrt(sum(v * v for v in one.values()) * sum(v * v for v in other.values()))
    return sum(value * other[key] for key, value in one.items()) / norm if norm else float(one == other)


class SentenceEncoder:
    """Sentence embeddings from a folder of sentence-transformers (or of a plain encoder, whose tokens are averaged).

    Args:
        path: local folder or hub id, with safetensors.
        device: where it runs.

    Raises:
        ModelError: it cannot be loaded, or has modules beyond transformer, pooling and normalisation.
    """

    def __init__(self, path: str, *, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name, self.device, self.batch_size = f"encoder:{Path(path).name}", device, batch_size
        self.pooling, folder = _pooling(path)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{path}: no sentence encoder can be loaded: {error}") from error
        self.length = _length(Path(path), self.tokenizer)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``[n, D]``, float32 on the CPU."""
        made = []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                list(texts[start : start + self.batch_size]), padding=True, truncation=True, max_length=self.length,
                return_tensors="pt",
            ).to(self.device)  # fmt: skip
            hidden = self.model(**inputs).last_hidden_state
            pooled = _pool(hidden, inputs["attention_mask"], self.pooling)
            made.append(torch.nn.functional.normalize(pooled.float(), dim=-1).cpu())
        return torch.cat(made) if made else torch.zeros(0, 1)

    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        both = self.embed([*first, *second])
        return [float(value) for value in (both[: len(first)] * both[len(first) :]).sum(-1)]


def load_similarity(encoder: str | None, device: torch.device | str = "cpu") -> Similarity:
    """The encoder at that path; None: the embedded measure."""
    return WordSimilarity() if encoder is None else SentenceEncoder(encoder, device=device)


def _pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """[B, D] from states ``[B, T, D]`` and mask ``[B, T]``."""
    seen = mask[..., None].to(hidden.dtype)
    if how == "cls":
        return hidden[torch.arange(len(hidden)), mask.argmax(1)]
    if how == "lasttoken":
        return hidden[torch.arange(len(hidden)), hidden.shape[1] - 1 - mask.flip(1).argmax(1)]
    if how == "max":
        return hidden.masked_fill(seen == 0, -torch.inf).amax(1)
    count = seen.sum(1).clamp_min(1)
    return (hidden * seen).sum(1) / (count.sqrt() if how == "mean_sqrt_len" else count)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _pooling(path: str) -> tuple[str, str]:
    """How tokens become a sentence, and where transformer and tokenizer lie."""
    folder = Path(path)
    if not (folder / "modules.json").exists():
        return "mean", path
    pooling, transformer = "mean", folder
    for module in _read(folder / "modules.json"):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Transformer":
            transformer = folder / str(module.get("path", ""))
        elif kind == "Pooling":
            settings = _read(folder / str(module.get("path", "")) / "config.json")
            named = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
            modes = [name.removeprefix("pooling_mode_").removesuffix("s").removesuffix("_token") for name in named]
            modes = modes or [str(settings.get("pooling_mode", "mean"))]
            if len(modes) != 1 or modes[0] not in POOLINGS:
                raise ModelError(f"{path}: pooling {modes} is not known (one of {', '.join(POOLINGS)})")
            pooling = modes[0]
        elif kind != "Normalize":
            raise ModelError(f"{path}: holds a module '{kind}'; encoders of transformer, pooling and normalisation are read")
    return pooling, str(transformer)


def _length(folder: Path, tokenizer: Any) -> int:
    settings = folder / "sentence_bert_config.json"
    found = _read(settings).get("max_seq_length") if settings.exists() else None
    return int(found or min(tokenizer.model_max_length, 512))
