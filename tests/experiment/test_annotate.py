"""Annotation of lists and pairs with rewards that need no weights: what is added, what is kept, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign import annotate as module
from mmalign.annotate import annotate, rank_row
from mmalign.data import TableWriter, make_pairs, open_ranked, open_table
from mmalign.errors import DataError


def grey(level: int, broken: bool = False) -> bytes:
    """A grey picture: its brightness is its level."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "PNG")
    return b"no picture" if broken else buffer.getvalue()


def lists(folder: Path, levels: list[list[int]], broken: tuple[int, int] | None = None) -> Path:
    rows = [
        {"id": f"list-{row}", "prompt": f"prompt {row}", "note": row,
         "images": [{"bytes": grey(level, (row, place) == broken), "path": None} for place, level in enumerate(given)]}
        for row, given in enumerate(levels)
    ]  # fmt: skip
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_two_rewards_that_disagree_by_hand() -> None:
    """First reward orders a > b > c, second b > a > c."""
    found = rank_row({"one": [3.0, 2.0, 1.0], "two": [2.0, 3.0, 1.0]})
    assert found["phi"] == [0.75, 0.75, 0.0]
    assert found["ranks"] == [1.5, 1.5, 3.0]
    assert found["soft_label"] == 1.0  # both prefer a to c
    assert found["disagreement"] == pytest.approx(1 / 3)


def test_candidates_without_all_scores_have_no_rank() -> None:
    found = rank_row({"one": [3.0, None, 1.0], "two": [1.0, 5.0, 2.0]})
    assert found["phi"] == [0.5, None, 0.5] and found["ranks"] == [1.5, None, 1.5]
    assert found["soft_label"] == 0.5 and found["disagreement"] == 1.0
    alone = rank_row({"one": [None, 2.0]})
    assert alone["soft_label"] is None and alone["disagreement"] is None


def test_lists_gain_scores_ranks_and_keep_the_rest(tmp_path: Path) -> None:
    source = lists(tmp_path / "lists", [[10, 200, 90], [50, 40, 30]])
    report = annotate(source, tmp_path / "out", ["brightness"], progress=False)
    assert (report.rows, report.pictures, report.failed) == (2, 6, 0)
    first, second = rows_of(tmp_path / "out")
    assert first["ranks"] == [3.0, 1.0, 2.0] and second["ranks"] == [1.0, 2.0, 3.0]
    assert first["phi"] == [0.0, 1.0, 0.5]
    assert first["scores"]["brightness"] == pytest.approx([10 / 255, 200 / 255, 90 / 255], abs=1e-4)
    assert json.loads(first["meta"]) == {"note": 0} and first["images"][1]["bytes"] == grey(200)
    assert report.rewards["brightness"]["low"] < report.rewards["brightness"]["high"]
    table = open_ranked(tmp_path / "out")
    assert table.rewards == ("brightness",)
    pairs = make_pairs(tmp_path / "out", tmp_path / "pairs", progress=False)
    assert pairs.pairs == 2
    assert open_table(tmp_path / "pairs")[0].scores["brightness"] == (
        pytest.approx(first["scores"]["brightness"][1]), pytest.approx(first["scores"]["brightness"][0])
    )  # fmt: skip


def test_annotating_again_adds_and_never_replaces(tmp_path: Path) -> None:
    source = lists(tmp_path / "lists", [[10, 200]])
    annotate(source, tmp_path / "one", ["brightness"], progress=False)
    annotate(tmp_path / "one", tmp_path / "two", ["saturation"], progress=False)
    assert set(rows_of(tmp_path / "two")[0]["scores"]) == {"brightness", "saturation"}
    # Grey pictures have equal saturation: one of two rewards prefers the brighter one.
    assert rows_of(tmp_path / "two")[0]["phi"] == [0.0, 0.5]
    with pytest.raises(DataError, match="already holds scores of brightness"):
        annotate(tmp_path / "two", tmp_path / "three", ["brightness"], progress=False)
    with pytest.raises(DataError, match="already exists"):
        annotate(source, tmp_path / "one", ["brightness"], progress=False)


def test_a_picture_that_cannot_be_read_is_listed_and_has_no_score(tmp_path: Path) -> None:
    source = lists(tmp_path / "lists", [[10, 200, 90]], broken=(0, 1))
    report = annotate(source, tmp_path / "out", ["brightness"], progress=False)
    assert report.failed == 1 and "failed.jsonl" in str(report)
    row = rows_of(tmp_path / "out")[0]
    assert row["scores"]["brightness"][1] is None and row["ranks"] == [2.0, None, 1.0]
    listed = json.loads((tmp_path / "out" / "annotate" / "failed.jsonl").read_text())
    wanted = {"id": "list-0", "picture": 1, "reward": "brightness", "reason": "unsupported_format"}
    assert {name: listed[name] for name in wanted} == wanted


def test_pairs_gain_scores_and_keep_labels(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "pairs") as writer:
        writer.add(id="a", prompt="p", chosen=grey(10), rejected=grey(99), p_chosen=0.8, user="u", weight=2.0, group="g")
    annotate(tmp_path / "pairs", tmp_path / "out", ["brightness"], progress=False)
    record = open_table(tmp_path / "out")[0]
    assert (record.p_chosen, record.user, record.weight, record.group) == (pytest.approx(0.8), "u", 2.0, "g")
    chosen, rejected = record.scores["brightness"]
    assert chosen < rejected


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_PART", 1)
    source = lists(tmp_path / "lists", [[10, 200], [20, 30], [60, 50]])
    whole = tmp_path / "whole"
    annotate(source, whole, ["brightness"], progress=False)
    done = []
    real = module._part

    def stops(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(module, "_part", stops)
    with pytest.raises(KeyboardInterrupt):
        annotate(source, tmp_path / "out", ["brightness"], progress=False)
    assert not (tmp_path / "out").exists()
    calls = []
    monkeypatch.setattr(module, "_part", lambda *arguments: calls.append(1) or real(*arguments))
    with pytest.raises(DataError, match="other settings"):
        annotate(source, tmp_path / "out", ["saturation"], progress=False)
    annotate(source, tmp_path / "out", ["brightness"], progress=False)
    assert len(calls) == 1
    assert rows_of(tmp_path / "out") == rows_of(whole)


def test_no_reward_and_no_table_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one reward"):
        annotate(lists(tmp_path / "lists", [[1, 2]]), tmp_path / "out", [], progress=False)
    with pytest.raises(DataError):
        annotate(tmp_path / "nothing", tmp_path / "out", ["brightness"], progress=False)


def test_shards_and_a_cache_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.scoring import stored

    source = lists(tmp_path / "lists", [[10, 20], [30, 40], [50, 10]], broken=(1, 1))
    annotate(source, tmp_path / "whole", ["brightness"], progress=False)
    expected = rows_of(tmp_path / "whole")
    annotate(source, tmp_path / "cached", ["brightness"], cache=tmp_path / "cache", progress=False)
    assert rows_of(tmp_path / "cached") == expected
    monkeypatch.setattr(stored.StoredScores, "_compute", lambda *_: pytest.fail("scored again") if _[4] else None)
    annotate(lists(tmp_path / "more", [[30, 50], [20, 10]]), tmp_path / "twice", ["brightness"], cache=tmp_path / "cache",
             progress=False)  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(module, "ROWS_PER_PART", 1)
    out = tmp_path / "shared"
    for index in (2, 1):
        assert annotate(source, out, ["brightness"], shard=(index, 3), progress=False) is None
    assert annotate(source, out, ["brightness"], shard=(0, 3), progress=False) is not None
    assert rows_of(out) == expected
    assert annotate(source, out, ["brightness"], shard=(1, 3), progress=False) is None  # one that comes late
    with pytest.raises(DataError, match="already exists"):
        annotate(source, out, ["brightness"], progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache", "cached", "lists", "more", "shared", "twice", "whole"
    ]  # fmt: skip
