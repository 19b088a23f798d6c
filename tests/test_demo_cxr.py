"""The recipe for reports at a small size: studies, candidates, judgements, pairs, training, evaluation, the page. Not a
medical device."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmalign import assets, demo_cxr
from mmalign.cli.application import app
from mmalign.data import open_vlm
from mmalign.demo import demo, shown
from mmalign.evaluation import evaluate
from mmalign.experiment.settings import load_experiment
from mmalign.world.report_judge import judge_report
from tests.rewards.test_replies import Judge


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mmalign demo --method cxr_dpo` on a few studies for two steps."""
    torch.set_num_threads(1)
    real = demo_cxr.prepare_studies
    small = {"studies": 12, "held_out": 8, "questions": 9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_cxr, "prepare_studies", lambda folder, *, seed: real(folder, seed=seed, **small))
        out = tmp_path_factory.mktemp("demo") / "run"
        demo(out, "cxr_dpo", seed=3, overrides=["optim.steps=2", "optim.batch_size=4", "evaluate.every=0", "run.device=cpu"])
    return out


def test_the_demo_goes_from_studies_to_pairs(run: Path) -> None:
    assert "cxr_dpo" in shown()
    candidates, pairs = open_vlm(run / "data/train/candidates"), open_vlm(run / "data/train/pairs")
    assert (len(candidates), {len(candidates[row].answers) for row in range(12)}) == (12, {4})
    assert 0 < len(pairs) <= 12
    for row in range(len(pairs)):
        record = pairs[row]
        chosen, rejected = (judge_report(record.meta["reference"], answer.text).score for answer in record.answers)
        assert chosen is not None and rejected is not None and chosen > rejected
        assert record.answers[0].scores["cxr-report"] == pytest.approx(chosen)


def test_the_summary_compares_reports_and_tasks(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    reports = summary["reports"]
    assert list(reports["models"]) == ["base", "aligned", "control"] and reports["reports"] == 8
    for name, model in reports["models"].items():
        judged = model["judges"]["cxr-report"]
        assert 0 <= judged["length_controlled"]["mean"] <= judged["score"]["mean"] <= 1
        assert set(judged["counts"]) >= {"matched", "false_finding", "omitted_comparison", "verbosity"}
        assert {"micro_f1", "macro_f1", "precision", "recall", "by_label", "unreadable"} <= set(model["findings"])
        assert set(model["lengths"]) == {"words", "verbosity_vs_reference", "verbosity_vs_base"}
        assert ("change" in model["findings"]) == (name != "base")
    assert reports["models"]["base"]["lengths"]["verbosity_vs_base"]["mean"] == 1.0
    said = set(reports["absent"]) | set(reports["models"]["base"]["overlap"])
    assert said == {"bleu", "rouge-l", "bertscore"} and "bertscore" in reports["absent"]
    task = summary["tasks"]["study-questions"]
    assert task["questions"] == 9 and task["models"]["base"]["accuracy"]["mean"] == 1.0
    assert "Not a medical device" in summary["notice"]
    lines = [json.loads(line) for line in (run / "samples/evaluation/answers.jsonl").read_text().splitlines()]
    assert all(line["reference"] for line in lines)
    for line in lines:
        for model, text in line["answers"].items():
            found = judge_report(line["reference"], text)
            assert line["scores"]["cxr-report"][model] == found.score
            told = line.get("judged", {}).get("cxr-report", {}).get(model, {"notes": []})["notes"]
            assert [note for note in told if not note.startswith("not read")] == list(found.notes)


def test_the_page_and_the_commands_say_what_it_is_not(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "Not a medical device" in page and "<h2 id=\"reports-title\">Reports</h2>" in page and "Side by side" in page
    assert "Not computed: bertscore" in page and "study-questions" in page
    told = evaluate(run)
    assert "Not a medical device" in told and "words / reference" in told and "study-questions, 9 questions right" in told
    table = run / "data/train/pairs"
    given = [f"data.manifest={table}", f"model.path={assets.path('tiny-cxr-vlm')}", "evaluate.prompts=null",
             "evaluate.rewards=[]", "evaluate.holdout=[]", "evaluate.reports=null", "evaluate.tasks=null"]  # fmt: skip
    checked = CliRunner().invoke(app, ["check", "configs/tiny/cxr_dpo.yaml", *given])
    assert checked.exit_code == 0 and "Not a medical device" in checked.output, checked.output


def test_an_endpoint_s_replies_lie_in_the_run_folder(run: Path) -> None:
    """A judge that is a model: it is asked when the run is evaluated, and not again when it is evaluated once more."""
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            given = [f"evaluate.holdout=[\"{server.name}\"]", "evaluate.tasks=null", "evaluate.reports=null"]
            evaluate(run, given)
            asked = sum(server.asked.values())
            evaluate(run, given)
            assert 0 < asked == sum(server.asked.values()) == len((run / "judge/replies.jsonl").read_text().splitlines())
        finally:
            server.shutdown()
            thread.join()
    figures = json.loads((run / "summary.json").read_text())["evaluation"]
    assert server.name in figures["rewards"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.tasks.q=nowhere.jsonl", "evaluate.tasks.q: no file or folder 'nowhere.jsonl'"),
        ("evaluate.reports.extractor=cxr-kind", "did you mean 'cxr-kinds'"),
        ("evaluate.rewards=[lc:cxr-reprot]", "did you mean 'cxr-report'"),
        ("evaluate.rewards=['green:']", "needs a name behind a colon"),
        ("method.alpha=0.1", "alpha has no effect"),
        ("method.objective=simpo", "objective"),
        ("evaluate.reports.overlap=[blue]", "bleu"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(run: Path, override: str, message: str) -> None:
    given = [f"data.manifest={run / 'data/train/pairs'}", f"model.path={assets.path('tiny-cxr-vlm')}",
             f"evaluate.prompts={run / 'data/held_out/reports.jsonl'}",
             f"evaluate.tasks.study-questions={run / 'data/held_out/questions.jsonl'}"]  # fmt: skip
    done = CliRunner().invoke(app, ["check", "configs/tiny/cxr_dpo.yaml", *given, override])
    assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output


def test_reports_need_references(run: Path, tmp_path: Path) -> None:
    from mmalign.errors import ConfigError
    from mmalign.experiment.report_figures import references_of

    rows = [json.loads(line) for line in (run / "data/held_out/reports.jsonl").read_text().splitlines()]
    for row in rows:
        del row["completion"], row["meta"]["reference"], row["images"]
        row["prompt"] = "Report."
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = open_vlm(tmp_path / "q.jsonl")
    with pytest.raises(ConfigError, match="row 's0' of evaluate.prompts has no reference report"):
        references_of([table[0]])


@pytest.mark.parametrize("objective", ["lc_dpo", "ipo", "kto", "orpo"])
def test_every_objective_trains(run: Path, tmp_path: Path, objective: str) -> None:
    from mmalign.experiment.running import train_experiment

    given: list[Any] = [f"data.manifest={run / 'data/train/pairs'}", f"model.path={assets.path('tiny-cxr-vlm')}",
                        f"method.objective={objective}", "evaluate.prompts=null", "evaluate.rewards=[]", "evaluate.holdout=[]",
                        "evaluate.every=0", "evaluate.reports=null", "evaluate.tasks=null", "optim.steps=1", "optim.batch_size=4",
                        f"run.out={tmp_path / 'run'}", "run.device=cpu"]  # fmt: skip
    result = train_experiment(load_experiment("configs/tiny/cxr_dpo.yaml", given), page=False, evaluate=False)
    assert torch.isfinite(torch.tensor(result.metrics["loss"])) and result.metrics["grad_norm"] > 0
    if objective == "kto":
        assert result.metrics["loss"] == pytest.approx(0.5, abs=1e-4)
        assert result.metrics["reference_point"] == pytest.approx(0, abs=1e-4)
