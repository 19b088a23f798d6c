"""The embedded recipe for reports: synthetic studies, four sampled reports each, a judge that reads references, pairs,
training, a page.

One command for what docs/chest_xray.md does step by step with ``mmalign generate``, ``annotate``, ``data pairs``, ``train`` and
``evaluate``; the functions called here are those behind these commands. NOT A MEDICAL DEVICE: pictures and reports are drawn by a
program.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign import assets
from mmalign.demo import SHARED
from mmalign.world.study_tables import write_reports, write_studies, write_study_questions

MODEL = "tiny-cxr-vlm"
JUDGE = "cxr-report"
CONTROL = "vlm_sft"
STUDIES = 384
HELD_OUT = 250
QUESTIONS = 300


def prepare_studies(
    folder: Path, *, seed: int, studies: int = STUDIES, held_out: int = HELD_OUT, questions: int = QUESTIONS,
    held_out_seed: int = 0,
) -> None:  # fmt: skip
    """Training studies under ``train``; held-out studies with references, and with questions, under ``held_out``.

    The held-out part does not depend on `seed`: every run is measured on the same studies. Another `held_out_seed` gives
    others, for choosing settings.
    """
    write_reports(folder / "train", write_studies(folder / "train", studies, seed=seed, held_out=False), seed=seed)
    drawn = write_studies(folder / "held_out", held_out, seed=held_out_seed, held_out=True)
    write_reports(folder / "held_out", drawn, seed=held_out_seed)
    write_study_questions(folder / "held_out", drawn, questions, seed=held_out_seed)


def make_pairs(folder: Path, *, seed: int, device: str = "auto", progress: bool = True, **filters: Any) -> Any:
    """Sample four reports a study of ``train``, judge them, and pair the best with the worst.

    Args:
        filters: of ``sampling.pairs.make_answer_pairs``.

    Returns:
        Its report; the table is ``train/pairs``.
    """
    from mmalign.sampling.job import sample_answers
    from mmalign.sampling.judging import judge_lists
    from mmalign.sampling.pairs import make_answer_pairs
    from mmalign.sampling.settings import load_sampling

    train = folder / "train"
    settings = load_sampling(
        assets.shipped("configs") / "generate" / "tiny_cxr.yaml",
        [f"model.path={assets.path(MODEL)}", f"manifest={train / 'reports.jsonl'}", f"out={train / 'candidates'}", f"seed={seed}",
         f"device={device}"],
    )  # fmt: skip
    sample_answers(settings, progress=progress)
    judged = judge_lists(train / "candidates", train / "judged", [JUDGE], progress=progress)
    print(judged)
    report = make_answer_pairs(train / "judged", train / "pairs", reward=JUDGE, progress=progress, **filters)
    print(report)
    return report


def demo_reports(folder: Path, experiment: Path, *, seed: int, overrides: Sequence[str] = ()) -> Any:
    """Run the embedded recipe into a fresh folder; see ``mmalign.demo.demo``.

    Base, aligned and a control are compared; the control is fine-tuned on the chosen reports alone, with the same data, steps,
    batches and rate.
    """
    from mmalign.experiment.opening import open_run
    from mmalign.experiment.running import RunResult, train_experiment
    from mmalign.experiment.settings import load_experiment
    from mmalign.report import build_report
    from mmalign.report.files import read_json
    from mmalign.report.reports import reports_text

    data = folder / "data"
    prepare_studies(data, seed=seed)
    held_out = data / "held_out"
    given = [
        f"data.manifest={data / 'train' / 'pairs'}", f"evaluate.prompts={held_out / 'reports.jsonl'}",
        f"model.path={assets.path(MODEL)}", f"run.seed={seed}",
    ]  # fmt: skip
    tasks = f"evaluate.tasks.study-questions={held_out / 'questions.jsonl'}"
    main = load_experiment(experiment, [*given, tasks, *overrides, f"run.out={folder}"])
    print(f"{STUDIES} synthetic studies, four reports of each by {MODEL}")
    make_pairs(data, seed=seed, device=main.config.run.device)
    optim = main.config.optim.model_dump()
    same = [*(f"optim.{key}={optim[key]}" for key in SHARED), "evaluate.every=0", "evaluate.rewards=[]", "evaluate.holdout=[]"]
    control = experiment.with_name(f"{CONTROL}.yaml")
    train_experiment(
        load_experiment(control, [*given, *overrides_for_control(overrides), *same, f"run.out={folder / 'control'}"]),
        page=False, evaluate=False,
    )  # fmt: skip
    result = train_experiment(main, page=False, evaluate=False)
    opened = open_run(folder)
    opened.controls = {"control": open_run(folder / "control").aligned}
    opened.evaluate()
    page = build_report(folder)
    summary = read_json(folder / "summary.json")
    print(reports_text(summary))
    print(f"report: {page}")
    return RunResult(folder=folder, metrics=result.metrics, summary=summary)


def overrides_for_control(overrides: Sequence[str]) -> list[str]:
    """Those that mean something to the control too: not the method's own settings, nor the evaluation's."""
    return [item for item in overrides if item.partition(".")[0] not in ("method", "evaluate", "reference")]
