"""The joined table, its metadata and the closing report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign import __version__
from mmalign.data.files import atomic_file, write_json
from mmalign.errors import DataError
from mmalign.scoring.ensembles import add_ensemble
from mmalign.scoring.job import Worker

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What happened, for people and for exit codes."""

    rows: int
    failed: int
    """Rows with at least one image and reward without a score."""
    reasons: Mapping[str, int]
    """Reason -> number of cells (row, image column and reward)."""
    truncated: int
    converted: Mapping[str, int]
    """What had to be done to pictures -> how often."""
    rewards: Mapping[str, Mapping[str, float]]
    """Column -> mean, 5 %, 50 % and 95 % quantile, count."""
    ensembles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What decided the numbers of every combined column."""
    checks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The precision check of every reward."""
    decode_wait: float = 0.0
    """Seconds the reporting process waited for pictures; the rest of its time it computed."""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def column_name(reward: str, column: str, columns: Sequence[str]) -> str:
    """``reward`` for one image column, ``reward__column`` for several."""
    return reward if len(columns) == 1 else f"{reward}__{column}"


def join(worker: Worker, out: Path, command: str, checks: Mapping[str, Any] | None = None) -> Report:
    """Join all parts into the output file; it appears complete or not at all.

    Args:
        checks: what was measured before the run, for the table's metadata.

    Raises:
        DataError: the suffix is none of ours, a part vanished, or the file cannot be written.
    """
    check_suffix(out)
    columns, names = worker.source.columns, worker.job.rewards
    pieces: list[pa.Table] = []
    flags: dict[str, int] = {}
    for start, stop in worker.ranges():
        tables = {}
        part_flags: dict[str, int] = {}
        for name in names:
            key = worker.key(name, start, stop)
            table = worker.store.load(key)
            if table is None:
                raise DataError(f"a finished part vanished from {worker.store.folder}; run the same command again")
            tables[name] = table
            for flag, count in worker.store.report(key).get("flags", {}).items():
                part_flags[flag] = max(part_flags.get(flag, 0), count)
        for flag, count in part_flags.items():
            flags[flag] = flags.get(flag, 0) + count
        pieces.append(_piece(worker, start, stop, tables))
    import pyarrow as pa

    table = pa.concat_tables(pieces) if pieces else pa.table({"key": pa.array([], pa.string())})
    ensembles = {}
    for spec in worker.job.ensembles if pieces else ():
        table, ensembles[spec.name] = add_ensemble(table, spec, names, columns, Path(worker.job.input))
    facts = {**_facts(worker, command), "ensembles": ensembles, "precision_check": dict(checks or {})}
    _write(table.replace_schema_metadata({b"mmalign": json.dumps(facts).encode()}), out)
    if out.suffix != ".parquet":
        write_json(out.with_name(f"{out.name}.meta.json"), facts)
    if worker.job.embeddings is not None:
        _write_embeddings(worker, Path(worker.job.embeddings), facts)
    report = _report(table, [*names, *ensembles], columns, flags)
    return replace(report, ensembles=ensembles, checks=dict(checks or {}), decode_wait=worker.decode_wait)


def _write_embeddings(worker: Worker, out: Path, facts: Mapping[str, Any]) -> None:
    """The image embeddings, part by part: ``key`` and one list column per reward (and image column).

    Raises:
        DataError: no reward of the run has embeddings.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, kinds = worker.source.columns, dict[str, Any]()
    for start, stop in worker.ranges():
        kinds |= {title: array.type for title, array in _vectors_of(worker, start, stop).items()}
    if not kinds:
        raise DataError(f"{', '.join(worker.job.rewards)}: none of these has image embeddings")
    titles = [column_name(name, column, columns) for name in worker.job.rewards for column in columns]
    titles = [title for title in titles if title in kinds]
    schema = pa.schema([("key", pa.string()), *((title, kinds[title]) for title in titles)])
    metadata = {b"mmalign": json.dumps(facts).encode()}
    with atomic_file(out) as stream, pq.ParquetWriter(stream, schema.with_metadata(metadata)) as writer:
        for start, stop in worker.ranges():
            rows, found = worker.source.rows(start, stop), _vectors_of(worker, start, stop)
            arrays = [found.get(title, pa.nulls(len(rows), kinds[title])) for title in titles]
            keys = pa.array([_writable(row.key) for row in rows], pa.string())
            writer.write_table(pa.table([keys, *arrays], schema=schema))


def _vectors_of(worker: Worker, start: int, stop: int) -> dict[str, Any]:
    out = {}
    for name in worker.job.rewards:
        part = worker.store.load(worker.key(name, start, stop))
        for column in worker.source.columns:
            if part is not None and f"embedding.{column}" in part.column_names:
                out[column_name(name, column, worker.source.columns)] = part[f"embedding.{column}"].combine_chunks()
    return out


def check_outputs(out: Path, embeddings: Path | None) -> None:
    """Refuse an output name before hours of scoring, not after."""
    check_suffix(out)
    if embeddings is not None:
        if embeddings.suffix != ".parquet" or embeddings.resolve() == out.resolve():
            raise DataError(f"{embeddings}: embeddings go into a .parquet file of their own")
        check_suffix(embeddings)


def check_suffix(out: Path) -> None:
    """Refuse an output name before hours of scoring, not after."""
    if out.suffix not in SUFFIXES:
        raise DataError(f"{out}: the output is one of {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise DataError(f"{out}: the folder {out.parent} does not exist")


def _piece(worker: Worker, start: int, stop: int, tables: Mapping[str, pa.Table]) -> pa.Table:
    import pyarrow as pa

    rows, columns = worker.source.rows(start, stop), worker.source.columns
    data: dict[str, pa.Array] = {
        "key": pa.array([_writable(row.key) for row in rows], pa.string()),
        "prompt": pa.array([None if row.prompt is None else _writable(row.prompt) for row in rows], pa.string()),
    }
    problems: list[list[str]] = [[] for _ in rows]
    truncated = [False] * len(rows)
    for name, table in tables.items():
        for column in columns:
            title = column_name(name, column, columns)
            data[title] = table[f"value.{column}"].combine_chunks()
            for index, reason in enumerate(table[f"error.{column}"].to_pylist()):
                if reason is not None:
                    problems[index].append(f"{title}:{reason}")
            for index, cut in enumerate(table[f"truncated.{column}"].to_pylist()):
                truncated[index] = truncated[index] or cut
    data["truncated"] = pa.array(truncated, pa.bool_())
    data["status"] = pa.array(["failed" if found else "ok" for found in problems], pa.string())
    data["error"] = pa.array([";".join(found) or None for found in problems], pa.string())
    return pa.table(data)


def _facts(worker: Worker, command: str) -> dict[str, Any]:
    backends = zip(worker.job.rewards, worker.scorers().backends, strict=True)
    return {
        "version": __version__,
        "input": worker.source.fingerprint,
        "command": command,
        "colours": worker.job.colours.name,
        "rewards": {
            name: {"card": item.card.as_dict(), "record": dict(item.record()), "device": str(item.device)}
            for name, item in backends
        },
    }


def _write(table: pa.Table, out: Path) -> None:
    import pyarrow.parquet as pq

    if out.suffix == ".parquet":
        with atomic_file(out) as stream:
            pq.write_table(table, stream)
        return
    with atomic_file(out, "w+") as stream:
        writer = csv.writer(stream)
        if out.suffix == ".csv":
            writer.writerow(table.column_names)
        for batch in table.to_batches(max_chunksize=4096):
            for row in batch.to_pylist():
                # JSON and CSV have no NaN: a score that is not there is null, or empty.
                plain = {name: None if _is_nan(value) else value for name, value in row.items()}
                if out.suffix == ".csv":
                    writer.writerow(plain.values())
                else:
                    stream.write(json.dumps(plain, ensure_ascii=False) + "\n")


def _writable(text: str) -> str:
    """Text that files can hold: half a surrogate pair, which JSON can smuggle in, is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _report(table: pa.Table, names: Sequence[str], columns: Sequence[str], flags: dict[str, int]) -> Report:
    import numpy as np

    reasons: dict[str, int] = {}
    for text in table["error"].to_pylist() if "error" in table.column_names else ():
        # A row that fails for several rewards or pictures by one reason is one failed row.
        for reason in {item.rpartition(":")[2] for item in text.split(";")} if text else ():
            reasons[reason] = reasons.get(reason, 0) + 1
    summary: dict[str, dict[str, float]] = {}
    for name in names:
        for column in columns:
            title = column_name(name, column, columns)
            values = (
                np.asarray(table[title].to_numpy(), dtype=np.float64) if title in table.column_names else np.empty(0)
            )
            values = values[np.isfinite(values)]
            summary[title] = {"count": len(values)}
            if len(values):
                low, middle, high = (float(item) for item in np.quantile(values, [0.05, 0.5, 0.95]))
                summary[title] |= {"mean": float(values.mean()), "q05": low, "q50": middle, "q95": high}
    scored = "status" in table.column_names
    return Report(
        rows=table.num_rows,
        failed=table["status"].to_pylist().count("failed") if scored else 0,
        reasons=reasons,
        truncated=sum(table["truncated"].to_pylist()) if scored else 0,
        converted=flags,
        rewards=summary,
    )
