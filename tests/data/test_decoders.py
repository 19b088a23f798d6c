"""Decoding in processes: the pixels, failures and order of threads, and nothing left behind."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.data import PairLoader, index_media, open_table
from mmalign.data.tables import PairTable
from mmalign.errors import DataError
from tests.data.making import make_jsonl, make_pairs, picture
from tests.data.test_pair_loader import content, take


def make_loader(table: PairTable, **settings: Any) -> PairLoader:
    settings = {"batch_size": 4, "resolution": (16, 16), "workers": 2, "flip": True, "crop": "random", **settings}
    return PairLoader(table, np.arange(len(table)), **settings)


def test_processes_give_what_threads_give(tmp_path: Path) -> None:
    table = open_table(make_pairs(tmp_path / "table", 11, size=(24, 40)))
    plain = take(make_loader(table), 6, start=1)
    decoded = take(make_loader(table, decode="processes"), 6, start=1)
    assert content(decoded) == content(plain)
    assert not multiprocessing.active_children()


def test_a_vanished_and_a_changed_picture_are_masked_alike(tmp_path: Path) -> None:
    table = open_table(make_jsonl(tmp_path, 8))
    media = index_media(table, np.arange(8), 1)
    (tmp_path / "images" / "5.png").unlink()
    (tmp_path / "images" / "8.png").write_bytes(picture(77))
    settings = {"media": media, "shuffle": False, "flip": False, "crop": "center", "retry_seconds": ()}
    found = []
    for decode in ("threads", "processes"):
        loader = make_loader(table, decode=decode, **settings)
        found.append((content(take(loader, 2)), loader.masked))
    assert found[0] == found[1]
    assert [(row.id, row.column, row.reason) for row in found[1][1]] == [
        ("row-2", "rejected", "missing_image"), ("row-4", "chosen", "changed_image"),
    ]  # fmt: skip


def test_a_killed_worker_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    import os
    import signal

    table = open_table(make_pairs(tmp_path / "table", 8))
    stream = make_loader(table, decode="processes", prefetch=0).micro_batches()
    next(stream)
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a decoding process was killed"):
        for _ in range(8):
            next(stream)
    assert not multiprocessing.active_children()
    with pytest.raises(DataError, match="decode must be 'threads' or 'processes'"):
        make_loader(table, decode="magic")
