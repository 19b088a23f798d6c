"""Sections about where the result comes from: what was refused, with which settings, in which environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmalign.report.folder import RunData
from mmalign.report.section import Section

EXAMPLES = 3
FIRST = ("method", "model", "tuning", "reference", "data", "optim", "evaluate", "run")
"""Order in which people ask."""


def refused(run: RunData) -> Section:
    """Every reason for which inputs could not be used, most frequent first, with examples."""
    missing = ""
    if run.quarantine is None and run.summary.get("samples_quarantined") != 0:
        missing = "quarantine.jsonl is not in this run folder, so it is not known whether inputs were refused."
    by_reason: dict[str, list[Mapping[str, Any]]] = {}
    for row in run.quarantine or ():
        by_reason.setdefault(str(row.get("reason") or "no reason given"), []).append(row)
    reasons = [
        {"reason": reason, "count": len(rows), "examples": [_example(row) for row in rows[:EXAMPLES]]}
        for reason, rows in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    values = {"reasons": reasons, "total": sum(len(rows) for rows in by_reason.values())}
    return Section(
        id="refused",
        title="What was refused",
        short="Refused",
        template="refused.html.j2",
        values=values,
        missing=missing,
    )


def settings(run: RunData) -> Section:
    """The resolved experiment: section by section, and the file itself."""
    missing = (
        "" if run.config_text is not None else "config.yaml is not in this run folder, so the settings are not known."
    )
    names = [name for name in FIRST if name in run.config] + [name for name in run.config if name not in FIRST]
    tables = [{"name": name, "rows": list(_flat(run.config[name]))} for name in names if run.config[name] is not None]
    values = {"tables": tables, "text": run.config_text}
    return Section(
        id="settings", title="Settings", short="Settings", template="settings.html.j2", values=values, missing=missing
    )


def environment(run: RunData) -> Section:
    """Versions, device, git state and command."""
    missing = "" if run.environment is not None else "environment.json is not in this run folder."
    values = {"rows": list(_flat(run.environment or {}))}
    return Section(
        id="environment",
        title="Environment",
        short="Environment",
        template="environment.html.j2",
        values=values,
        missing=missing,
    )


def _example(row: Mapping[str, Any]) -> str:
    """File, row and id, then whatever else was noted."""
    place = " · ".join(f"{name} {row[name]}" for name in ("row", "id") if row.get(name) not in (None, ""))
    rest = "; ".join(
        str(value)
        for name, value in row.items()
        if name not in ("file", "row", "id", "reason") and value not in (None, "", [], {})
    )
    return " — ".join(part for part in (str(row.get("file") or ""), place, rest) if part)


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) for every leaf."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{at}.{name}" if at else str(name))
    else:
        yield at, _leaf(value)


def _leaf(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_leaf(item) for item in value) or "–"
    return str(value) if value != {} else "–"
