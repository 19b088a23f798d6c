"""Tables of the selectivity benchmark: arms with intervals, differences to the learned mask, stability."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from freezing_study import Scheme, World

from mmalign.evaluate_guard.measures import Effect, interval
from mmalign.experiment.folder import write_json
from mmalign.freezing import FreezeMask
from mmalign.freezing.relaxation import chance_jaccard, jaccard, mean_jaccard
from mmalign.statistics import Interval


@dataclass(frozen=True, slots=True)
class Arm:
    """A mask that is compared."""

    label: str
    """Arms with one label are averaged."""
    name: str
    mask: Callable[[], FreezeMask]


MEASURES = ("block", "harm", "selectivity")
Cells = Mapping[tuple[float, int], Sequence[Arm]]
"""By ratio and seed: arms, all of them finished."""


def tables(world: World, cells: Cells, ratios: Sequence[float], *, name: str) -> str:
    """Markdown of all whole cells; also written to results-NAME.json."""
    lines = ["| ratio | mask | tensors | parameters | block | harm | selectivity | by seed |", "|" + "---|" * 8]
    notes: list[str] = []
    record: dict[str, Any] = {}
    for ratio in ratios:
        seeds = [seed for there, seed in cells if there == ratio]
        if not seeds:
            continue
        labels = list(dict.fromkeys(arm.label for arm in cells[ratio, seeds[0]]))
        merged = {label: {seed: _merged(world, cells[ratio, seed], label, seed) for seed in seeds} for label in labels}
        for label in labels:
            shares = [world.ratio(arm.name, seed) for seed in seeds for arm in cells[ratio, seed] if arm.label == label]
            values = {key: interval([getattr(merged[label][seed], key) for seed in seeds]) for key in MEASURES}
            record[f"{label}@{ratio}"] = {key: value.as_dict() for key, value in values.items()}
            each = ", ".join(f"{merged[label][seed].selectivity[0]:.3f}" for seed in seeds)
            lines.append(f"| {ratio:.0%} | {label} | {_share(shares, 'tensors')} | {_share(shares, 'parameters')} | "
                         + " | ".join(_show(value) for value in values.values()) + f" | {each} |")  # fmt: skip
        masks = [[arm.mask() for arm in cells[ratio, seed][:2]] for seed in seeds]
        notes += _notes(ratio, seeds, merged, masks, record)
    write_json(world.folder / f"results-{name}.json", record)
    return "\n".join([*lines, "", *notes])


def _merged(world: World, arms: Sequence[Arm], label: str, seed: int) -> Effect:
    effects = [world.effect(arm.name, arm.mask, seed) for arm in arms if arm.label == label]
    return Effect(
        block=np.mean([found.block for found in effects], axis=0), harm=np.mean([found.harm for found in effects], axis=0)
    )


def _notes(
    ratio: float, seeds: Sequence[int], merged: Mapping[str, Mapping[int, Effect]], masks: Sequence[Sequence[FreezeMask]],
    record: dict[str, Any],
) -> list[str]:  # fmt: skip
    """Differences between arms, stability over seeds, and how much of a mask is its start or the second arm's mask."""
    notes = []
    for label in list(merged)[1:]:
        gaps = [merged["learned"][seed].selectivity - merged[label][seed].selectivity for seed in seeds]
        found = interval(gaps)
        record[f"learned - {label}@{ratio}"] = found.as_dict()
        each = ", ".join(f"{gap[0]:+.3f}" for gap in gaps)
        notes.append(f"- {ratio:.0%}: learned minus {label}: {_show(found)} (seeds: {each})")
    learned = [found[0] for found in masks]
    starts = [float(mask.recipe["overlap_with_start"]) for mask in learned]
    seconds = [jaccard(one.frozen, two.frozen) for one, two in masks]
    stable, chance = mean_jaccard([mask.frozen for mask in learned]), chance_jaccard(learned[0].ratio["tensors"])
    record[f"stability@{ratio}"] = {"jaccard": stable, "chance": chance, "start": starts, "second": seconds}
    notes.append(
        f"- {ratio:.0%}: learned masks of {len(masks)} seeds overlap by Jaccard {stable:.2f} (chance {chance:.2f}); with the "
        f"order they started from {_each(starts)}; with {list(merged)[1]} {_each(seconds)}"
    )
    return notes


def echo(world: World, scheme: Scheme, seed: int, ratio: float) -> str:
    """Is a mask its start? Learn it once more from random scores and compare with both."""
    plain = world.scored(scheme, ratio=ratio, seed=seed).frozen
    more = ("method.start=random", f"method.mask_seed={seed}")
    random = world.scored(scheme, ratio=ratio, seed=seed, more=more, name=f"random-start-{ratio:g}")
    return (
        f"- {ratio:.0%}, seed {seed}, started from random scores: Jaccard {random.recipe['overlap_with_start']:.2f} with its own "
        f"start, {jaccard(random.frozen, plain):.2f} with the mask learned from equal scores (chance {chance_jaccard(ratio):.2f})"
    )


def sweep(world: World, arms: Sequence[Arm], seed: int, ratio: float, steps: Sequence[int]) -> str:
    """Does the effect last when the user trains for longer?"""
    lines = []
    for number in steps:
        for arm in arms:
            found = world.effect(f"{arm.name}-steps{number}", arm.mask, seed, steps=number)
            words = ", ".join(f"{key} {_show(interval([getattr(found, key)]))}" for key in MEASURES)
            lines.append(f"- {ratio:.0%}, seed {seed}, {number} user steps, {arm.label}: {words}")
    return "\n".join(lines)


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _share(shares: Sequence[Mapping[str, float]], key: str) -> str:
    values = [100 * share[key] for share in shares]
    return f"{min(values):.0f} %" if max(values) - min(values) < 1 else f"{min(values):.0f}-{max(values):.0f} %"


def _show(found: Interval) -> str:
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
