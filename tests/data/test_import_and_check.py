"""From a source with every defect to usable rows: each row lands exactly where it must."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

from mmalign.data import check_table, import_table, open_table, usable_rows
from mmalign.data.check import CheckPolicy
from mmalign.errors import ConfigError, DataError
from tests.data.making import Case, make_jsonl, make_pairs, pickapic_cases, picture, write_pickapic

LENIENT = CheckPolicy(max_bad_fraction=1.0)
AT_IMPORT = ("no_label", "contradictory_label", "label_out_of_range")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pap")
    write_pickapic(folder / "source" / "data" / "train-00000-of-00001.parquet", pickapic_cases())
    import_table(folder / "source", folder / "table", progress=False)
    return folder / "table"


def outcomes(table_folder: Path, policy: CheckPolicy, **settings: Any) -> dict[str, str]:
    """Caption of each source row -> what became of it ('keep' or the reason), from the two lists on disk."""
    table = open_table(table_folder)
    result = check_table(table, policy=policy, progress=False, **settings)
    listed = [json.loads(line) for line in (table_folder / "check" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["reason"] for entry in listed}
    assert len(reasons) == len(listed) == len(result.problems)
    used = {table.raw(int(row)).id for row in result.rows}
    assert used.isdisjoint(reasons)
    assert used | set(reasons) == set(table.ids())
    return {name: reasons.get(name, "keep") for name in table.ids()}


def test_every_row_lands_where_it_must(imported: Path) -> None:
    cases = pickapic_cases()
    table = open_table(imported)
    at_import = [json.loads(line) for line in (imported / "import" / "quarantine.jsonl").read_text().splitlines()]
    assert {(e["row"], e["reason"]) for e in at_import} == {
        (number, case.expected) for number, case in enumerate(cases) if case.expected in AT_IMPORT
    }
    assert {e["file"] for e in at_import} == {"train-00000-of-00001.parquet"}
    reached = [case for case in cases if case.expected not in AT_IMPORT]
    assert len(table) == len(reached)
    assert list(outcomes(imported, LENIENT).values()) == [case.expected for case in reached]
    for row, case in enumerate(reached):
        raw, meta = table.raw(row), table.meta(row)
        assert meta[f"image_{meta['chosen_side']}_uid"] == case.chosen, case.name
        other = 1 - meta["chosen_side"]
        assert raw.chosen.data == case.row[f"jpg_{meta['chosen_side']}"], case.name
        if case.row[f"jpg_{other}"] is not None:
            assert raw.rejected.data == case.row[f"jpg_{other}"], case.name
        assert raw.p_chosen == case.p_chosen, case.name
        assert (raw.user, raw.group) == ("7", str(case.row["ranking_id"]))
        assert (meta["later_column"], meta["prompt_weight"], raw.weight) == (case.row["later_column"], 0.25, 1.0)
        assert meta["created_at"] == case.row["created_at"].isoformat()


@pytest.mark.parametrize("workers", [1, 3])
def test_soft_ties_and_kept_duplicates(imported: Path, workers: int) -> None:
    policy = CheckPolicy(ties="soft", duplicates="keep", max_bad_fraction=1.0)
    found = list(outcomes(imported, policy, workers=workers).values())
    expected = [case.expected for case in pickapic_cases() if case.expected not in AT_IMPORT]
    assert found == ["keep" if reason in ("tie", "duplicate") else reason for reason in expected]


def test_report_counts_and_conflicts(imported: Path) -> None:
    result = check_table(imported, policy=LENIENT, progress=False)
    report = json.loads((imported / "check" / "report.json").read_text())
    assert report["reasons"] == result.counts
    assert report["used"] == len(result.rows) == 5
    assert report["quarantined"] == 7
    assert result.counts["conflict"] == 2  # "first wins" and "opposite verdict"
    text = (imported / "check" / "report.md").read_text()
    assert "| unsupported_format | quarantined | 2 |" in text
    assert "| tie | dropped | 1 |" in text


def test_pillows_tolerance_changes_nothing(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = check_table(imported, policy=LENIENT, progress=False, write=False)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    tolerant = check_table(imported, policy=LENIENT, progress=False, write=False)
    assert strict.counts == tolerant.counts
    assert strict.counts["truncated_image"] == 1


def test_too_many_bad_rows_stop_with_the_table(imported: Path) -> None:
    with pytest.raises(DataError, match=r"7 of 17 rows are bad \(41.2%, limit 1.0%\)") as caught:
        check_table(imported, progress=False)
    assert "unsupported_format  quarantined   2" in str(caught.value)
    assert "quarantine.jsonl" in str(caught.value)
    with pytest.raises(DataError, match=r"first: .* row \d+ \(id .*\) column '(chosen|rejected)': ") as caught:
        check_table(imported, progress=False, write=False)
    assert f"'mmalign data check {imported}' lists all of them" in str(caught.value)
    with pytest.raises(DataError, match="strict allows none"):
        check_table(imported, policy=CheckPolicy(strict=True, max_bad_fraction=1.0), progress=False, write=False)


def test_the_sources_order_does_not_matter(imported: Path, tmp_path: Path) -> None:
    cases = pickapic_cases()
    random.Random(0).shuffle(cases)
    write_pickapic(tmp_path / "source.parquet", cases)
    import_table(tmp_path / "source.parquet", tmp_path / "table", progress=False)

    def content(folder: Path) -> dict[str, Any]:
        table = open_table(folder)
        raws = [table.raw(row) for row in range(len(table))]
        return {raw.id or "": (raw.prompt, raw.chosen.data, raw.rejected.data, raw.p_chosen) for raw in raws}

    assert content(imported) == content(tmp_path / "table")


def test_streaming_in_groups_of_any_size(imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.data.formats.pickapic.ROWS_AT_ONCE", 3)
    monkeypatch.setattr("mmalign.data.writer.ROWS_PER_GROUP", 4)
    monkeypatch.setattr("mmalign.data.writer.PART_BYTES", 5000)
    write_pickapic(tmp_path / "source.parquet", pickapic_cases())
    import_table(tmp_path / "source.parquet", tmp_path / "table", progress=False)
    assert len(list((tmp_path / "table").glob("part-*.parquet"))) > 1
    assert open_table(tmp_path / "table").ids() == open_table(imported).ids()
    assert open_table(tmp_path / "table").where(16).startswith("part-0000")


def test_the_table_loads_in_datasets(imported: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    check_table(imported, policy=LENIENT, progress=False)
    loaded = datasets.load_dataset(str(imported), cache_dir=str(tmp_path), split="train")
    assert loaded.num_rows == 17
    assert isinstance(loaded.features["chosen"], datasets.Image)
    assert loaded[0]["chosen"].size == (16, 16)


def test_variants_of_the_source(tmp_path: Path) -> None:
    cases = pickapic_cases()[:2]
    few = write_pickapic(tmp_path / "few.parquet", cases, drop=("has_label", "user_id", "ranking_id", "created_at"))
    assert import_table(few, tmp_path / "few", progress=False).written == 2
    bare = write_pickapic(tmp_path / "bare.parquet", cases, drop=("jpg_0", "jpg_1"))
    with pytest.raises(DataError, match="variant without images"):
        import_table(bare, tmp_path / "bare", progress=False)
    half = write_pickapic(tmp_path / "half.parquet", cases, drop=("jpg_1",))
    with pytest.raises(DataError, match="column 'jpg_1' is missing"):
        import_table(half, tmp_path / "half", progress=False)
    for split in ("train", "test"):
        write_pickapic(tmp_path / "splits" / f"{split}-00000-of-00001.parquet", cases)
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        import_table(tmp_path / "splits", tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="no split 'dev'"):
        import_table(tmp_path / "splits", tmp_path / "out", split="dev", progress=False)
    assert import_table(tmp_path / "splits", tmp_path / "out", split="test", progress=False).total == 2


def test_nothing_half_made_stays(tmp_path: Path) -> None:
    unlabelled = [case for case in pickapic_cases() if case.expected == "no_label"]
    source = write_pickapic(tmp_path / "none.parquet", unlabelled)
    with pytest.raises(DataError, match="none of its rows can be used"):
        import_table(source, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.parquet"]
    write_pickapic(tmp_path / "good.parquet", pickapic_cases()[:1])
    import_table(tmp_path / "good.parquet", tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="already exists"):
        import_table(tmp_path / "good.parquet", tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="no such file or folder"):
        import_table(tmp_path / "nowhere", tmp_path / "x", progress=False)
    with pytest.raises(ConfigError, match="did you mean 'pickapic'"):
        import_table(tmp_path / "good.parquet", tmp_path / "x", format="pickapick", progress=False)
    pq.write_table(pq.read_table(source, columns=["caption"]), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"none of the known formats; name one with --from"):
        import_table(tmp_path / "other.parquet", tmp_path / "x", progress=False)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_folders_with_any_line_ending_and_unicode(tmp_path: Path, kind: str, ending: str) -> None:
    source = tmp_path / "Bilder ü"
    source.mkdir()
    for number in range(4):
        (source / f"bild ø {number}.png").write_bytes(picture(number))
    rows = [("ein Hund, 'groß'", 0, 1, "x"), ("日本", 2, 3, "y"), ("gone", 2, 9, "z")]
    if kind == "csv":
        lines = ["prompt,chosen,rejected,extra", *(f'"{p}",bild ø {c}.png,bild ø {r}.png,{e}' for p, c, r, e in rows)]
    else:
        lines = [
            json.dumps({"prompt": p, "chosen": f"bild ø {c}.png", "rejected": f"bild ø {r}.png", "extra": e})
            for p, c, r, e in rows
        ]
    (source / f"pairs.{kind}").write_bytes((ending.join(lines) + ending).encode())
    report = import_table(source, tmp_path / "out", progress=False)
    assert (report.format, report.detected, report.counts) == ("folder", True, {"missing_image": 1})
    table = open_table(tmp_path / "out")
    assert [table.prompt(row) for row in (0, 1)] == ["ein Hund, 'groß'", "日本"]
    assert table[1].rejected.data == picture(3)
    assert table.meta(0) == {"extra": "x"}
    listed = json.loads((tmp_path / "out" / "import" / "quarantine.jsonl").read_text())
    assert (listed["row"], listed["column"]) == (4 if kind == "csv" else 3, "rejected")


def test_folder_paths_and_ids_are_guarded(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(0))
    (source / "a.png").write_bytes(picture(1))
    (source / "pairs.csv").write_text("prompt,chosen,rejected\np,a.png,../secret.png\n")
    with pytest.raises(DataError, match=r"pairs.csv line 2 column 'rejected'.*leaves the manifest's folder"):
        import_table(source, tmp_path / "out", progress=False)
    (source / "pairs.csv").write_text("id,prompt,chosen,rejected\n1,p,a.png,a.png\n1,q,a.png,a.png\n")
    with pytest.raises(DataError, match="line 3: id '1' is already that of line 2"):
        import_table(source, tmp_path / "out", progress=False)
    (source / "pairs.csv").write_text("prompt,choosen,rejected\np,a.png,a.png\n")
    with pytest.raises(DataError, match="column 'chosen' is missing; is it the column 'choosen'"):
        import_table(source, tmp_path / "out", progress=False)
    (source / "pairs.csv").write_text("prompt,chosen,rejected\np,a.png\n")
    with pytest.raises(DataError, match="line 2: 2 fields, the header has 3"):
        import_table(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_training_refuses_what_was_not_checked(tmp_path: Path) -> None:
    folder = make_pairs(tmp_path / "table", 6, ties=[1])
    table = open_table(folder)
    with pytest.raises(DataError, match=rf"has not been checked; run 'mmalign data check {folder}'"):
        usable_rows(table)
    check_table(table, progress=False)
    assert usable_rows(table).rows.tolist() == [0, 2, 3, 4, 5]
    assert usable_rows(table, policy=CheckPolicy(ties="soft")).rows.tolist() == [0, 1, 2, 3, 4, 5]
    (folder / "part-00000.parquet").write_bytes((make_pairs(tmp_path / "b", 7) / "part-00000.parquet").read_bytes())
    with pytest.raises(DataError, match="the table has changed since it was checked; run 'mmalign data check"):
        usable_rows(open_table(folder))
    (folder / "check" / "stamp.json").write_text("{")
    with pytest.raises(DataError, match=r"stamp.json: cannot be read"):
        usable_rows(open_table(folder))


def test_checked_online_and_from_disk_agree(imported: Path) -> None:
    check_table(imported, policy=LENIENT, progress=False)
    table = open_table(imported)
    stored, online = (usable_rows(table, check=how, policy=LENIENT, progress=False) for how in ("required", "online"))
    assert stored.rows.tolist() == online.rows.tolist()
    assert stored.problems == online.problems
    assert stored.media is not None and online.media is not None
    assert (stored.media.hashes == online.media.hashes).all()
    assert (stored.media.sizes == online.media.sizes).all()
    with pytest.raises(DataError, match="'required', 'online' or 'off'"):
        usable_rows(table, check="maybe")


def test_off_looks_at_labels_only(tmp_path: Path) -> None:
    table = open_table(make_pairs(tmp_path / "table", 4, ties=[0, 3]))
    result = usable_rows(table, check="off")
    assert result.rows.tolist() == [1, 2]
    assert result.media is None


def test_all_ties_say_so(tmp_path: Path) -> None:
    table = open_table(make_pairs(tmp_path / "table", 3, ties=[0, 1, 2]))
    for how in ("online", "off"):
        with pytest.raises(DataError, match=r"all 3 rows are ties; data.ties: soft keeps"):
            usable_rows(table, check=how, progress=False)
        assert len(usable_rows(table, check=how, policy=CheckPolicy(ties="soft"), progress=False).rows) == 3


def test_values_that_cannot_be_used(tmp_path: Path) -> None:
    path = make_jsonl(tmp_path, 6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["p_chosen"] = 0.3
    rows[2]["p_chosen"] = None
    rows[3]["scores"] = {"taste": [1.0, float("nan")]}
    rows[4]["scores"] = {"taste": [1.0]}
    for number in (0, 1, 2, 5):
        rows[number]["scores"] = {"taste": [2, 1.5]}
    for number in (0, 3, 4, 5):
        rows[number]["p_chosen"] = 1
    rows[5]["chosen"] = "images/absent.png"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    result = check_table(path, policy=LENIENT, progress=False)
    assert result.rows.tolist() == [0]
    assert [(p.row, p.column, p.reason, p.action) for p in result.problems] == [
        (2, "p_chosen", "label_out_of_range", "quarantine"),
        (3, "p_chosen", "no_label", "drop"),
        (4, "scores.taste", "non_finite_score", "quarantine"),
        (5, "scores.taste", "non_finite_score", "quarantine"),
        (6, "chosen", "missing_image", "quarantine"),
    ]
    assert (tmp_path / "pairs.check" / "report.md").exists()
    table = open_table(path)
    with pytest.raises(
        DataError, match=r"pairs.jsonl line 2 column 'p_chosen': label_out_of_range.*mmalign data check"
    ):
        table[1]


def test_user_files_are_left_alone(imported: Path) -> None:
    before = {path: path.read_bytes() for path in imported.glob("*.parquet")}
    check_table(imported, policy=LENIENT, progress=False)
    assert before == {path: path.read_bytes() for path in imported.glob("*.parquet")}


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = make_pairs(tmp_path / "table", 3)
    (folder / "check").write_text("in the way")
    with pytest.raises(DataError, match=r"check.*cannot be written"):
        check_table(folder, progress=False)
    assert (folder / "check").read_text() == "in the way"


def test_a_prompt_may_count_once_however_often_it_was_judged(tmp_path: Path) -> None:
    source = write_pickapic(tmp_path / "source.parquet", pickapic_cases()[:2])
    for option, weight in (("per_prompt", 0.25), ("one", 1.0)):
        import_table(source, tmp_path / option, options={"weight": option}, progress=False)
        table = open_table(tmp_path / option)
        assert [table.raw(row).weight for row in range(2)] == [weight, weight]
    with pytest.raises(DataError, match="'weight' is 'x', expected one or per_prompt"):
        import_table(source, tmp_path / "x", options={"weight": "x"}, progress=False)
    bare = write_pickapic(tmp_path / "bare.parquet", pickapic_cases()[:2], drop=("num_example_per_prompt",))
    with pytest.raises(DataError, match="needs the column num_example_per_prompt"):
        import_table(bare, tmp_path / "y", options={"weight": "per_prompt"}, progress=False)


def encoded(kind: str, size: tuple[int, int], mode: str = "RGB", **settings: Any) -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (*size, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **settings)
    return buffer.getvalue()


def turned(orientation: int) -> Any:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def spoilt(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


SIXTEEN = io.BytesIO()
Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(SIXTEEN, "PNG")
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "turned": ("keep", {"jpg_0": encoded("JPEG", (20, 30), exif=turned(6))}),
    "clear": ("keep", {"jpg_0": encoded("PNG", (20, 30), "RGBA")}),
    "palette": ("keep", {"jpg_1": encoded("PNG", (20, 30), "P", transparency=0)}),
    "sixteen bits": ("keep", {"jpg_1": SIXTEEN.getvalue()}),
    "inks": ("keep", {"jpg_0": encoded("JPEG", (20, 30), "CMYK")}),
    "one pixel": ("keep", {"jpg_0": encoded("PNG", (1, 1))}),
    "moving": ("keep", {"jpg_0": encoded("GIF", (20, 30))}),
    "junk behind": ("keep", {"jpg_0": encoded("JPEG", (64, 64)) + b"junk" * 9}),
    "a long strip": ("aspect_ratio", {"jpg_0": encoded("PNG", (10, 30_000))}),
    "two bytes short": ("truncated_image", {"jpg_0": encoded("JPEG", (64, 64))[:-2]}),
    "progressive, cut": ("truncated_image", {"jpg_1": encoded("JPEG", (64, 64), progressive=True)[:-300]}),
    "webp, cut": ("truncated_image", {"jpg_0": encoded("WEBP", (64, 64))[:-60]}),
    "a wrong checksum": ("undecodable_image", {"jpg_0": spoilt(encoded("PNG", (64, 64)), 60)}),
    "both are bad": ("empty_image", {"jpg_0": b"", "jpg_1": b"x"}),
    "a tie that is bad": ("truncated_image", {"label_0": 0.5, "label_1": 0.5, "jpg_1": picture(7)[:-50]}),
    "unjudged and bad": ("no_label", {"has_label": False, "jpg_0": b""}),
    "half judged": ("label_out_of_range", {"label_1": None}),
    "endless": ("label_out_of_range", {"label_0": float("inf")}),
    "too much": ("contradictory_label", {"label_1": 0.5}),
    "leaning": ("keep", {"label_0": 0.7, "label_1": 0.3}),
    "wide spaces": ("empty_prompt", {"caption": "\u00a0\u2003\n"}),
    "a zero byte": ("keep", {"caption": "a\x00b"}),
    "a novel": ("keep", {"caption": "word " * 20_000}),
    "without names": ("keep", {"image_0_uid": None, "image_1_uid": None}),
}


def test_odd_pictures_and_labels(tmp_path: Path) -> None:
    """Each alone in its row: what can be shown is kept, what cannot has its one reason."""
    base = pickapic_cases()[0].row
    cases = [
        Case(name=name, expected=expected, row={**base, "caption": name, "ranking_id": number, "jpg_0": picture(50 + number),
                                                "jpg_1": picture(150 + number), **change})
        for number, (name, (expected, change)) in enumerate(ODD.items())
    ]  # fmt: skip
    import_table(write_pickapic(tmp_path / "source.parquet", cases), tmp_path / "table", progress=False)
    lines = (tmp_path / "table" / "import" / "quarantine.jsonl").read_text().splitlines()
    found = {json.loads(line)["row"]: json.loads(line)["reason"] for line in lines}
    reached = [number for number in range(len(cases)) if number not in found]
    found |= dict(zip(reached, outcomes(tmp_path / "table", LENIENT, workers=2).values(), strict=True))
    assert {cases[number].name: reason for number, reason in found.items()} == {case.name: case.expected for case in cases}


def test_refused_files_are_told_by_their_first_bytes(imported: Path) -> None:
    check_table(imported, policy=LENIENT, progress=False)
    listed = {entry["reason"]: entry for entry in pq.read_table(imported / "check" / "quarantine.parquet").to_pylist()}
    page = next(case.row["jpg_0"] for case in pickapic_cases() if case.name == "noise")
    assert listed["unsupported_format"]["head"] == hashlib.sha256(page[:64]).hexdigest()
    assert listed["empty_image"]["head"] == hashlib.sha256(b"").hexdigest()
    assert listed["missing_image"]["head"] == listed["empty_prompt"]["head"] == ""
