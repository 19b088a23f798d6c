"""Killed at random and resumed: the sequence of rows and the bytes of every batch are the uninterrupted run's.

MMALIGN_KILLS says how often (once by default).
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

from mmalign.data import Cache, check_table, open_table
from tests.data.making import make_pairs
from tests.forks import run_code, start

KILLS = int(os.environ.get("MMALIGN_KILLS", "1"))
STEPS = 40

RUN = """
import hashlib, os, sys, time
from pathlib import Path
from mmalign import data
folder, log, stop, pause, cached = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5] == "1"
table = data.open_table(folder, progress=False)
checked = data.usable_rows(table, check="required", progress=False)
settings = dict(resolution=(16, 16), flip=True)
latents = text = None
if cached:
    latents = data.Cache.open_or_create(folder / "cache", "vae", {"a": 1})
    def encode(pixels):
        time.sleep(pause)
        return {"mean": pixels, "std": pixels.abs()}
    data.fill_latents(latents, table, checked.rows, checked.media, encode=encode, batch_size=4, progress=False, **settings)
done = log.read_bytes().count(b"\\n") if log.exists() else 0
loader = data.PairLoader(table, checked.rows, batch_size=3, accumulate=2, seed=5, media=checked.media, latents=latents,
                         drop_caption=0.3, workers=2, **settings)
batches = loader.micro_batches(done // 2)
with log.open("ab") as handle:
    while done < 2 * stop:
        step, micro, batch = next(batches)
        if 2 * step + micro < done:
            continue  # the step was cut in its middle: its first micro-batch is in the log already
        digest = hashlib.sha256("|".join((*batch.ids, *batch.prompts)).encode())
        for side in (batch.chosen, batch.rejected):
            tensors = [side.pixels] if side.pixels is not None else [side.moments.mean, side.moments.std]
            for tensor in (*tensors, side.geometry.crop):
                digest.update(tensor.numpy().tobytes())
        handle.write(f"{step} {micro} {','.join(batch.ids)} {digest.hexdigest()}\\n".encode())
        handle.flush(); os.fsync(handle.fileno())
        done += 1
        time.sleep(pause)
"""


@pytest.mark.parametrize("cached", [False, True])
def test_killed_at_random_and_resumed(cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_pairs(tmp_path / "table", 70)
    check_table(table, workers=1, progress=False)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    chance = random.Random(7)
    killed = 0
    while killed < KILLS:
        process = start(run_code, RUN, str(table), str(pieces), str(STEPS), "0.05", "1" if cached else "0")
        seen = progress(table, pieces)
        deadline = time.monotonic() + 120
        while progress(table, pieces) == seen and process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.01)
        # Somewhere in the next few units of work, be it a shard of the cache or a batch.
        time.sleep(chance.uniform(0.0, 0.05 * 2 * STEPS / max(KILLS, 4)))
        if process.exitcode is None:
            process.kill()
            killed += 1
        elif killed == 0 or done(pieces) >= 2 * STEPS:
            break
        process.join()
    finish(table, pieces, cached, monkeypatch)
    finish(table, whole, cached, monkeypatch)
    assert killed >= 1
    assert pieces.read_text().splitlines() == whole.read_text().splitlines()
    ids = [name for line in whole.read_text().splitlines() for name in line.split()[2].split(",")]
    assert len(ids) == 6 * STEPS and sorted(ids[:70]) == sorted(f"row-{n}" for n in range(70)), "each row once an epoch"
    if cached:
        cache = Cache.open_or_create(table / "cache", "vae", {"a": 1})
        assert len(cache) == 2 * 2 * len(open_table(table)), "both pictures of every row, plain and mirrored, once"


def finish(folder: Path, log: Path, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on to the end, in this process."""
    monkeypatch.setattr(sys, "argv", [])  # and give its own back afterwards
    run_code(RUN, str(folder), str(log), str(STEPS), "0", "1" if cached else "0")


def done(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def progress(table: Path, log: Path) -> tuple[int, int]:
    return len(list(table.glob("cache/vae/*/shard-*"))), done(log)
