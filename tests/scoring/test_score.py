"""`mmalign score`: sources, outputs, reasons, resuming, extra processes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmalign.cli.application import app
from mmalign.errors import DataError
from mmalign.scoring import job as job_module
from mmalign.scoring.job import Job
from mmalign.scoring.run import score
from mmalign.scoring.sources import Columns, open_source
from tests.forks import kill_when, run_code, start

REASONS = {
    "page.jpg": "unsupported_format",
    "../secret.png": "outside_root",
    "link.png": "outside_root",
    "none.png": "missing_image",
}


def same(one: pa.Table, two: pa.Table) -> bool:
    """Equal to the last bit, with a missing score equal to a missing score."""
    return one.schema.equals(two.schema) and str(one.to_pylist()) == str(two.to_pylist())


def brightness(file: Path) -> float:
    return float((np.asarray(Image.open(file), dtype=np.float64) @ np.array([0.299, 0.587, 0.114])).mean() / 255)


def test_folder_to_parquet(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    report = score(Job(input=str(folder), rewards=("brightness", "saturation"), out=str(out)))
    assert report is not None and (report.rows, report.failed) == (16, 4)
    assert report.reasons == {"unsupported_format": 1, "outside_root": 2, "missing_image": 1}  # together: the failed rows
    table = pq.read_table(out)
    assert table.column_names == ["key", "prompt", "brightness", "saturation", "truncated", "status", "error"]
    rows = table.to_pylist()
    for row in rows[:12]:
        assert row["brightness"] == pytest.approx(brightness(folder / row["key"]), abs=1e-6) and row["status"] == "ok"
    for row in rows[12:]:
        reason = REASONS[row["key"]]
        assert row["error"] == f"brightness:{reason};saturation:{reason}" and np.isnan(row["brightness"])
    facts = json.loads(table.schema.metadata[b"mmalign"])
    assert facts["rewards"]["brightness"]["card"]["formula"] == "mean of 0.299 R + 0.587 G + 0.114 B"
    assert str(tmp_path / "secret.png") not in str(rows)


def test_csv_and_jsonl_hold_the_same(folder: Path, tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl"):
        score(Job(input=str(folder), rewards=("brightness",), out=str(tmp_path / name)))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    with (tmp_path / "a.csv").open(newline="") as stream:
        cells = list(csv.DictReader(stream))
    assert [row["key"] for row in cells] == [row["key"] for row in lines]
    assert [row["brightness"] for row in cells] == [
        "" if r["brightness"] is None else str(r["brightness"]) for r in lines
    ]
    assert lines[12]["brightness"] is None


def pair_table(folder: Path, file: Path) -> None:
    data = [(folder / f"{index:02d}.png").read_bytes() for index in range(12)]
    table = pa.table({
        "jpg_0": data[:6], "jpg_1": data[6:], "caption": [f"p{i}" for i in range(6)],
        "label_0": [1.0, 0.0, 0.5, 1.0, 0.0, 1.0], "label_1": [0.0, 1.0, 0.5, 0.0, 1.0, 0.0],
    })  # fmt: skip
    pq.write_table(table, file, row_group_size=4)


def test_pairs_in_parquet(folder: Path, tmp_path: Path) -> None:
    pair_table(folder, tmp_path / "pairs.parquet")
    out = tmp_path / "scores.parquet"
    score(Job(input=str(tmp_path / "pairs.parquet"), rewards=("brightness",), out=str(out)))
    table = pq.read_table(out)
    for side, first in (("jpg_0", 0), ("jpg_1", 6)):
        expected = [brightness(folder / f"{first + index:02d}.png") for index in range(6)]
        assert table[f"brightness__{side}"].to_pylist() == pytest.approx(expected, abs=1e-6)
    source = open_source(tmp_path / "pairs.parquet", Columns())
    assert [row.prompt for row in source.rows(3, 6)] == ["p3", "p4", "p5"]


def test_datasets_folder(folder: Path, tmp_path: Path) -> None:
    import datasets

    files = [str(folder / f"{index:02d}.png") for index in range(3)]
    table = datasets.Dataset.from_dict({"image": files, "prompt": ["a", "b", "c"]}).cast_column(
        "image", datasets.Image()
    )
    table.map(lambda row: row).save_to_disk(tmp_path / "saved")
    out = tmp_path / "scores.jsonl"
    report = score(Job(input=str(tmp_path / "saved"), rewards=("brightness",), out=str(out), root=str(folder)))
    assert report is not None and report.failed == 0
    found = [json.loads(line)["brightness"] for line in out.read_text().splitlines()]
    assert found == pytest.approx([brightness(Path(file)) for file in files], abs=1e-6)


def test_a_reward_added_later_leaves_the_rest_untouched(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    score(Job(input=str(folder), rewards=("brightness",), out=str(out)))
    parts = Path(f"{out}.parts")
    before = {file.name: file.stat().st_mtime_ns for file in parts.glob("*.brightness.*")}
    score(Job(input=str(folder), rewards=("brightness", "saturation"), out=str(out)))
    assert before == {file.name: file.stat().st_mtime_ns for file in parts.glob("*.brightness.*")} != {}
    assert "saturation" in pq.read_table(out).column_names


@pytest.mark.parametrize("harm", ["cut", "swapped", "manifest"])
def test_a_damaged_part_is_made_again(folder: Path, tmp_path: Path, harm: str) -> None:
    out = tmp_path / "s.parquet"
    task = Job(input=str(folder), rewards=("brightness",), out=str(out))
    score(task)
    expected = pq.read_table(out)
    part = next(Path(f"{out}.parts").glob("*.parquet"))
    if harm == "cut":
        part.write_bytes(part.read_bytes()[:-20])
    elif harm == "swapped":
        pq.write_table(pa.table({"value.file_name": [0.0] * 16}), part)
    else:
        part.with_suffix(".json").write_text("{")
    score(task)
    assert same(pq.read_table(out), expected)


def test_a_changed_input_is_not_mistaken_for_the_old_one(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    task = Job(input=str(folder), rewards=("brightness",), out=str(out))
    score(task)
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    score(task)
    rows = pq.read_table(out).to_pylist()
    assert rows[0]["key"] == "01.png" and rows[0]["brightness"] == pytest.approx(
        brightness(folder / "01.png"), abs=1e-6
    )


SLOW = """
import sys, time
from mmalign.scoring import job
from mmalign.rewards.simple import Brightness
job.part_rows = lambda count: 8
plain = Brightness.answer
def slow(self, images, prompts):
    time.sleep(0.25)
    return plain(self, images, prompts)
Brightness.answer = slow
from mmalign.scoring.run import score
score(job.Job(input=sys.argv[1], rewards=("brightness",), out=sys.argv[2]))
"""


def test_killed_three_times_and_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = tmp_path / "big"
    big.mkdir()
    for copy in range(4):
        for index in range(12):
            shutil.copy(folder / f"{index:02d}.png", big / f"{copy}-{index:02d}.png")
    out = tmp_path / "killed.parquet"

    def parts() -> list[Path]:
        return sorted(Path(f"{out}.parts").glob("*.json"))

    finished: list[Path] = []
    for _ in range(3):
        before = len(finished)
        assert kill_when(start(run_code, SLOW, str(big), str(out)), lambda before=before: len(parts()) > before)
        finished = parts()
    assert not out.exists() and 3 <= len(finished) < 6
    kept = {file: file.stat().st_mtime_ns for file in finished}
    monkeypatch.setattr(job_module, "part_rows", lambda count: 8)
    score(Job(input=str(big), rewards=("brightness",), out=str(out)))
    assert {file: file.stat().st_mtime_ns for file in finished} == kept
    score(Job(input=str(big), rewards=("brightness",), out=str(tmp_path / "whole.parquet")))
    assert same(pq.read_table(out), pq.read_table(tmp_path / "whole.parquet"))


def test_two_processes_write_the_same_table(folder: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        job = Job(
            input=str(folder), rewards=("tiny-clip", "brightness"), out=str(tmp_path / f"{count}.parquet"), device="cpu"
        )
        score(job, processes=count)
    one, two = ((tmp_path / f"{count}.parquet") for count in (1, 2))
    assert same(pq.read_table(one), pq.read_table(two))


def test_parts_made_at_the_same_time_write_the_same_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; a Parquet input, whose reader holds one group of rows at a time, and an error in one of the parts."""
    monkeypatch.setattr(job_module, "part_rows", lambda count: 2)
    pictures = [(folder / f"{index:02d}.png").read_bytes() for index in range(12)]
    table = pa.table({"image": [{"bytes": data, "path": None} for data in pictures], "prompt": list("abcdefghijkl")})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=3)

    def run(lanes: int) -> pa.Table:
        monkeypatch.setattr(job_module.Worker, "lanes", lambda self: lanes)
        out = tmp_path / f"{lanes}.parquet"
        report = score(Job(input=str(tmp_path / "in.parquet"), rewards=("tiny-clip", "brightness"), out=str(out), device="cpu"))
        assert report is not None and (report.rows, report.failed) == (12, 0)
        return pq.read_table(out)

    assert same(run(1), run(3))
    plain = job_module.Worker._score

    def fails(self: Any, names: Any, start: int, stop: int) -> None:
        if start == 4:
            raise DataError("rows 4 to 5")
        plain(self, names, start, stop)

    shutil.rmtree(tmp_path / "3.parquet.parts")
    monkeypatch.setattr(job_module.Worker, "_score", fails)
    with pytest.raises(DataError, match="rows 4 to 5"):
        run(3)


def test_ranks_of_a_launcher_share_the_parts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Job(input=str(folder), rewards=("brightness",), out=str(tmp_path / "s.parquet"))
    monkeypatch.setattr(job_module, "part_rows", lambda count: 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert score(task) is None and not (tmp_path / "s.parquet").exists()
    made = {file: file.stat().st_mtime_ns for file in Path(f"{task.out}.parts").glob("*.parquet")}
    assert len(made) == 4
    monkeypatch.setenv("RANK", "0")
    report = score(task)
    assert report is not None and report.rows == 16
    assert made == {file: file.stat().st_mtime_ns for file in made}


def test_rows_without_a_prompt(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    (folder / "03.txt").write_text("a star\n")
    found = {row.key: row.prompt for row in open_source(folder, Columns()).rows(0, 100)}
    assert found["03.png"] == "a star" and found["04.png"] is None
    report = score(Job(input=str(folder), rewards=("brightness",), out=str(tmp_path / "s.csv")))
    assert report is not None and report.reasons == {"unsupported_format": 1, "outside_root": 1}


def test_hostile_files_and_prompts_are_counted(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30_000, 10)).save(folder / "00.png")
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:300])
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[2]["text"], lines[3]["text"], lines[4]["text"] = "star " * 2000, "", "a <|endoftext|> b"
    lines.append({"file_name": "/etc/passwd", "text": "a"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "s.jsonl"
    arguments = ["score", str(folder), "--reward", "tiny-clip", "--out", str(out), "--device", "cpu"]
    done = run_cli(*arguments)
    assert done.exit_code == 3, done.output
    reasons = "missing_image 1, outside_root 3, too_large 1, truncated_image 1, unsupported_format 1"
    assert (
        f"failed rows: 7 ({reasons})" in done.stdout and "prompts longer than the text encoder reads: 1" in done.stdout
    )
    assert "prompts: empty_prompt 1, special_token 1" in done.stdout
    assert "passwd" not in out.read_text().replace('"/etc/passwd"', "") and "root:" not in out.read_text()


def test_strict_refuses_empty_prompts(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": ""}\n')
    arguments = ["score", str(folder), "--reward", "tiny-clip", "--out", str(tmp_path / "s.csv"), "--device", "cpu"]
    assert (run_cli(*arguments).exit_code, run_cli(*arguments, "--strict").exit_code) == (0, 2)


def test_prompt_files_and_batch_sizes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"00.png": "a star", "01.png": "a circle"}')
    rows = open_source(folder, Columns(prompt_file=str(tmp_path / "p.json"))).rows(0, 3)
    assert [row.prompt for row in rows] == ["a star", "a circle", None]
    out = str(tmp_path / "s.csv")
    done = run_cli("score", str(folder), "--reward", "brightness", "--out", out, "--batch-size", "auto",
                   "--prompt-file", str(tmp_path / "p.json"))  # fmt: skip
    assert done.exit_code == 3 and "% of it waiting for pictures" in done.stdout
    for option, words in (("--batch-size=0", "a number from 1"), ("--prompt-file=none.json", "cannot read none.json")):
        done = run_cli("score", str(folder), "--reward", "brightness", "--out", out, option)
        assert done.exit_code == 2 and words in done.stderr


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="parquet, .csv, .jsonl"):
        score(Job(input=str(folder), rewards=("brightness",), out=str(tmp_path / "s.txt")))
    with pytest.raises(DataError, match="nothing at"):
        score(Job(input=str(tmp_path / "no"), rewards=("brightness",), out=str(tmp_path / "s.csv")))
    with pytest.raises(DataError, match="no column 'imge'; did you mean 'image'"):
        (tmp_path / "t.jsonl").write_text('{"image": "a.png"}\n')
        open_source(tmp_path / "t.jsonl", Columns(images=("imge",)))
    (tmp_path / "t.jsonl").write_text('{"image": "a.png"}\n{oops\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        open_source(tmp_path / "t.jsonl", Columns())


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_exit_codes_and_closing_report(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    done = run_cli("score", str(folder), "--reward", "brightness", "--out", str(out))
    assert done.exit_code == 3, done.output
    assert "failed rows: 4 (missing_image 1, outside_root 2, unsupported_format 1)" in done.stdout
    assert run_cli("score", str(folder), "--reward", "brightness", "--out", str(out), "--strict").exit_code == 2
    wrong = run_cli("score", str(folder), "--reward", "britness", "--out", str(out))
    assert wrong.exit_code == 2 and "did you mean 'brightness'" in wrong.stderr and "Traceback" not in wrong.stderr


def test_score_eval_command(folder: Path, tmp_path: Path) -> None:
    pair_table(folder, tmp_path / "pairs.parquet")
    out = tmp_path / "scores.parquet"
    score(Job(input=str(tmp_path / "pairs.parquet"), rewards=("brightness",), out=str(out)))
    done = run_cli("score-eval", str(out), "--reward", "brightness", "--labels-from", str(tmp_path / "pairs.parquet"))
    assert done.exit_code == 0, done.output
    first, second = (pq.read_table(out)[f"brightness__jpg_{side}"].to_pylist() for side in (0, 1))
    labels = [1.0, 0.0, 0.5, 1.0, 0.0, 1.0]
    right = sum((a > b) == (c == 1) for a, b, c in zip(first, second, labels, strict=True) if c != 0.5)
    assert f"accuracy {right / 5:.4f} on 5 pairs" in done.stdout and "rule: no-ties" in done.stdout


def test_other_colours_are_another_score_and_are_recorded(folder: Path, tmp_path: Path) -> None:
    """A changed choice scores again where it was scored before, and an unknown one is refused by name."""
    Image.new("RGBA", (32, 32), (200, 30, 30, 60)).save(folder / "clear.png")
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"file_name": "clear.png", "text": "a red square"}) + "\n")
    out, found = tmp_path / "s.parquet", {}
    command = ["score", str(folder), "--reward", "brightness", "--out", str(out)]
    for alpha in ("white", "black", "drop"):
        result = CliRunner().invoke(app, [*command, "--alpha", alpha, "--no-exif"])
        assert result.exit_code in (0, 3), result.output
        table = pq.read_table(out)
        facts = json.loads(table.schema.metadata[b"mmalign"])
        assert facts["colours"].startswith("alpha-dropped" if alpha == "drop" else f"alpha-over-{alpha}")
        assert "exif-ignored" in facts["colours"]
        found[alpha] = table["brightness"].to_pylist()[-1]
    assert found["white"] > found["drop"] > found["black"]
    refused = CliRunner().invoke(app, [*command, "--alpha", "grey"])
    assert refused.exit_code == 2 and "alpha is one of white, black, drop" in refused.output
