"""Section of people: pictures of the same prompts and noise for everybody a personalised run was asked about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.report import words
from mmalign.report.folder import RunData
from mmalign.report.pictures import SHEET_WIDTH, embed
from mmalign.report.section import Section
from mmalign.statistics import Interval

SHEETS_SHOWN = 8
"""Sheets of single people, the newest first."""


def is_personal(run: RunData) -> bool:
    """Whether the run trained for users."""
    return isinstance(method := run.config.get("method"), dict) and isinstance(method.get("users"), dict)


def people(run: RunData) -> Section:
    """What ``RUN/personal`` holds: the table and sheet of the demonstration, and the sheets of ``mmalign personalize``."""
    folder, problems = run.folder / "personal", list[str]()
    found = sorted(folder.glob("*/personal.json"), key=lambda path: -path.stat().st_mtime)
    values: dict[str, Any] = {
        "rows": _rows(folder / "people.json", problems), "sheet": _sheet(folder / "people.png", problems),
        "single": [one for path in found[:SHEETS_SHOWN] if (one := _single(path, problems)) is not None],
        "left_out": max(0, len(found) - SHEETS_SHOWN), "problems": problems,
    }  # fmt: skip
    there = values["rows"] or values["sheet"] or values["single"] or problems
    missing = "" if there else "no pictures were made for anybody yet: mmalign personalize RUN --pairs FILE --prompts TEXT."
    return Section(
        id="people", title="Person by person", short="People", template="people.html.j2", values=values, missing=missing
    )


def headline(run: RunData) -> str:
    """The result of a personalised run in one sentence; '' where nobody's pictures were compared."""
    rows = _rows(run.folder / "personal" / "people.json", [])
    told = []
    for kind, name in (("trained", "trained on"), ("never seen", "never seen")):
        means = [row["mean"] for row in rows if row["kind"] == kind]
        if means:
            told.append(f"{words.percent(sum(means) / len(means))} for {words.count(len(means), 'person', 'people')} {name}")
    return f"Own pictures win against the base by own taste: {', '.join(told)}." if told else ""


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        rows = []
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            rate = Interval.from_dict(row["win_rate"])
            rows.append({
                "person": str(row["person"]), "likes": str(row["likes"]), "kind": "trained" if row["trained"] else "never seen",
                "mean": rate.mean, "wins": words.percent(rate.mean), "range": words.percent_range(rate),
                "verdict": "better" if rate.low > 0.5 else "worse" if rate.high < 0.5 else "",
            })  # fmt: skip
        return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"personal/{path.name} cannot be read: {error}")
        return []


def _sheet(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            source, (width, height) = embed(image.convert("RGB"), SHEET_WIDTH)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        problems.append(f"{path.parent.name}/{path.name} cannot be shown: {error}")
        return None
    return {"source": source, "width": width, "height": height}


def _single(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        who = ", ".join(f"{key[:12]} {weight:g}" for key, weight in zip(told["users"], told["weights"], strict=True))
        text = f"{who}; scale {told['scale']:g}, guidance {told['guidance']:g}, seed {told['seed']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{path.parent.name}/{path.name} cannot be read: {error}")
        return None
    sheet = _sheet(path.with_name("grid.png"), problems)
    return None if sheet is None else {**sheet, "text": text}
