"""Processes that decode into pieces of memory which they share with this one.

Threads of one process wait for the interpreter, and for the kernel's map of their memory, between pictures; processes do not.
A piece of memory (a slot) belongs to one process and is lent to one piece of work at a time; beside it only small things travel,
through a pipe of the slot's own, which costs the main process a tenth of a millisecond. Knows nothing of what is decoded.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from mmalign.errors import DataError

PAUSE = 0.1
"""Seconds between two looks whether the one who waits for a slot should go on waiting."""
LEAVING = 10.0
"""Seconds a process has to finish what it is at when the pool is closed."""


class SlotPool:
    """Some processes and some slots. The processes end with this one, however it ends.

    Args:
        processes: how many.
        slots: pieces of work that may be under way at once; at least one per process.
        slot_bytes: size of each.
        begin: called once in each process, with `arguments`; both must be picklable.
        remedy: what a user can do when a process was killed, for the message.

    Raises:
        DataError: there is not so much shared memory.
    """

    def __init__(
        self, *, processes: int, slots: int, slot_bytes: int, begin: Callable[..., None] | None = None,
        arguments: tuple[Any, ...] = (), remedy: str,
    ) -> None:  # fmt: skip
        slots = max(slots, processes)
        self.slot_bytes, self._remedy = slot_bytes, remedy
        memory = _reserved(slots * slot_bytes)
        self._views = np.ndarray((slots, slot_bytes), dtype=np.uint8, buffer=memory.buf)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        # Not fork: this process has threads (Arrow's, torch's), and a fork of them may hang.
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(slots)]
        self._ends: list[Connection] = [here for here, _ in pipes]
        started: list[BaseProcess] = []
        for number in range(processes):
            own = {slot: pipes[slot][1] for slot in range(number, slots, processes)}
            process = context.Process(
                target=_serve, args=(memory.name, (slots, slot_bytes), own, begin, arguments), daemon=True
            )
            process.start()
            started.append(process)
            for there in own.values():  # so that the end of the process is the end of the pipe
                there.close()
        for slot in range(slots):
            self._free.put(slot)
        self._leaving: list[Callable[[], None]] = []
        self._finish = weakref.finalize(self, _finish, self._leaving, self._ends, started, memory)

    @property
    def memory(self) -> np.ndarray:
        """All slots: uint8 ``[slots, slot_bytes]``, no copy."""
        return self._views

    def before_close(self, work: Callable[[], None]) -> None:
        """Have `work` done before the memory is given back; it must not hold the pool."""
        self._leaving.append(work)

    def take(self, ended: threading.Event | None = None) -> int | None:
        """A slot that nobody uses, when there is one; None once `ended` is set."""
        while True:
            try:
                return self._free.get(timeout=PAUSE)
            except queue.Empty:
                if ended is not None and ended.is_set():
                    return None

    def give(self, slot: int) -> None:
        """A slot is free again."""
        self._free.put(slot)

    def view(self, slot: int) -> np.ndarray:
        """The memory of a slot: uint8 ``[slot_bytes]``, no copy."""
        found: np.ndarray = self._views[slot]
        return found

    def run(self, work: Callable[..., Any], slot: int, *arguments: Any) -> Any:
        """What ``work(memory of the slot, *arguments)`` returns in the slot's process; `work` must be picklable.

        Raises:
            DataError: the process was killed, or the work raised an error.
        """
        try:
            self._ends[slot].send((work, arguments))
            done, answer = self._ends[slot].recv()
        except (EOFError, OSError) as error:
            raise DataError(
                f"a decoding process was killed, perhaps for want of memory; {self._remedy}. If it ended while it started (its"
                " error is printed above), put what your script does under 'if __name__ == \"__main__\":', as processes demand"
            ) from error
        except BaseException:  # interrupted: the answer is still to come, and must not become that of other work
            self._ends[slot].close()
            raise
        if not done:
            raise answer
        return answer

    def close(self) -> None:
        """End the processes and give the memory back. Harmless when repeated."""
        self._views = np.empty((0, 0), np.uint8)
        self._finish()


def _reserved(size: int) -> SharedMemory:
    """Shared memory that is really there: where it is merely promised, writing to it would kill the process."""
    try:
        memory = SharedMemory(create=True, size=size)
    except OSError as error:
        raise DataError(f"no shared memory for decoding processes: {error}") from error
    file = f"/dev/shm/{memory.name.lstrip('/')}"
    if os.path.exists(file):
        handle = os.open(file, os.O_RDWR)
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            memory.close()
            memory.unlink()
            raise DataError(
                f"decoding processes want {size / 2**20:.0f} MiB of shared memory and /dev/shm has not that much"
                f" ({error.strerror}): fewer of them, or more shared memory (containers: --shm-size)"
            ) from error
        finally:
            os.close(handle)
    return memory


def _finish(
    leaving: list[Callable[[], None]], ends: list[Connection], processes: list[BaseProcess], memory: SharedMemory
) -> None:
    for work in leaving:
        work()
    for end in ends:
        end.close()
    for process in processes:
        process.join(LEAVING)
        if process.is_alive():
            process.kill()
            process.join()
    with contextlib.suppress(BufferError):  # somebody still holds a view: the name goes, the memory when the view does
        memory.close()
    memory.unlink()


def _serve(
    name: str, shape: tuple[int, int], pipes: dict[int, Connection], begin: Callable[..., None] | None,
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    """In a process of the pool: do what comes through the pipes until the other side closes them, or is gone."""
    # A terminal's Ctrl-C reaches the whole group; the parent decides what becomes of its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory = SharedMemory(name=name)
    views = np.ndarray(shape, dtype=np.uint8, buffer=memory.buf)
    wrong: DataError | None = None
    try:
        if begin is not None:
            begin(*arguments)
    except Exception as error:  # told to whoever asks for the first piece of work
        wrong = _told(error)
    slots = {pipe: slot for slot, pipe in pipes.items()}
    while slots:
        for pipe in wait(list(slots)):
            assert isinstance(pipe, Connection)
            try:
                work, given = pipe.recv()
                pipe.send(_answer(work, views[slots[pipe]], given, wrong))
            except (EOFError, OSError):
                del slots[pipe]


def _answer(work: Callable[..., Any], memory: np.ndarray, given: tuple[Any, ...], wrong: DataError | None) -> tuple[bool, Any]:
    if wrong is not None:
        return False, wrong
    try:
        return True, work(memory, *given)
    except Exception as error:  # raised again on the other side
        return False, _told(error)


def _told(error: Exception) -> DataError:
    """What travels: not every error can be pickled and read again."""
    known = isinstance(error, DataError)
    return DataError(str(error) if known else f"a decoding process failed: {type(error).__name__}: {error}")
