"""Processes with shared memory: what they do reaches the right slot, and they never outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmalign.errors import DataError
from mmalign.media import slots
from mmalign.media.slots import SlotPool

PARENT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born without it
sys.path.insert(0, {root!r})
from mmalign.media.slots import SlotPool
from tests.media.test_slots import pid

if __name__ == "__main__":
    pool = SlotPool(processes=2, slots=4, slot_bytes=64, remedy="")
    print(*(pool.run(pid, slot) for slot in range(2)), pool.view(0).ctypes.data != 0, flush=True)
    time.sleep(60)
"""


def fill(memory: np.ndarray, value: int) -> int:
    memory[:] = value
    return os.getpid()


def pid(memory: np.ndarray) -> int:
    return os.getpid()


def break_down(memory: np.ndarray) -> None:
    raise KeyError("no such thing")


def refuse() -> None:
    raise DataError("no such table")


def test_each_slot_gets_its_own_work_and_errors_come_back() -> None:
    pool = SlotPool(processes=2, slots=4, slot_bytes=1000, remedy="ask for less")
    taken = [pool.take() for _ in range(4)]
    assert sorted(slot for slot in taken if slot is not None) == [0, 1, 2, 3]
    others = {pool.run(fill, slot, 10 + slot) for slot in range(4)}
    assert len(others) == 2 and os.getpid() not in others
    assert [pool.view(slot).tolist() for slot in range(4)] == [[10 + slot] * 1000 for slot in range(4)]
    with pytest.raises(DataError, match="a decoding process failed: KeyError: 'no such thing'"):
        pool.run(break_down, 1)
    assert pool.run(pid, 1) in others  # and it goes on
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match="was killed, perhaps for want of memory; ask for less"):
        pool.run(pid, 0)
    pool.close()
    pool.close()
    assert not multiprocessing.active_children()


def test_a_process_that_cannot_begin_says_why() -> None:
    pool = SlotPool(processes=1, slots=1, slot_bytes=8, begin=refuse, remedy="")
    with pytest.raises(DataError, match=r"^no such table$"):
        pool.run(pid, 0)
    pool.close()


def test_memory_that_is_not_there_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slots.os, "posix_fallocate", full)
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(DataError, match=r"1 MiB of shared memory.*No space left.*--shm-size"):
        SlotPool(processes=1, slots=1, slot_bytes=1 << 20, remedy="")
    assert set(os.listdir("/dev/shm")) == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_processes_go_when_their_parent_goes(tmp_path: Path, how: signal.Signals) -> None:
    root = str(Path(__file__).parents[2])
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(root=root))
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()[:2]]
    # Ctrl-C reaches the whole group, SIGKILL its one victim.
    (os.killpg if how == signal.SIGINT else os.kill)(parent.pid, how)
    parent.wait(30)
    until = time.monotonic() + 30
    while any(alive(child) for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(child) for child in children)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
