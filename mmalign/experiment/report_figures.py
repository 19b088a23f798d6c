"""Figures of reports against their references: errors as judges count them, findings, lengths, words in common.

Reads texts and judgements alone, no model: ``vlm_evaluation`` calls it after it has asked, and benchmarks call it on stored
answers. NOT A MEDICAL DEVICE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmalign.branches import BranchRecord, Judgement
from mmalign.errors import ConfigError
from mmalign.experiment.settings import ReportsConfig
from mmalign.report.figures import BASE
from mmalign.rewards.answers import reference_text
from mmalign.rewards.findings import FindingCounts, count_findings, load_extractor
from mmalign.rewards.overlap import missing, overlap
from mmalign.statistics import mean_interval, paired_difference, ratio_interval

Said = Mapping[str, Sequence[str]]
"""Model -> one answer per record."""


def references_of(records: Sequence[BranchRecord]) -> list[str]:
    """The reference report of every record.

    Raises:
        ConfigError: a record has none.
    """
    found = []
    for record in records:
        reference = reference_text(record)
        if reference is None or not reference.split():
            raise ConfigError(
                f"evaluate.reports: row '{record.id}' of evaluate.prompts has no reference report; give it one in "
                "meta.reference or in completion, or remove evaluate.reports"
            )
        found.append(reference)
    return found


def report_figures(
    records: Sequence[BranchRecord], answers: Said, judged: Mapping[str, Mapping[str, Sequence[Judgement]]],
    settings: ReportsConfig, *, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything about reports that goes into ``summary.json`` under `reports`.

    Args:
        answers: by model, ``base`` among them.
        judged: judge -> model -> one judgement per record.
    """
    references = references_of(records)
    owners = [record.id for record in records]
    extractor = load_extractor(settings.extractor)
    found = {model: count_findings(extractor, references, texts) for model, texts in answers.items()}
    lengths = {model: np.array([len(text.split()) for text in texts], np.float64) for model, texts in answers.items()}
    wanted = np.array([len(text.split()) for text in references], np.float64)
    words = _overlaps(references, answers, settings, owners, seed)
    figures: dict[str, Any] = {"extractor": settings.extractor, "reports": len(records), "absent": words.pop("absent")}
    figures["models"] = {}
    for model in answers:
        figures["models"][model] = {
            "findings": finding_figures(found[model], seed),
            "lengths": length_figures(lengths[model], lengths[BASE], wanted, owners, seed),
            "judges": {
                name: judge_figures(models[model], models[BASE], lengths[model], lengths[BASE], wanted, owners, seed)
                for name, models in judged.items()
            },
            "overlap": {name: by_model[model] for name, by_model in words.items()},
        }
        if model != BASE:
            figures["models"][model]["findings"]["change"] = f1_change(found[model], found[BASE], seed)
    return figures


def finding_figures(found: FindingCounts, seed: int) -> dict[str, Any]:
    """Micro F1 with its interval over reports, macro F1, precision, recall, and F1 by label."""
    top, whole = found.parts()
    by_label = {}
    for place, label in enumerate(found.labels):
        both, extra, missed = (int(v[:, place].sum()) for v in (found.both, found.only_candidate, found.only_reference))
        if both + extra + missed:
            by_label[label] = {"f1": 2 * both / (2 * both + extra + missed), "in_references": both + missed, "false": extra}
    return {
        **found.rates(), "micro_f1": ratio_interval(top, whole, seed=seed).as_dict(), "unreadable": found.unreadable,  # type: ignore[arg-type]
        "by_label": by_label,
    }  # fmt: skip


def f1_change(after: FindingCounts, before: FindingCounts, seed: int, resamples: int = 10_000) -> dict[str, float]:
    """Difference of micro F1, after minus before, with a percentile bootstrap interval over reports (both models resampled
    alike)."""
    tops, wholes = zip(after.parts(), before.parts(), strict=True)
    drawn = np.random.default_rng(seed).integers(len(tops[0]), size=(resamples, len(tops[0])))
    rates = [top[drawn].sum(1) / np.maximum(1, whole[drawn].sum(1)) for top, whole in zip(tops, wholes, strict=True)]
    low, high = np.quantile(rates[0] - rates[1], [0.025, 0.975])
    mean = after.rates()["micro_f1"] - before.rates()["micro_f1"]
    return {"mean": mean, "low": float(low), "high": float(high)}


def length_figures(
    words: np.ndarray, base: np.ndarray, wanted: np.ndarray, owners: Sequence[str], seed: int
) -> dict[str, Any]:
    """Words a report, and two ratios that must not be mixed up: words over the reference's, and over the base model's."""
    return {
        "words": mean_interval(words, owners, seed=seed).as_dict(),
        "verbosity_vs_reference": mean_interval(words / wanted, owners, seed=seed).as_dict(),
        "verbosity_vs_base": mean_interval(words / np.maximum(1, base), owners, seed=seed).as_dict(),
    }


def judge_figures(
    after: Sequence[Judgement], before: Sequence[Judgement], words: np.ndarray, base: np.ndarray, wanted: np.ndarray,
    owners: Sequence[str], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Score, length-controlled score, mean counts and reasons of missing scores of one judge on one model, against the base.

    Length-controlled: the score over ``max(1, words / words of the reference)`` (arXiv:2410.07025), and the change of the plain
    score on the reports that are no longer than the base's.
    """
    scores, old = scores_of(after), scores_of(before)
    controlled, controlled_old = scores / np.maximum(1, words / wanted), old / np.maximum(1, base / wanted)
    shorter = words <= base
    reasons: dict[str, int] = {}
    for found in after:
        if found.score is None:
            reasons[found.reason or "no_score"] = reasons.get(found.reason or "no_score", 0) + 1
    names = list(dict.fromkeys(name for found in after for name in found.parts))
    counts = {name: float(np.mean([found.parts[name] for found in after if name in found.parts])) for name in names}
    return {
        "score": mean_interval(scores, owners, seed=seed).as_dict(),
        "length_controlled": mean_interval(controlled, owners, seed=seed).as_dict(),
        "change": paired_difference(scores, old, owners, seed=seed).as_dict(),
        "length_controlled_change": paired_difference(controlled, controlled_old, owners, seed=seed).as_dict(),
        "change_where_no_longer": paired_difference(
            np.where(shorter, scores, math.nan), np.where(shorter, old, math.nan), owners, seed=seed
        ).as_dict(),
        "counts": counts, "missing": reasons,
    }  # fmt: skip


def scores_of(judged: Sequence[Judgement]) -> np.ndarray:
    """Scores as ``[N]`` float64, NaN where there is none."""
    return np.array([math.nan if found.score is None else found.score for found in judged], np.float64)


def _overlaps(
    references: Sequence[str], answers: Said, settings: ReportsConfig, owners: Sequence[str], seed: int
) -> dict[str, Any]:
    """Measure -> model -> figures, and under `absent` the measures that cannot be computed here, with the reason."""
    found: dict[str, Any] = {"absent": {}}
    for name in settings.overlap:
        why = missing(name, settings.bertscore_model)
        if why is not None:
            found["absent"][name] = why
            continue
        values = {
            model: overlap(name, references, texts, bertscore_model=settings.bertscore_model)
            for model, texts in answers.items()
        }
        found[name] = {
            model: {
                "value": one.value,
                **({} if model == BASE else
                   {"change": paired_difference(one.each, values[BASE].each, owners, seed=seed).as_dict()}),
            }
            for model, one in values.items()
        }  # fmt: skip
    return found
