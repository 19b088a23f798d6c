"""How much the innocent user's cost counts, chosen on validation domains by a rule that was written down before it was run.

Candidates are rules for the weight, which may depend on the ratio. Masks of a share of tensors are learnt on some persons
and papers of the split `learn` and validated on its others, in two folds and with a seed that the report does not use. A rule's
value is its selectivity, averaged over folds, seeds and ratios; the highest wins, and of those within `TIE` of it the first in
the list below. Saliency masks can get their own rule the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from freezing_study import FOLDS, Scheme, World

from mmalign.errors import MmalignError
from mmalign.experiment.folder import write_json

SEEDS = (10,)
TIE = 0.005
RULES: dict[str, Callable[[float], float]] = {
    "1": lambda ratio: 1.0,
    "3/5": lambda ratio: 0.6,
    "3/10": lambda ratio: 0.3,
}
"""From the most to the least cautious."""
SCHEMES = ("learned", "saliency")


class EvaluationError(MmalignError):
    """There is nothing to choose from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One mask on one fold."""

    fold: int
    seed: int
    ratio: float
    scheme: Scheme

    @property
    def name(self) -> str:
        """Of its arm."""
        return f"{self.scheme.name}-w{self.scheme.weight:.4g}-r{self.ratio:g}"

    def selectivity(self, world: World) -> float:
        """Computed if it is not there."""
        found = world.effect(self.name, lambda: world.by_tensors(self.scheme, ratio=self.ratio, seed=self.seed), self.seed)
        return float(found.selectivity[0])


def trials(ratios: Sequence[float], schemes: Sequence[str]) -> Iterator[Trial]:
    """Every distinct mask that some rule asks for, fold by fold."""
    for seed in SEEDS:
        for fold in range(len(FOLDS)):
            for name in schemes:
                for ratio in ratios:
                    for weight in dict.fromkeys(weight_of(rule, ratio) for rule in RULES):
                        yield Trial(fold=fold, seed=seed, ratio=ratio, scheme=Scheme(name=name, weight=weight))


def weight_of(rule: str, ratio: float) -> float:
    return round(RULES[rule](ratio), 6)


def choose(
    out: Path, ratios: Sequence[float], schemes: Sequence[str], worlds: Sequence[World]
) -> dict[str, Any]:
    """The rule of each scheme with all values behind it; also written to choice.json.

    Args:
        worlds: the validation world of each fold; folds that are not finished are left out, and the record says which counted.

    Raises:
        EvaluationError: not even one fold is finished.
    """
    found = list(trials(ratios, schemes))
    open_ = {trial.fold for trial in found if not worlds[trial.fold].done(trial.name, trial.seed)}
    folds = [fold for fold in range(len(FOLDS)) if fold not in open_]
    if not folds:
        raise EvaluationError(f"{out}: no fold of the choice is finished; run with --only choose first")
    every = {trial: trial.selectivity(worlds[trial.fold]) for trial in found if trial.fold in folds}
    record: dict[str, Any] = {"seeds": list(SEEDS), "folds": folds, "ratios": list(ratios), "tie": TIE}
    for name in schemes:

        def value(rule: str, ratio: float, name: str = name) -> float:
            scheme = Scheme(name=name, weight=weight_of(rule, ratio))
            return float(np.mean([found for trial, found in every.items() if (trial.scheme, trial.ratio) == (scheme, ratio)]))

        table = {rule: [value(rule, ratio) for ratio in ratios] for rule in RULES}
        means = {rule: float(np.mean(row)) for rule, row in table.items()}
        best = next(rule for rule in RULES if means[rule] >= max(means.values()) - TIE)
        record[name] = {"chosen": best, "means": means, "by_ratio": table}
    write_json(out / "choice.json", record)
    return record


def text_of(record: dict[str, Any]) -> str:
    """The table of both schemes as Markdown."""
    lines = ["| scheme | innocent weight | " + " | ".join(f"{ratio:.0%}" for ratio in record["ratios"]) + " | mean |",
             "|---|---|" + "---|" * (len(record["ratios"]) + 1)]  # fmt: skip
    for scheme in (name for name in SCHEMES if name in record):
        found = record[scheme]
        for label, row in found["by_ratio"].items():
            mark = "**" if label == found["chosen"] else ""
            values = " | ".join(f"{value:.3f}" for value in row)
            lines.append(f"| {scheme} | {mark}{label}{mark} | {values} | {mark}{found['means'][label]:.3f}{mark} |")
    return "\n".join(lines)
