"""How much the innocent user's cost counts, chosen on validation domains by a rule that was written down before it was run.

Candidates are rules for the weight as a function of the ratio: a constant, or a multiple of it. Masks are learnt on some persons
and papers of the split `learn` and validated on its others, in two folds and with a seed that the report does not use. A rule's
value is its selectivity, averaged over folds, seeds and ratios; the highest wins, and of those within `TIE` of it the first in
the list below. Learned masks and saliency masks each get their own rule, so that neither is favoured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from freezing_study import FOLDS, Scheme, World

from mmalign.experiment.folder import write_json

SEEDS = (10,)
TIE = 0.005
RULES: dict[str, Callable[[float], float]] = {
    "1": lambda ratio: 1.0,
    "1/2": lambda ratio: 0.5,
    "1/5": lambda ratio: 0.2,
    "2 x ratio": lambda ratio: 2 * ratio,
    "ratio": lambda ratio: ratio,
    "2/3 x ratio": lambda ratio: 2 / 3 * ratio,
    "1/3 x ratio": lambda ratio: ratio / 3,
}
"""From the most to the least cautious."""
SCHEMES = ("learned", "saliency")


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


def trials(ratios: list[float], seeds: tuple[int, ...] = SEEDS) -> Iterator[Trial]:
    """Every distinct mask that some rule asks for."""
    for seed in seeds:
        for fold in range(len(FOLDS)):
            for ratio in ratios:
                for name in SCHEMES:
                    for weight in dict.fromkeys(round(rule(ratio), 6) for rule in RULES.values()):
                        yield Trial(fold=fold, seed=seed, ratio=ratio, scheme=Scheme(name=name, weight=weight))


def choose(
    out: Path, ratios: list[float], world: Callable[[int], World], seeds: tuple[int, ...] = SEEDS
) -> dict[str, Any]:
    """The rule of each scheme with all values behind it; also written to choice.json.

    Args:
        world: the validation world of a fold.
    """
    every = {trial: trial.selectivity(world(trial.fold)) for trial in trials(ratios, seeds)}
    record: dict[str, Any] = {"seeds": list(seeds), "folds": len(FOLDS), "ratios": ratios, "tie": TIE}
    for scheme in SCHEMES:
        table = {
            label: {
                ratio: float(np.mean([value for trial, value in every.items() if trial.scheme == Scheme(
                    name=scheme, weight=round(rule(ratio), 6)) and trial.ratio == ratio])) for ratio in ratios
            } for label, rule in RULES.items()
        }  # fmt: skip
        means = {label: float(np.mean(list(row.values()))) for label, row in table.items()}
        best = max(means.values())
        record[scheme] = {"chosen": next(label for label in RULES if means[label] >= best - TIE), "means": means,
                          "by_ratio": table}  # fmt: skip
    write_json(out / "choice.json", record)
    return record


def text_of(record: dict[str, Any]) -> str:
    """The table of both schemes as Markdown."""
    lines = ["| scheme | innocent weight | " + " | ".join(f"{ratio:.0%}" for ratio in record["ratios"]) + " | mean |",
             "|---|---|" + "---|" * (len(record["ratios"]) + 1)]  # fmt: skip
    for scheme in SCHEMES:
        found = record[scheme]
        for label, row in found["by_ratio"].items():
            mark = "**" if label == found["chosen"] else ""
            values = " | ".join(f"{value:.3f}" for value in row.values())
            lines.append(f"| {scheme} | {mark}{label}{mark} | {values} | {mark}{found['means'][label]:.3f}{mark} |")
    return "\n".join(lines)
