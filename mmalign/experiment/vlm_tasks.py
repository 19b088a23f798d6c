"""Held-out tasks beside the one that was trained: what alignment costs elsewhere (the alignment tax).

A task is a table of questions with the right answer of each in `completion` (or `chosen`); an answer is right if it says the
same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.branches import BranchRecord
from mmalign.data.vlm import open_vlm
from mmalign.errors import ConfigError
from mmalign.experiment.vlm_samples import ask, question_table
from mmalign.report.figures import BASE
from mmalign.rewards.answers import words
from mmalign.statistics import mean_interval, paired_difference

if TYPE_CHECKING:
    from mmalign.experiment.opening import OpenRun


def is_right(answer: str, right: str) -> bool:
    """Equal words in equal order; case, blanks and punctuation do not matter."""
    return words(answer) == words(right)


def task_records(name: str, source: str) -> list[BranchRecord]:
    """The questions of a task, each with its right answer first.

    Raises:
        ConfigError: no such table, or a question without an answer. DataError: a row that cannot be used.
    """
    try:
        path = question_table(source)
    except ConfigError as error:
        named = [problem.replace("evaluate.prompts", f"evaluate.tasks.{name}") for problem in error.problems]
        raise ConfigError(named) from error
    table = open_vlm(path, progress=False)
    records = [table[row] for row in range(len(table))]
    lacking = next((record.id for record in records if not record.answers), None)
    if lacking is not None or not records:
        raise ConfigError(f"evaluate.tasks.{name}: {path} needs rows with a right answer in 'completion' (row {lacking})")
    return records


def evaluate_tasks(run: OpenRun, networks: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of every network on every task of `evaluate.tasks`, with its change against the base."""
    found = {}
    for name, source in (run.config.evaluate.tasks or {}).items():
        records = task_records(name, source)
        said = {
            model: [one[0] for one in ask(run.config, run.family, network, records)] for model, network in networks.items()
        }
        found[name] = task_figures(records, said, run.config.run.seed)
    return found


def task_figures(records: Sequence[BranchRecord], said: Mapping[str, Sequence[str]], seed: int) -> dict[str, Any]:
    """Accuracy by model with intervals over questions, the paired change against ``base``, and accuracy by kind of question."""
    right = {
        model: np.array([is_right(text, record.answers[0].text) for record, text in zip(records, texts, strict=True)], np.float64)
        for model, texts in said.items()
    }
    kinds = np.array([str(record.meta.get("kind", "")) for record in records])
    models: dict[str, Any] = {}
    for model, values in right.items():
        models[model] = {"accuracy": mean_interval(values, seed=seed).as_dict()}
        if model != BASE:
            models[model]["change"] = paired_difference(values, right[BASE], seed=seed).as_dict()
        if len(set(kinds)) > 1:
            models[model]["by_kind"] = {kind: float(values[kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}
    return {"questions": len(records), "models": models}
