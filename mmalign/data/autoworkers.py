"""How many threads a loader needs: measured on its own rows, for at most two seconds. Never what a batch holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Final, Literal

from mmalign.media.cores import available_cores

Workers = int | Literal["auto"]
MEASURE_SECONDS: Final = 2.0
GAIN: Final = 1.15
"""Twice the threads have to give this much more, or they are not worth their contention."""


def fixed_workers(workers: Workers) -> int:
    """For work that is done once and not measured first: the number itself, or one thread a core."""
    return available_cores() if workers == "auto" else workers


def require_workers(workers: Workers) -> bool:
    """Whether it is 'auto' or a number from 0 on."""
    return workers == "auto" if isinstance(workers, str) else workers >= 0


def measured_workers(work: Callable[[int], object], *, most: int | None = None, seconds: float = MEASURE_SECONDS) -> int:
    """The number of threads that get rows ready fastest, the fewest of about equal ones.

    1, 2, 4, ... threads up to one a core are tried in turn, each for its share of the time, until twice as many give less
    than 15 % more. On one core there is nothing to try.

    Args:
        work: prepares the i-th row; a failure ends the measurement (the loader meets it again, and names the row).
        most: by default `available_cores`.
        seconds: for all trials together.
    """
    most = available_cores() if most is None else most
    tries = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
    if most <= 1:
        return 1
    best, before, row = 1, 0.0, 0
    try:
        work(0)  # what is loaded on first use is not a row's cost
        for count in tries:
            rate, row = _rate(work, row, count, seconds / len(tries))
            if rate < before * GAIN:
                break
            best, before = count, rate
    except Exception:  # whatever it is: the loader asks for the same row next, outside of any measurement
        return best
    return best


def _rate(work: Callable[[int], object], row: int, count: int, seconds: float) -> tuple[float, int]:
    """Rows a second with some threads, and the number of the next row."""
    start, done = time.perf_counter(), 0
    with ThreadPoolExecutor(count, thread_name_prefix="mmalign-measure") as pool:
        pending = {pool.submit(work, row + number) for number in range(count)}
        row += count
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
                done += 1
                if time.perf_counter() - start < seconds:
                    pending.add(pool.submit(work, row))
                    row += 1
    return done / (time.perf_counter() - start), row


__all__ = ["Workers", "available_cores", "fixed_workers", "measured_workers", "require_workers"]
