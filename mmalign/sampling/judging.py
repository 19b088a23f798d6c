"""Judges read lists of answers and write what they think into a new table: the middle of every recipe without human labels.

``mmalign generate`` with a sampler makes the lists, ``mmalign data pairs`` makes pairs of what this writes. The input is never
changed, and scores that it already holds are kept. A judge that is a model keeps its replies on disk, so that an interrupted
run, or a run with one more judge, asks for nothing twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.branches import BranchRecord, Judgement
from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.data.vlm import VlmTable
    from mmalign.rewards.answers import AnswerJudge

ROWS_PER_PART = 64
"""Lists judged between two writes: with a local model, what an interruption costs."""
UNREADABLE = "unreadable_row"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedReport:
    """What came of a run."""

    path: Path | str
    rows: int
    answers: int
    unreadable: int
    """Rows of the input that could not be read; they are not in the table."""
    missing: Mapping[str, Mapping[str, int]]
    """Judge -> reason -> answers without a score."""
    judges: Mapping[str, Mapping[str, float]]
    """Judge -> low, mean and high of the scores."""
    replies: Path | None = None

    @property
    def failed(self) -> int:
        """Rows left out, and (answer, judge) without a score."""
        return self.unreadable + sum(sum(counts.values()) for counts in self.missing.values())

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.rows} rows, {self.answers} answers"]
        for name, numbers in self.judges.items():
            lines.append(f"  {name}: low {numbers['low']:.6g}, mean {numbers['mean']:.6g}, high {numbers['high']:.6g}")
        for name, counts in self.missing.items():
            lines += [f"  {name}: no score for {number} answers: {reason}" for reason, number in counts.items()]
        if self.unreadable:
            lines.append(f"  {self.unreadable} rows could not be read and are left out")
        if self.failed:
            lines.append(f"  listed in {self.path}/annotate/failed.jsonl")
        if self.replies is not None:
            lines.append(f"  replies are kept in {self.replies}")
        return "\n".join(lines)


def judge_lists(
    source: str | Path,
    out: str | Path,
    judges: Sequence[str],
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    replies: str | Path | None = None,
    progress: bool = True,
) -> JudgedReport:
    """Score every answer of a table of lists; run again after an interruption and it goes on.

    Args:
        out: folder of the new table. Beside its rows: ``annotate/judgements.jsonl`` (a line per answer and judge, with counts and
            the errors in words), ``annotate/failed.jsonl`` and ``annotate/summary.json``.
        judges: names of `mmalign.rewards.answers.ANSWER_JUDGES`, with their arguments.
        options: judge's name in front of the colon -> settings.
        replies: where the replies of judges that are models are kept; default: ``<out>.replies.jsonl``.

    Raises:
        DataError: the input holds no lists, already holds a judge's scores, or `out` is taken.
        ConfigError: an unknown judge. RewardError: a judge cannot be loaded or asked; what is done is kept.
    """
    from mmalign.data.partfolder import PartFolder
    from mmalign.data.progress import progress_bar
    from mmalign.data.schema import sampled_schema
    from mmalign.data.vlm import open_vlm
    from mmalign.rewards.answers import load_judge

    if not judges:
        raise DataError("annotate: name at least one judge; see 'mmalign list judges'")
    table = open_vlm(source, progress=progress)
    held = score_names(table)
    _require_new(source, table, judges, held)
    kept = Path(replies) if replies is not None else Path(f"{out}.replies.jsonl")
    given = {name: dict(values) for name, values in (options or {}).items()}
    job = {"input": table.fingerprint, "judges": list(judges), "options": given}
    folder = PartFolder(out, job, max(1, math.ceil(len(table) / ROWS_PER_PART)))
    missing = folder.missing()
    if missing:
        loaded = {name: load_judge(name, options=_options(name, given), replies=kept) for name in judges}
        schema = sampled_schema("lists", (*held, *judges))
        with progress_bar("Judging", len(table), enabled=progress) as advance:
            advance(len(table) - sum(len(_numbers(table, number)) for number in missing))
            for number in missing:
                rows, notes = _part(table, _numbers(table, number), held, loaded, folder.building)
                folder.write(number, rows, schema, notes)
                advance(len(_numbers(table, number)))
    return _finish(folder, tuple(judges), kept)


def _options(name: str, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a judge: those of its own name, and of the judge within it (``lc:green-api:...``)."""
    return {key: value for part in name.split(":") for key, value in given.get(part, {}).items()}


def score_names(table: VlmTable) -> tuple[str, ...]:
    """Judges whose scores some row of the table has, in the order in which they appear."""
    names: dict[str, None] = {}
    if "scores" in table.columns:
        for row in range(len(table)):
            names.update(dict.fromkeys(name for name, value in (table.values(row).get("scores") or {}).items() if value))
    return tuple(names)


def _require_new(source: str | Path, table: VlmTable, judges: Sequence[str], held: Sequence[str]) -> None:
    if table.kind != "lists":
        raise DataError(
            f"{source}: holds {table.kind} of answers; judges score lists (prompt, answers), as 'mmalign generate' with "
            "'sampler: candidates' makes them"
        )
    if len(set(judges)) != len(judges):
        raise DataError(f"annotate: a judge is named twice: {', '.join(judges)}")
    taken = [name for name in judges if name in held]
    if taken:
        raise DataError(f"{source}: already holds scores of {', '.join(taken)}; nothing is replaced, so leave them out")


def _numbers(table: VlmTable, part: int) -> range:
    return range(part * ROWS_PER_PART, min((part + 1) * ROWS_PER_PART, len(table)))


@dataclass(frozen=True, slots=True)
class _Read:
    records: list[BranchRecord] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)


def _read(table: VlmTable, numbers: range) -> _Read:
    from mmalign.data.vlm_rows import RowProblem

    found = _Read()
    for row in numbers:
        try:
            record = table.record(row)
        except RowProblem as problem:
            found.notes.append(
                {"id": table.row_id(row), "where": table.where(row), "reason": UNREADABLE, "detail": str(problem)}
            )
            continue
        if len(record.answers) < 2:
            detail = f"{len(record.answers)} answers make no list"
            found.notes.append({"id": record.id, "where": table.where(row), "reason": UNREADABLE, "detail": detail})
            continue
        found.records.append(record)
    return found


def _part(
    table: VlmTable, numbers: range, held: Sequence[str], judges: Mapping[str, AnswerJudge], folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one part, and a note for every judgement and every row that cannot be read."""
    from mmalign.rewards.answers import judgements
    from mmalign.sampling.base import SampledRow
    from mmalign.sampling.table import table_row

    read = _read(table, numbers)
    owners = [record for record in read.records for _ in record.answers]
    texts = [answer.text for record in read.records for answer in record.answers]
    found = {name: judgements(judge, owners, texts) for name, judge in judges.items()}
    rows, notes, at = [], list(read.notes), 0
    for record in read.records:
        own = slice(at, at + len(record.answers))
        at += len(record.answers)
        scores: dict[str, list[float | None]] = {
            name: [answer.scores.get(name) for answer in record.answers] for name in held
        }
        for name, judged in found.items():
            scores[name] = [_finite(one) for one in judged[own]]
            notes += [_note(record.id, place, name, one) for place, one in enumerate(judged[own])]
        row = SampledRow(
            id=record.id, record=record, answers=tuple(answer.text for answer in record.answers), scores=scores,
            stage=record.stage or None,
        )  # fmt: skip
        rows.append(table_row(row, "lists", tuple(scores), folder, dict(record.meta.get("sampled") or {})))
    return rows, notes


def _finite(found: Judgement) -> float | None:
    return float(found.score) if found.score is not None and math.isfinite(found.score) else None


def _note(row: str, place: int, judge: str, found: Judgement) -> dict[str, Any]:
    score = _finite(found)
    return {
        "id": row, "answer": place, "judge": judge, "score": score, "parts": dict(found.parts), "notes": list(found.notes),
        "reason": None if score is not None else found.reason or "no_score",
    }  # fmt: skip


def _finish(folder: Any, judges: tuple[str, ...], replies: Path) -> JudgedReport:
    """Name the table, with the judgements, a list of failures and a summary beside the parts."""
    notes = folder.notes()
    judged = [note for note in notes if note["reason"] != UNREADABLE]
    failed = [note for note in notes if note["reason"] is not None]
    rows = [row for number in range(folder.parts) for row in folder.rows(number, columns=["answers"])]
    summary: dict[str, dict[str, float]] = {}
    missing: dict[str, dict[str, int]] = {}
    for name in judges:
        values = [note["score"] for note in judged if note["judge"] == name and note["score"] is not None]
        if values:
            summary[name] = {"low": min(values), "mean": sum(values) / len(values), "high": max(values)}
        for note in judged:
            if note["judge"] == name and note["reason"] is not None:
                counts = missing.setdefault(name, {})
                counts[note["reason"]] = counts.get(note["reason"], 0) + 1
    unreadable = len(notes) - len(judged)
    said = {"rows": len(rows), "unreadable": unreadable, "judges": summary, "missing": missing}
    out = folder.finish(
        {
            "annotate/judgements.jsonl": _lines(judged), "annotate/failed.jsonl": _lines(failed),
            "annotate/summary.json": json.dumps(said, indent=2, ensure_ascii=False) + "\n",
        }
    )  # fmt: skip
    return JudgedReport(
        path=out, rows=len(rows), answers=sum(len(row["answers"]) for row in rows), unreadable=unreadable, missing=missing,
        judges=summary, replies=replies if replies.exists() else None,
    )  # fmt: skip


def _lines(notes: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(dict(note), ensure_ascii=False) + "\n" for note in notes)
