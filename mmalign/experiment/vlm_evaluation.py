"""Answers of the aligned model against those of its base, on the same questions: judged, compared, and written down.

Leaves ``samples/evaluation/answers.jsonl`` (every question with every model's answer and scores), ``evaluation.jsonl``, and in
``summary.json`` the figures of every judge and the lengths of the answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.branches import BranchRecord, Judgement
from mmalign.errors import ConfigError
from mmalign.evaluation import EvaluationResult, reward_figures
from mmalign.experiment.report_figures import report_figures, scores_of
from mmalign.experiment.vlm_samples import AnswerSamples, ask, question_text, read_questions
from mmalign.experiment.vlm_tasks import evaluate_tasks
from mmalign.report import files
from mmalign.report.figures import BASE, EvaluationFigures, GroupFigures
from mmalign.report.folder import read_lines
from mmalign.report.warnings import collect
from mmalign.rewards.answers import judgements, load_judge, reference_text
from mmalign.statistics import mean_interval, paired_difference
from mmalign.trainers import METHODS

if TYPE_CHECKING:
    from mmalign.experiment.opening import OpenRun

WORDS = "words"
REPLIES = "judge/replies.jsonl"
"""Where a run folder keeps the replies of judges that are models."""


def evaluate_answers(run: OpenRun) -> EvaluationResult:
    """Ask every network of an open run the questions of `evaluate.prompts`, judge, compare and write.

    Raises:
        ConfigError: no questions, or a judge named twice or unknown.
    """
    config, settings = run.config, run.config.evaluate
    records = read_questions(config, None)
    judges = [*settings.rewards, *settings.holdout]
    if not records or not judges or len(set(judges)) != len(judges):
        raise ConfigError("evaluate: questions (evaluate.prompts) and judges (evaluate.rewards), each once, are needed")
    networks = run.networks()
    answers = {model: [found[0] for found in ask(config, run.family, network, records)] for model, network in networks.items()}
    judged = {name: _judged(name, run, records, answers) for name in judges}
    scores = {name: {model: scores_of(found) for model, found in models.items()} for name, models in judged.items()}
    result = compare_answers(
        records, scores, roles=_roles(settings.rewards, settings.holdout), seed=config.run.seed,
        headline=settings.rewards[0] if settings.rewards else None,
    )  # fmt: skip
    more: dict[str, Any] = {}
    if settings.reports is not None:
        more["reports"] = report_figures(records, answers, judged, settings.reports, seed=config.run.seed)
    if settings.tasks:
        more["tasks"] = evaluate_tasks(run, networks)
    notice = METHODS.get(config.method_name).notice
    if notice:
        more["notice"] = notice
    _write(run, records, answers, judged, result, more)
    return result


def _roles(rewards: Sequence[str], holdout: Sequence[str]) -> dict[str, str]:
    """The first reward is what was trained on; hold-out judges took no part."""
    named = {name: "training" if index == 0 else "other" for index, name in enumerate(rewards)}
    return {**named, **dict.fromkeys(holdout, "holdout")}


def _judged(
    name: str, run: OpenRun, records: Sequence[BranchRecord], answers: Mapping[str, Sequence[str]]
) -> dict[str, list[Judgement]]:
    """Model -> what the judge says of every answer. Replies of a judge that is a model are kept in the run folder."""
    given = {key.rpartition(".")[::2]: value for key, value in run.config.evaluate.judge_options.items()}
    parts = name.split(":")
    options = {setting: value for (judge, setting), value in given.items() if judge in parts}
    judge = load_judge(name, options=options, replies=run.folder / REPLIES)
    return {model: judgements(judge, records, said) for model, said in answers.items()}


def compare_answers(
    records: Sequence[BranchRecord], scores: Mapping[str, Mapping[str, np.ndarray]], *, roles: Mapping[str, str], seed: int,
    headline: str | None,
) -> EvaluationResult:  # fmt: skip
    """Every judge's figures, over all questions and by group.

    Args:
        scores: judge -> model -> one score per record; must hold ``base``.
    """
    owners = [record.id for record in records]
    groups = [record.group or "" for record in records]

    def figures(chosen: np.ndarray) -> tuple[Any, ...]:
        own = [owners[row] for row in chosen]
        return tuple(
            reward_figures(name, roles[name], {model: values[chosen] for model, values in found.items()}, own, seed)
            for name, found in scores.items()
        )

    names = np.array(groups, dtype=object)
    by_group = {}
    for group in dict.fromkeys(groups):
        chosen = np.flatnonzero(names == group)
        by_group[group] = GroupFigures(prompts=len(chosen), rewards=figures(chosen))
    return EvaluationResult(
        figures=EvaluationFigures(
            prompts=len(records), images_per_prompt=1, guidance=None, sampling_steps=None, headline_reward=headline,
            models=tuple(next(iter(scores.values()))), rewards=figures(np.arange(len(records))), groups=by_group,
        ),
        prompts=tuple(question_text(record) for record in records), groups=tuple(groups), indices=(0,) * len(records),
        scores=scores,
    )  # fmt: skip


def lengths(answers: Mapping[str, Sequence[str]], owners: Sequence[str], seed: int) -> dict[str, Any]:
    """Words per answer of every model with intervals, and how much longer than the base's they are."""
    counts = {model: np.array([len(text.split()) for text in said], dtype=np.float64) for model, said in answers.items()}
    return {
        model: {
            **mean_interval(found, owners, seed=seed).as_dict(),
            **({} if model == BASE else {"longer": paired_difference(found, counts[BASE], owners, seed=seed).as_dict()}),
        }
        for model, found in counts.items()
    }


def _write(
    run: OpenRun, records: Sequence[BranchRecord], answers: Mapping[str, Sequence[str]],
    judged: Mapping[str, Mapping[str, Sequence[Judgement]]], result: EvaluationResult, more: Mapping[str, Any],
) -> None:  # fmt: skip
    """Answers and scores first, the summary last, so that figures never precede their files."""
    folder, writer = run.folder, AnswerSamples(run.config, run.family, run.aligned)
    lines = []
    for row, record in enumerate(records):
        scores = {
            name: {model: float(found[model][row]) if math.isfinite(found[model][row]) else None for model in answers}
            for name, found in result.scores.items()
        }
        line: dict[str, Any] = {
            "id": record.id, "question": question_text(record), "media": writer.pictures(record), "group": record.group,
            "answers": {model: texts[row] for model, texts in answers.items()}, "scores": scores,
        }  # fmt: skip
        notes = {
            name: {model: {"notes": list(found[row].notes), "reason": found[row].reason} for model, found in models.items()}
            for name, models in judged.items() if any(found[row].notes or found[row].reason for found in models.values())
        }  # fmt: skip
        if notes:
            line["judged"] = notes
        if "reports" in more:
            line["reference"] = reference_text(record)
        lines.append(line)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_text(folder / "samples" / "evaluation" / "answers.jsonl", text)
    rows = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in result.rows())
    files.write_text(folder / "evaluation.jsonl", "".join(f"{row}\n" for row in rows))
    path = folder / "summary.json"
    summary = files.read_json(path) if path.exists() else {}
    said = {WORDS: lengths(answers, [record.id for record in records], run.config.run.seed)}
    found = collect(read_lines(folder / "metrics.jsonl", []) or (), {**summary, "answers": said}, result.figures)
    files.merge_json(
        path,
        {"evaluation": result.as_dict(), "win_rate": result.headline(), "answers": said, **more,
         "warnings": [finding.text for finding in found]},
    )  # fmt: skip
