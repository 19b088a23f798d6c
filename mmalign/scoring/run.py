"""`score`: the whole run as one call, with extra processes if asked for."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.data.engines import Engine, each_part
from mmalign.errors import DataError
from mmalign.scoring.job import Job, Worker, part_maker, process_rank, run_worker
from mmalign.scoring.output import Report, check_outputs, join
from mmalign.scoring.precision import check_precision

Progress = Callable[[int, int], None]
"""(rows done, rows in total)."""


def score(
    job: Job, *, processes: int = 1, command: str = "", progress: Progress | None = None, engine: Engine = "local",
    gpus: float | None = None,
) -> Report | None:  # fmt: skip
    """Score a table into ``job.out``; run again after any interruption and it goes on where it stopped.

    Started by ``accelerate launch``, every process makes parts and the first one joins them; the others return None.

    Args:
        processes: on this machine; with Ray, workers in the cluster.
        engine: ``processes`` or ``ray`` have the parts made by others, which must see the same folders; the rows are the same.
        gpus: as of ``mmalign.data.engines.each_part``.

    Raises:
        DataError: the input, the output or a part cannot be read or written, or the precision check fails.
        RewardError: a reward cannot be loaded.
        MissingExtraError: Ray is not installed.
    """
    check_outputs(Path(job.out), Path(job.embeddings) if job.embeddings else None)
    if processes < 1:
        raise DataError(f"processes must be at least 1, got {processes}")
    rank, world = process_rank()
    if rank > 0:
        run_worker(job)
        return None
    if not job.resume and world == 1:
        _forget(job)
    worker = Worker(job)
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, worker.count)

    # Loading here first means that a mistake in a reward's name or weights is one message, not one per process.
    worker.scorers()
    checks = check_precision(worker, job.precision_check) if job.precision_check else {}
    if engine != "local":
        for _ in each_part(
            partial(part_maker, job), range(len(worker.ranges())), engine=engine, workers=processes, gpus=gpus, progress=False
        ):
            pass
        processes = 1
    context = multiprocessing.get_context("spawn")
    helpers = [context.Process(target=run_worker, args=(job,), daemon=True) for _ in range(processes - 1)]
    for helper in helpers:
        helper.start()
    if helpers or world > 1:
        worker.run(progress=lambda _: None, wait=False)
    # What others hold is waited for; what they left undone is made here.
    worker.run(progress=advance, wait=True)
    for helper in helpers:
        helper.join()
    return join(worker, Path(job.out), command, checks)


def _forget(job: Job) -> None:
    """Remove the parts of earlier runs, and nothing else in that folder."""
    folder = job.store().folder
    for file in folder.iterdir():
        if file.suffix in (".parquet", ".json") and file.name[:9].isdigit():
            file.unlink()


def timed(job: Job, **settings: Any) -> tuple[Report | None, float]:
    """`score` with its wall time in seconds."""
    start = time.perf_counter()
    report = score(job, **settings)
    return report, time.perf_counter() - start
