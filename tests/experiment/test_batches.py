"""`mmalign.data.open` and `mmalign.data.loader`: what a person's own loop is given, and that it can stop anywhere."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmalign import data
from mmalign.errors import ConfigError, DataError
from mmalign.experiment.batches import Batch
from mmalign.types import StepContext
from tests.data.making import make_pairs, number_of, pickapic_cases, picture, write_pickapic
from tests.fixtures.tiny import load

Folders = Callable[[str], Path]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return make_pairs(tmp_path / "table", 9, ties=[4])


def test_pixels_labels_and_ids(table: Path) -> None:
    pairs = data.open(table)
    assert len(pairs) == 9 and len(pairs.filter(ties="drop").usable().rows) == 8
    batches = data.loader(pairs.filter(ties="soft"), batch_size=3, resolution=16)
    assert len(batches) == 3
    seen = {}
    for batch in batches:
        assert batch.latents is None and batch.text is None and batch.pixels is not None
        assert batch.pixels.shape == (3, 2, 3, 16, 16)
        for place, name in enumerate(batch.row_id):
            row = int(name.removeprefix("row-"))
            assert [number_of(batch.pixels[place, side]) for side in (0, 1)] == [2 * row, 2 * row + 1]
            seen[row] = float(batch.label[place])
    assert seen == {row: 0.5 if row == 4 else 1.0 for row in range(9)}
    assert batches.report() == {"rows": 9, "used": 9, "reasons": {}, "quarantined": 0, "masked": []}
    with pytest.raises(ConfigError, match="resolution"):
        data.loader(table, batch_size=3)
    with pytest.raises(DataError, match="no such field tie "):
        pairs.filter(tie="drop")


def test_latents_are_those_of_training_and_every_stop_goes_on_exactly(
    tiny_folder: Folders, table: Path, tmp_path: Path
) -> None:
    from mmalign.models.diffusion.inputs import pair_inputs

    family = load("sd1", tiny_folder("sd1"))
    settings = {"model": family, "batch_size": 2, "resolution": 16, "seed": 3}

    def some(batches: object, count: int) -> list[Batch]:
        found: list[Batch] = []
        while len(found) < count:
            for batch in batches:  # type: ignore[attr-defined]
                found.append(batch)
                if len(found) == count:
                    break
        return found

    whole = some(data.loader(table, **settings), 7)
    assert whole[0].latents is not None and whole[0].latents.shape[:3] == (2, 2, 4)
    inner = data.loader(table, **settings).loader
    for step, _, batch in inner.micro_batches(2):
        made = pair_inputs(family, batch, StepContext(step=step, seed=3, device=torch.device("cpu")))
        latents = whole[2].latents
        assert latents is not None and torch.equal(made.latents, torch.cat([latents[:, 0], latents[:, 1]]))
        break
    for stop in range(1, 7):
        first = data.loader(table, **settings)
        some(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        assert state["next_global_batch"] == stop and state["samples_seen"] == 2 * stop
        second = data.loader(table, **settings)
        second.load_state_dict(state)
        for left, right in zip(whole[stop:], some(second, 7 - stop), strict=True):
            assert left.row_id == right.row_id and left.step == right.step
            assert torch.equal(left.latents, right.latents)  # type: ignore[arg-type]
    other = data.loader(table, **{**settings, "batch_size": 4, "seed": 4})
    with pytest.raises(DataError, match=r"seed was 3 and is 4; global_batch was 2 and is 4"):
        other.load_state_dict(state)


def test_two_ranks_make_one_line(table: Path) -> None:
    whole = [batch.row_id for batch in data.loader(table, batch_size=4, resolution=16)]
    ranks = [data.loader(table, batch_size=2, resolution=16, world_size=2, rank=rank) for rank in (0, 1)]
    assert [left.row_id + right.row_id for left, right in zip(*ranks, strict=True)] == whole
    one = data.loader(table, batch_size=4, resolution=16)
    for _ in one:
        break
    ranks[0].load_state_dict(one.state_dict())
    assert next(iter(ranks[0])).row_id == whole[1][:2]


def test_buckets(tiny_folder: Folders, tmp_path: Path) -> None:
    with data.TableWriter(tmp_path / "table") as writer:
        for row in range(8):
            size = (24, 48) if row % 2 else (48, 24)
            writer.add(id=f"r{row}", prompt="x", chosen=picture(2 * row, size=size), rejected=picture(2 * row + 1, size=size))
    batches = data.loader(tmp_path / "table", batch_size=2, resolution=32, buckets="auto", model=tiny_folder("sd1"))
    shapes = {batch.latents.shape[-2:] for batch in batches if batch.latents is not None}
    assert len(shapes) == 2


def test_scores_from_a_file(table: Path, tmp_path: Path) -> None:
    rows = [{"id": f"row-{row}", "like__chosen": row + 0.25, "like__rejected": -1.0 * row} for row in reversed(range(9))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scores.parquet")
    pairs = data.open(table).with_scores(tmp_path / "scores.parquet")
    assert pairs[3].scores == {"taste": (3.5, 2.5), "like": (3.25, -3.0)}
    for batch in data.loader(pairs, batch_size=2, resolution=16):
        for place, name in enumerate(batch.row_id):
            row = int(name.removeprefix("row-"))
            assert batch.scores["like"][place].tolist() == [row + 0.25, -row]
    rows[2]["like__chosen"] = None  # type: ignore[assignment]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "holes.parquet")
    with pytest.raises(DataError, match="row 'row-6' has no finite score of 'like'"):
        data.open(table).with_scores(tmp_path / "holes.parquet")
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "short.parquet")
    with pytest.raises(DataError, match="8 rows for a table of 9, and none for the row 'row-8'"):
        data.open(table).with_scores(tmp_path / "short.parquet")
    with pytest.raises(DataError, match="REWARD__chosen"):
        data.open(table).with_scores(table / "part-00000.parquet")


def test_other_formats_and_datasets_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "home"))
    source = write_pickapic(tmp_path / "source.parquet", pickapic_cases())
    before = source.read_bytes()
    pairs = data.open(source)
    assert "imported as pickapic (detected from the columns)" in capsys.readouterr().out
    assert len(pairs.filter(max_bad_fraction=1.0).usable().rows) == 5
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "source.parquet"]
    data.open(source)
    assert capsys.readouterr().out == ""  # imported once
    buffer = io.BytesIO(picture(1))
    rows = [{"id": str(row), "prompt": "x", "chosen": {"bytes": buffer.getvalue(), "path": None},
             "rejected": {"bytes": picture(2 + row), "path": None}} for row in range(3)]  # fmt: skip
    assert len(data.open(datasets.Dataset.from_list(rows))) == 3
    with pytest.raises(DataError, match="no such table or source"):
        data.open(tmp_path / "nothing")
