"""The page that compares several runs: figures, costs and pictures side by side. Figures come from ``mmalign.compare``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.report import grids, samples, svg, words
from mmalign.report.figures import BASE, Comparison
from mmalign.report.pictures import embed
from mmalign.report.results import ROLES
from mmalign.report.section import Section
from mmalign.report.warnings import FEW_PROMPTS
from mmalign.statistics import Interval

SHOWN = 10
"""Prompts whose pictures are shown, evenly spaced through the list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one run of a column cost on average; None where a run does not tell."""

    steps: float | None = None
    rows: float | None = None
    """Pairs or lists that were seen."""
    evaluations: float | None = None
    """Network evaluations: a picture without gradient counts 1, with gradient 3."""
    seconds: float | None = None
    """Of training alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The base, or one method with all its seeds."""

    name: str
    seeds: tuple[int, ...]
    means: Mapping[str, float]
    """Reward -> mean score over prompts and seeds."""
    against_base: Mapping[str, Comparison]
    """Reward -> against the base; empty for the base."""
    against: Mapping[str, Mapping[str, Comparison]]
    """Reward -> other method -> this one against that one."""
    cost: Cost = Cost()
    sheet: samples.Index | None = None
    """Where its pictures lie, ..."""
    sheet_of: Any = None
    """... in which run folder, ..."""
    model: str = BASE
    """... and under which name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Everything the page shows. The base comes first among the columns."""

    columns: tuple[Column, ...]
    rewards: tuple[tuple[str, str], ...]
    """(name, role)."""
    headline: str
    """The reward that the first sentence is about."""
    how: str
    """Prompts, pictures and sampling in words."""
    settings: tuple[tuple[str, tuple[str, ...]], ...]
    """What differs between the methods: (key, one value per method)."""
    devices: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[Column, ...]:
        """The columns behind the base, largest gain by the headline reward first."""
        return tuple(sorted(self.columns[1:], key=lambda column: -_known(column.against_base[self.headline].difference.mean)))


def _known(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def page_of(compared: Compared) -> tuple[Section, tuple[Section, ...]]:
    """The head of the page and its sections."""
    return _hero(compared), (
        _rewards(compared), _matrices(compared), _costs(compared), _pictures(compared), _settings(compared),
    )  # fmt: skip


def headline(compared: Compared) -> tuple[str, str]:
    """What the headline reward says: the largest gain, and how far ahead of the next method that is."""
    ordered, reward = compared.methods, compared.headline
    best = ordered[0]
    found = best.against_base[reward].difference
    told = f"{best.name} gains most over the base by {reward}: {words.signed_interval(found)}"
    if found.includes(0):
        told = f"No method was shown to beat the base by {reward}; the largest gain, of {best.name}, is "
        told += words.signed_interval(found)
    few = f" Only {words.count(found.prompts, 'prompt')}: below {FEW_PROMPTS} the interval itself is unreliable."
    few = few if found.prompts < FEW_PROMPTS else ""
    if len(ordered) == 1:
        return f"{told}.", few.strip()
    lead = best.against[reward][ordered[1].name].difference
    apart = "which proves no lead" if lead.includes(0) else "a lead that the interval bears out"
    return f"{told}.", f"That is {words.signed_interval(lead)} ahead of {ordered[1].name}, {apart}.{few}"


def _hero(compared: Compared) -> Section:
    reward = compared.headline
    first, second = headline(compared)
    values = {
        "headline": first,
        "lead": second,
        "plot": _forest(compared, reward),
        "reward": reward,
        "how": compared.how,
        "facts": [
            ("Methods", str(len(compared.methods))),
            ("Seeds", ", ".join(map(str, compared.methods[0].seeds))),
            ("Judged by", ", ".join(name for name, _ in compared.rewards)),
        ],
    }
    title = f"{words.count(len(compared.methods), 'method')} compared"
    return Section(id="top", title=title, short="Top", template="compare_hero.html.j2", values=values)


def _forest(compared: Compared, reward: str) -> str:
    rows = [
        svg.Row(label=column.name, tone="t1", mean=found.mean, low=found.low, high=found.high)
        for column in compared.methods
        for found in [column.against_base[reward].difference]
    ]
    return svg.forest(
        rows, title=f"Change of {reward} against the base", guide=0.0, axis=words.axis,
        form=lambda value: words.number(value, signed=True),
    )  # fmt: skip


def _rewards(compared: Compared) -> Section:
    cards = []
    for name, role in compared.rewards:
        lines = [{"model": BASE, "mean": words.number(compared.columns[0].means[name]), "change": ""}]
        for column in compared.methods:
            against = column.against_base[name]
            change, interval = words.with_interval(against.difference)
            lines.append(
                {
                    "model": column.name, "mean": words.number(column.means[name]), "change": change, "interval": interval,
                    "wins": words.percent(against.win_rate.mean), "wins_interval": words.percent_range(against.win_rate),
                    "verdict": words.verdict(against.win_rate),
                }
            )  # fmt: skip
        kind, meaning = ROLES[role]
        cards.append({"name": name, "role": kind, "meaning": meaning, "lines": lines, "plot": _forest(compared, name)})
    values = {"cards": cards, "how": compared.how}
    return Section(id="rewards", title="Against the base", short="Rewards", template="compare_rewards.html.j2", values=values)


def _matrices(compared: Compared) -> Section:
    """Row against column, by every reward; only the half above the diagonal, which says it all."""
    methods = compared.methods
    tables = []
    for name, _ in compared.rewards:
        rows = []
        for place, column in enumerate(methods[:-1]):
            cells = [_cell(column.against[name][other.name].difference) for other in methods[place + 1 :]]
            rows.append({"name": column.name, "cells": [*[None] * place, *cells]})
        tables.append({"reward": name, "heads": [column.name for column in methods[1:]], "rows": rows})
    missing = "" if len(methods) > 1 else "There is one method alone."
    return Section(
        id="each-other", title="Against each other", short="Each other", template="compare_matrix.html.j2",
        values={"tables": tables}, missing=missing,
    )  # fmt: skip


def _cell(found: Interval) -> dict[str, str]:
    change, interval = words.with_interval(found)
    verdict = "none" if found.includes(0) else ("better" if found.mean > 0 else "worse")
    return {"change": change, "interval": interval, "verdict": verdict}


def _costs(compared: Compared) -> Section:
    lines = [
        {
            "name": column.name,
            "steps": _amount(column.cost.steps), "rows": _amount(column.cost.rows),
            "evaluations": _amount(column.cost.evaluations),
            "seconds": words.duration(column.cost.seconds) if column.cost.seconds is not None else "not told",
        }
        for column in compared.methods
    ]  # fmt: skip
    values = {"lines": lines, "devices": list(compared.devices)}
    return Section(id="cost", title="What it cost", short="Cost", template="compare_cost.html.j2", values=values)


def _amount(value: float | None) -> str:
    return "not told" if value is None else f"{value:,.0f}"


def _pictures(compared: Compared) -> Section:
    """The same prompts and noise in every column; places are those of the sheets that the evaluations wrote."""
    columns = (compared.columns[0], *compared.methods)
    first = columns[0].sheet
    missing, rows = "", []
    if first is None or any(column.sheet is None for column in columns):
        lacking = next((column.name for column in columns if column.sheet is None), BASE)
        missing = f"The run of {lacking} holds no evaluation pictures (samples/evaluation), so none are shown."
    else:
        places = [{(slot.prompt, slot.index): slot for slot in column.sheet.slots} for column in columns if column.sheet]
        shared = [key for key in places[0] if all(key in place for place in places)]
        sheets = [samples.open_sheet(column.sheet_of, column.model) for column in columns]
        most = min(SHOWN, len(shared))
        for key in [shared[position * len(shared) // most] for position in range(most)]:
            tiles = []
            for column, place, sheet in zip(columns, places, sheets, strict=True):
                slot = place[key]
                source, (width, height) = embed(grids.cut(sheet, slot.box, slot.scale))
                tiles.append({"model": column.name, "source": source, "width": width, "height": height})
            rows.append({"prompt": key[0], "tiles": tiles})
    values = {"heads": [column.name for column in columns], "rows": rows}
    return Section(
        id="pictures", title="The same prompts, the same noise", short="Pictures", template="compare_pictures.html.j2",
        values=values, missing=missing,
    )  # fmt: skip


def _settings(compared: Compared) -> Section:
    values = {"heads": [column.name for column in compared.columns[1:]], "rows": compared.settings}
    return Section(
        id="settings", title="Settings that differ", short="Settings", template="compare_settings.html.j2", values=values,
        missing="" if compared.settings else "Nothing differs.",
    )  # fmt: skip


def table(compared: Compared) -> str:
    """The figures as an aligned text table, for a terminal."""
    names: Sequence[str] = [name for name, _ in compared.rewards]
    rows = [["method", *(text for name in names for text in (f"{name} - {BASE}", "wins")), "evaluations", "seconds"]]
    for column in compared.methods:
        row = [column.name]
        for name in names:
            against = column.against_base[name]
            row += [words.signed_interval(against.difference), words.percent(against.win_rate.mean)]
        seconds = column.cost.seconds
        rows.append([*row, _amount(column.cost.evaluations), "not told" if seconds is None else f"{seconds:.0f}"])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*filter(None, headline(compared)), "", *lines, "", compared.how]).replace(words.NBSP, " ")
