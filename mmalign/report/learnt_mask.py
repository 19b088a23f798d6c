"""Section of a freeze mask that a run learnt: how much of every block and kind of layer it freezes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.freezing import FreezeMask, FreezingError
from mmalign.freezing.mask import FILE_NAME
from mmalign.report import words
from mmalign.report.folder import RunData
from mmalign.report.masks import by_block, by_kind
from mmalign.report.section import Section
from mmalign.trainers import METHODS


def makes_mask(run: RunData) -> bool:
    """Whether the run's method learns a mask: it makes neither pictures nor answers to compare."""
    method = run.config.get("method")
    name = str(method.get("name", "")) if isinstance(method, Mapping) else ""
    return name in METHODS.names() and METHODS.get(name).batches == "domains"


def headline(run: RunData) -> str:
    """What the mask freezes, in one sentence; '' where the run learnt none."""
    mask = _mask(run)[0] if makes_mask(run) else None
    if mask is None:
        return ""
    every = list(mask.tensors.values())
    held = sum(entry.parameters for entry in every if entry.frozen) / max(1, sum(entry.parameters for entry in every))
    share = words.percent(len(mask.frozen) / max(1, len(every)))
    return f"The mask freezes {share} of the tensors, which hold {words.percent(held)} of the parameters."


def learnt_mask(run: RunData) -> Section:
    """Shares by block, in the order in which data passes, and by kind of layer, the largest first."""
    mask, problem = _mask(run)
    tables = []
    if mask is not None:
        for title, first, rows in (("By block", "Block", by_block(mask)), ("By kind of layer", "Kind", by_kind(mask))):
            tables.append({"title": title, "first": first, "rows": [_row(label, row) for label, row in rows.items()]})
    template, values = "learnt_mask.html.j2", {"tables": tables}
    return Section(id="mask", title="What is frozen", short="Mask", template=template, values=values, missing=problem)


def _mask(run: RunData) -> tuple[FreezeMask | None, str]:
    path = run.folder / "export" / FILE_NAME
    if not path.is_file():
        return None, f"export/{FILE_NAME} is not in this run folder: no mask was learnt yet."
    try:
        return FreezeMask.load(path), ""
    except FreezingError as error:
        return None, str(error)


def _row(label: str, row: Mapping[str, float]) -> dict[str, Any]:
    return {
        "label": label, "count": f"{row['count']:,.0f}", "size": f"{row['size']:,.0f}",
        "tensors": words.percent(row["tensors"]), "parameters": words.percent(row["parameters"]),
        "width": f"{100 * row['parameters']:.1f}",
    }  # fmt: skip
