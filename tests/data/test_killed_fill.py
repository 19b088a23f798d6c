"""Filling caches killed at random: what is there afterwards is what an uninterrupted fill leaves, nothing twice, nothing wrong.

MMALIGN_KILLS says how often (once by default).
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

from mmalign.data import Cache, check_table
from mmalign.data.files import atomic_file, remove_abandoned
from mmalign.data.shards import Shard
from mmalign.data.upkeep import list_caches, verify
from mmalign.experiment.caching import TableJob, fill_table
from tests.data.making import make_pairs
from tests.forks import kill_when, start

KILLS = int(os.environ.get("MMALIGN_KILLS", "1"))
ROOT = Path(__file__).resolve().parents[2]
PAIRS = 30


def fill(table: str, root: str, shard: tuple[int, int] = (0, 1)) -> None:
    """`mmalign data cache TABLE --kind vae,text`, with a shard for every encoded batch instead of for 256 MiB or two minutes."""
    defaults = Cache.fill.__kwdefaults__
    assert defaults is not None
    before = dict(defaults)
    defaults["shard_bytes"] = 1
    job = TableJob(
        table=table, kinds=("vae", "text"), model=str(ROOT / "assets" / "tiny-sd"), resolution=32, flip=True, drop_caption=True,
        root=root, check="required", device="cpu",
    )  # fmt: skip
    try:
        fill_table(job, shard=shard)
    finally:
        defaults.update(before)


def contents(root: Path) -> dict[str, dict[bytes, dict[str, bytes]]]:
    """Kind and fingerprint -> key -> tensors, as bytes; a key that is stored twice is an error."""
    found: dict[str, dict[bytes, dict[str, bytes]]] = {}
    for folder in sorted(root.glob("*/*")):
        entries: dict[bytes, dict[str, bytes]] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            shard = Shard(path)
            for number in range(len(shard)):
                key = shard.digests[number].tobytes()
                assert key not in entries, f"{path.name}: an entry of another shard again"
                entries[key] = {name: value.numpy().tobytes() for name, value in shard.entry(number).items()}
        found[f"{folder.parent.name}/{folder.name}"] = entries
    return found


def files(root: Path) -> set[str]:
    """Shards and notes, finished or begun."""
    return {path.name for path in root.glob("*/*/*") if path.suffix != ".lock"}


def kill_one(table: Path, root: Path, chance: random.Random) -> int:
    """A fill by one process or by two, each its share, killed somewhere in its first units of work; returns how many were."""
    shares = chance.choice((1, 2)) if KILLS > 1 else 1
    before, moment, seen = files(root), chance.uniform(0.0, 0.2), 0.0
    running = [start(fill, str(table), str(root), (number, shares)) for number in range(shares)]

    def due() -> bool:
        nonlocal seen
        if not seen and files(root) != before:
            seen = time.monotonic()
        return bool(seen) and time.monotonic() - seen >= moment

    killed = int(kill_when(running[0], due))
    for other in running[1:]:
        if chance.random() < 0.5 and other.exitcode is None:
            killed += kill_when(other, lambda: True)
        other.join()
        assert other.exitcode in (0, -9), "whoever fills beside a killed process goes on"
    return killed


def test_killed_while_it_fills_and_filled_again(tmp_path: Path) -> None:
    table = make_pairs(tmp_path / "table", PAIRS)
    check_table(table, workers=1, progress=False)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    fill(str(table), str(whole))
    expected = contents(whole)
    assert sorted(len(entries) for entries in expected.values()) == [PAIRS + 1, 2 * 2 * PAIRS]
    chance = random.Random(11)
    killed = fills = begun = 0
    while killed < KILLS:
        killed += kill_one(table, pieces, chance)
        begun += sum(name.endswith(".tmp") for name in files(pieces))
        wrong = [line for line in verify(pieces, progress=False) if "left by a writer that was killed" not in line]
        assert not wrong, "a kill may leave begun files, never a wrong one"
        if contents(pieces) == expected:  # all was there before the kill: begin another
            shutil.rmtree(pieces)
            fills += 1
    fill(str(table), str(pieces))
    assert contents(pieces) == expected
    assert not [problem for info in list_caches(pieces) for problem in info.problems]
    print(f"{killed} kills over {fills + 1} fills, {begun} in the middle of a file")


def test_what_killed_writers_had_begun_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    cache = Cache.open_or_create(tmp_path, "vae", {"a": 1})
    abandoned = cache.folder / ".shard-0.safetensors.1-abc.tmp"
    abandoned.write_bytes(b"half of a shard")
    just_made = cache.folder / ".shard-1.safetensors.2-abc.tmp"
    just_made.touch()  # perhaps between its making and its lock
    with atomic_file(cache.folder / "shard-2.bin") as handle:
        handle.write(b"half of")
        handle.flush()
        assert [line for line in verify(tmp_path, progress=False) if "killed" in line]
        cache.fill(iter(()), lambda inputs: {}, batch_size=1)
        assert not abandoned.exists() and just_made.exists()
        handle.write(b" another")
    assert (cache.folder / "shard-2.bin").read_bytes() == b"half of another"
    remove_abandoned(tmp_path / "nothing there")


__all__ = ["fill"]
