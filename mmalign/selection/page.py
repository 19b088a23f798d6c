"""Kept and refused films as one HTML page that needs no other file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mmalign.data.files import write_text
from mmalign.selection.rules import REASONS
from mmalign.selection.settings import SelectionConfig

if TYPE_CHECKING:
    from mmalign.selection.run import Verdict

SHOWN: Final = 40
"""Films of a kind on the page; the files list all."""
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1c1f23; background:
#fff } h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } table { border-collapse: collapse } td, th {
padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top } td.n, th.n { text-align: right; font-variant-numeric:
tabular-nums } .muted { color: #5b6470 } .film { border-top: 1px solid #d8dce1; padding: .7rem 0 } .film p { margin: .1rem 0;
overflow-wrap: anywhere } .strip { display: flex; flex-wrap: wrap; gap: .4rem } figure { margin: 0; font-size: .75rem; color:
#5b6470 } figure img { display: block; max-width: 120px; max-height: 120px; background: #f1f3f5 }
"""


def write_page(path: Path, config: SelectionConfig, verdicts: Sequence[Verdict]) -> None:
    """Write the page."""
    kept = [verdict for verdict in verdicts if verdict.reason is None]
    refused = Counter(verdict.reason for verdict in verdicts if verdict.reason is not None)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Films selected</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{_STYLE}</style></head><body>",
        f"<h1>{len(kept)} of {len(verdicts)} films kept</h1><p class='muted'>{escape(config.films)}</p>",
        *_table("Refused", [(name, str(count), REASONS.get(name, "cannot be read")) for name, count in refused.most_common()]),
        *_table("Thresholds", [(name, str(value), "") for name, value in _thresholds(config)]),
        f"<h2>Kept <span class='muted'>({len(kept)}{_some(len(kept))})</span></h2>",
        *(_film(verdict) for verdict in kept[:SHOWN]),
    ]
    for reason, number in refused.most_common():
        parts.append(f"<h2>{escape(reason)} <span class='muted'>({number}{_some(number)})</span></h2>")
        parts += [_film(verdict) for verdict in verdicts if verdict.reason == reason][:SHOWN]
    write_text(path, "\n".join([*parts, "</body></html>\n"]))


def _some(number: int) -> str:
    return f", {SHOWN} of them shown" if number > SHOWN else ""


def _thresholds(config: SelectionConfig) -> list[tuple[str, object]]:
    shots = {f"shots.{name}": value for name, value in config.shots.model_dump().items()}
    rules = {f"rules.{name}": value for name, value in config.rules.model_dump().items()}
    return [("features", config.features), *shots.items(), *rules.items()]


def _table(title: str, rows: Sequence[tuple[str, str, str]]) -> list[str]:
    if not rows:
        return []
    cells = [f"<tr><td>{escape(a)}</td><td class='n'>{escape(b)}</td><td class='muted'>{escape(c)}</td></tr>" for a, b, c in rows]
    return [f"<h2>{title}</h2><table>", *cells, "</table>"]


def _film(verdict: Verdict) -> str:
    notes = [f"{clip.start:.1f}-{clip.end:.1f} s, group {clip.group}" for clip in verdict.clips] or [""] * len(verdict.thumbs)
    strip = "".join(
        f"<figure><img alt='' src='data:image/jpeg;base64,{picture}'>{escape(note)}</figure>"
        for picture, note in zip(verdict.thumbs, notes, strict=True)
    )
    about = escape(verdict.detail) if verdict.reason else f"{len(verdict.clips)} clips"
    title = f"<p>{escape(verdict.id)} <span class='muted'>{about}</span></p>"
    return f"<div class='film'>{title}<div class='strip'>{strip}</div></div>"
