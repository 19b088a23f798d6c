"""For whom a personalised run's own samples and comparisons are made: its trained users, in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from mmalign.experiment.users import FOLDER
from mmalign.models.users.adapter import adapter_of
from mmalign.models.users.blend import made_for, persons
from mmalign.models.users.store import INDEX, UserStore


def in_turn(run: Path, network: nn.Module, rows: int) -> Callable[[slice], AbstractContextManager[Any]] | None:
    """For `DiffusionFamily.sample`: row i is for the run's trained user i, again and again; None for other runs and networks."""
    folder = run / FOLDER
    if adapter_of(network) is None or not (folder / INDEX).is_file():
        return None
    store = UserStore(folder)
    known = [store.get(entry.key) for entry in store.entries() if entry.kind == "trained"]
    if not known:
        return None
    who = persons([[(known[row % len(known)], 1.0)] for row in range(rows)])
    return lambda cut: made_for(network, who.rows(cut))
