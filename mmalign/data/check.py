"""Decode every row of a table once, say which rows can be used, and why not the others.

What was found (facts) is kept apart from what is done about it (policy): facts are stored beside the table, and any run
applies its own policy to them without decoding again. User files are never modified.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from mmalign.data import checkfiles, checkparts
from mmalign.data.files import head_hash, write_text
from mmalign.data.lookparts import PartsMissing
from mmalign.data.mediaindex import SIDES, MediaIndex, Picture
from mmalign.data.reasons import QUARANTINE, Problem, count, reasons_table
from mmalign.data.tables import PairTable, open_table, row_problem
from mmalign.errors import DataError
from mmalign.media import DEFAULT, Limits, MediaError, decode_image, read_bytes

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckPolicy:
    """What is done about what was found. Checked when made.

    Raises:
        DataError: a value with no meaning.
    """

    ties: str = "drop"
    """``drop``, or ``soft``: keep them with p_chosen 0.5."""
    duplicates: str = "drop"
    """``drop`` all but the first of equal verdicts on the same pair and prompt, or ``keep``."""
    max_aspect: float = 4.0
    """Longer over shorter side; beyond it a row is dropped."""
    min_side: int = 1
    """Pixels; a row with a shorter side is dropped."""
    max_bad_fraction: float = 0.01
    """More quarantined rows than this share of the table stop everything."""
    strict: bool = False
    """Any quarantined row stops everything."""
    limits: Limits = DEFAULT

    def __post_init__(self) -> None:
        if self.ties not in ("drop", "soft"):
            raise DataError(f"ties must be 'drop' or 'soft', got '{self.ties}'")
        if self.duplicates not in ("drop", "keep"):
            raise DataError(f"duplicates must be 'drop' or 'keep', got '{self.duplicates}'")
        if not self.max_aspect >= 1.0 or not 0.0 <= self.max_bad_fraction <= 1.0:
            raise DataError("max_aspect must be at least 1, and max_bad_fraction a share in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What decoding every row once showed, whatever the policy."""

    media: MediaIndex
    defects: Mapping[int, Problem]
    """Row number -> the first thing that makes it unusable."""
    flags: Mapping[str, int] = field(default_factory=dict)
    """How many pictures needed each kind of conversion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """Which rows can be used, and what became of the others."""

    path: Path
    total: int
    rows: np.ndarray
    """Usable row numbers in table order, int64 [n]."""
    problems: tuple[Problem, ...]
    """One for every row that is not used."""
    conflicts: int
    """Rows that are used although another row holds the opposite verdict on the same pair and prompt."""
    policy: CheckPolicy
    media: MediaIndex | None
    """None only where nothing was checked."""
    flags: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by reason; `conflict` is a note on rows that are used."""
        return {**count(self.problems), **({"conflict": self.conflicts} if self.conflicts else {})}

    @property
    def quarantined(self) -> int:
        """Rows with defects; rows that a policy leaves out are not counted."""
        return sum(problem.reason in QUARANTINE for problem in self.problems)

    def table_text(self) -> str:
        """The counts by reason as aligned text."""
        return reasons_table(self.counts, total=self.total, used=len(self.rows))

    def write_quarantine(self, path: Path) -> None:
        """Every row that is not used, one JSON object a line."""
        write_text(path, checkfiles.problem_lines(self.problems))

    def _first_bad(self, listed: Path | None) -> str:
        """The first bad row, where no list of them is written."""
        bad = None if listed else next((problem for problem in self.problems if problem.reason in QUARANTINE), None)
        if bad is None:
            return ""
        place = f"{bad.file} row {bad.row} (id {bad.id}) column '{bad.column}': {bad.reason}: {bad.detail}"
        return f"\n  first: {place}\n  'mmalign data check {self.path}' lists all of them"

    def demand(self, listed: Path | None = None) -> CheckResult:
        """Itself, when there are rows to use and not too many bad ones.

        Args:
            listed: where the single rows are listed, for the message.

        Raises:
            DataError: otherwise, with the table of reasons and what to do.
        """
        share = self.quarantined / max(self.total, 1)
        table = self.table_text() + (f"\n  listed in {listed}" if listed else "")
        if self.policy.strict and self.quarantined:
            raise DataError(f"{self.path}: {self.quarantined} bad rows, and strict allows none\n{table}")
        if share > self.policy.max_bad_fraction:
            limit = f"{self.policy.max_bad_fraction:.1%}"
            raise DataError(
                f"{self.path}: {self.quarantined} of {self.total} rows are bad ({share:.1%}, limit {limit});"
                f" mend them or raise the limit (data.max_bad_fraction)\n{table}{self._first_bad(listed)}"
            )
        if len(self.rows) == 0:
            ties = self.counts.get("tie", 0)
            remedy = "; data.ties: soft keeps ties as soft labels" if ties else ""
            which = f"all {ties} rows are ties" if ties == self.total else f"none of {self.total} rows can be used"
            raise DataError(f"{self.path}: {which}{remedy}\n{table}")
        return self


def check_table(
    path: str | Path | PairTable,
    *,
    policy: CheckPolicy | None = None,
    strict: bool = False,
    max_bad_fraction: float = 0.01,
    workers: int | None = None,
    write: bool = True,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> CheckResult:
    """Decode every row once and write a report beside the table (`check/`, or `<name>.check/` for a single file).

    What is decoded is kept part by part: a check that was killed goes on where it was.

    Args:
        policy: overrides `strict` and `max_bad_fraction` when given.
        workers: decoding processes (threads for small tables); by default one per core.
        write: False keeps everything in memory.
        shard: (i, n): decode every n-th part from the i-th on; the others are made by processes that share the folder.

    Returns:
        the usable rows.

    Raises:
        DataError: too many bad rows or none usable (the report is written first), or a path that leaves the folder.
        PartsMissing: this shard's parts are done and others' are not.
    """
    table = path if isinstance(path, PairTable) else open_table(path, progress=progress)
    policy = policy or CheckPolicy(strict=strict, max_bad_fraction=max_bad_fraction)
    if not write:
        return apply_policy(
            table, scan(table, limits=policy.limits, workers=workers, progress=progress), policy
        ).demand()
    folder = checkfiles.check_folder(table.path)
    facts = _facts_by_parts(table, folder, policy.limits, workers=workers, shard=shard, progress=progress)
    result = apply_policy(table, facts, policy)
    checkfiles.write_report(table, result)
    checkfiles.write_page(table, result)
    return result.demand(folder / "quarantine.jsonl")


def _facts_by_parts(
    table: PairTable, folder: Path, limits: Limits, *, workers: int | None, shard: tuple[int, int], progress: bool
) -> Facts:
    store = checkparts.PartStore(folder, table, limits)
    spans = [store.ranges[number] for number in store.missing(shard)]
    for part in checkparts.make_parts(table, spans, limits=limits, workers=workers, progress=progress):
        store.save(part)
    missing = store.missing()
    if set(missing) & set(store.missing(shard)):
        return checkfiles.read_facts(table, limits)  # another shard has put the whole together in this moment
    if missing:
        raise PartsMissing(len(missing), len(store.ranges))
    facts = _joined(table, store.load())
    checkfiles.write_facts(table, facts, limits)
    store.discard()
    return facts


def usable_rows(
    table: PairTable,
    *,
    check: str = "required",
    policy: CheckPolicy | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> CheckResult:
    """The rows a run may use.

    Args:
        check: ``required`` takes the facts `mmalign data check` stored for exactly this content; ``online`` looks now,
            in memory; ``off`` looks at nothing but labels, and bad rows then stop the run or are masked.

    Raises:
        DataError: not checked or changed since (with the command to run), too many bad rows, or none usable.
    """
    policy = policy or CheckPolicy()
    if check == "required":
        return apply_policy(table, checkfiles.read_facts(table, policy.limits), policy).demand()
    if check == "online":
        facts = scan(table, limits=policy.limits, workers=workers, progress=progress)
        return apply_policy(table, facts, policy).demand()
    if check == "off":
        nothing = Facts(media=MediaIndex.empty(len(table)), defects={})
        labels_only = replace(policy, duplicates="keep", min_side=0)
        return replace(apply_policy(table, nothing, labels_only), media=None, policy=policy).demand()
    raise DataError(f"data.check must be 'required', 'online' or 'off', got '{check}'")


def _in_order(pool: ThreadPoolExecutor, work: Callable[[int], T], count: int, ahead: int = 256) -> Iterator[T]:
    pending: deque[Future[T]] = deque()
    try:
        for row in range(count):
            pending.append(pool.submit(work, row))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def scan(table: PairTable, *, limits: Limits, workers: int | None = None, progress: bool = True) -> Facts:
    """Decode both pictures of every row, in parallel, keeping everything in memory."""
    spans = checkparts.ranges(len(table))
    return _joined(table, checkparts.make_parts(table, spans, limits=limits, workers=workers, progress=progress))


def _joined(table: PairTable, parts: Iterable[checkparts.Part]) -> Facts:
    media = MediaIndex.empty(len(table))
    defects: dict[int, Problem] = {}
    flags: Counter[str] = Counter()
    for part in parts:
        media.hashes[part.first : part.first + len(part.hashes)] = part.hashes
        media.sizes[part.first : part.first + len(part.sizes)] = part.sizes
        defects.update(part.defects)
        flags.update(part.flags)
    return Facts(media=media, defects=defects, flags=dict(sorted(flags.items())))


def examine(
    table: PairTable, row: int, media: MediaIndex, place: int, limits: Limits
) -> tuple[Problem | None, list[str]]:
    """The first thing that makes a row unusable, if any, and what its pictures needed; facts go to `place` of `media`."""
    raw = table.raw(row)
    found = row_problem(raw)
    if found is not None:
        column, reason, detail = found
        return Problem.at(table, row, column=column, reason=reason, detail=detail), []
    flags: list[str] = []
    for side, ref in enumerate((raw.chosen, raw.rejected)):
        try:
            data, source = read_bytes(ref, limits)
            decoded = decode_image(data, limits, source=source)
        except MediaError as error:
            head = head_hash(ref.data, ref.path)
            return Problem.at(table, row, column=SIDES[side], reason=error.reason, detail=error.detail, head=head), []
        media.note(place, side, Picture(sha256=hashlib.sha256(data).hexdigest(), size=decoded.original_size))
        flags.extend(decoded.flags)
    return None, flags


def apply_policy(table: PairTable, facts: Facts, policy: CheckPolicy) -> CheckResult:
    """Which rows are used under a policy. Of several reasons a row has, the first of the list above counts."""
    total = len(table)
    problems: dict[int, Problem] = dict(facts.defects)
    open_rows = np.ones(total, dtype=bool)
    open_rows[list(problems)] = False

    def drop(rows: np.ndarray, column: str, reason: str, detail: str) -> None:
        for row in rows.tolist():
            problems[row] = Problem.at(table, row, column=column, reason=reason, detail=detail)
        open_rows[rows] = False

    labels = label_column(table)
    if policy.ties == "drop":
        drop(np.flatnonzero(open_rows & (labels == 0.5)), "p_chosen", "tie", "p_chosen is 0.5")
    hashes, sizes = facts.media.hashes, facts.media.sizes.astype(np.int64)
    seen = (sizes.reshape(total, 4) > 0).all(axis=1)
    same = seen & (hashes[:, 0] == hashes[:, 1]).all(axis=1)
    drop(np.flatnonzero(open_rows & same), "rejected", "identical_images", "both pictures have the same bytes")
    conflicts = 0
    if policy.duplicates == "drop":
        repeated, conflicts = _repeats(table, np.flatnonzero(open_rows & seen), hashes, labels)
        drop(repeated, "id", "duplicate", "an earlier row has the same pair, prompt and verdict")
    for side, name in enumerate(SIDES):
        shorter, longer = sizes[:, side].min(axis=1), sizes[:, side].max(axis=1)
        drop(np.flatnonzero(open_rows & seen & (shorter < policy.min_side)), name, "min_side",
             f"shorter side below {policy.min_side} px")  # fmt: skip
        ratio = longer / np.maximum(shorter, 1)
        drop(np.flatnonzero(open_rows & seen & (ratio > policy.max_aspect)), name, "aspect_ratio",
             f"longer over shorter side above {policy.max_aspect}")  # fmt: skip
    return CheckResult(
        path=table.path,
        total=total,
        rows=np.flatnonzero(open_rows).astype(np.int64),
        problems=tuple(problems[row] for row in sorted(problems)),
        conflicts=conflicts,
        policy=policy,
        media=facts.media,
        flags=facts.flags,
    )


def label_column(table: PairTable) -> np.ndarray:
    """p_chosen of every row, float64 [n]; NaN for null, 1 where the column is absent."""
    if "p_chosen" not in table.columns:
        return np.ones(len(table))
    chunks = [batch.column(0) for batch in table.storage.batches(["p_chosen"])]
    column = pa.chunked_array(chunks, type=table.type_of("p_chosen")).combine_chunks().cast(pa.float64())
    return np.array(column.fill_null(float("nan")).to_numpy(zero_copy_only=True))


def _repeats(table: PairTable, rows: np.ndarray, hashes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows that repeat an earlier verdict, and how many of the kept rows contradict another kept one."""
    if not len(rows):
        return np.zeros(0, dtype=np.int64), 0
    # The first 16 bytes of a SHA-256 tell pictures apart; big-endian words compare as the bytes do.
    words = np.ascontiguousarray(hashes[rows][:, :, :16]).view(">u8").astype(np.uint64)  # [n, 2, 2]
    chosen, rejected = words[:, 0], words[:, 1]
    smaller = (chosen[:, 0] < rejected[:, 0]) | ((chosen[:, 0] == rejected[:, 0]) & (chosen[:, 1] < rejected[:, 1]))
    low, high = np.where(smaller[:, None], chosen, rejected), np.where(smaller[:, None], rejected, chosen)
    verdict = np.where(labels[rows] == 0.5, 0, np.where(smaller, 1, -1)).astype(np.int8)
    keys = [low[:, 0], low[:, 1], high[:, 0], high[:, 1], prompt_codes(table)[rows]]
    order = np.lexsort((np.arange(len(rows)), verdict, *keys))
    same = np.ones(len(rows), dtype=bool)
    same[0] = False
    for key in keys:
        same[1:] &= key[order][1:] == key[order][:-1]
    pair = np.cumsum(~same) - 1  # number of the (pair, prompt) group along `order`
    repeated = np.zeros(len(rows), dtype=bool)
    repeated[order[1:]] = same[1:] & (verdict[order][1:] == verdict[order][:-1])
    ways = np.zeros((pair[-1] + 1, 3), dtype=bool)
    ways[pair, verdict[order] + 1] = True
    both = ways[:, 0] & ways[:, 2]
    conflicts = int((both[pair] & ~repeated[order]).sum())
    return rows[np.sort(np.flatnonzero(repeated))], conflicts


def prompt_codes(table: PairTable) -> np.ndarray:
    """A number for every row's prompt, equal where the prompts are. [n] int64"""
    chunks = [batch.column(0) for batch in table.storage.batches(["prompt"])]
    column = pa.chunked_array(chunks).combine_chunks() if chunks else pa.array([], pa.string())
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return np.asarray(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=True), dtype=np.int64)
