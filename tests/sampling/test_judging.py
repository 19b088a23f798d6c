"""Lists of answers judged and paired through the public commands: counts, filters, interruptions, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmalign.cli.application import app
from mmalign.data import open_vlm
from mmalign.data.partfolder import PartFolder
from mmalign.errors import DataError
from mmalign.sampling import judging
from mmalign.sampling.judging import judge_lists
from mmalign.sampling.pairs import make_answer_pairs
from mmalign.world.board_tables import prompt, reply, write_rows
from tests.fixtures import tiny_vlm

RUNNER = CliRunner()
REFERENCE = "The heart is normal in size. There is a small left pleural effusion."
PERFECT = "Normal heart size. Small left-sided pleural effusion."
FALSE = "Normal heart size. Small left-sided pleural effusion. Large right-sided nodule."
LONG = PERFECT + " No nodule. No opacity. No pneumothorax."
BABBLE = "once upon a time"


def run(*words: str) -> Any:
    return RUNNER.invoke(app, list(words))


def write_lists(folder: Path, lists: list[list[str]]) -> Path:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, answers in enumerate(lists):
        (folder / "pictures" / f"{number}.png").write_bytes(tiny_vlm.picture(number, (24, 24)).data or b"")
        rows.append(
            {"id": f"s{number}", "prompt": prompt("Report this study."), "answers": [reply(text) for text in answers],
             "images": [f"pictures/{number}.png"], "meta": {"reference": REFERENCE, "sampled": {"seed": 5}}}
        )  # fmt: skip
    return write_rows(folder / "lists.jsonl", rows)


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    return write_lists(tmp_path, [[PERFECT, FALSE, BABBLE], [FALSE, LONG], [PERFECT, "Normal heart size. Small left-sided "
                                  "pleural effusion."], [BABBLE, PERFECT]])  # fmt: skip


def test_judging_then_pairing(lists: Path, tmp_path: Path) -> None:
    out, pairs = tmp_path / "judged", tmp_path / "pairs"
    done = run("annotate", str(lists), "--reward", "cxr-report,lc:cxr-report", "--out", str(out))
    assert done.exit_code == 3, done.output
    assert "no score for 2 answers: unreadable" in done.output and "low 0.5" in done.output
    table = open_vlm(out)
    assert [answer.scores for answer in table[0].answers] == [
        {"cxr-report": 1.0, "lc:cxr-report": 1.0}, {"cxr-report": 0.5, "lc:cxr-report": pytest.approx(0.5)}, {}
    ]  # fmt: skip
    words = len(LONG.split()) / len(REFERENCE.split())
    assert table[1].answers[1].scores["lc:cxr-report"] == pytest.approx(1 / words)
    assert table[0].meta == {"reference": REFERENCE, "sampled": {"seed": 5}} and table[0].media[0].data  # type: ignore[union-attr]
    lines = [json.loads(line) for line in (out / "annotate" / "judgements.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    false = next(line for line in lines if line["notes"] and line["score"] is not None)
    assert false["notes"] == ["false finding: large right nodule"] and false["parts"]["false_finding"] == 1.0
    failed = [json.loads(line) for line in (out / "annotate" / "failed.jsonl").read_text().splitlines()]
    assert {(line["id"], line["answer"], line["reason"]) for line in failed} == {
        ("s0", 2, "unreadable"), ("s3", 0, "unreadable")
    }  # fmt: skip
    done = run("data", "pairs", str(out), "--out", str(pairs), "--reward", "cxr-report")
    assert done.exit_code == 0, done.output
    made = open_vlm(pairs)
    assert made.kind == "pairs" and [made[row].answers[0].text for row in range(len(made))] == [PERFECT, LONG]
    assert made[0].meta["pair"] == {"chosen": 0, "rejected": 1, "judge": "cxr-report", "margin": 0.5}
    assert made[0].answers[0].scores == {"cxr-report": 1.0, "lc:cxr-report": 1.0} and made[0].p_chosen == 1.0
    reasons = [json.loads(line)["reason"] for line in (pairs / "import" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(reasons) == ["no_score", "no_score", "tie", "too_few"]
    assert run("data", "check", str(pairs)).exit_code == 0


def test_the_length_controlled_judge_turns_a_pair_round(tmp_path: Path) -> None:
    """A right but long report against a short one with an error: which is better depends on whether length counts."""
    source = write_lists(tmp_path, [[LONG + " No opacity." * 12, FALSE]])
    judge_lists(source, tmp_path / "judged", ["cxr-report", "cxr-report-lc"], progress=False)
    plain = make_answer_pairs(tmp_path / "judged", tmp_path / "a", reward="cxr-report", progress=False)
    controlled = make_answer_pairs(tmp_path / "judged", tmp_path / "b", reward="cxr-report-lc", progress=False)
    assert open_vlm(tmp_path / "a")[0].answers[0].text.startswith(LONG) and plain.chosen_words > plain.rejected_words
    assert open_vlm(tmp_path / "b")[0].answers[0].text == FALSE and controlled.chosen_words < controlled.rejected_words


def test_filters_by_margin_and_length(tmp_path: Path) -> None:
    rows = [[PERFECT, FALSE], [LONG, FALSE], [LONG, FALSE], [PERFECT, FALSE + " No opacity." * 10]]
    judge_lists(write_lists(tmp_path, rows), tmp_path / "judged", ["cxr-report"], progress=False)
    short, wrong, long = len(PERFECT.split()), len(FALSE.split()), len(LONG.split())
    assert (short, wrong, long) == (7, 10, 13)

    def made(name: str, **filters: Any) -> Any:
        return make_answer_pairs(tmp_path / "judged", tmp_path / name, progress=False, **filters)

    assert made("all").pairs == 4 and made("all2", rule="all_pairs", soft=True).pairs == 4
    assert open_vlm(tmp_path / "all2")[0].p_chosen == pytest.approx(0.6224593)  # sigmoid(0.5)
    found = made("ratio", max_length_ratio=1.4)
    assert (found.pairs, dict(found.counts)) == (2, {"length_ratio": 2})  # 10 : 7 and 30 : 7 are above, 13 : 10 is not
    # differences chosen minus rejected: -3, +3, +3, -23; without the last the sum is +3, so one of the +3 goes as well
    found = made("balance", balance_lengths=True)
    assert (found.pairs, dict(found.counts)) == (2, {"length_balance": 2})
    assert found.chosen_words == found.rejected_words == 10.0
    with pytest.raises(DataError, match="no pair is left"):
        made("none", min_margin=0.6)
    for bad, message in (({"min_margin": -1.0}, "must not be negative"), ({"max_length_ratio": 0.5}, "at least 1"),
                         ({"rule": "best"}, "rule 'best' is not known; did you mean 'best_worst'"),
                         ({"reward": "cxr"}, "no scores of 'cxr'")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            made("bad", **bad)


def test_an_interrupted_judgement_goes_on(lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "ROWS_PER_PART", 1)
    judge_lists(lists, tmp_path / "whole", ["cxr-report"], progress=False)
    written = PartFolder.write

    def stopped(self: PartFolder, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        written(self, number, *rest)

    monkeypatch.setattr(PartFolder, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        judge_lists(lists, tmp_path / "cut", ["cxr-report"], progress=False)
    monkeypatch.setattr(PartFolder, "write", written)
    with pytest.raises(DataError, match="parts of other settings"):
        judge_lists(lists, tmp_path / "cut", ["cxr-report-lc"], progress=False)
    judge_lists(lists, tmp_path / "cut", ["cxr-report"], progress=False)
    for name in ("annotate/judgements.jsonl", "annotate/failed.jsonl", "annotate/summary.json"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    rows = [[open_vlm(tmp_path / side)[row].answers for row in range(4)] for side in ("cut", "whole")]
    assert rows[0] == rows[1]


def test_a_second_judge_joins_the_first(lists: Path, tmp_path: Path) -> None:
    judge_lists(lists, tmp_path / "one", ["cxr-report"], progress=False)
    judge_lists(tmp_path / "one", tmp_path / "two", ["findings:cxr-kinds"], progress=False)
    answer = open_vlm(tmp_path / "two")[0].answers[1]
    assert answer.scores == {"cxr-report": 0.5, "findings:cxr-kinds": pytest.approx(2 / 3)}
    with pytest.raises(DataError, match="holds scores of several"):
        make_answer_pairs(tmp_path / "two", tmp_path / "pairs", progress=False)
    done = run("annotate", str(tmp_path / "two"), "--reward", "cxr-report", "--out", str(tmp_path / "three"))
    assert done.exit_code == 2 and "already holds scores of cxr-report" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "cxr-reprot"], "did you mean 'cxr-report'"),
        (["--reward", "cxr-report", "--option", "retries=8"], "expected NAME.KEY=VALUE"),
        (["--reward", "cxr-report", "--option", "green-api.retries=8"], "no judge named green-api is asked"),
        (["--reward", "cxr-report,cxr-report"], "named twice"),
        (["--reward", "findings:"], "name the extractor"),
    ],
)
def test_mistakes_are_named(lists: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = run("annotate", str(lists), "--out", str(tmp_path / "out"), *words)
    assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output
    assert not (tmp_path / "out").exists()


def test_tables_of_another_kind_are_refused(tmp_path: Path) -> None:
    source = write_lists(tmp_path, [[PERFECT, FALSE]])
    row = json.loads(source.read_text())
    pair = {**row, "chosen": row["answers"][0], "rejected": row["answers"][1]}
    del pair["answers"]
    write_rows(tmp_path / "pairs.jsonl", [pair])
    with pytest.raises(DataError, match="holds pairs of answers; judges score lists"):
        judge_lists(tmp_path / "pairs.jsonl", tmp_path / "out", ["cxr-report"], progress=False)
    with pytest.raises(DataError, match="holds no scores; 'mmalign annotate' adds them"):
        make_answer_pairs(source, tmp_path / "out", progress=False)


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    source = write_lists(tmp_path, [[PERFECT, FALSE], [PERFECT, FALSE], [PERFECT, FALSE]])
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[1]["answers"] = [reply("one")]
    rows[2]["prompt"] = [{"role": "assistant", "content": "hello"}]
    write_rows(source, rows)
    found = judge_lists(source, tmp_path / "judged", ["cxr-report"], progress=False)
    assert (found.rows, found.unreadable, found.failed) == (1, 2, 2) and "2 rows could not be read" in str(found)
    failed = (tmp_path / "judged" / "annotate" / "failed.jsonl").read_text()
    assert "1 answers make no list" in failed and "bad_turns" in failed
