"""A check in parts: killed, shared, and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmalign.data import CheckPolicy, check_table, checkparts, import_table, open_table
from mmalign.data.checking import check_any
from mmalign.data.jobs import shard_of
from mmalign.data.lookparts import PartsMissing
from mmalign.errors import ConfigError, DataError
from tests.data.clips import clip
from tests.data.making import make_pairs, pickapic_cases, picture, write_pickapic
from tests.forks import kill_when, run_code, start

LENIENT = CheckPolicy(max_bad_fraction=1.0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    import_table(write_pickapic(tmp_path / "source.parquet", pickapic_cases()), tmp_path / "table", progress=False)
    return tmp_path / "table"


def report(table: Path) -> tuple[str, str, str]:
    folder = table / "check"
    return tuple((folder / name).read_text() for name in ("report.json", "quarantine.jsonl", "report.html"))  # type: ignore[return-value]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 256])
def test_parts_and_workers_change_nothing(
    table: Path, workers: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_table(table, policy=LENIENT, workers=1, progress=False)
    before = report(table)
    monkeypatch.setattr(checkparts, "ROWS_PER_PART", rows)
    result = check_table(table, policy=LENIENT, workers=workers, progress=False)
    assert report(table) == before
    expected = sorted(case.expected for case in pickapic_cases() if case.expected != "keep")
    imported = [json.loads(line)["reason"] for line in (table / "import" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted([*imported, *(problem.reason for problem in result.problems)]) == expected


def test_processes_find_what_threads_find(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_table(table, policy=LENIENT, workers=1, progress=False)
    before = report(table)
    monkeypatch.setattr(checkparts, "PROCESSES_FROM", 1)
    check_table(table, policy=LENIENT, workers=2, progress=False)
    assert report(table) == before


def test_shards_share_a_check(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_table(table, policy=LENIENT, workers=1, progress=False)
    before = report(table)
    monkeypatch.setattr(checkparts, "ROWS_PER_PART", 4)
    parts = len(checkparts.ranges(17))
    with pytest.raises(PartsMissing, match=f"{parts - 2} of {parts} parts"):
        check_table(table, policy=LENIENT, workers=1, shard=(1, 3), progress=False)
    with pytest.raises(PartsMissing):
        check_table(table, policy=LENIENT, workers=1, shard=(0, 3), progress=False)
    check_table(table, policy=LENIENT, workers=1, shard=(2, 3), progress=False)
    assert report(table) == before
    assert not list((table / "check").glob("parts-*"))


KILLED = """
import sys
from mmalign.data import CheckPolicy, check_table, checkparts
import mmalign.data.check as check
checkparts.ROWS_PER_PART = 1
slow = check.examine
def examine(*given):
    import time; time.sleep(0.05)
    return slow(*given)
check.examine = examine
check_table(sys.argv[1], policy=CheckPolicy(max_bad_fraction=1.0), workers=1, progress=False)
"""


def test_a_killed_check_goes_on_where_it_was(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkparts, "ROWS_PER_PART", 1)
    check_table(table, policy=LENIENT, workers=1, progress=False)
    before = report(table)

    def parts() -> int:
        return len(list((table / "check").glob("parts-*/part-*.npz")))

    assert kill_when(start(run_code, KILLED, str(table)), lambda: parts() >= 3)
    done = parts()
    assert 3 <= done < 17
    looked = []
    examine = checkparts.examine_part
    monkeypatch.setattr(checkparts, "examine_part", lambda *given: (looked.append(given[1]), examine(*given))[1])
    check_table(table, policy=LENIENT, workers=1, progress=False)
    assert len(looked) == 17 - done
    assert report(table) == before


def test_the_page_shows_what_was_refused(table: Path) -> None:
    with pytest.raises(DataError, match="are bad"):
        check_any(table, policy=CheckPolicy(), workers=1, progress=False)
    page = (table / "check" / "report.html").read_text()
    assert "<h2>truncated_image" in page and "<div class='none'>truncated_image</div>" in page
    assert page.count("<figure class=bad>") >= 3 and "data:image/jpeg;base64," in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    listed = pq.read_table(table / "check" / "quarantine.parquet").to_pylist()
    lines = [json.loads(line) for line in (table / "check" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == [line["id"] for line in lines]


def test_words_of_a_row_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    row = {"id": "<script>alert(1)</script>", "prompt": "<b>x", "chosen": "a.png", "rejected": "a.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError):
        check_any(tmp_path / "pairs.jsonl", policy=LENIENT, workers=1, progress=False)
    page = (tmp_path / "pairs.check" / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "identical_images" in page


def test_lists_and_answers_are_checked_too(tmp_path: Path) -> None:
    sound = [
        {"id": str(n), "prompt": "x", "images": [f"{n}.png", "b.png"], "scores": {"r": [1.0, 0.0]}} for n in range(2)
    ]
    for name in ("0.png", "b.png"):
        (tmp_path / name).write_bytes(picture(len(name)))
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sound))
    result = check_any(tmp_path / "lists.jsonl", policy=LENIENT, workers=1, progress=False)
    assert (len(result.rows), result.counts) == (1, {"missing_image": 1})
    assert "missing_image" in (tmp_path / "lists.check" / "report.html").read_text()
    (tmp_path / "v.mp4").write_bytes(clip(2))
    (tmp_path / "cut.mp4").write_bytes(clip(2)[:-200])
    answers = [
        {"id": name, "prompt": "<video>What?", "chosen": "a", "rejected": "b", "videos": [name]}
        for name in ("v.mp4", "cut.mp4")
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    result = check_any(tmp_path / "talk.jsonl", policy=LENIENT, workers=1, progress=False)
    assert (len(result.rows), result.counts) == (1, {"unreadable_video": 1})
    assert "cut short" in (tmp_path / "talk.check" / "report.html").read_text()


def test_whose_share_it_is() -> None:
    assert shard_of("1/4", {}) == (1, 4)
    assert shard_of(None, {}) == (0, 1)
    assert shard_of(None, {"RANK": "2", "WORLD_SIZE": "8"}) == (2, 8)
    for bad in ("4/4", "1", "a/2", "-1/2"):
        with pytest.raises(ConfigError):
            shard_of(bad, {})


def test_pictures_that_changed_are_looked_at_again(tmp_path: Path) -> None:
    folder = make_pairs(tmp_path / "t", 3)
    assert len(check_table(folder, workers=1, progress=False).rows) == 3
    assert len(check_table(open_table(folder), workers=1, progress=False).rows) == 3
