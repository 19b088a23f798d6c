"""Where the frozen tensors of a mask lie: shares by block and by kind of layer, as stand-alone SVG."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from mmalign.freezing.mask import FreezeMask
from mmalign.freezing.names import block, block_order, kind

_WIDTH, _LEFT, _BAR, _ROW = 700, 150, 330, 34
_TONES = {"tensors": "#4878a8", "parameters": "#c2703d"}


def shares(mask: FreezeMask, group: Callable[[str], str]) -> dict[str, dict[str, float]]:
    """Per group of tensors: how many there are, and the frozen share of tensors and of parameters."""
    found: dict[str, dict[str, float]] = {}
    for name, entry in mask.tensors.items():
        row = found.setdefault(group(name), {"count": 0, "size": 0, "tensors": 0, "parameters": 0})
        row["count"] += 1
        row["size"] += entry.parameters
        row["tensors"] += entry.frozen
        row["parameters"] += entry.frozen * entry.parameters
    return {
        label: {
            "count": row["count"], "size": row["size"], "tensors": row["tensors"] / row["count"],
            "parameters": row["parameters"] / max(1, row["size"]),
        }
        for label, row in found.items()
    }  # fmt: skip


def by_block(mask: FreezeMask) -> dict[str, dict[str, float]]:
    """`shares` by block, in the order in which data passes."""
    found = shares(mask, block)
    return {label: found[label] for label in sorted(found, key=block_order)}


def by_kind(mask: FreezeMask) -> dict[str, dict[str, float]]:
    """`shares` by kind of layer, the largest first."""
    found = shares(mask, lambda name: kind(name, len(mask.tensors[name].shape)))
    return {label: found[label] for label in sorted(found, key=lambda label: -found[label]["size"])}


def mask_figures(mask: FreezeMask) -> dict[str, str]:
    """``mask_by_block`` and ``mask_by_kind`` as SVG documents."""
    return {
        "mask_by_block": bars(by_block(mask), f"Frozen by block: {mask}"),
        "mask_by_kind": bars(by_kind(mask), f"Frozen by kind of layer: {mask}"),
    }


def bars(rows: dict[str, dict[str, float]], title: str) -> str:
    """Two bars a row: the frozen share of its tensors and of its parameters."""
    height = 70 + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="white"/><text x="12" y="20" font-size="13">{escape(title)}</text>'
    ]
    for index, (word, tone) in enumerate(_TONES.items()):
        parts.append(f'<rect x="{_LEFT + 110 * index}" y="32" width="10" height="10" fill="{tone}"/>')
        parts.append(f'<text x="{_LEFT + 110 * index + 15}" y="41">{word}</text>')
    for index, (label, row) in enumerate(rows.items()):
        top = 54 + _ROW * index
        parts.append(f'<text x="{_LEFT - 8}" y="{top + 16}" text-anchor="end">{escape(label)}</text>')
        for place, (word, tone) in enumerate(_TONES.items()):
            y = top + 3 + 12 * place
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{_BAR}" height="10" fill="#eee"/>')
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{_BAR * row[word]:.1f}" height="10" fill="{tone}"/>')
        words = f"{100 * row['tensors']:.0f} % of {row['count']:.0f}; {100 * row['parameters']:.0f} % of {_short(row['size'])}"
        parts.append(f'<text x="{_LEFT + _BAR + 8}" y="{top + 16}" fill="#555">{words}</text>')
    return "".join([*parts, "</svg>\n"])


def _short(number: float) -> str:
    for limit, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{word}"
    return f"{number:.0f}"
