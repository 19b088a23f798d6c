"""``mmalign list``: the names that experiment files can use, with what they mean and where they come from."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import typer

from mmalign.registry import Registry

Kind = Literal["methods", "objectives", "models", "formats", "samplers", "judges"]
_GAP = "  "


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("list")(list_names)


def list_names(
    what: Annotated[Kind, typer.Argument(metavar="methods|objectives|models|formats|samplers|judges", help="What to list.")],
) -> None:
    """List methods, objectives, model families, data formats, or samplers or judges of answers.

    Rewards have a command of their own: mmalign rewards list.
    """
    entries = [(entry.name, entry.summary, entry.cite) for entry in _registry(what)]
    typer.echo(table(entries, width=shutil.get_terminal_size((120, 24)).columns))


def table(rows: Iterable[tuple[str, str, str]], *, width: int) -> str:
    """Names, meanings and sources in three columns; meanings and sources wrap to share `width` characters."""
    rows = list(rows)
    name_width = max((len(name) for name, _, _ in rows), default=0)
    cite_width = min(max((len(cite) for _, _, cite in rows), default=0), max(width // 3, 16))
    summary_width = max(width - name_width - cite_width - 2 * len(_GAP), 24)
    lines: list[str] = []
    for name, summary, cite in rows:
        left = textwrap.wrap(summary, summary_width) or [""]
        right = textwrap.wrap(cite, max(cite_width, 1)) or [""]
        for index in range(max(len(left), len(right))):
            meaning = left[index] if index < len(left) else ""
            source = right[index] if index < len(right) else ""
            cells = (f"{name if index == 0 else '':<{name_width}}", f"{meaning:<{summary_width}}", source)
            lines.append(_GAP.join(cells).rstrip())
    return "\n".join(lines)


def _registry(what: Kind) -> Registry[Any]:
    if what == "methods":
        from mmalign.trainers import METHODS

        return METHODS
    if what == "objectives":
        from mmalign.objectives import OBJECTIVES

        return OBJECTIVES
    if what == "models":
        from mmalign.models.table import MODELS

        return MODELS
    if what == "samplers":
        from mmalign.sampling import ANSWER_SAMPLERS

        return ANSWER_SAMPLERS
    if what == "judges":
        from mmalign.rewards.answers import ANSWER_JUDGES

        return ANSWER_JUDGES
    from mmalign.data import FORMATS

    return FORMATS
