"""The section of reports: words marked, errors named, figures in their cells, nothing of the texts taken for markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.report import build_report
from mmalign.report.folder import read_run
from mmalign.report.reports import marked, reports, reports_text


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def model(score: float, *, base: bool) -> dict[str, Any]:
    change = {} if base else {"change": interval(0.2)}
    judge = {"score": interval(score), "length_controlled": interval(score - 0.1),
             "counts": {"matched": 2.0, "false_finding": 0.25}, "missing": {} if base else {"cut_reply": 2},
             "change": interval(0.2), "length_controlled_change": interval(0.1),
             "change_where_no_longer": interval(0.15)}  # fmt: skip
    return {
        "findings": {"micro_f1": interval(0.8), "unreadable": 0, **change}, "judges": {"judge": judge},
        "lengths": {"words": interval(20), "verbosity_vs_reference": interval(1.5), "verbosity_vs_base": interval(1.0)},
        "overlap": {"bleu": {"value": 0.25, **change}},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "samples" / "evaluation"
    folder.mkdir(parents=True)
    rows = [
        {"id": f"s{number}", "question": "Report.", "media": [], "reference": "Clear lungs.",
         "answers": {"base": "Clear lungs. A nodule.", "aligned": "Clear lungs <b>now</b>."},
         "scores": {"judge": {"base": 0.5, "aligned": 0.5 + 0.1 * (number - 3)}},
         "judged": {"judge": {"base": {"notes": ["false finding: <i>nodule</i>"], "reason": None},
                              "aligned": {"notes": [], "reason": "cut_reply" if number == 0 else None}}}}
        for number in range(8)
    ]  # fmt: skip
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text("method: {name: cxr_dpo}\n")
    summary = {
        "method": "cxr_dpo", "notice": "Not a medical device: <x>",
        "reports": {"extractor": "cxr-findings", "reports": 8, "absent": {"bertscore": "bert_score is not installed"},
                    "models": {"base": model(0.6, base=True), "aligned": model(0.8, base=False)}},
        "tasks": {"views": {"questions": 30, "models": {"base": {"accuracy": interval(0.9)},
                                                        "aligned": {"accuracy": interval(0.8), "change": interval(-0.1)}}}},
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_marks_are_what_the_other_report_lacks() -> None:
    assert marked("The heart is large. No effusion.", "the heart is normal. No effusion") == (
        ("The heart is", False), ("large.", True), ("No effusion.", False)
    )  # fmt: skip
    assert marked("same words", "same words") == (("same words", False),)
    assert marked("", "x") == () and marked("x", "") == (("x", True),)


def test_figures_errors_and_studies(run: Path) -> None:
    section = reports(read_run(run))
    values = section.values
    assert section.missing == "" and values["judge"] == "judge" and len(values["even"]) == 6
    base, aligned = values["table"]
    assert [cell["mean"] for cell in base["cells"]][-4:] == ["", "", "", ""]
    assert aligned["cells"][0]["mean"] == "0.8" or aligned["cells"][0]["mean"].startswith("0.80")
    assert aligned["cells"][5]["mean"].startswith("+0.2")
    assert values["errors"]["names"] == ["matched", "false finding"] and values["errors"]["rows"][1]["missing"] == "2 cut_reply"
    first = values["even"][0]
    assert first.columns[0].errors == ("false finding: <i>nodule</i>",) and first.columns[1].errors == ("no score: cut_reply",)
    assert len(values["gains"]) == 3 and len(values["losses"]) == 3
    assert values["gains"][0].columns[1].score.startswith("0.9")


def test_the_page_escapes_and_shows_the_notice(run: Path) -> None:
    page = build_report(run).read_text()
    assert "<i>nodule</i>" not in page and "&lt;i&gt;nodule&lt;/i&gt;" in page and "<b>now</b>" not in page
    assert "Not a medical device: &lt;x&gt;" in page and "<mark>A nodule.</mark>" in page
    assert "Not computed: bertscore. bert_score is not installed" in page and "views" in page


def test_the_text_of_the_commands(run: Path) -> None:
    text = reports_text(json.loads((run / "summary.json").read_text()))
    assert "0.800 (0.700 to 0.900)" in text and "(2 without a score)" in text and "views, 30 questions right: base 0.900" in text
    assert "not computed: bertscore: bert_score is not installed" in text and text.endswith("Not a medical device: <x>")
    assert reports_text({}) == ""


def test_a_run_without_reports_has_no_such_section(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name in ("reports", "tasks"):
        del summary[name]
    (run / "summary.json").write_text(json.dumps(summary))
    assert reports(read_run(run)).missing and 'id="reports"' not in build_report(run).read_text()
