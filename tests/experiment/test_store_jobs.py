"""Tables made in shards by machines that share nothing but a store: the rows are those of one process on one machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mmalign import annotate as annotating
from mmalign.annotate import annotate
from mmalign.data import open_ranked
from mmalign.data.partfolder import DONE, PartFolder
from mmalign.data.remote import names_at
from mmalign.errors import DataError
from mmalign.generate import generate
from tests.experiment.test_generate import settings

Folders = Callable[[str], Path]


@pytest.fixture
def store() -> Iterator[Any]:
    """A store in memory, emptied before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Go on as another machine: with none of what this one keeps of the store."""

    def use(number: int) -> None:
        monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / f"machine-{number}"))

    use(0)
    return use


def values(table: Any) -> list[Any]:
    return [table.values(row) for row in range(len(table))]


def test_candidates_and_their_scores(
    tiny_folder: Folders, tmp_path: Path, store: Any, machine: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = settings(tiny_folder, tmp_path / "here")
    generate(here, progress=False)
    there = here.model_copy(update={"out": "memory://bucket/deep/lists"})
    assert generate(there, shard=(0, 2), progress=False).missing == 2
    assert {"job.json", "part-00000.parquet", "part-00002.parquet"} <= names_at("memory://bucket/deep/.lists.building")
    machine(1)
    report = generate(there, shard=(1, 2), progress=False)
    assert (report.missing, report.path) == (0, "memory://bucket/deep/lists")
    assert not names_at("memory://bucket/deep/.lists.building")
    machine(2)
    assert values(open_ranked("memory://bucket/deep/lists")) == values(open_ranked(tmp_path / "here" / "out"))
    assert generate(there, shard=(0, 2), progress=False).pictures == 0, "a shard that comes late finds the table made"
    with pytest.raises(DataError, match="memory://bucket/deep/lists: already exists"):
        generate(there, progress=False)

    monkeypatch.setattr(annotating, "ROWS_PER_PART", 1)
    annotate(tmp_path / "here" / "out", tmp_path / "scored", ["brightness"], progress=False)
    for number in range(3):
        machine(3 + number)
        found = annotate(
            "memory://bucket/deep/lists", Path("memory://bucket/scored"), ["brightness"], shard=(number, 3), progress=False
        )
        assert (found is None) == (number < 2)
    assert found is not None and "memory://bucket/scored: 3 rows" in str(found)
    assert values(open_ranked("memory://bucket/scored")) == values(open_ranked(tmp_path / "scored"))
    summary = json.loads(store.cat("/bucket/scored/annotate/summary.json"))
    assert summary["rewards"] == json.loads((tmp_path / "scored" / "annotate" / "summary.json").read_text())["rewards"]


def test_a_kill_while_the_table_is_sent(tmp_path: Path, store: Any, machine: Callable[[int], None]) -> None:
    """What says that a table is whole is sent last; until then whoever comes sends it again."""
    import pyarrow as pa

    schema = pa.schema([("id", pa.int64())])
    folder = PartFolder("memory://b/t", {"a": 1}, 2)
    for number in (0, 1):
        folder.write(number, [{"id": number}], schema)
    store.pipe("/b/t/part-00000.parquet", b"half of it")
    machine(1)
    again = PartFolder("memory://b/t", {"a": 1}, 2)
    assert again.missing() == []
    assert again.finish({"note.txt": "x"}) == "memory://b/t"
    assert names_at("memory://b/t") == {DONE, "note.txt", "part-00000.parquet", "part-00001.parquet"}
    assert store.cat("/b/t/part-00000.parquet")[:4] == b"PAR1"
    with pytest.raises(DataError, match="already exists"):
        PartFolder("memory://b/t", {"a": 1}, 2)
    assert PartFolder("memory://b/t", {"a": 1}, 2, shared=True).done
    store.pipe("/b/other/mine.txt", b"a user's own")
    with pytest.raises(DataError, match="already exists"):
        PartFolder("memory://b/other", {"a": 1}, 2)
    PartFolder("memory://b/third", {"a": 1}, 2)
    with pytest.raises(DataError, match=r"memory://b/\.third\.building: holds parts of other settings"):
        PartFolder("memory://b/third", {"a": 2}, 2)

