"""One scoring run: parts handed out to processes, scored, and joined into one table."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import DataError
from mmalign.media import PLAIN, Colours
from mmalign.scoring.ensembles import EnsembleSpec, checked_ensembles
from mmalign.scoring.parts import PartKey, PartStore
from mmalign.scoring.sources import NO_PROMPT, Columns, Row, Source, open_source
from mmalign.scoring.stored import identity

if TYPE_CHECKING:
    import pyarrow as pa

    from mmalign.rewards import Backend, ScorerSet


ROWS_UNDER_WAY = 1024
"""Of the parts that are in the making on a GPU."""


def part_rows(count: int) -> int:
    """Rows per part: a kill loses little of a small table, and a large one does not become a million files."""
    return min(2048, max(64, -(-count // 64)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to score and how; plain data, so that it can be handed to another process."""

    input: str
    rewards: tuple[str, ...]
    out: str
    paths: Mapping[str, str] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)
    """By reward name, the published revision to load instead of the one on its card."""
    columns: Columns = field(default_factory=Columns)
    root: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    workers: int | None = None
    """Threads that read and decode, per process; None: one per core."""
    resume: bool = True
    local_files_only: bool = False
    compile: bool = False
    ensembles: tuple[EnsembleSpec, ...] = ()
    embeddings: str | None = None
    """Parquet file for the image embeddings of rewards that have one."""
    colours: Colours = PLAIN
    """What becomes of transparency, rotation tags and floats outside [0, 1]."""
    decode_workers: int | None = 0
    """Processes that decode, for each process that scores; 0: the threads do; None: as many as are worth it."""
    decode: str = "full"
    fast_preprocess: bool = False
    """These two as in `mmalign.rewards.load`."""
    precision_check: int = 0
    """Rows to score in float32 as well before the run."""

    def versioned(self) -> list[str]:
        """The rewards as `rewards.load` takes them."""
        return [f"{name}@{self.revisions[name]}" if name in self.revisions else name for name in self.rewards]

    def source(self) -> Source:
        return open_source(Path(self.input), self.columns, Path(self.root) if self.root else None)

    def store(self) -> PartStore:
        out = Path(self.out)
        return PartStore(out.with_name(f"{out.name}.parts"))


class Worker:
    """Scores parts; rewards are loaded when the first part needs them."""

    def __init__(self, job: Job) -> None:
        self.job, self.source, self.store = job, job.source(), job.store()
        self.count = len(self.source) if job.limit is None else min(job.limit, len(self.source))
        checked_ensembles(job.ensembles, job.rewards, self.source.columns)
        self._loaded: ScorerSet | None = None
        self._keys: dict[str, str] | None = None
        self._graphs: dict[tuple[str, ...], Any] = {}
        self._hashes: dict[tuple[str, int], str] = {}
        self._lock = threading.Lock()
        self.decode_wait = 0.0
        """Seconds this process waited for pictures to be read and decoded."""

    def ranges(self) -> list[tuple[int, int]]:
        size = part_rows(self.count)
        return [(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def run(self, *, progress: Callable[[int], None], wait: bool) -> None:
        """Make every part that is not there yet and not in another process's hands (or wait for it)."""
        count = self.lanes()
        if count == 1:
            for part in self.ranges():
                progress(self._claimed(part, wait))
            return
        lanes = ThreadPoolExecutor(count)
        try:
            for rows in lanes.map(lambda part: self._claimed(part, wait), self.ranges()):
                progress(rows)
        finally:  # an error or Ctrl-C: what is under way ends, what has not begun never does
            lanes.shutdown(cancel_futures=True)

    def lanes(self) -> int:
        """Parts that are made at the same time: on a GPU the pictures of one are read, and its rows written, while it computes
        another. Each has its own engine, so its numbers are those it has alone."""
        from mmalign.rewards.base import EncodingBackend

        self.identities()  # loads, once
        fast = all(isinstance(one, EncodingBackend) and one.device.type == "cuda" for one in self.scorers().backends)
        return min(8, max(2, ROWS_UNDER_WAY // part_rows(self.count))) if fast and not self.job.compile else 1

    def _claimed(self, part: tuple[int, int], wait: bool) -> int:
        start, stop = part
        with self.store.claim(start, wait=wait) as mine:
            if mine:
                self._part(start, stop)
        return stop - start if mine else 0

    def make(self, number: int) -> int:
        """Make the part of a number, if it is not there yet; returns the number of its rows."""
        start, stop = self.ranges()[number]
        with self.store.claim(start, wait=True):
            self._part(start, stop)
        return stop - start

    def _part(self, start: int, stop: int) -> None:
        missing = [name for name in self.job.rewards if not self._done(self.key(name, start, stop))]
        if missing:
            self._score(missing, start, stop)

    def _done(self, key: PartKey) -> bool:
        """Whether a part is there, with embeddings if they are wanted."""
        if self.store.load(key) is None:
            return False
        return self.job.embeddings is None or bool(self.store.report(key).get("embeddings"))

    def key(self, reward: str, start: int, stop: int) -> PartKey:
        return PartKey(
            input=self.source.fingerprint, reward=reward, identity=self.identities()[reward], start=start, stop=stop
        )

    def scorers(self) -> ScorerSet:
        """The loaded rewards."""
        if self._loaded is None:
            from mmalign import rewards
            from mmalign.rewards.decoders import suitable_processes
            from mmalign.rewards.hub import pick_device

            job, decoders = self.job, self.job.decode_workers
            if decoders is None:
                decoders = suitable_processes(self.count * len(self.source.columns), pick_device(job.device))
            self._loaded = rewards.load(
                job.versioned(),
                dict(job.paths),
                job.device,
                job.dtype,
                workers=job.workers,
                local_files_only=job.local_files_only,
                colours=job.colours,
                decode_workers=decoders,
                decode=job.decode,
                fast_preprocess=job.fast_preprocess,
            )
        return self._loaded

    def identities(self) -> dict[str, str]:
        """Per reward, a hash of all that decides its numbers: card, weights, options, precision, this version."""
        if self._keys is None:
            self._keys = {}
            for name, backend in zip(self.job.rewards, self.scorers().backends, strict=True):
                facts = identity(backend, compiled=self.job.compile, colours=self.job.colours)
                self._keys[name] = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(),
                                                   digest_size=12).hexdigest()  # fmt: skip
        return self._keys

    def _set(self, backends: Sequence[Backend]) -> ScorerSet:
        """A fresh set per part: nothing carried over can make a resumed run differ from an uninterrupted one."""
        from mmalign.rewards import ScorerSet

        made = ScorerSet(backends, workers=self.job.workers, compile=self.job.compile, colours=self.job.colours)
        # Compiled and compared once per process, not once per part.
        made.engine.graphs, made.engine.hashes = self._graphs, self._hashes
        whole = self.scorers().engine
        made.engine.reader.decoders, made.engine.workers = whole.reader.decoders, whole.workers
        if made.engine.reader.stage is not None and whole.reader.stage is not None:
            made.engine.reader.stage = whole.reader.stage  # which sizes are worth it is known once
        return made

    def _score(self, names: Sequence[str], start: int, stop: int) -> None:
        wanted = [b for n, b in zip(self.job.rewards, self.scorers().backends, strict=True) if n in names]
        with self._lock:  # a source may keep what it read last
            rows = self.source.rows(start, stop)
        cells = [(index, column) for index in range(len(rows)) for column in self.source.columns]
        # Rewards that read no prompt can score rows without one; only then is a second pass over the files worth it.
        apart = any(row.prompt is None for row in rows)
        free = [backend for backend in wanted if apart and not backend.card.needs_prompt]
        for backends in ([backend for backend in wanted if backend not in free], free):
            if not backends:
                continue
            scorers = self._set(backends)
            needing = any(backend.card.needs_prompt for backend in backends)
            keep = self.job.embeddings is not None
            found, early = _run(scorers, rows, cells, needing, self.job.batch_size, embeddings=keep)
            with self._lock:
                self.decode_wait += scorers.engine.counters.decode_wait_seconds / self.lanes()
            for backend in backends:
                name = self.job.rewards[self.scorers().backends.index(backend)]
                table, report = _table(rows, self.source.columns, cells, early, found[backend.name])
                self.store.save(self.key(name, start, stop), table, {**report, "embeddings": keep})


def _run(
    scorers: ScorerSet,
    rows: Sequence[Row],
    cells: Sequence[tuple[int, str]],
    needs_prompt: bool,
    batch: int | None,
    *,
    embeddings: bool,
) -> tuple[dict[str, Any], dict[tuple[int, str], str]]:
    """Details per reward for the cells that can be scored, and the reason for every other cell."""
    early: dict[tuple[int, str], str] = {}
    for index, column in cells:
        image = rows[index].images[column]
        if isinstance(image, str):
            early[index, column] = image
        elif needs_prompt and rows[index].prompt is None:
            early[index, column] = NO_PROMPT
    todo = [cell for cell in cells if cell not in early]
    images = [rows[index].images[column] for index, column in todo]
    prompts = [rows[index].prompt or "" for index, _ in todo]
    users = [rows[index].user for index, _ in todo]
    found = scorers.engine.run(images, prompts, batch_size=batch, on_error="nan", embeddings=embeddings, users=users)
    return found, early


def _table(
    rows: Sequence[Row],
    columns: Sequence[str],
    cells: Sequence[tuple[int, str]],
    early: Mapping[tuple[int, str], str],
    details: Any,
) -> tuple[pa.Table, dict[str, Any]]:
    import pyarrow as pa

    todo = [cell for cell in cells if cell not in early]
    at = {cell: place for place, cell in enumerate(todo)}
    data: dict[str, list[Any]] = {}
    flags: dict[str, int] = {}
    for column in columns:
        values, errors, messages, truncated = [], [], [], []
        for index in range(len(rows)):
            place = at.get((index, column))
            values.append(float(details.values[place]) if place is not None else float("nan"))
            errors.append(details.errors[place] if place is not None else early[index, column])
            messages.append(details.messages[place] if place is not None else None)
            truncated.append(bool(details.truncated[place]) if place is not None else False)
            for flag in details.flags[place] if place is not None else ():
                flags[flag] = flags.get(flag, 0) + 1
        data |= {f"value.{column}": values, f"error.{column}": errors, f"message.{column}": messages}
        data[f"truncated.{column}"] = truncated
    types = {"value": pa.float32(), "error": pa.string(), "message": pa.string(), "truncated": pa.bool_()}
    arrays = {name: pa.array(values, types[name.partition(".")[0]]) for name, values in data.items()}
    if details.embeddings is not None:
        arrays |= _vectors(len(rows), columns, at, details)
    return pa.table(arrays), {"flags": flags}


def _vectors(count: int, columns: Sequence[str], at: Mapping[tuple[int, str], int], details: Any) -> dict[str, Any]:
    """One list column per image column; null where the picture could not be encoded."""
    import pyarrow as pa

    kind = pa.list_(pa.float32(), details.embeddings.shape[1])
    out = {}
    for column in columns:
        places = [at.get((index, column)) for index in range(count)]
        lists = [None if place is None else details.embeddings[place].tolist() for place in places]
        plain = [None if item is None or any(value != value for value in item) else item for item in lists]
        out[f"embedding.{column}"] = pa.array(plain, kind)
    return out


def process_rank() -> tuple[int, int]:
    """(rank, number of processes) when started by ``accelerate launch`` or torchrun, else (0, 1)."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise DataError(f"RANK and WORLD_SIZE must be numbers: {error}") from error


def part_maker(job: Job) -> Callable[[int], int]:
    """Opens the input where this is called, and gives what makes one part there."""
    return Worker(job).make


def run_worker(job: Job) -> None:
    """Body of an extra process: makes parts until none is free."""
    rank, _ = process_rank()
    worker = Worker(job if job.device or rank == 0 else _on_device(job, rank))
    worker.run(progress=lambda _: None, wait=False)


def _on_device(job: Job, rank: int) -> Job:
    import dataclasses

    import torch

    count = torch.cuda.device_count()
    return dataclasses.replace(job, device=f"cuda:{rank % count}") if count else job
