"""How much the innocent user's cost counts, chosen on persons and papers that are neither learnt from nor reported on.

Candidates are rules for the weight, which may depend on the ratio. Masks of a share of tensors are learnt on the split `learn`
and judged under users of the second group. A rule's value is its selectivity, averaged over seeds and ratios; the highest wins,
and of those within `TIE` of it the first in the list below. Saliency masks get their own rule the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from freezing_study import Scheme, World

from mmalign.experiment.folder import write_json

TIE = 0.005
RULES: dict[str, Callable[[float], float]] = {
    "1": lambda ratio: 1.0,
    "3/10": lambda ratio: 0.3,
}
"""From the most to the least cautious."""
SCHEMES = ("learned", "saliency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One mask."""

    seed: int
    ratio: float
    scheme: Scheme

    @property
    def name(self) -> str:
        """Of its arm."""
        more = "-tensors" if self.scheme.name == "saliency" else ""  # whose scores serve several arms
        return f"{self.scheme.name}-w{self.scheme.weight:.4g}-r{self.ratio:g}{more}"

    def selectivity(self, world: World) -> float:
        """Computed if it is not there."""
        found = world.effect(self.name, lambda: world.by_tensors(self.scheme, ratio=self.ratio, seed=self.seed), self.seed)
        return float(found.selectivity[0])


def trials(ratios: Sequence[float], schemes: Sequence[str], seeds: Sequence[int]) -> Iterator[Trial]:
    """Every distinct mask that some rule asks for."""
    for seed in seeds:
        for name in schemes:
            for ratio in ratios:
                for weight in dict.fromkeys(weight_of(rule, ratio) for rule in RULES):
                    yield Trial(seed=seed, ratio=ratio, scheme=Scheme(name=name, weight=weight))


def weight_of(rule: str, ratio: float) -> float:
    return round(RULES[rule](ratio), 6)


def choose(
    out: Path, ratios: Sequence[float], schemes: Sequence[str], seeds: Sequence[int], world: World
) -> dict[str, Any]:
    """The rule of each scheme with all values behind it; also written to choice.json."""
    every = {trial: trial.selectivity(world) for trial in trials(ratios, schemes, seeds)}
    record: dict[str, Any] = {"seeds": list(seeds), "ratios": list(ratios), "tie": TIE}
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
