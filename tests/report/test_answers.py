"""Answers on the page: before and after with pictures, lengths, rates, and the alarms that belong to answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.report import build_report
from mmalign.report.answers import answers
from mmalign.report.folder import read_run
from mmalign.report.warnings import chosen_answers_fall, length_exploitation


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "n": 40, "level": 0.95}


def words(base: float, aligned: float, longer: tuple[float, float, float]) -> dict[str, Any]:
    return {"answers": {"words": {
        "base": interval(base, base - 1, base + 1),
        "aligned": {**interval(aligned, aligned - 1, aligned + 1), "longer": interval(*longer)},
    }}}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with 14 questions that were answered before and after."""
    media = tmp_path / "samples" / "media"
    media.mkdir(parents=True)
    (tmp_path / "samples" / "evaluation").mkdir()
    Image.new("RGB", (48, 48), (200, 30, 30)).save(media / "q0-0.png")
    rows = []
    for number in range(14):
        rows.append(
            {"id": f"q{number}", "question": f"[picture] What is there? {number}", "media": [f"samples/media/q{number}-0.png"],
             "group": "board", "answers": {"base": f"a blue square {number}", "aligned": f"a <b>red</b> circle {number}"},
             "scores": {"judge": {"base": 0.5, "aligned": 0.5 + 0.01 * (number - 6)}}}
        )  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "samples" / "evaluation" / "answers.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text("method: {name: vlm_dpo}\n")
    (tmp_path / "summary.json").write_text(json.dumps(
        {"method": "vlm_dpo", "hallucination": {"base": {"chair_i": interval(0.3, 0.25, 0.35)},
                                                "aligned": {"chair_i": interval(0.2, 0.15, 0.25)}}, **words(10, 14, (4, 3, 5))}
    ))  # fmt: skip
    return tmp_path


def test_the_section_shows_questions_evenly_and_says_what_is_missing(run: Path) -> None:
    section = answers(read_run(run))
    assert [question.text for question in section.values["even"]][:3] == [
        "[picture] What is there? 0", "[picture] What is there? 1", "[picture] What is there? 2",
    ]  # fmt: skip
    first = section.values["even"][0]
    assert [said.model for said in first.said] == ["base", "aligned"]
    assert len(first.pictures) == 1
    assert any("q13-0.png cannot be shown" in problem or "q12" in problem for problem in section.values["problems"])
    assert section.values["rates"]["names"] == [("Named things that are not there", "CHAIR-i; lower is better")]
    assert section.values["lengths"][1]["longer"] == "+4.00"


def test_the_page_escapes_answers_and_leaves_out_what_belongs_to_pictures(run: Path) -> None:
    page = build_report(run).read_text("utf-8")
    assert "a &lt;b&gt;red&lt;/b&gt; circle 0" in page
    assert 'id="answers"' in page
    assert 'id="pictures"' not in page
    assert "Answers have become longer" in page


def test_without_an_evaluation_the_first_and_last_samples_are_shown(run: Path) -> None:
    (run / "samples" / "evaluation" / "answers.jsonl").unlink()
    for step, answer in ((0, "before"), (20, "after")):
        folder = run / "samples" / f"step-{step:08d}"
        folder.mkdir()
        row = {"id": "q0", "question": "What?", "answer": answer, "media": ["../outside.png"]}
        (folder / "answers.jsonl").write_text(json.dumps(row) + "\n")
    section = answers(read_run(run))
    (question,) = section.values["even"]
    assert [(said.model, said.text) for said in question.said] == [("step 0", "before"), ("step 20", "after")]
    assert section.values["problems"] == ["../outside.png lies outside the run folder and is not shown"]


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (words(10, 14, (4, 3, 5)), True),
        (words(10, 11, (1, 0.5, 1.5)), False),  # less than a fifth more
        (words(10, 14, (4, -1, 9)), False),  # not told from chance
        ({}, False),
    ],
)
def test_longer_answers_raise_an_alarm(summary: dict[str, Any], expected: bool) -> None:
    found = length_exploitation(summary)
    assert (found is not None) is expected
    if found is not None:
        assert "14.0 words per answer where the base uses 10.0" in found.text


@pytest.mark.parametrize(("drift", "expected"), [(-0.5, True), (-0.05, False), (0.2, False)])
def test_falling_chosen_answers_raise_an_alarm(drift: float, expected: bool) -> None:
    rows = [{"step": step, "chosen_drift_per_token": drift} for step in range(1, 9)]
    found = chosen_answers_fall(rows)
    assert (found is not None) is expected
    if found is not None:
        assert "0.500 nats less" in found.text
    assert chosen_answers_fall([{"step": 1}]) is None
