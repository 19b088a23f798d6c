"""What identifies a tokenizer: all that decides which tokens a text becomes. For cache fingerprints."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of vocabulary, merges, normaliser, special tokens, length and padding side, in hexadecimal.

    Two vocabularies alone may agree where texts are split otherwise (other merges, lower case), so the whole of a fast
    tokenizer counts, but for the padding and truncation of the call before.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules: Any = json.loads(backend.to_str())
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    else:
        ranks = getattr(tokenizer, "bpe_ranks", None) or {}
        merges = [list(pair) if isinstance(pair, tuple) else pair for pair in sorted(ranks, key=ranks.__getitem__)]
        settings = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int)}
        rules = {"merges": merges, "settings": settings}
    content = {
        "class": type(tokenizer).__name__.removesuffix("Fast"), "rules": rules,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())},
        "length": tokenizer.model_max_length, "side": tokenizer.padding_side,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()
