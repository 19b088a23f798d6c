"""The section of reports: figures against reference reports, held-out tasks, and reports side by side with what a judge
finds wrong.

Base and aligned report stand beside the reference; words that one of the two has and the other lacks are marked, and below each
report stand the errors that the headline judge names. Read from ``summary.json`` (`reports`, `tasks`) and
``samples/evaluation/answers.jsonl``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.report import words
from mmalign.report.answers import pictures_of, score_of
from mmalign.report.figures import ALIGNED, BASE
from mmalign.report.folder import RunData, read_lines
from mmalign.report.results import tone
from mmalign.report.section import Section

SHOWN = 6
"""Studies shown unpicked."""
EXTREMES = 3
"""Largest gains, and as many largest losses, by the headline judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One report beside the reference: pieces are (text, whether the other model's report lacks it)."""

    model: str
    tone: str
    score: str
    words: int
    pieces: tuple[tuple[str, bool], ...]
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One study with its reference and the reports of the models."""

    question: str
    pictures: tuple[Mapping[str, Any], ...]
    reference: str
    columns: tuple[Column, ...]


def reports(run: RunData) -> Section:
    """Figures and studies; missing where the run compared no reports."""
    found = run.summary.get("reports")
    figures: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    problems: list[str] = []
    judge = _judge(figures, run)
    asked = read_lines(run.folder / "samples" / "evaluation" / "answers.jsonl", problems) or ()
    rows = [row for row in asked if row.get("reference")]
    shown = [rows[index * len(rows) // min(SHOWN, len(rows))] for index in range(min(SHOWN, len(rows)))]
    gains = sorted((row for row in rows if math.isfinite(_gain(row, judge))), key=lambda row: _gain(row, judge))

    def studies(picked: Sequence[Mapping[str, Any]]) -> list[Study]:
        return [_study(run, row, judge, problems) for row in picked]

    values = {
        "notice": str(run.summary.get("notice") or ""), "judge": judge, "extractor": str(figures.get("extractor", "")),
        "total": int(figures.get("reports", 0)), "table": _table(figures, judge), "errors": _errors(figures, judge),
        "overlap": _overlap(figures), "absent": dict(figures.get("absent") or {}),
        "tasks": _tasks(run.summary.get("tasks") or {}),
        "even": studies(shown), "gains": studies([row for row in reversed(gains[-EXTREMES:]) if _gain(row, judge) > 0]),
        "losses": studies([row for row in gains[:EXTREMES] if _gain(row, judge) < 0]), "problems": sorted(set(problems)),
    }  # fmt: skip
    missing = "" if figures or values["tasks"] else "This run compared no reports: evaluate.reports is not set."
    return Section(
        id="reports", title="Reports", short="Reports", template="reports.html.j2", values=values, missing=missing
    )


def marked(text: str, other: str) -> tuple[tuple[str, bool], ...]:
    """A text in pieces, each with whether `other` lacks it: words outside the longest common subsequence, case and stops
    aside."""
    mine, theirs = text.split(), other.split()
    matcher = difflib.SequenceMatcher(None, [_plain(word) for word in mine], [_plain(word) for word in theirs], autojunk=False)
    pieces: list[tuple[str, bool]] = []
    for kind, begin, end, _, _ in matcher.get_opcodes():
        if begin < end:
            pieces.append((" ".join(mine[begin:end]), kind != "equal"))
    return tuple(pieces)


def _plain(word: str) -> str:
    return word.lower().strip(".,;:")


def _judge(figures: Mapping[str, Any], run: RunData) -> str:
    """The headline judge, or the first that judged reports."""
    headline = run.evaluation.headline() if run.evaluation is not None else None
    if headline is not None:
        return headline.name
    models = list((figures.get("models") or {}).values())
    return next(iter(models[0].get("judges") or ()), "") if models else ""


def _gain(row: Mapping[str, Any], judge: str) -> float:
    return score_of(row, judge, ALIGNED) - score_of(row, judge, BASE)


def _study(run: RunData, row: Mapping[str, Any], judge: str, problems: list[str]) -> Study:
    said: Mapping[str, str] = row.get("answers") or {}
    columns = []
    for model, text in said.items():
        other = said.get(ALIGNED if model == BASE else BASE, "")
        about = (((row.get("judged") or {}).get(judge) or {}).get(model)) or {}
        errors = [str(note) for note in about.get("notes") or ()]
        if about.get("reason"):
            errors.insert(0, f"no score: {about['reason']}")
        score = score_of(row, judge, model)
        columns.append(
            Column(model=model, tone=tone(model), score=words.number(score) if math.isfinite(score) else "",
                   words=len(text.split()), pieces=marked(text, other), errors=tuple(errors))
        )  # fmt: skip
    return Study(
        question=str(row.get("question", "")), pictures=pictures_of(run.folder, row, problems), reference=str(row["reference"]),
        columns=tuple(columns),
    )  # fmt: skip


def _cell(value: Mapping[str, Any] | None, *, signed: bool = False) -> dict[str, str]:
    """A figure with its interval; empty where there is none."""
    if not value or value.get("mean") is None:
        return {"mean": "", "range": ""}
    low, high = (words.number(value[name], signed=signed) for name in ("low", "high"))
    return {"mean": words.number(value["mean"], signed=signed), "range": f"{low} to {high}"}


def _table(figures: Mapping[str, Any], judge: str) -> list[dict[str, Any]]:
    """Per model: score, length-controlled score, finding F1, both ratios of length, and changes against the base."""
    rows = []
    for model, found in (figures.get("models") or {}).items():
        judged = (found.get("judges") or {}).get(judge) or {}
        lengths, findings = found.get("lengths") or {}, found.get("findings") or {}
        is_base = model == BASE
        rows.append(
            {"model": model, "tone": tone(model), "cells": [
                _cell(judged.get("score")), _cell(judged.get("length_controlled")), _cell(findings.get("micro_f1")),
                _cell(lengths.get("words")), _cell(lengths.get("verbosity_vs_reference")),
                _cell(None if is_base else judged.get("change"), signed=True),
                _cell(None if is_base else judged.get("length_controlled_change"), signed=True),
                _cell(None if is_base else judged.get("change_where_no_longer"), signed=True),
                _cell(findings.get("change"), signed=True),
            ]}
        )  # fmt: skip
    return rows


def _errors(figures: Mapping[str, Any], judge: str) -> dict[str, Any]:
    """Mean counts of the headline judge by model, and how many reports it could not score."""
    models: Mapping[str, Any] = figures.get("models") or {}
    judged = {model: (found.get("judges") or {}).get(judge) or {} for model, found in models.items()}
    names = list(dict.fromkeys(name for one in judged.values() for name in one.get("counts") or ()))
    rows = [
        {"model": model, "tone": tone(model),
         "cells": [words.number(one["counts"][name]) if name in (one.get("counts") or {}) else "" for name in names],
         "missing": ", ".join(f"{number} {reason}" for reason, number in (one.get("missing") or {}).items())}
        for model, one in judged.items()
    ]  # fmt: skip
    return {"names": [name.replace("_", " ") for name in names], "rows": rows if names else []}


def _overlap(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Words in common with the references, by model."""
    models: Mapping[str, Any] = figures.get("models") or {}
    names = list(dict.fromkeys(name for found in models.values() for name in found.get("overlap") or ()))
    rows = [
        {"model": model, "tone": tone(model),
         "cells": [{"mean": words.number(found["overlap"][name]["value"]),
                    "change": _cell(found["overlap"][name].get("change"), signed=True)} for name in names]}
        for model, found in models.items()
    ]  # fmt: skip
    return {"names": names, "rows": rows if names else []}


def _tasks(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy by task and model, with changes."""
    return [
        {"task": name, "questions": task.get("questions", 0), "model": model, "tone": tone(model),
         "accuracy": _cell(found.get("accuracy")), "change": _cell(found.get("change"), signed=True)}
        for name, task in tasks.items() for model, found in (task.get("models") or {}).items()
    ]  # fmt: skip


def reports_text(summary: Mapping[str, Any]) -> str:
    """Reports, tasks and the notice of a run as plain text, one line a model; empty where it compared neither."""
    found, tasks = summary.get("reports"), summary.get("tasks") or {}
    figures: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    lines: list[str] = []
    models: Mapping[str, Any] = figures.get("models") or {}
    for judge in dict.fromkeys(name for model in models.values() for name in model["judges"]):
        columns = ("score", "length-controlled", "finding F1", "words / reference")
        lines.append(f"{judge + ', ' + str(figures['reports']) + ' reports':<34}" + "".join(f"{name:>26}" for name in columns))
        for name, model in models.items():
            judged = model["judges"].get(judge) or {}
            cells = (judged.get("score"), judged.get("length_controlled"), model["findings"]["micro_f1"],
                     model["lengths"]["verbosity_vs_reference"])  # fmt: skip
            missing = sum((judged.get("missing") or {}).values())
            note = f"  ({missing} without a score)" if missing else ""
            lines.append(f"{name:<34}" + "".join(f"{_span(cell):>26}" for cell in cells) + note)
    lines += [f"not computed: {name}: {why}" for name, why in (figures.get("absent") or {}).items()]
    for name, task in tasks.items():
        right = ", ".join(f"{model} {_span(one['accuracy'])}" for model, one in task["models"].items())
        lines.append(f"{name}, {task['questions']} questions right: {right}")
    if lines:
        lines.append("95 % intervals in brackets")
    if summary.get("notice"):
        lines.append(str(summary["notice"]))
    return "\n".join(lines)


def _span(value: Mapping[str, Any] | None) -> str:
    if not value or value.get("mean") is None:
        return "none"
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
