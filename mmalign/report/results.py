"""Sections about the outcome: the claim, what to know before believing it, and the figures of every reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.report import svg, words
from mmalign.report.figures import ALIGNED, BASE, CONTROL, Comparison, EvaluationFigures, RewardFigures
from mmalign.report.folder import RunData
from mmalign.report.section import Section

TONES = {BASE: "t0", ALIGNED: "t1", CONTROL: "t2"}
ROLES = {
    "training": ("Training reward", "what was optimised"),
    "holdout": ("Hold-out judge", "took no part in training"),
    "oracle": ("Oracle", "checks pictures by program"),
    "other": ("Other reward", "reported for information"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLine:
    """One model in the table of one reward, in words."""

    model: str
    tone: str
    mean: str
    change: str
    wins: str
    interval: str
    wins_interval: str
    verdict: str


def tone(model: str) -> str:
    """The colour class of a model, the same all over the page."""
    return TONES.get(model, "t3")


def hero(run: RunData, claim: tuple[str, str] = ("", "")) -> Section:
    """The claim in one sentence, who judged, and the run in key figures.

    Args:
        claim: headline and what to say under it, of a run that is not compared picture by picture with its base.
    """
    figures = run.evaluation
    reward = figures.headline() if figures is not None else None
    rate = reward.against_base[ALIGNED].win_rate if reward is not None else None
    told, under = claim if reward is None else ("", "")
    values = {
        "headline": told or words.headline(figures),
        "under": under,
        "verdict": words.verdict(rate) if rate is not None else "none",
        "judge": _judge(reward),
        "others": _others(figures, reward),
        "plot": _win_plot(reward, figures, labels=True) if reward is not None and figures is not None else "",
        "facts": _facts(run),
        "command": f"mmalign evaluate {run.folder}" if reward is None else "",
    }
    return Section(id="top", title=_title(run), short="Result", template="hero.html.j2", values=values)


def findings(run: RunData) -> Section:
    """What a person should know before believing the figures."""
    values = {"findings": run.findings, "problems": run.problems}
    return Section(
        id="notes", title="Before you believe it", short="Caveats", template="findings.html.j2", values=values
    )


def rewards(run: RunData) -> Section:
    """One card per reward, and the groups of prompts beside each other."""
    figures = run.evaluation
    missing = "" if figures is not None else "summary.json holds no evaluation, so there are no figures to compare."
    values: Mapping[str, Any] = {}
    if figures is not None:
        values = {"figures": figures, "cards": [_card(reward, figures) for reward in figures.rewards]}
        values = {**values, "groups": _groups(figures), "how": _how(figures, answers=run.answers)}
    return Section(
        id="rewards",
        title="What the judges say",
        short="Judges",
        template="rewards.html.j2",
        values=values,
        missing=missing,
    )


def _title(run: RunData) -> str:
    settings = run.config.get("run")
    named = settings.get("name") if isinstance(settings, dict) else None
    return str(run.summary.get("name") or named or run.folder.resolve().name)


def _judge(reward: RewardFigures | None) -> str:
    if reward is None:
        return ""
    return {
        "holdout": f"Judged by {reward.name}, a hold-out judge that took no part in training.",
        "oracle": f"Judged by {reward.name}, which checks pictures against their captions by program.",
        "training": f"Judged by {reward.name}, the very reward it was trained on: expect it to look better than it is.",
        "other": f"Judged by {reward.name}.",
    }[reward.role]


def _others(figures: EvaluationFigures | None, reward: RewardFigures | None) -> list[str]:
    """The same claim by every other reward, so that a favourable judge is never seen alone."""
    if figures is None or reward is None:
        return []
    told = []
    for other in figures.rewards:
        if other.name != reward.name and ALIGNED in other.against_base:
            rate = other.against_base[ALIGNED].win_rate
            role = ROLES[other.role][0].lower()
            name = other.name if role == other.name else f"{other.name} ({role})"
            told.append(f"{name}: {_rate(rate.mean, words.percent_range(rate))}")
    return told


def _rate(mean: float, interval: str) -> str:
    return f"{words.percent(mean)} ({interval})" if math.isfinite(mean) else "no finite score"


def _win_plot(reward: RewardFigures, figures: EvaluationFigures, *, labels: bool = False) -> str:
    rows = [
        svg.Row(label=model, tone=tone(model), mean=rate.mean, low=rate.low, high=rate.high)
        for model in _compared(reward, figures)
        for rate in [reward.against_base[model].win_rate]
    ]
    title = f"Win rate against the base by {reward.name}"
    return svg.forest(
        rows, title=title, guide=0.5, form=words.percent, axis=words.percent, bounds=(0.0, 1.0), labels=labels
    )


def _change_plot(reward: RewardFigures, figures: EvaluationFigures) -> str:
    rows = [
        svg.Row(label=model, tone=tone(model), mean=change.mean, low=change.low, high=change.high)
        for model in _compared(reward, figures)
        for change in [reward.against_base[model].difference]
    ]
    title = f"Change of {reward.name} against the base"
    return svg.forest(
        rows, title=title, guide=0.0, form=lambda value: words.number(value, signed=True), axis=words.axis
    )


def _compared(reward: RewardFigures, figures: EvaluationFigures) -> list[str]:
    return [model for model in figures.models if model in reward.against_base]


def _line(model: str, reward: RewardFigures) -> ModelLine:
    found: Comparison | None = reward.against_base.get(model)
    change, interval = words.with_interval(found.difference) if found else ("", "")
    return ModelLine(
        model=model,
        tone=tone(model),
        mean=words.number(reward.means.get(model, math.nan)),
        change=change,
        interval=interval,
        wins=words.percent(found.win_rate.mean) if found else "",
        wins_interval=words.percent_range(found.win_rate) if found else "",
        verdict=words.verdict(found.win_rate) if found else "",
    )


def _card(reward: RewardFigures, figures: EvaluationFigures) -> dict[str, Any]:
    name, meaning = ROLES[reward.role]
    against = reward.against_control.get(ALIGNED)
    return {
        "name": reward.name,
        "role": name,
        "meaning": meaning,
        "lines": [_line(model, reward) for model in figures.models],
        "wins": _win_plot(reward, figures) if _compared(reward, figures) else "",
        "change": _change_plot(reward, figures) if _compared(reward, figures) else "",
        "control": _rate(against.win_rate.mean, words.percent_range(against.win_rate)) if against else "",
        "left_out": [f"{count} of {model}" for model, count in reward.excluded.items() if count],
    }


def _groups(figures: EvaluationFigures) -> Sequence[Mapping[str, Any]]:
    """One row per group with the win rate of the aligned model by every reward; nothing for a single group."""
    if len(figures.groups) < 2:
        return []
    rows = []
    for name, group in figures.groups.items():
        cells = []
        for reward in group.rewards:
            found = reward.against_base.get(ALIGNED)
            cells.append(
                {
                    "text": words.percent(found.win_rate.mean) if found else words.DASH,
                    "interval": words.percent_range(found.win_rate) if found else "",
                    "verdict": words.verdict(found.win_rate) if found else "",
                }
            )
        rows.append({"name": name or "no group", "prompts": group.prompts, "cells": cells})
    return rows


def _how(figures: EvaluationFigures, *, answers: bool = False) -> str:
    if answers:
        return f"{words.count(figures.prompts, 'question')}, one answer each, the same question and media for every model"
    parts = [
        words.count(figures.prompts, "distinct prompt"),
        f"{words.count(figures.images_per_prompt, 'picture')} each",
        "the same prompt and initial noise for every model",
    ]
    if figures.sampling_steps is not None:
        parts.append(f"{figures.sampling_steps} sampling steps")
    if figures.guidance is not None:
        parts.append(f"guidance {words.axis(figures.guidance)}")
    return ", ".join(parts)


def _facts(run: RunData) -> list[tuple[str, str]]:
    """The run in a few figures; what is not known is left out."""
    summary = run.summary
    facts = []
    if summary.get("method"):
        facts.append(("Method", str(summary["method"])))
    for label, key in (("Steps", "steps"), ("Samples seen", "samples_seen"), ("Inputs refused", "samples_quarantined")):
        if isinstance(summary.get(key), int):
            facts.append((label, f"{summary[key]:,}"))
    if isinstance(summary.get("wall_seconds"), int | float):
        facts.append(("Time", words.duration(float(summary["wall_seconds"]))))
    if summary.get("seed") is not None:
        facts.append(("Seed", str(summary["seed"])))
    return facts
