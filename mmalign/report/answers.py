"""The section of answers: what every model says to the same questions about the same pictures, and how long it takes.

Read from ``samples/evaluation/answers.jsonl``, or, where nothing was evaluated, from the first and last ``samples/step-…``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.report import words
from mmalign.report.figures import ALIGNED, BASE
from mmalign.report.folder import RunData, read_lines
from mmalign.report.pictures import embed
from mmalign.report.results import tone
from mmalign.report.section import Section
from mmalign.statistics import Interval

RATES = {
    "chair_s": ("Answers that name what is not there", "CHAIR-s; lower is better"),
    "chair_i": ("Named things that are not there", "CHAIR-i; lower is better"),
    "accuracy": ("Questions answered right", "higher is better"),
}
"""Shares in a run's `hallucination` -> what they are, and how to read them."""
SHOWN = 10
"""Questions shown unpicked."""
EXTREMES = 3
"""Largest gains, and as many largest losses, by the headline judge."""
PICTURES = 4
"""Pictures shown of one question."""
SIDE = 220
"""Longer side of a picture, in pixels."""
SHEET = 440
"""The same of a clip's frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One model's answer."""

    model: str
    tone: str
    text: str
    score: str
    words: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question with every model's answer."""

    text: str
    pictures: tuple[Mapping[str, Any], ...]
    """source, width and height of each."""
    said: tuple[Said, ...]


def answers(run: RunData) -> Section:
    """Questions with the answers of base and aligned model, evenly spaced, then the largest gains and losses."""
    problems: list[str] = []
    rows, judge = _rows(run, problems)
    shown = [rows[index * len(rows) // min(SHOWN, len(rows))] for index in range(min(SHOWN, len(rows)))]
    ranked = sorted((row for row in rows if math.isfinite(_gain(row, judge))), key=lambda row: _gain(row, judge))
    values = {
        "even": [_question(run.folder, row, judge, problems) for row in shown],
        "gains": [_question(run.folder, row, judge, problems) for row in reversed(ranked[-EXTREMES:]) if _gain(row, judge) > 0],
        "losses": [_question(run.folder, row, judge, problems) for row in ranked[:EXTREMES] if _gain(row, judge) < 0],
        "judge": judge, "total": len(rows), "lengths": _lengths(run.summary), "rates": _rates(run.summary),
        "problems": sorted(set(problems)),
    }  # fmt: skip
    missing = "" if rows else "No answers are in this run folder: evaluate.prompts named no questions."
    return Section(id="answers", title="Answers", short="Answers", template="answers.html.j2", values=values, missing=missing)


def _rows(run: RunData, problems: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Every question with answers by model, and the judge whose changes are told."""
    found = read_lines(run.folder / "samples" / "evaluation" / "answers.jsonl", problems)
    if found:
        figures = run.evaluation
        headline = figures.headline() if figures is not None else None
        return [row for row in found if isinstance(row.get("answers"), dict)], headline.name if headline else ""
    steps = sorted((run.folder / "samples").glob("step-*/answers.jsonl")) if (run.folder / "samples").is_dir() else []
    if not steps:
        return [], ""
    first, last = ({row.get("id"): row for row in read_lines(path, problems) or ()} for path in (steps[0], steps[-1]))
    labels = [f"step {int(path.parent.name.removeprefix('step-'))}" for path in (steps[0], steps[-1])]
    rows = []
    for name, row in first.items():
        said = {labels[0]: str(row.get("answer", "")), labels[1]: str(last.get(name, {}).get("answer", ""))}
        rows.append({**row, "answers": said})
    return rows, ""


def score_of(row: Mapping[str, Any], judge: str, model: str) -> float:
    """A judge's score of a model's answer, NaN where there is none."""
    value = ((row.get("scores") or {}).get(judge) or {}).get(model)
    return float(value) if isinstance(value, int | float) else math.nan


def _gain(row: Mapping[str, Any], judge: str) -> float:
    return score_of(row, judge, ALIGNED) - score_of(row, judge, BASE)


def pictures_of(folder: Path, row: Mapping[str, Any], problems: list[str]) -> tuple[Mapping[str, Any], ...]:
    """The first pictures of a row, embedded; what cannot be shown goes to `problems`."""
    pictures: list[Mapping[str, Any]] = []
    for name in list(row.get("media") or ())[:PICTURES]:
        path = folder / str(name)
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{name} lies outside the run folder and is not shown")
            continue
        try:
            with Image.open(path) as image:
                source, (width, height) = embed(image.convert("RGB"), SHEET if path.name.endswith("-frames.png") else SIDE)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"{name} cannot be shown: {error}")
            continue
        pictures.append({"source": source, "width": width, "height": height})
    return tuple(pictures)


def _question(folder: Path, row: Mapping[str, Any], judge: str, problems: list[str]) -> Question:
    said = []
    for number, (model, text) in enumerate(row["answers"].items()):
        score = score_of(row, judge, model)
        said.append(
            Said(model=model, tone=tone(model) if model in (BASE, ALIGNED, "control") else f"t{number}", text=str(text),
                 score=words.number(score) if math.isfinite(score) else "", words=len(str(text).split()))
        )  # fmt: skip
    return Question(text=str(row.get("question", "")), pictures=pictures_of(folder, row, problems), said=tuple(said))


def _lengths(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Words per answer by model."""
    found = (summary.get("answers") or {}).get("words") or {}
    return [
        {"model": model, "tone": tone(model), "mean": words.number(value["mean"]), "range": _range(value),
         "longer": words.number(value["longer"]["mean"], signed=True) if "longer" in value else "",
         "longer_range": _range(value["longer"]) if "longer" in value else ""}
        for model, value in found.items()
    ]  # fmt: skip


def _rates(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Hallucination rates by model, where the run's world can count them: names of the rates, and one row a model."""
    found: Mapping[str, Mapping[str, Mapping[str, float]]] = summary.get("hallucination") or {}
    names = list(dict.fromkeys(name for rates in found.values() for name in rates))
    rows = []
    for model, rates in found.items():
        cells = [
            {"mean": words.percent(rates[name]["mean"]) if name in rates else "",
             "range": words.percent_range(_interval(rates[name])) if name in rates else ""} for name in names
        ]  # fmt: skip
        rows.append({"model": model, "tone": tone(model), "cells": cells})
    return {"names": [RATES.get(name, (name.replace("_", " "), "")) for name in names], "rows": rows}


def _interval(value: Mapping[str, float]) -> Interval:
    return Interval(mean=value["mean"], low=value["low"], high=value["high"], prompts=1)


def _range(value: Mapping[str, float]) -> str:
    return f"{words.number(value['low'])} to {words.number(value['high'])}"


__all__: Sequence[str] = ["answers", "pictures_of", "score_of"]
