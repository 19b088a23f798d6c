"""The number of workers that is measured: its rule, and that it changes nothing but the speed."""

from __future__ import annotations

import threading
import time

import pytest

from mmalign.data import autoworkers
from mmalign.data.autoworkers import available_cores, fixed_workers, measured_workers


def test_waiting_is_shared_among_threads_and_a_lock_is_not() -> None:
    """Rows that wait (a slow disk) gain from every thread; rows behind one lock gain from none."""
    lock = threading.Lock()

    def waits(number: int) -> None:
        time.sleep(0.004)

    def held(number: int) -> None:
        with lock:
            time.sleep(0.004)

    assert measured_workers(waits, most=4, seconds=0.6) == 4
    assert measured_workers(held, most=4, seconds=0.6) == 1


def test_a_row_that_fails_ends_the_measurement_and_is_met_again_later() -> None:
    def fails(number: int) -> None:
        raise RuntimeError("row 3 is bad")

    assert measured_workers(fails, most=8) == 1


def test_one_core_has_nothing_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoworkers, "available_cores", lambda: 1)
    assert measured_workers(lambda number: pytest.fail("nothing is measured")) == 1


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (available_cores(), fixed_workers("auto"), fixed_workers(3)) == (2, 2, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert available_cores() == 1
