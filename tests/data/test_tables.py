"""Opening tables: what is read, what is refused, and that nothing is repaired in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data import open_table
from mmalign.data.storage import MappedPart
from mmalign.errors import DataError
from mmalign.media import open_image
from tests.data.making import make_jsonl, make_pairs, picture


def jsonl(folder: Path, *rows: dict[str, Any] | str) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


ROW = {"id": "a", "prompt": "p", "chosen": "1.png", "rejected": "2.png"}


def test_parquet_and_jsonl_hold_the_same_records(tmp_path: Path) -> None:
    inside = open_table(make_pairs(tmp_path / "table", 5, ties=[3]))
    beside = open_table(make_jsonl(tmp_path / "loose", 5))
    assert len(inside) == len(beside) == 5
    assert inside.ids() == beside.ids() == [f"row-{row}" for row in range(5)]
    for row in range(5):
        one, other = inside[row], beside[row]
        assert (one.id, one.prompt) == (other.id, other.prompt)
        assert one.chosen.data == picture(2 * row)
        assert open_image(one.rejected).image.tobytes() == open_image(other.rejected).image.tobytes()
    assert (inside[3].p_chosen, beside[3].p_chosen) == (0.5, 1.0)
    assert inside[2].scores == {"taste": (2.5, 1.5)}
    assert (inside[1].user, inside[1].weight, inside[1].group) == ("user-1", 2.0, "group-0")
    assert (beside[1].user, beside[1].weight, beside[1].scores) == (None, 1.0, {})
    with pytest.raises(IndexError):
        inside[5]


def test_large_tables_are_mapped_from_an_arrow_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_pairs(tmp_path / "table", 9)
    plain = open_table(folder)
    monkeypatch.setattr("mmalign.data.storage.SMALL_TABLE_BYTES", 0)
    monkeypatch.setattr("mmalign.data.storage.ROWS_PER_BATCH", 4)
    mapped = open_table(folder, progress=False)
    assert all(isinstance(part, MappedPart) for part in mapped.storage.parts)
    assert mapped.fingerprint == plain.fingerprint
    assert [mapped[row] for row in range(9)] == [plain[row] for row in range(9)]
    copies = list((folder / ".arrow").glob("*.arrow"))
    before = copies[0].stat().st_mtime_ns
    assert open_table(folder, progress=False).ids() == plain.ids()
    assert copies[0].stat().st_mtime_ns == before
    (folder / "part-00000.parquet").write_bytes((make_pairs(tmp_path / "b", 2) / "part-00000.parquet").read_bytes())
    assert len(open_table(folder, progress=False)) == 2


def test_tables_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**ROW, "id": str(row), "chosen": picture(row), "rejected": picture(9)} for row in range(3)]
    made = datasets.Dataset.from_list(rows)
    made = made.cast_column("chosen", datasets.Image(decode=False)).cast_column(
        "rejected", datasets.Image(decode=False)
    )
    made.save_to_disk(str(tmp_path / "saved"))
    table = open_table(tmp_path / "saved")
    assert table[2].chosen.data == picture(2)
    made.to_parquet(str(tmp_path / "one.parquet"))
    assert open_table(tmp_path / "one.parquet")[1].chosen.data == picture(1)


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    one, two = make_pairs(tmp_path / "one", 3), make_pairs(tmp_path / "two" / "deep", 3)
    assert open_table(one).fingerprint == open_table(two).fingerprint
    assert open_table(one).fingerprint != open_table(make_pairs(tmp_path / "three", 4)).fingerprint
    assert open_table(one).fingerprint != open_table(make_pairs(tmp_path / "four", 3, ties=[0])).fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": "a", "promt": "p", "chosen": "1.png", "rejected": "2.png"}],
            "'prompt' is missing; is it the column 'promt'",
        ),
        ([{**ROW, "p_choosen": 0.7}], "column 'p_choosen' is not known; did you mean 'p_chosen'"),
        ([{**ROW, "p_chosen": "high"}], "column 'p_chosen' holds string; expected a number"),
        ([{**ROW, "scores": {"taste": 0.5}}], "column 'scores' holds"),
        (
            [ROW, {**ROW, "prompt": 5, "id": "b"}],
            r"column 'prompt' mixes kinds of values: str \(line 1\), int \(line 2\)",
        ),
        ([ROW, ROW], "id 'a' appears twice: pairs.jsonl line 1 and pairs.jsonl line 2"),
        ([ROW, {**ROW, "id": None}], "pairs.jsonl line 2 column 'id': null"),
        ([ROW, "", "{broken"], "pairs.jsonl line 3: not valid JSON"),
        ([ROW, "[1]"], "line 2: expected an object, got list"),
        (['{"id": "a", "id": "b"}'], "line 1: not valid JSON: the key 'id' appears twice"),
        ([], "no rows in it"),
        ([{"id": "a", "prompt": "x", "images": ["a.png", "b.png"]}], "'mmalign data pairs' makes pairs of it"),
        ([{"id": "a", "image": "x.png"}], "'mmalign data import' turns tables of other layouts"),
        ([{"id": "a", "prompt": [{"role": "user", "content": "x"}], "chosen": [], "rejected": []}], "it is a table of answers"),
    ],
)
def test_bad_manifests_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_table(jsonl(tmp_path, *rows))
    assert "pairs.jsonl" in str(caught.value)


def test_unknown_columns_are_kept(tmp_path: Path) -> None:
    table = open_table(jsonl(tmp_path, {**ROW, "camera": "x", "meta": {"a": 1}}, {**ROW, "id": "b", "camera": None}))
    assert table.meta(0) == {"a": 1, "camera": "x"}
    assert table.meta(1) == {"camera": None}


@pytest.mark.parametrize(
    "path", ["../out.png", "/etc/passwd", "a/../../out.png", "..\\out.png", "C:\\x.png", "link.png"]
)
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "out.png").write_bytes(picture(0))
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    table = open_table(jsonl(folder, {**ROW, "chosen": path}))
    with pytest.raises(DataError, match=r"pairs.jsonl line 1 column 'chosen'.*out of|leaves the manifest's folder"):
        table[0]


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such table"):
        open_table(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no Parquet or Arrow part"):
        open_table(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"bad.parquet: not a readable parquet file"):
        open_table(tmp_path / "bad.parquet")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="not a table"):
        open_table(tmp_path / "notes.txt")
    made = make_jsonl(tmp_path / "loose", 1)
    assert len(open_table(tmp_path / "loose")) == 1  # a folder of votes stands for its pairs.jsonl
    made.rename(tmp_path / "loose" / "other.jsonl")
    with pytest.raises(DataError, match=r"give the file itself: .*other.jsonl"):
        open_table(tmp_path / "loose")


def test_parts_must_agree_and_newer_schemas_are_refused(tmp_path: Path) -> None:
    folder = make_pairs(tmp_path / "table", 2)
    part = pq.read_table(folder / "part-00000.parquet")
    pq.write_table(part.drop_columns(["user"]), folder / "part-00001.parquet")
    with pytest.raises(
        DataError, match=r"part-00001.parquet: its columns differ.*'user' is string there and absent here"
    ):
        open_table(folder)
    (folder / "part-00001.parquet").unlink()
    newer = part.replace_schema_metadata({"mmalign": json.dumps({"schema": "image_pairs", "version": 99})})
    pq.write_table(newer, folder / "part-00000.parquet")
    with pytest.raises(DataError, match="schema version 99 is newer"):
        open_table(folder)


def test_other_arrow_types_of_the_same_meaning(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array([10, 11]),
            "prompt": pa.array(["p", "p"]).dictionary_encode(),
            "chosen": pa.array([picture(0), picture(2)], pa.large_binary()),
            "rejected": pa.array([picture(1), picture(3)], pa.binary()),
            "p_chosen": pa.array([1, 1]),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    opened = open_table(tmp_path / "t.parquet")
    assert (opened[1].id, opened[1].prompt, opened[1].p_chosen) == ("11", "p", 1.0)
    assert opened[1].rejected.data == picture(3)


def test_the_package_is_light_to_import() -> None:
    code = (
        "import sys, mmalign.data, mmalign.data.formats, mmalign.cli.data\n"
        "heavy = {'torch', 'pyarrow', 'datasets', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert mmalign.data.FORMATS.names()[:2] == ['pickapic', 'folder']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_table_of_the_documentation_loses_no_row(tmp_path: Path) -> None:
    """A line without `p_chosen` beside one with it: certain, as in a table without the column. `null` is no label."""
    lines = [{**ROW, "id": "1"}, {**ROW, "id": "2", "p_chosen": 0.8}, {**ROW, "id": "3", "p_chosen": None}]
    table = open_table(jsonl(tmp_path, *lines))
    assert table[0].p_chosen == 1.0 and table[1].p_chosen == pytest.approx(0.8)
    with pytest.raises(DataError, match="line 3 column 'p_chosen': no_label"):
        table[2]
