"""What a person should know before believing a run: known ways in which preference alignment goes wrong.

Pure functions of the logged rows and the evaluation, answering in plain words, or None where there is nothing to say.
The texts also go to ``summary.json`` under ``warnings``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.report import words
from mmalign.report.figures import ALIGNED, CONTROL, EvaluationFigures

Metrics = Sequence[Mapping[str, Any]]

TAIL = 0.1
"""Share of the logged rows that counts as the end of a run (never fewer than five rows, if there are five)."""
FEW_PROMPTS = 30
"""Below this a percentile bootstrap is itself unreliable."""
SATURATED_ACCURACY, SATURATED_LOSS = 0.99, 0.05
VANISHED_GRADIENT = 0.01
"""Of its size at the beginning."""
MANY_REFUSED = 0.01
"""Refused inputs per sample used."""
LONGER = 1.2
"""Aligned answers of this many times the base's words are worth a word."""
FALLING = -0.1
"""Chosen answers less likely than at the start by this much per token, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One warning: a stable name, a few words, and the explanation with its numbers."""

    name: str
    title: str
    text: str


def collect(
    metrics: Metrics, summary: Mapping[str, Any], evaluation: EvaluationFigures | None = None
) -> tuple[Finding, ...]:
    """All that applies, the gravest first.

    Args:
        metrics: the rows of ``metrics.jsonl``.
        summary: ``summary.json``; `samples_seen`, `samples_quarantined`, `steps` and `interrupted` are read.
        evaluation: its evaluation, if there is one.
    """
    seen, refused = summary.get("samples_seen"), summary.get("samples_quarantined")
    found = [interrupted(summary), non_finite_metrics(metrics)]
    if evaluation is not None:
        found += [over_optimisation(evaluation), control_as_good(evaluation)]
        found.append(non_finite_scores(evaluation, "answer" if "answers" in summary else "picture"))
    found += [likelihood_displacement(metrics), margin_saturation(metrics), gradient_vanished(metrics)]
    found += [length_exploitation(summary), chosen_answers_fall(metrics)]
    if evaluation is not None:
        found.append(too_few_prompts(evaluation))
    found.append(many_refused(int(refused or 0), int(seen or 0)))
    return tuple(finding for finding in found if finding is not None)


def interrupted(summary: Mapping[str, Any]) -> Finding | None:
    """The run did not reach its last step."""
    if summary.get("interrupted") is not True:
        return None
    return Finding(
        name="interrupted",
        title="The run was interrupted",
        text=f"It stopped after {words.count(int(summary.get('steps') or 0), 'step')}, before it was done; "
        "continue it with --resume.",
    )


def likelihood_displacement(metrics: Metrics) -> Finding | None:
    """Both sides less likely than under the reference at the end (likelihood displacement, arXiv:2410.08847)."""
    chosen, rejected = _tail(metrics, "chosen_drift"), _tail(metrics, "rejected_drift")
    if chosen.size == 0 or rejected.size == 0:
        return None
    noise = 2 * chosen.std() / math.sqrt(chosen.size)
    if not (chosen.mean() < -noise and rejected.mean() < 0):
        return None
    if rejected.mean() < chosen.mean():
        why = "the margin grows because the rejected side falls faster, not because the chosen side is learned"
    else:
        why = "and the chosen side even falls faster, so the pairs are not learned at all"
    return Finding(
        name="likelihood_displacement",
        title="Both sides became less likely",
        text=(
            f"At the end the policy scores the chosen side {words.number(-chosen.mean())} and the rejected side "
            f"{words.number(-rejected.mean())} below the reference: {why} (likelihood displacement). "
            "A smaller learning rate, a larger beta, fewer steps or a term on the chosen side help."
        ),
    )


def length_exploitation(summary: Mapping[str, Any]) -> Finding | None:
    """The aligned model answers at greater length (arXiv:2310.03716): part of a judge's praise may be for words."""
    lengths = (summary.get("answers") or {}).get("words") or {}
    base, aligned = lengths.get("base"), lengths.get(ALIGNED)
    if not base or not aligned or "longer" not in aligned:
        return None
    if aligned["longer"]["low"] <= 0 or aligned["mean"] < LONGER * base["mean"]:
        return None
    return Finding(
        name="length_exploitation",
        title="Answers have become longer",
        text=f"The aligned model uses {words.number(aligned['mean'])} words per answer where the base uses "
        f"{words.number(base['mean'])}. A judge that favours length would see an improvement that is none: compare at equal "
        "length, or train with method.objective=lc_dpo, ln_dpo or ld_dpo.",
    )


def chosen_answers_fall(metrics: Metrics) -> Finding | None:
    """The policy finds even the chosen answers much less likely than at the start, per token."""
    drift = _tail(metrics, "chosen_drift_per_token")
    if drift.size == 0 or drift.mean() > FALLING:
        return None
    return Finding(
        name="chosen_answers_fall",
        title="Chosen answers have become less likely",
        text="At the end the policy gives every token of a chosen answer "
        f"{words.number(abs(float(drift.mean())))} nats less than it did at the start; "
        "answers of other kinds gain what they lose. Add the likelihood of the chosen answers "
        "(method.nll_weight), or lower optim.lr.",
    )


def margin_saturation(metrics: Metrics) -> Finding | None:
    """The training pairs are fully separated: nothing is left to learn from them."""
    accuracy, loss = _tail(metrics, "accuracy"), _tail(metrics, "loss")
    if accuracy.size == 0 or loss.size == 0:
        return None
    if accuracy.mean() < SATURATED_ACCURACY or not 0 <= loss.mean() <= SATURATED_LOSS:
        return None
    return Finding(
        name="margin_saturation",
        title="The training pairs are exhausted",
        text=(
            f"At the end {words.percent(float(accuracy.mean()))} of the training pairs are ranked right and the loss "
            f"is {words.number(float(loss.mean()))}: the margins are saturated and further steps mostly memorise. "
            "More pairs, fewer steps or a smaller learning rate."
        ),
    )


def gradient_vanished(metrics: Metrics) -> Finding | None:
    """The gradient at the end is a hundredth of what it was at the beginning, or less."""
    norms = _finite(metrics, "grad_norm")
    if norms.size < 10:
        return None
    early, late = float(np.median(norms[: _tail_length(norms.size)])), float(np.median(_tail(metrics, "grad_norm")))
    if early <= 0 or late > VANISHED_GRADIENT * early:
        return None
    return Finding(
        name="gradient_vanished",
        title="The gradient has vanished",
        text=(
            f"The gradient norm fell from {words.number(early)} to {words.number(late)}: "
            "the last steps changed next to nothing."
        ),
    )


def over_optimisation(evaluation: EvaluationFigures) -> Finding | None:
    """The training reward rose while a judge that was kept apart fell (reward over-optimisation, arXiv:2210.10760)."""
    risen, fallen = [], []
    for reward in evaluation.rewards:
        if ALIGNED not in reward.against_base:
            continue
        difference = reward.against_base[ALIGNED].difference
        if reward.role == "training" and difference.known and difference.low > 0:
            risen.append(f"{reward.name} {words.number(difference.mean, signed=True)}")
        if reward.role in ("holdout", "oracle") and difference.known and difference.high < 0:
            fallen.append(f"{reward.name} {words.number(difference.mean, signed=True)}")
    if not risen or not fallen:
        return None
    return Finding(
        name="over_optimisation",
        title="The training reward was over-optimised",
        text=(
            f"The reward it was trained on rose ({', '.join(risen)}) while what was kept apart fell "
            f"({', '.join(fallen)}), and neither interval includes zero: the model learned the reward's weaknesses. "
            "Stop earlier, or train on a better or a mixed reward."
        ),
    )


def control_as_good(evaluation: EvaluationFigures) -> Finding | None:
    """The gain may be owed to more training on good data, not to preference learning."""
    reward = evaluation.headline()
    if reward is None or ALIGNED not in reward.against_control:
        return None
    against, base = reward.against_control[ALIGNED].win_rate, reward.against_base[ALIGNED].win_rate
    if words.verdict(base) != "better" or words.verdict(against) == "better":
        return None
    return Finding(
        name="control_as_good",
        title=f"The {CONTROL} does about as well",
        text=(
            f"Against the {CONTROL} the aligned model wins {words.percent(against.mean)} "
            f"(95{words.NBSP}% interval {words.percent_range(against)}) by {reward.name}: the gain over the base "
            "cannot be credited to the preference objective."
        ),
    )


def too_few_prompts(evaluation: EvaluationFigures) -> Finding | None:
    """Too few cases for any claim, or for the difference that was found."""
    reward = evaluation.headline()
    if reward is None:
        return None
    rate = reward.against_base[ALIGNED].win_rate
    if rate.prompts < FEW_PROMPTS:
        return Finding(
            name="too_few_prompts",
            title="Too few prompts",
            text=(
                f"Only {words.count(rate.prompts, 'prompt')} counted in the comparison by {reward.name}; "
                f"below {FEW_PROMPTS} the interval itself is unreliable. Evaluate on more distinct prompts."
            ),
        )
    if not rate.includes(0.5) or abs(rate.mean - 0.5) < 0.01:
        return None
    # the interval shrinks with the root of the number of prompts
    half = (rate.high - rate.low) / 2
    needed = math.ceil(rate.prompts * (half / abs(rate.mean - 0.5)) ** 2)
    return Finding(
        name="too_few_prompts",
        title="Too few prompts for this difference",
        text=(
            f"A win rate of {words.percent(rate.mean)} by {reward.name} cannot be told from 50{words.NBSP}% with "
            f"{words.count(rate.prompts, 'prompt')}; if it is real, about "
            f"{words.count(_round_up(needed), 'prompt')} would show it."
        ),
    )


def many_refused(refused: int, seen: int) -> Finding | None:
    """More than one input in a hundred could not be used."""
    if refused == 0 or refused <= MANY_REFUSED * seen:
        return None
    return Finding(
        name="many_refused",
        title="Many inputs were refused",
        text=(
            f"{words.count(refused, 'input')} could not be used, against {words.count(seen, 'sample')} seen in "
            "training. What remains may not be what was meant to be learned; the reasons are listed below."
        ),
    )


def non_finite_metrics(metrics: Metrics) -> Finding | None:
    """A logged figure that is not a number; the log writes it as null."""
    names: dict[str, int] = {}
    steps = []
    for row in metrics:
        bad = [
            name
            for name, value in row.items()
            if value is None or (isinstance(value, float) and not math.isfinite(value))
        ]
        for name in bad:
            names[name] = names.get(name, 0) + 1
        if bad:
            steps.append(row.get("step"))
    if not steps:
        return None
    listed = ", ".join(f"{name} ({times}×)" for name, times in sorted(names.items()))
    return Finding(
        name="non_finite_metrics",
        title="Values that are not finite",
        text=f"Figures in the log are not finite numbers: {listed}, first at step {steps[0]}.",
    )


def non_finite_scores(evaluation: EvaluationFigures, noun: str = "picture") -> Finding | None:
    """Pictures or answers of an evaluation that a reward could not score."""
    parts = [
        f"{reward.name} on {words.count(times, noun)} of {model}"
        for reward in evaluation.rewards
        for model, times in reward.excluded.items()
        if times
    ]
    if not parts:
        return None
    return Finding(
        name="non_finite_scores",
        title=f"{noun.capitalize()}s without a score",
        text=f"No finite score came from {'; '.join(parts)}. They are left out of every figure, not counted as losses.",
    )


def _finite(metrics: Metrics, name: str) -> np.ndarray:
    values = [row[name] for row in metrics if isinstance(row.get(name), int | float)]
    array = np.array(values, dtype=np.float64)
    return array[np.isfinite(array)]


def _tail_length(rows: int) -> int:
    return min(rows, max(5, math.ceil(TAIL * rows)))


def _tail(metrics: Metrics, name: str) -> np.ndarray:
    values = _finite(metrics, name)
    return values[-_tail_length(values.size) :] if values.size else values


def _round_up(value: int) -> int:
    """To two significant digits: an estimate should not look exact."""
    unit = int(10 ** max(0, len(str(value)) - 2))
    return -(-value // unit) * unit
