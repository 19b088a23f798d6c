"""Everything the report knows: a run folder read once, with what is missing or damaged said instead of raised.

A report is most wanted for a run that went wrong, so only a folder that does not exist is an error here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmalign.errors import DataError
from mmalign.report import files, samples
from mmalign.report.figures import EvaluationFigures
from mmalign.report.warnings import Finding, Metrics, collect
from mmalign.trainers import METHODS

MARKS = ("checkpoints", "config.yaml", "metrics.jsonl", "summary.json")
"""Files of which a run leaves at least one, however early it ends."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TEXTS = (".txt", ".md")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStep:
    """One ``samples/step-…`` folder."""

    step: int
    pictures: tuple[Path, ...]
    texts: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One line of ``evaluation.jsonl``."""

    prompt: str
    group: str
    index: int
    model: str
    scores: Mapping[str, float]
    """Reward -> score; NaN where the reward gave none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """A run folder as the sections of the report see it. None means: the file is not there."""

    folder: Path
    config_text: str | None
    config: Mapping[str, Any]
    environment: Mapping[str, Any] | None
    metrics: Metrics | None
    summary: Mapping[str, Any]
    evaluation: EvaluationFigures | None
    scores: tuple[ScoreRow, ...]
    sheets: samples.Index | None
    steps: tuple[SampleStep, ...]
    quarantine: tuple[Mapping[str, Any], ...] | None
    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    """Files that are there but could not be read, in words."""

    @property
    def answers(self) -> bool:
        """Whether the run trained a model that answers: then pictures from noise have no part in its page."""
        method = self.config.get("method")
        name = str(method.get("name", "")) if isinstance(method, Mapping) else ""
        return name in METHODS.names() and METHODS.get(name).batches.startswith("vlm_")


def read_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        DataError: it is not a folder, or one that no run has written to.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a run folder: no such folder")
    if not any((folder / name).exists() for name in MARKS):
        raise DataError(f"{folder} is not a run folder: it has none of {', '.join(MARKS)}")
    problems: list[str] = []
    config_text = _text(folder / "config.yaml", problems)
    summary = _object(folder / "summary.json", problems) or {}
    metrics = read_lines(folder / "metrics.jsonl", problems)
    evaluation, sheets = None, None
    try:
        if summary.get("evaluation"):
            evaluation = EvaluationFigures.from_dict(summary["evaluation"])
        sheets = samples.read(folder)
    except DataError as error:
        problems.append(str(error))
    return RunData(
        folder=folder,
        config_text=config_text,
        config=_config(config_text, problems),
        environment=_object(folder / "environment.json", problems),
        metrics=metrics,
        summary=summary,
        evaluation=evaluation,
        scores=_scores(folder / "evaluation.jsonl", problems),
        sheets=sheets,
        steps=_sample_steps(folder / "samples"),
        quarantine=read_lines(folder / "quarantine.jsonl", problems),
        findings=_findings(metrics or (), summary, evaluation),
        problems=tuple(problems),
    )


def read_lines(path: Path, problems: list[str] | None = None) -> tuple[dict[str, Any], ...] | None:
    """The objects of a JSONL file, None if there is no such file.

    Args:
        problems: where lines that are not JSON objects are told, as one sentence; a line cut short by a killed process
            is such a line. Without it they are an error.

    Raises:
        DataError: the file, or a line when `problems` is not given, cannot be read.
    """
    text = _text(path, problems)
    if text is None:
        return None
    rows, bad = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(number)
    if bad:
        many = f"{len(bad)} lines that are" if len(bad) > 1 else "1 line that is"
        told = f"{path.name} has {many} not a JSON object and left out here (first: line {bad[0]})"
        if problems is None:
            raise DataError(f"{path}: {told}")
        problems.append(told)
    return tuple(rows)


def _findings(
    metrics: Metrics, summary: Mapping[str, Any], evaluation: EvaluationFigures | None
) -> tuple[Finding, ...]:
    """What the curves and figures say now, then what the run itself had noted and is not among them."""
    found = collect(metrics, summary, evaluation)
    texts = {finding.text for finding in found}
    noted = summary.get("warnings") or []
    extra = [str(text) for text in noted if str(text) not in texts]
    return (*found, *(Finding(name="noted", title="Noted by the run", text=text) for text in extra))


def _text(path: Path, problems: list[str] | None) -> str | None:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        if problems is None:
            raise DataError(f"{path} cannot be read: {error}") from error
        problems.append(f"{path.name} cannot be read: {error}")
        return None


def _object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return files.read_json(path)
    except DataError as error:
        problems.append(str(error))
        return None


def _config(text: str | None, problems: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        problems.append(f"config.yaml is not valid YAML: {error}")
        return {}
    return values if isinstance(values, dict) else {}


def _scores(path: Path, problems: list[str]) -> tuple[ScoreRow, ...]:
    rows = []
    try:
        for row in read_lines(path, problems) or ():
            scores = {name: math.nan if score is None else float(score) for name, score in row["scores"].items()}
            rows.append(
                ScoreRow(
                    prompt=row["prompt"], group=row["group"], index=int(row["index"]), model=row["model"], scores=scores
                )
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(f"evaluation.jsonl has a row that cannot be read: {type(error).__name__} {error}")
    return tuple(rows)


def _sample_steps(folder: Path) -> tuple[SampleStep, ...]:
    """The ``step-…`` folders in order of their step."""
    found = []
    for path in folder.glob("step-*") if folder.is_dir() else ():
        number = path.name.removeprefix("step-")
        if path.is_dir() and number.isdigit():
            content: Sequence[Path] = sorted(path.iterdir())
            found.append(
                SampleStep(
                    step=int(number),
                    pictures=tuple(file for file in content if file.suffix.lower() in PICTURES),
                    texts=tuple(file for file in content if file.suffix.lower() in TEXTS),
                )
            )
    return tuple(sorted(found, key=lambda step: step.step))
