"""A real model on real films: answers parsed, counted and written, films that cannot be read left out and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmalign import assets
from mmalign.cli.application import app
from mmalign.errors import ConfigError
from mmalign.videobench.run import figures, load_video_bench, parse_choice
from mmalign.world.clip_tables import write_clips

pytest.importorskip("av")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", 1), ("(B)", 1), ("b. a dog", 1), ("B: because", 1),
        ("The answer is (C).", 2), ("Answer: a", 0), ("a dog", 1), ("A dog.", 1),
        ("I see a dog running", 1), ("a cat and a dog", None), ("nothing", None), ("D", None),
        ("<think>A</think> C", 2), ("Apple", None),
        ("A", 0), ("A cat", 0),
    ],
)  # fmt: skip
def test_options_named_by_letter_or_text(text: str, wanted: int | None) -> None:
    assert parse_choice(text, ("a cat", "a dog", "rain")) == wanted


def line(pair: str | None, group: str, right: bool, chosen: int | None = 0) -> dict[str, object]:
    return {"id": "x", "group": group, "pair": pair, "right": right, "chosen": chosen, "options": 2}


def test_pairs_count_where_both_are_right() -> None:
    right = {"0-text": (True, True), "0-video": (True, False), "1-text": (True, True), "1-video": (True, True)}
    lines = [line(pair, pair.split("-")[1], one) for pair, both in right.items() for one in both]
    lines[-1] |= {"chosen": None}
    found = figures(lines, seed=0)
    assert found["accuracy"]["mean"] == pytest.approx(7 / 8) and found["chance"] == 0.5 and found["unparsed"] == 1
    assert [found["pairs"][name]["mean"] for name in ("text", "video", "group")] == [1.0, 0.5, 0.5]


def test_the_command_on_a_model(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 2, seed=1, held_out=True, numbers=(3,))
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"no film")
    rows = [
        {"id": f"q{number}", "video": f"{film}.mp4", "question": "Which comes first?", "group": "order",
         "options": [clip.events[0].subject, clip.events[1].subject], "answer": "A"}
        for number, (film, clip) in enumerate([(0, clips[0]), (1, clips[1]), (0, clips[0]), ("bad", clips[0])])
    ]  # fmt: skip
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    (tmp_path / "bench.yaml").write_text(
        f"benchmark: choices\nfile: {tmp_path}/questions.json\nvideos: {tmp_path}/clips\nout: {tmp_path}/out\ndevice: cpu\n"
        f"model: {{name: vlm, path: {assets.path('tiny-video-vlm')}, video_fps: 8, max_frames: 12}}\ncache: {tmp_path}/cache\n"
    )
    done = CliRunner().invoke(app, ["evaluate-video", str(tmp_path / "bench.yaml"), "max_new_tokens=8"])
    assert done.exit_code == 3, done.output
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    answers = [json.loads(text) for text in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert summary["questions"] == 4 and summary["unreadable"] == {"undecodable_media": 1} and len(answers) == 3
    assert summary["accuracy"]["mean"] == pytest.approx(sum(item["right"] for item in answers) / 3)
    assert answers[0]["said"] == answers[2]["said"] and "accuracy" in done.output


def test_settings_without_meaning_are_refused(tmp_path: Path) -> None:
    text = "benchmark: choices\nfile: f\nvideos: v\nout: o\n"
    for more, message in (("", "one of model and run"), ("run: r\nmax_new_tokens: 0\n", "at least 1")):
        (tmp_path / "c.yaml").write_text(text + more)
        with pytest.raises(ConfigError, match=message):
            load_video_bench(tmp_path / "c.yaml")
