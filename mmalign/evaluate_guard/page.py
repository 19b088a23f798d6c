"""``guard.html`` and the table on the terminal: what each mask prevented, what it cost, and pictures of both domains."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from mmalign.evaluate_guard.settings import GuardEvaluation
from mmalign.freezing import FreezeMask
from mmalign.report.grids import grid
from mmalign.report.masks import mask_figures
from mmalign.report.page import TEMPLATES
from mmalign.report.svg import Row, forest

Figures = Mapping[str, Mapping[str, Any]]
_HONEST = (
    "A mask is a property of the process that trains. Whoever trains with a script of their own, attaches adapters to frozen "
    "layers, trains the text encoder or simply trains for longer is not bound by it; verification tells afterwards whether "
    "frozen tensors of a checkpoint were changed. These figures are about a user who keeps to the mask."
)
_WORDS = {
    "illegal": ("Illegal domain", "what fine-tuning should do badly here"),
    "innocent": ("Innocent domain", "what fine-tuning should still do well"),
}


def interval_text(value: Mapping[str, Any], digits: int = 3) -> str:
    """``0.291 [0.257, 0.327]``."""
    if value["mean"] is None:
        return "–"
    shown = f"{value['mean']:.{digits}f}"
    if value["low"] is None:
        return shown
    return f"{shown} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _rows(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the main table."""
    head = ["arm", "tensors frozen", "parameters frozen", "loss, illegal", "loss, innocent", "block", "harm", "selectivity"]
    rows = []
    for name, row in figures.items():
        ratio = row.get("ratio")
        shares = [f"{100 * ratio[key]:.1f} %" if ratio else "–" for key in ("tensors", "parameters")]
        losses = [f"{row['loss'][role]['mean']:.4f}" for role in ("illegal", "innocent")]
        effects = [interval_text(row[key]) if key in row else "–" for key in ("block", "harm", "selectivity")]
        rows.append([name, *shares, *losses, *effects])
    return head, rows


def _quality_rows(figures: Figures, role: str) -> tuple[list[str], list[list[str]]]:
    first = next(iter(figures.values()))["quality"][role]
    keys = [key for key in ("judge", "clip", "topiq") if key in first]
    names = {"judge": "judge of the world (0-1)", "clip": "CLIP score", "topiq": "TOPIQ"}
    head = ["arm", "feature distance (lower is nearer)", *(names[key] for key in keys)]
    rows = []
    for name, row in figures.items():
        values = row["quality"][role]
        rows.append([name, f"{values['fid']:.3f}", *(interval_text(values[key]) for key in keys)])
    return head, rows


def _cost_rows(figures: Figures) -> tuple[list[str], list[list[str]]]:
    head = ["arm", "trained parameters", "gradients and optimiser", "kept for backward", "CPU s per step"]
    head += ["memory saved", "time saved"]
    plain = figures["none"]["cost"]["illegal"]
    rows = []
    for name, row in figures.items():
        if "cost" not in row:
            continue
        cost = {key: sum(row["cost"][role][key] for role in row["cost"]) / 2 for key in plain}
        full = {key: sum(figures["none"]["cost"][role][key] for role in row["cost"]) / 2 for key in plain}
        memory, before = (values["state_bytes"] + values["saved_bytes"] for values in (cost, full))
        saved = [1 - memory / before, 1 - cost["cpu_seconds_per_step"] / full["cpu_seconds_per_step"]]
        rows.append([
            name, f"{cost['trained_parameters']:,.0f}", _bytes(cost["state_bytes"]), _bytes(cost["saved_bytes"]),
            f"{cost['cpu_seconds_per_step']:.3f}", *(f"{100 * share:.0f} %" for share in saved),
        ])  # fmt: skip
    return head, rows


def _bytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def table(figures: Figures) -> str:
    """The figures as Markdown."""
    parts = [_rows(figures)]
    if all("quality" in row for row in figures.values()):
        parts += [_quality_rows(figures, role) for role in ("illegal", "innocent")]
    parts.append(_cost_rows(figures))
    texts = []
    for head, rows in parts:
        lines = [head, ["---"] * len(head), *rows]
        texts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(texts)


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(word)}</th>" for word in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pictures(role: str, rows: Mapping[str, np.ndarray]) -> str:
    parts = []
    for name, pictures in rows.items():
        sheet = grid(list(pictures), len(pictures))
        parts.append(f'<figure class="arm"><figcaption>{escape(name)}</figcaption><img alt="{escape(f"{name}, {role}")}" '
                     f'src="{_picture(sheet)}"></figure>')  # fmt: skip
    return "".join(parts)


def _forest(figures: Figures, named: Mapping[str, str]) -> str:
    rows = [
        Row(label=name, tone="t1" if name in named else "t2", mean=row["selectivity"]["mean"], low=row["selectivity"]["low"],
            high=row["selectivity"]["high"])
        for name, row in figures.items() if "selectivity" in row
    ]  # fmt: skip
    return forest(rows, title="Selectivity", guide=0.0, form=lambda v: f"{v:.3f}", axis=lambda v: f"{v:g}", labels=True)


def page(
    config: GuardEvaluation, figures: Figures, masks: Mapping[str, FreezeMask], grids: Mapping[str, Mapping[str, np.ndarray]],
    domains: Mapping[str, list[str]], *, note: str = "",
) -> str:  # fmt: skip
    """A self-contained page: figures, pictures by domain and mask, where the frozen tensors lie, what it saves.

    Args:
        note: what stands below the tables of quality, such as why a judge is missing.
    """
    style = (TEMPLATES / "style.css").read_text("utf-8")
    first = next(iter(config.masks))
    parts = [f"<h1>{escape(_claim(first, figures[first]))}</h1><p class='lede'>{escape(_HONEST)}</p>"]
    words = "Share of the adaptation that a mask prevents: block on the illegal domain, harm on the innocent one; selectivity is "
    words += "their difference. Held-out pictures, equal noise for all arms, 95 % bootstrap intervals over pictures."
    parts.append(f"<section><h2>What each mask prevented</h2><p class='intro'>{words}</p>{_html_table(*_rows(figures))}")
    parts.append(f"<div style='max-width:520px;margin-top:18px'>{_forest(figures, config.masks)}</div></section>")
    for role, (title, meaning) in _WORDS.items():
        told = f"{', '.join(domains[role])}: {meaning}. Rows are arms, columns the same captions from the same noise."
        parts.append(f"<section><h2>{title}</h2><p class='intro'>{escape(told)}</p>{_pictures(role, grids[role])}")
        parts.append(_html_table(*_quality_rows(figures, role)))
        parts.append(f"<p class='intro'>{escape(note)}</p></section>" if note else "</section>")
    parts.append(f"<section><h2>What it saves</h2>{_html_table(*_cost_rows(figures))}</section>")
    drawn = "".join(f"<figure>{figure}</figure>" for figure in mask_figures(masks[first]).values())
    parts.append(f"<section><h2>Where the frozen tensors of “{escape(first)}” lie</h2>{drawn}</section>")
    extra = ".arm{display:grid;grid-template-columns:9em 1fr;align-items:center;gap:12px;margin:4px 0}.arm img{max-width:100%}"
    extra += ".scroll{overflow-x:auto}td,th{padding:4px 12px 4px 0;text-align:left;white-space:nowrap;font-size:14px}"
    title = escape(f"{config.run.name} · guard evaluation")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{style}{extra}</style></head><body><main class='wrap'>{''.join(parts)}"
        "</main></body></html>\n"
    )


def _claim(name: str, row: Mapping[str, Any]) -> str:
    block, harm = row["block"], row["harm"]
    return (
        f"The mask “{name}” prevents {100 * block['mean']:.0f} % of the illegal adaptation "
        f"({100 * block['low']:.0f} to {100 * block['high']:.0f} %) and {100 * harm['mean']:.0f} % of the innocent one "
        f"({100 * harm['low']:.0f} to {100 * harm['high']:.0f} %)"
    )
