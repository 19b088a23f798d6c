"""How many cores there are for decoding."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Cores that this process may use, shared with the processes that a launcher started beside it on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(beside) if beside.isdigit() else 1))
