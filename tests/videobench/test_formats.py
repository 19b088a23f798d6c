"""Files laid out as the published ones, small and hand-made, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.errors import DataError
from mmalign.videobench.formats import read_benchmark

VIDEOS = Path("films")


def write(folder: Path, name: str, value: Any) -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_videomme_from_json_and_parquet(tmp_path: Path) -> None:
    row = {"video_id": "001", "videoID": "fFjv93ACGo8", "question_id": "001-1",
           "task_type": "Temporal Reasoning", "duration": "short",
           "question": "What comes first?", "options": ["A. A cat.", "B. A dog.", "C. Rain."], "answer": "B"}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "test.parquet")
    for file in (write(tmp_path, "videomme.json", [row]), tmp_path / "test.parquet"):
        (found,) = read_benchmark("videomme", file, VIDEOS)
        assert (found.id, found.options, found.answer) == ("001-1", ("A cat.", "A dog.", "Rain."), 1)
        assert found.group == "Temporal Reasoning" and found.videos == (VIDEOS / "fFjv93ACGo8.mp4",)


def test_mlvu_answers_by_text(tmp_path: Path) -> None:
    row = {"video": "order_1.mp4", "question": "In which order?", "candidates": ["a then b", "b then a"], "answer": "b then a",
           "question_type": "order"}  # fmt: skip
    (found,) = read_benchmark("mlvu", write(tmp_path, "order.json", [row]), VIDEOS)
    assert (found.id, found.answer, found.group, found.videos) == ("order-0", 1, "order", (VIDEOS / "order_1.mp4",))


def test_tempcompass_with_options_and_with_yes_or_no(tmp_path: Path) -> None:
    rows = {"1001": {"order": [{"question": "What is first?\nA. jump\nB. sit", "answer": "B. sit"}],
                     "speed": [{"question": "Is it fast?", "answer": "No"}]}}  # fmt: skip
    first, second = read_benchmark("tempcompass", write(tmp_path, "t.json", rows), VIDEOS)
    assert (first.question, first.options, first.answer, first.group) == ("What is first?", ("jump", "sit"), 1, "order")
    assert (second.options, second.answer, second.id) == (("yes", "no"), 1, "1001-speed-0")


def test_vinoground_asks_four_questions_a_pair(tmp_path: Path) -> None:
    text = "index,major,pos_vid,neg_vid,pos_cap,neg_cap\n0,object,0_pos,0_neg,a then b,b then a\n"
    found = read_benchmark("vinoground", write(tmp_path, "v.csv", text), VIDEOS)
    assert [(item.id, item.answer, item.pair, len(item.videos)) for item in found] == [
        ("0-text-0", 0, "0-text", 1), ("0-video-0", 0, "0-video", 2),
        ("0-text-1", 1, "0-text", 1), ("0-video-1", 1, "0-video", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("videomme", [{"question_id": "1"}], "row 0: lacks 'options'"),
        (
            "choices",
            [{"id": "a", "video": "v", "question": "q", "options": ["x", "y"], "answer": "z"}],
            "none of its options",
        ),
        ("choices", [{"id": "a", "video": "v", "question": "q", "options": ["x"], "answer": "x"}], "1 options"),
        (
            "choices",
            [{"id": "a", "video": "../v", "question": "q", "options": ["x", "y"], "answer": "x"}],
            "lies outside",
        ),
        (
            "choices",
            [{"id": "a", "video": "v", "question": "q", "options": ["x", "y"], "answer": "x"}] * 2,
            "two questions have",
        ),
        ("tempcompass", [1], "expected films"),
        ("tempcompass", {"1": [1]}, "expected aspects"),
        ("mlvu", [], "holds no questions"),
        ("mlvu", "{", "cannot be read"),
    ],
)
def test_what_differs_is_refused_by_name(tmp_path: Path, name: str, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_benchmark(name, write(tmp_path, "f.json", value), VIDEOS)
