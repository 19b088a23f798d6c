"""Who makes the numbered parts of a batch job: this process, several of this machine, or the workers of a Ray cluster.

A part is something that a worker writes where all see it (a file that is whole or absent), so the engine decides nothing but
who makes it when: the rows are those of a single process. Not for what a part is.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from mmalign.data.progress import progress_bar
from mmalign.errors import DataError, MissingExtraError, MmalignError

Engine = Literal["local", "processes", "ray"]
Maker = Callable[[int], int]
"""Makes the part of a number; returns how many rows or pictures that was."""


def each_part(
    make_worker: Callable[[], Maker], numbers: Sequence[int], *, engine: Engine, workers: int | None = None,
    gpus: float | None = 0.0, title: str = "Making parts", progress: bool = True,
) -> Iterator[int]:  # fmt: skip
    """Make some parts, yielding the size of each as it is done.

    Args:
        make_worker: called once per worker, there: opens tables, loads models. It must be picklable unless the engine is local.
        workers: how many processes, or workers of Ray (default: as many as parts and cores allow).
        gpus: accelerators that each of Ray's workers needs, or a fraction of one; None: one where the cluster has any.

    Raises:
        MissingExtraError: Ray is not installed.
        MmalignError: what a worker raised.
        DataError: a worker died.
    """
    with progress_bar(title, len(numbers), enabled=progress) as advance:
        if engine == "ray":
            made = _ray(make_worker, numbers, workers, gpus)
        else:
            made = _processes(make_worker, numbers, workers) if engine == "processes" else _local(make_worker, numbers)
        for size in made:
            advance(1)
            yield size


def _local(make_worker: Callable[[], Maker], numbers: Sequence[int]) -> Iterator[int]:
    worker = make_worker() if numbers else None
    for number in numbers:
        if worker is not None:
            yield worker(number)


def _processes(make_worker: Callable[[], Maker], numbers: Sequence[int], workers: int | None) -> Iterator[int]:
    """Processes of this machine; accelerators, where there are any, are dealt out in turn."""
    count = min(workers or os.cpu_count() or 1, len(numbers))
    if not count:
        return
    # Not fork: this process has threads (Arrow's, torch's), and a fork of them may hang.
    context = multiprocessing.get_context("spawn")
    place = context.Value("i", 0)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(make_worker, place)) as pool:
        try:
            pending = [pool.submit(_make_here, number) for number in numbers]
            for done in as_completed(pending):
                yield done.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for want of memory; parts that are done are kept: start again, with fewer"
                " workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_here: dict[str, Any] = {}
"""In a worker process: what makes its worker, and the worker once it is made."""


def _begin(make_worker: Callable[[], Maker], place: Any) -> None:
    import torch

    with place.get_lock():
        own, place.value = place.value, place.value + 1
    _here["make_worker"] = make_worker
    if torch.cuda.is_available():
        torch.cuda.set_device(own % torch.cuda.device_count())


def _make_here(number: int) -> int:
    # Made at the first part and not before: an error then is this part's, with its words.
    worker: Maker = _here.get("worker") or _here["make_worker"]()
    _here["worker"] = worker
    return worker(number)


def _ray(make_worker: Callable[[], Maker], numbers: Sequence[int], workers: int | None, gpus: float | None) -> Iterator[int]:
    """The parts through Ray Data: numbers in, sizes out, one stateful worker per slot of the pool."""
    if not numbers:
        return
    ray = _started(workers)
    held = ray.cluster_resources()
    if gpus is None:
        gpus = 1.0 if held.get("GPU") else 0.0
    room = int(held["GPU"] / gpus) if gpus and held.get("GPU") else int(held.get("CPU", 1))
    count = max(1, min(workers or room, len(numbers)))
    rows = ray.data.from_items([{"part": int(number)} for number in numbers], override_num_blocks=len(numbers))
    sizes = rows.map_batches(
        PartWorker, fn_constructor_args=(make_worker, os.getcwd()), batch_size=1, compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=1, num_gpus=gpus or None,
    )  # fmt: skip
    try:
        for row in sizes.iter_rows():
            if row["error"]:
                raise _error(row["kind"], row["error"])
            yield int(row["size"])
    except ray.exceptions.RayError as error:
        raise DataError(f"ray: a worker failed: {_last_line(error)}; parts that are done are kept, start again") from error


class PartWorker:
    """What Ray runs: one per slot. What a user can mend comes back as a row, so that its words survive the way."""

    def __init__(self, make_worker: Callable[[], Maker], folder: str) -> None:
        self.problem: MmalignError | None = None
        try:
            os.chdir(folder)  # relative paths mean what they mean to whoever started the job
            self.make = make_worker()
        except FileNotFoundError as error:
            self.problem = DataError(f"ray: this worker does not see the folder {folder}: {error}")
        except MmalignError as error:
            self.problem = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        sizes, errors, kinds = [], [], []
        for number in batch["part"]:
            size, problem = 0, self.problem
            if problem is None:
                try:
                    size = self.make(int(number))
                except MmalignError as error:
                    problem = error
            sizes.append(size)
            errors.append("" if problem is None else str(problem))
            kinds.append("" if problem is None else type(problem).__name__)
        return {"size": sizes, "error": errors, "kind": kinds}


def _started(workers: int | None) -> Any:
    """Ray, connected: to the cluster that RAY_ADDRESS names, else to one of this machine's own."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "--engine ray") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        own: dict[str, Any] = {} if address else {"num_cpus": max(workers or 0, os.cpu_count() or 1), "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def _error(kind: str, words: str) -> MmalignError:
    from mmalign import errors

    found = getattr(errors, kind, DataError)
    try:
        return found(words)  # type: ignore[no-any-return]
    except TypeError:
        return DataError(words)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
