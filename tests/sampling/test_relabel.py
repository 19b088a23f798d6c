"""Reward-augmented tables: both halves of a pair, what is asked for where, and pairs that give none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmalign.cli.application import app
from mmalign.data import open_vlm
from mmalign.errors import DataError
from mmalign.sampling.relabel import TEMPLATE, conditioned, relabel_table
from tests.fixtures import tiny_vlm
from tests.fixtures.vlm_runs import write_table


def table_of(folder: Path, scores: list[list[float] | None]) -> Path:
    path = write_table(folder, "pairs", len(scores))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, given in zip(rows, scores, strict=True):
        row["scores"] = {"judge": given}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_pair_is_asked_for_at_both_scores(tmp_path: Path) -> None:
    source = table_of(tmp_path, [[0.9, 0.2], [0.5, 0.501], None, [1.0, 0.0]])
    made = relabel_table(source, tmp_path / "out", reward="judge", low=0, high=1, progress=False)
    assert (made.rows, made.left_out) == (4, {"tie": 1, "no_score": 1})
    before, after = open_vlm(source, progress=False), open_vlm(tmp_path / "out", progress=False)
    first, second = after[0], after[1]
    assert [first.id, second.id] == ["r0/chosen", "r0/rejected"]
    texts = [answer.text for answer in before[0].answers]
    assert [answer.text for answer in first.answers] == texts and [answer.text for answer in second.answers] == texts[::-1]
    assert [answer.scores["judge"] for answer in second.answers] == pytest.approx([0.2, 0.9])
    for record, score in ((first, "0.90"), (second, "0.20")):
        parts = record.messages[-1].parts
        assert parts[0].media == 0 and parts[1].text == TEMPLATE.format(score=score, low="0", high="1")
        assert parts[2].text == "What is in the picture? 0"
        assert record.meta["sampled"]["asked_for"] == score
    assert open_vlm(tmp_path / "out", progress=False)[2].media[0].data == (tmp_path / "pictures" / "3.png").read_bytes()  # type: ignore[union-attr]
    assert json.loads((tmp_path / "out" / "relabel.json").read_text())["rows"] == 4


def test_words_stand_behind_the_media_of_the_last_turn() -> None:
    record = tiny_vlm.record("r", media=[tiny_vlm.picture(1)], prompt="What?")
    assert [(part.text, part.media) for part in conditioned(record, "Ask. ").messages[-1].parts] == [
        (None, 0), ("Ask. ", None), ("What?", None),
    ]  # fmt: skip


def test_the_command_writes_what_a_method_reads(tmp_path: Path) -> None:
    source = table_of(tmp_path, [[3.0, 1.0], [2.0, 5.0]])
    arguments = ["data", "relabel", str(source), str(tmp_path / "out"), "--reward", "judge", "--low", "1", "--high", "5"]
    done = CliRunner().invoke(app, [*arguments, "--digits", "0", "--template", "Score {score}: "])
    assert done.exit_code == 0 and "4 rows" in done.output
    texts = [open_vlm(tmp_path / "out", progress=False)[row].messages[-1].parts[1].text for row in range(4)]
    assert texts == ["Score 3: ", "Score 1: ", "Score 2: ", "Score 5: "]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code != 0 and "already exists" in " ".join(again.output.split())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": "no place"}, "exactly once"), ({"low": 1.0, "high": 1.0}, "low < high"),
        ({"reward": "other"}, "no pair with different scores of 'other'"),
    ],
)  # fmt: skip
def test_settings_without_meaning_are_refused(settings: dict[str, float | str], words: str, tmp_path: Path) -> None:
    source = table_of(tmp_path, [[0.9, 0.2]])
    with pytest.raises(DataError, match=words):
        relabel_table(source, tmp_path / "out", **{"reward": "judge", "low": 0.0, "high": 1.0, "progress": False, **settings})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_columns_that_would_be_lost_are_named(tmp_path: Path) -> None:
    source = write_table(tmp_path, "pairs", 2, p_chosen=0.8)
    with pytest.raises(DataError, match="p_chosen"):
        relabel_table(source, tmp_path / "out", reward="judge", low=0, high=1, progress=False)
    lists = write_table(tmp_path, "lists", 2)
    with pytest.raises(DataError, match="reads pairs"):
        relabel_table(lists, tmp_path / "out", reward="judge", low=0, high=1, progress=False)
