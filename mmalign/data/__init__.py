"""Preference data and its way to the accelerator: tables, imports, checks, order, caches, loaders.

The names below are resolved when first used, so that listing formats or building a command line loads neither torch nor
Arrow.
"""

from __future__ import annotations

import importlib
from typing import Any

from mmalign.data.formats import FORMATS

_LAZY = {
    "open_table": "mmalign.data.tables",
    "PairTable": "mmalign.data.tables",
    "open_ranked": "mmalign.data.ranked",
    "open_vlm": "mmalign.data.vlm",
    "VlmTable": "mmalign.data.vlm",
    "is_vlm": "mmalign.data.vlm",
    "RankedTable": "mmalign.data.ranked",
    "make_pairs": "mmalign.data.ranked",
    "import_table": "mmalign.data.importing",
    "ImportReport": "mmalign.data.importing",
    "export_table": "mmalign.data.exporting",
    "ExportReport": "mmalign.data.exporting",
    "TableWriter": "mmalign.data.writer",
    "CheckPolicy": "mmalign.data.check",
    "CheckResult": "mmalign.data.check",
    "check_table": "mmalign.data.check",
    "usable_rows": "mmalign.data.check",
    "MediaIndex": "mmalign.data.mediaindex",
    "index_media": "mmalign.data.mediaindex",
    "Problem": "mmalign.data.reasons",
    "reasons_table": "mmalign.data.reasons",
    "Order": "mmalign.data.order",
    "PairLoader": "mmalign.data.pair_loader",
    "MaskedRow": "mmalign.data.pair_loader",
    "Cache": "mmalign.data.cache",
    "CacheWarning": "mmalign.data.cache",
    "FillReport": "mmalign.data.cache",
    "FillOutcome": "mmalign.data.fill",
    "fill_latents": "mmalign.data.fill",
    "fill_text": "mmalign.data.fill",
    "geometry_fields": "mmalign.data.fill",
    "fill_references": "mmalign.data.references",
    "FrameCache": "mmalign.data.frames",
    "Pairs": "mmalign.data.opened",
    "open": "mmalign.data.opened:open_pairs",
    "loader": "mmalign.experiment.batches",
}
__all__ = ["FORMATS", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mmalign.data' has no attribute {name!r}")
    module, _, other = _LAZY[name].partition(":")
    return getattr(importlib.import_module(module), other or name)


def __dir__() -> list[str]:
    return sorted(__all__)
