"""The section of the training curves: every figure of ``metrics.jsonl`` over the optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mmalign.report import svg, words
from mmalign.report.folder import RunData
from mmalign.report.section import Section
from mmalign.report.warnings import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart: which columns it draws and what it tells."""

    title: str
    about: str
    columns: tuple[tuple[str, str, str], ...]
    """(column of metrics.jsonl, name in the legend, colour class)."""
    guide: float | None = None
    share: bool = False
    bounds: tuple[float, float] | None = None
    noisy: bool = True
    """Whether a moving average helps; a planned figure such as the learning rate has no noise."""


PANELS = (
    Panel(title="Loss", about="mean over the pairs of the logged steps", columns=(("loss", "loss", "t1"),)),
    Panel(
        title="Accuracy",
        about="training pairs whose chosen side the policy favours; 50 % is chance",
        columns=(("accuracy", "accuracy", "t1"),),
        guide=0.5,
        share=True,
    ),
    Panel(
        title="Margin",
        about="how much further the chosen side moved than the rejected one",
        columns=(("margin", "margin", "t1"),),
        guide=0.0,
    ),
    Panel(
        title="Drift",
        about="policy minus reference score; both below zero is likelihood displacement",
        columns=(("chosen_drift", "chosen", "t1"), ("rejected_drift", "rejected", "t2")),
        guide=0.0,
    ),
    Panel(title="Gradient norm", about="before clipping", columns=(("grad_norm", "gradient norm", "t1"),)),
    Panel(
        title="Learning rate",
        about="of the main group",
        columns=(("lr", "learning rate", "t1"),),
        guide=0.0,
        noisy=False,
    ),
    Panel(
        title="Throughput", about="samples per second", columns=(("samples_per_second", "samples/s", "t1"),), guide=0.0
    ),
    Panel(
        title="Waiting for data",
        about="share of the step time",
        columns=(("data_wait_fraction", "waiting", "t1"),),
        share=True,
        bounds=(0.0, 1.0),
    ),
)
NOT_DRAWN = {"step", "epoch", "seconds"}
ABOUT = {
    "policy_chosen": "score of the chosen side by the policy; higher is better",
    "policy_rejected": "score of the rejected side by the policy; higher is better",
    "evaluations": "network evaluations a row; one with its gradient counts 3",
    "network_calls": "calls of the network a step, those of the inversion included",
    "reference_point": "what a liked or disliked row is held against",
    "user_accuracy": "pairs that the policy orders as their user did, each user counted once",
    "users_in_batch": "different people a step",
    "chosen_length": "tokens of the chosen answers, mean", "rejected_length": "tokens of the rejected answers, mean",
    "answer_length": "tokens of the answers, mean", "liked": "share of rows that are liked",
    "chosen_nll": "loss of the chosen answers a token",
    "chosen_drift_per_token": "policy minus reference, a token of the chosen side",
    "reward_chosen": "implicit reward of the chosen side", "reward_rejected": "implicit reward of the rejected side",
    "reward_margin": "implicit reward, chosen minus rejected", "stage": "which stage of the curriculum, from 0",
    "mask_softness": "mean of m (1 - m) over the mask; 0 is a decided mask, 0.25 none",
    "illegal_loss": "of the illegal user on the masked model", "innocent_loss": "of the innocent user on the masked model",
    "gold_nll": "loss of the gold answer a token",
    "mask_zero": "share of token weights at zero",
}  # fmt: skip
"""What further columns mean, where they have no chart of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A chart ready for the page."""

    title: str
    about: str
    chart: str
    last: str
    legend: tuple[tuple[str, str], ...]
    """(name, colour class) where there are several lines."""


def curves(run: RunData) -> Section:
    """All charts; columns that this report does not know get plain charts of their own."""
    rows = [row for row in run.metrics or () if _number(row.get("step")) is not None]
    missing = ""
    if run.metrics is None:
        missing = "metrics.jsonl is not in this run folder, so there are no curves."
    elif not rows:
        missing = "metrics.jsonl holds no logged step, so there are no curves."
    known = {column for panel in PANELS for column, _, _ in panel.columns}
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in known | NOT_DRAWN]
    more = [Panel(title=name.replace("_", " "), about=ABOUT.get(name, ""), columns=((name, name, "t1"),)) for name in names]
    values = {
        "charts": [chart for panel in PANELS for chart in [draw(panel, rows)] if chart is not None],
        "more": [chart for panel in more for chart in [draw(panel, rows)] if chart is not None],
        "absent": [panel.title.lower() for panel in PANELS if draw(panel, rows) is None] if rows else [],
    }
    return Section(
        id="training", title="Training", short="Training", template="curves.html.j2", values=values, missing=missing
    )


def draw(panel: Panel, rows: Metrics) -> Drawn | None:
    """One panel, or None if none of its columns holds a finite number."""
    form: Callable[[float], str] = words.percent if panel.share else words.number
    axis: Callable[[float], str] = words.percent if panel.share else words.axis
    series = []
    for column, name, tone in panel.columns:
        told = [row for row in rows if column in row]
        y = [_value(row[column]) for row in told]
        if any(math.isfinite(value) for value in y):
            series.append(svg.Series(name=name, tone=tone, x=[float(row["step"]) for row in told], y=y))
    if not series:
        return None
    chart = svg.line_chart(
        series,
        title=f"{panel.title} over steps",
        form=form,
        axis=axis,
        guide=panel.guide,
        bounds=panel.bounds,
        smooth=panel.noisy,
    )
    several = len(series) > 1
    legend = tuple((line.name, line.tone) for line in series) if several else ()
    last = "" if several else form(series[0].y[-1])
    return Drawn(title=panel.title, about=panel.about, chart=chart, last=last, legend=legend)


def _number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _value(value: object) -> float:
    found = _number(value)
    return math.nan if found is None else found
