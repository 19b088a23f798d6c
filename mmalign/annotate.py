"""Rewards read pictures and write what they think into a new table: scores, and for lists win rates, ranks and labels.

The second half of the Syn-Pic pipeline (arXiv:2410.18013 section 3): `generate` makes candidates, this ranks them without
a human label. The input is never changed, and scores that it already holds are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from mmalign.data import PairTable, RankedTable
    from mmalign.data.engines import Engine
    from mmalign.scoring.stored import StoredScores

ROWS_PER_PART = 256
COMPUTED = ("phi", "ranks", "soft_label", "disagreement")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotateReport:
    """What came of a run."""

    path: Path | str
    rows: int
    pictures: int
    failed: int
    """(picture, reward) without a score."""
    rewards: Mapping[str, Mapping[str, float]]
    """Reward -> low, mean and high of the table's scores; low and high are what score-based labels normalise with."""

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.rows} rows, {self.pictures} pictures"]
        for name, numbers in self.rewards.items():
            lines.append(f"  {name}: low {numbers['low']:.6g}, mean {numbers['mean']:.6g}, high {numbers['high']:.6g}")
        if self.failed:
            lines.append(f"  {self.failed} scores are missing; see {self.path}/annotate/failed.jsonl")
        return "\n".join(lines)


def annotate(
    source: str | Path,
    out: str | Path,
    rewards: Sequence[str],
    *,
    paths: Mapping[str, str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    local_files_only: bool = False,
    shard: tuple[int, int] = (0, 1),
    engine: Engine = "local",
    workers: int | None = None,
    gpus: float | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> AnnotateReport | None:
    """Score every picture of a table of pairs or of ranked lists; run again after an interruption and it goes on.

    Lists gain ``phi`` (share of comparisons won over all rewards of the row), ``ranks`` (1 = best, ties share the mean),
    ``soft_label`` (share of rewards that prefer the best to the worst candidate, ties half) and ``disagreement`` (0: no
    two rewards contradict each other). A picture that cannot be scored has a null score and is listed.

    Args:
        out: folder of the new table.
        rewards: names; see `mmalign rewards list`.
        paths: reward -> folder with its weights.
        shard: (i, n): make every n-th part from the i-th on. Shards may run at once, on machines that share the folder.
        engine: ``processes`` or ``ray`` have the parts made by others, which must see the same folder; the rows are the same.
        workers, gpus: as of ``mmalign.data.engines.each_part``.
        cache: folder of caches in which scores are looked up first and kept, so that a picture is scored once for all tables.

    Returns:
        what came of it; None while other shards have parts to make.

    Raises:
        DataError: the input is neither kind of table, already holds scores of a reward, or `out` is taken.
        RewardError: a reward cannot be loaded.
        MissingExtraError: Ray is not installed.
    """
    from mmalign.data.engines import each_part
    from mmalign.data.progress import progress_bar

    make = partial(
        Annotator, str(source), str(out), tuple(rewards), paths=dict(paths or {}), device=device, dtype=dtype,
        batch_size=batch_size, local_files_only=local_files_only, shared=shard[1] > 1,
        cache=None if cache is None else str(cache),
    )  # fmt: skip
    own = make()
    missing = own.folder.missing(shard)
    if engine != "local":
        for _ in each_part(
            make, missing, engine=engine, workers=workers, gpus=gpus, title="Annotating", progress=progress
        ):
            pass
    else:
        with progress_bar("Annotating", len(own.table), enabled=progress) as advance:
            advance(len(own.table) - sum(len(_numbers(own.table, number)) for number in missing))
            for number in missing:
                advance(own(number))
    with own.folder.finishing() as mine:
        return _finish(own.folder, own.table, own.rewards) if mine else None


class Annotator:
    """Makes parts of an annotated table; the rewards are loaded when the first part needs them."""

    def __init__(
        self, source: str, out: str, rewards: tuple[str, ...], *, paths: dict[str, str], device: str | None, dtype: str | None,
        batch_size: int | None, local_files_only: bool, shared: bool, cache: str | None,
    ) -> None:  # fmt: skip
        from mmalign import rewards as registry
        from mmalign.data.partfolder import PartFolder

        if not rewards:
            raise DataError("annotate: name at least one reward; see 'mmalign rewards list'")
        self.table, self.rewards, self.batch_size = open_either(source), rewards, batch_size
        taken = [name for name in rewards if name in self.table.rewards]
        if taken:
            raise DataError(f"{source}: already holds scores of {', '.join(taken)}; nothing is replaced, so leave them out")
        job = {"input": self.table.fingerprint, "rewards": list(rewards), "paths": paths, "dtype": dtype}
        self.folder = PartFolder(out, job, max(1, math.ceil(len(self.table) / ROWS_PER_PART)), shared=shared)
        self._load = partial(
            registry.load, list(rewards), path=dict(paths), device=device, dtype=dtype, local_files_only=local_files_only
        )
        self._scorers: Any = None
        self._cache = cache
        self._store: StoredScores | None = None

    def __call__(self, number: int) -> int:
        """Make one part; returns the number of its rows."""
        if self._scorers is None:
            self._scorers = self._load()
            if self._cache is not None:
                from mmalign.scoring.stored import StoredScores

                self._store = StoredScores(self._scorers, self._cache)
        rows, notes = _part(self.table, _numbers(self.table, number), self.rewards, self._ask)
        if self._store is not None:
            self._store.flush()
        self.folder.write(number, rows, _schema(self.table, self.rewards), notes)
        return len(rows)

    def _ask(self, images: Sequence[Any], prompts: Sequence[str], users: Sequence[str | None]) -> Mapping[str, Any]:
        if self._store is not None:
            return self._store.score(images, prompts, batch_size=self.batch_size, users=users)
        found: Mapping[str, Any] = self._scorers.score(
            images, prompts, batch_size=self.batch_size, details=True, on_error="nan", users=users
        )
        return found


def open_either(source: str | Path) -> PairTable | RankedTable:
    """A table of ranked lists where there is a column `images`, else a table of pairs."""
    from mmalign import data
    from mmalign.data.storage import open_storage

    names = open_storage(source).parts[0].schema.names
    return data.open_ranked(source) if "images" in names else data.open_table(source)


def _numbers(table: PairTable | RankedTable, part: int) -> range:
    return range(part * ROWS_PER_PART, min((part + 1) * ROWS_PER_PART, len(table)))


def _part(
    table: PairTable | RankedTable, numbers: range, rewards: tuple[str, ...],
    ask: Callable[[Sequence[Any], Sequence[str], Sequence[str | None]], Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one part, and a note for every score that is missing."""
    records = [table[number] for number in numbers]
    images = [_images(record) for record in records]
    flat = [image for row in images for image in row]
    prompts = [record.prompt for record, row in zip(records, images, strict=True) for _ in row]
    users = [record.user for record, row in zip(records, images, strict=True) for _ in row]
    found = ask(flat, prompts, users) if flat else {}
    rows, notes, at = [], [], 0
    for number, record, row in zip(numbers, records, images, strict=True):
        scores: dict[str, list[float | None]] = {
            name: [_plain(value) for value in record.scores[name]] if name in record.scores else [None] * len(row)
            for name in table.rewards
        }
        for name in rewards:
            details = found[name]
            scores[name] = [_plain(value) for value in details.values[at : at + len(row)].tolist()]
            notes += [
                {"id": record.id, "where": table.where(number), "picture": place, "reward": name,
                 "reason": details.errors[at + place], "detail": details.messages[at + place]}
                for place in range(len(row)) if scores[name][place] is None
            ]  # fmt: skip
        at += len(row)
        rows.append(_row(table, number, scores))
    return rows, notes


def _images(record: Any) -> tuple[Any, ...]:
    from mmalign.types import RankedRecord

    return record.images if isinstance(record, RankedRecord) else (record.chosen, record.rejected)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _row(table: PairTable | RankedTable, number: int, scores: dict[str, list[float | None]]) -> dict[str, Any]:
    """One row of the output: what the input holds, pictures inside, and the scores."""
    from mmalign.data.ranked import RankedTable

    values = table.values(number)
    known = set(_schema(table, ()).names)
    kept = json.loads(values["meta"]) if values.get("meta") else {}
    more = {name: value for name, value in values.items() if name not in (*known, *COMPUTED, "scores") and _is_plain(value)}
    base = {name: value for name, value in values.items() if name in known and name not in ("scores", "meta")}
    base |= {name: str(base[name]) for name in ("user", "group") if base.get(name) is not None}
    base |= {"id": str(values["id"]), "scores": scores, "meta": json.dumps({**kept, **more}, ensure_ascii=False)}
    if isinstance(table, RankedTable):
        base["images"] = [_embedded(image) for image in table[number].images]
        base |= rank_row(scores)
    else:
        record = table[number]
        base |= {"chosen": _embedded(record.chosen), "rejected": _embedded(record.rejected)}
        base |= {"p_chosen": record.p_chosen, "weight": record.weight}
    return base


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _embedded(image: Any) -> dict[str, Any]:
    """A picture as the table stores it; one that cannot be read stays null and is listed as unscored."""
    from mmalign.media import MediaError, read_bytes

    try:
        data = read_bytes(image)[0]
    except MediaError:
        data = None
    return {"bytes": data, "path": None if image.path is None else Path(image.path).name}


def rank_row(scores: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """``phi``, ``ranks``, ``soft_label`` and ``disagreement`` of one list. Candidates without all scores have null.

    The list's soft label and disagreement are null when fewer than two candidates have all scores.
    """
    import torch

    from mmalign.objectives.ranked import mid_ranks
    from mmalign.objectives.utilities import disagreement, win_rates

    columns = list(scores.values())
    width = len(columns[0])
    present = [all(column[place] is not None for column in columns) for place in range(width)]
    mask = torch.tensor([present])
    values = torch.tensor([[[value if value is not None else 0.0 for value in column]] for column in columns])
    phi = win_rates(values, mask)
    ranks = mid_ranks(phi, mask)
    made: dict[str, Any] = {
        "phi": [value if there else None for value, there in zip(phi[0].tolist(), present, strict=True)],
        "ranks": [value if there else None for value, there in zip(ranks[0].tolist(), present, strict=True)],
        "soft_label": None, "disagreement": None,
    }  # fmt: skip
    if sum(present) >= 2:
        best = int(torch.where(mask, phi, -torch.inf).argmax())
        others = [place for place in range(width) if present[place] and place != best]
        worst = min(reversed(others), key=lambda place: phi[0, place].item())
        for_best = 0.5 * (1 + torch.sign(values[:, 0, best] - values[:, 0, worst]))
        made |= {"soft_label": for_best.mean().item(), "disagreement": disagreement(values, mask).item()}
    return made


def _schema(table: PairTable | RankedTable, rewards: tuple[str, ...]) -> pa.Schema:
    from mmalign.data.ranked import RankedTable
    from mmalign.data.schema import pair_schema, ranked_schema

    names = (*table.rewards, *rewards)
    return ranked_schema(names) if isinstance(table, RankedTable) else pair_schema(names)


def _finish(folder: Any, table: PairTable | RankedTable, rewards: tuple[str, ...]) -> AnnotateReport:
    """Name the table, with the list of failures and a summary beside the parts."""
    notes = folder.notes()
    seen: dict[str, list[float]] = {name: [] for name in rewards}
    pictures = 0
    for number in range(folder.parts):
        for row in folder.rows(number, columns=["scores"]):
            pictures += len(next(iter(row["scores"].values())))
            for name in rewards:
                seen[name] += [value for value in row["scores"][name] if value is not None]
    summary = {
        name: {"low": min(values), "mean": sum(values) / len(values), "high": max(values)}
        for name, values in seen.items() if values
    }  # fmt: skip
    extra = {
        "annotate/failed.jsonl": "".join(json.dumps(note, ensure_ascii=False) + "\n" for note in notes),
        "annotate/summary.json": json.dumps({"source": str(table.path), "rewards": summary}, indent=2) + "\n",
    }
    out = folder.finish(extra)
    return AnnotateReport(path=out, rows=len(table), pictures=pictures, failed=len(notes), rewards=summary)
