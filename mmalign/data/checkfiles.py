"""The files a check leaves beside a table: report, quarantine list, and the facts with the content they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mmalign.data.files import atomic_file, write_json, write_text
from mmalign.data.mediaindex import MediaIndex
from mmalign.data.reasons import QUARANTINE, Problem
from mmalign.errors import DataError
from mmalign.media import Limits

if TYPE_CHECKING:
    from mmalign.data.check import CheckResult, Facts
    from mmalign.data.tables import PairTable, Table

CHECK_VERSION: Final = 1
STAMP: Final = "stamp.json"
MEDIA: Final = "media.npz"


def check_folder(table_path: Path) -> Path:
    """Where the files of a table's check are."""
    return table_path / "check" if table_path.is_dir() else table_path.with_name(f"{table_path.stem}.check")


def problem_lines(problems: Iterable[Problem]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(problem.as_json(), ensure_ascii=False) + "\n" for problem in problems)


def write_facts(table: PairTable, facts: Facts, limits: Limits) -> None:
    """Store what was found. The stamp comes last: without it the facts count as absent."""
    folder = check_folder(table.path)
    stamp = folder / STAMP
    if stamp.exists():
        stamp.unlink()
    facts.media.save(folder / MEDIA)
    defects = [[row, problem.as_json()] for row, problem in sorted(facts.defects.items())]
    write_json(stamp, {**_identity(table, limits), "flags": dict(facts.flags), "defects": defects})


def read_facts(table: PairTable, limits: Limits) -> Facts:
    """The facts stored for exactly this content.

    Raises:
        DataError: none, or of another content or other limits; names the command that makes them.
    """
    from mmalign.data.check import Facts

    remedy = f"run 'mmalign data check {table.path}', or set data.check: online"
    stamp = check_folder(table.path) / STAMP
    try:
        stored = json.loads(stamp.read_text())
    except FileNotFoundError:
        raise DataError(f"{table.path}: this table has not been checked; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{stamp}: cannot be read ({error}); {remedy}") from error
    identity = _identity(table, limits)
    changed = [name for name, value in identity.items() if stored.get(name) != value]
    if changed:
        what = "the table has changed" if "table" in changed else f"{', '.join(changed)} differ"
        raise DataError(f"{table.path}: {what} since it was checked; {remedy}")
    media = MediaIndex.load(stamp.with_name(MEDIA))
    if len(media) != len(table):
        raise DataError(f"{stamp.with_name(MEDIA)}: belongs to another table; {remedy}")
    defects = {int(row): _problem(values) for row, values in stored["defects"]}
    return Facts(media=media, defects=defects, flags=stored["flags"])


def write_report(table: Table, result: CheckResult) -> None:
    """`report.json`, `report.md` and `quarantine.jsonl`."""
    folder = check_folder(table.path)
    policy = asdict(result.policy)
    counts = result.counts
    summary = {
        "table": table.path.name,
        "fingerprint": table.fingerprint,
        "rows": result.total,
        "used": len(result.rows),
        "quarantined": result.quarantined,
        "reasons": counts,
        "converted_pictures": dict(result.flags),
        "policy": policy,
    }
    write_json(folder / "report.json", summary)
    result.write_quarantine(folder / "quarantine.jsonl")
    write_quarantine_table(folder / "quarantine.parquet", result.problems)
    lines = [f"# Check of {table.path.name}", "", f"{result.total} rows, {len(result.rows)} used.", ""]
    if counts:
        lines += ["| reason | what happened | rows |", "|---|---|---:|"]
        for reason, number in counts.items():
            did = "noted, used" if reason == "conflict" else "quarantined" if reason in QUARANTINE else "dropped"
            lines.append(f"| {reason} | {did} | {number} |")
        lines += ["", "Each row that is not used is listed in `quarantine.jsonl`."]
    if result.flags:
        lines += ["", "Pictures that were converted while decoding:", ""]
        lines += [f"- {flag}: {number}" for flag, number in result.flags.items()]
    limits = policy.pop("limits")
    settings = {**policy, **limits}
    lines += ["", "Policy: " + ", ".join(f"{name}={value}" for name, value in settings.items()), ""]
    write_text(folder / "report.md", "\n".join(lines))


def write_quarantine_table(path: Path, problems: Sequence[Problem]) -> None:
    """The same list as `quarantine.jsonl`, for tools that read tables, with each row's key in one column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("row_id", "source_key", "id", "file", "row", "column", "reason", "action", "detail", "head")
    rows = [{**problem.as_json(), "row_id": problem.id, "source_key": f"{problem.file}:{problem.row}"} for problem in problems]
    kinds = {name: pa.int64() if name == "row" else pa.string() for name in names}
    table = pa.table({name: pa.array([row[name] for row in rows], kinds[name]) for name in names})
    with atomic_file(path) as handle:
        pq.write_table(table, handle)


def write_page(table: Table, result: CheckResult) -> None:
    """`report.html`: the counts, and what was refused, with its pictures where they can be shown."""
    from mmalign.data.checkpage import page

    write_text(check_folder(table.path) / "report.html", page(table, result))


def _identity(table: PairTable, limits: Limits) -> dict[str, Any]:
    return {"version": CHECK_VERSION, "table": table.fingerprint, "rows": len(table), "limits": asdict(limits)}


def _problem(values: dict[str, Any]) -> Problem:
    names = ("file", "row", "id", "column", "reason", "detail", "head")
    return Problem(**{name: values[name] for name in names if name in values})
