"""The five algorithms of the report recipe on synthetic studies: judge score, finding F1, lengths, and the tax on questions.

    python benchmarks/cxr.py --seeds 0 1 2

For each seed: draw training studies, let the embedded report model write four reports of each, let the rule-based judge compare
them with the reference, pair best with worst (as ``mmalign demo --method cxr_dpo`` does), and train every arm on the same pairs
for the same number of steps at the same rate. All arms and seeds are measured on the same held-out studies and questions with
greedy answers. ``sft`` is continued fine-tuning on the chosen reports alone: the control that any gain of a preference
objective has to beat. ``dpo_lc`` is ``dpo`` on pairs of the length-controlled judge. Intervals are 95 % bootstrap intervals
over studies (or questions), each averaged over the seeds; changes are paired with the starting model. Finished parts are kept
and not made again, so arms and seeds may be run by processes of their own, one seed's data first (``--arms data``); ``--arms
table`` prints the table of what is there. NOT A MEDICAL DEVICE.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign import assets, demo_cxr
from mmalign.data import open_vlm
from mmalign.experiment.opening import load_any, open_run
from mmalign.experiment.report_figures import f1_change
from mmalign.experiment.running import train_experiment
from mmalign.experiment.settings import load_experiment
from mmalign.experiment.vlm_tasks import is_right
from mmalign.rewards.answers import judgements, load_judge
from mmalign.rewards.findings import FindingCounts, count_findings, load_extractor
from mmalign.statistics import Interval, mean_interval, paired_difference, ratio_interval

HELD_OUT, QUESTIONS = 200, 200
MAX_NEW_TOKENS, ANSWER_TOKENS, TOGETHER = 96, 16, 128
LENGTH_JUDGE = "cxr-report-lc"


@dataclass(frozen=True, slots=True)
class Arm:
    """One objective with its settings; ``stated`` is what the table says about them."""

    name: str
    method: str
    settings: tuple[str, ...]
    stated: str
    pairs: str = "pairs"


ARMS = (
    Arm("sft", "vlm_sft", (), "on the chosen reports"),
    Arm("dpo", "cxr_dpo", ("method.objective=dpo", "method.beta=0.1"), "beta 0.1"),
    Arm("lc_dpo", "cxr_dpo", ("method.objective=lc_dpo", "method.beta=0.1", "method.alpha=0.05"), "beta 0.1, alpha 0.05"),
    Arm("ipo", "cxr_dpo", ("method.objective=ipo", "method.beta=0.1"), "tau 0.1, per token"),
    Arm("kto", "cxr_dpo", ("method.objective=kto", "method.beta=0.1"), "beta 0.1"),
    Arm("orpo", "cxr_dpo", ("method.objective=orpo", "method.beta=0.1"), "lambda 0.1"),
    Arm("dpo_lc", "cxr_dpo", ("method.objective=dpo", "method.beta=0.1"), "beta 0.1, length-controlled judge", "pairs_lc"),
)


def studies(out: Path, seed: int, options: argparse.Namespace) -> Path:
    """Studies and pairs of a seed, made once."""
    folder = options.work / f"data-{seed}"
    train, done = folder / "train", out / f"pairs-{seed}.json"
    if done.exists() and (train / "pairs").exists():
        return folder
    if not (train / "candidates").exists():
        demo_cxr.prepare_studies(
            folder, seed=seed, studies=options.studies, held_out=HELD_OUT, questions=QUESTIONS, held_out_seed=options.held_out
        )
    if not (train / "pairs").exists():
        demo_cxr.make_pairs(folder, seed=seed, device="cpu", progress=False)
    from mmalign.sampling.judging import judge_lists
    from mmalign.sampling.pairs import make_answer_pairs

    if not (train / "judged_lc").exists():
        judge_lists(train / "candidates", train / "judged_lc", [LENGTH_JUDGE], progress=False)
    figures = {}
    for name, judged, judge in (("pairs", "judged", demo_cxr.JUDGE), ("pairs_lc", "judged_lc", LENGTH_JUDGE)):
        if not (train / name).exists():
            make_answer_pairs(train / judged, train / name, reward=judge, progress=False)
        table = open_vlm(train / name, progress=False)
        words = np.array([[len(answer.text.split()) for answer in table[row].answers] for row in range(len(table))])
        figures[name] = {"pairs": len(table), "chosen_words": words[:, 0].mean(), "rejected_words": words[:, 1].mean()}
    write(done, figures)
    return folder


def experiment(arm: Arm, data: Path, folder: Path, seed: int, options: argparse.Namespace) -> Any:
    """The embedded experiment of an arm's method with the arm's settings and no evaluation of its own."""
    overrides = [
        *arm.settings, f"data.manifest={data / 'train' / arm.pairs}", f"model.path={assets.path(demo_cxr.MODEL)}",
        "evaluate.prompts=null", "evaluate.rewards=[]", "evaluate.holdout=[]", "evaluate.every=0", f"optim.lr={options.lr}",
        f"optim.steps={options.steps}", f"run.save_every={options.steps}", f"run.seed={seed}", "run.device=cpu",
        f"run.out={folder}",
    ]  # fmt: skip
    if arm.method == "cxr_dpo":
        overrides += ["evaluate.reports=null", "evaluate.tasks=null"]
    return load_experiment(f"configs/tiny/{arm.method}.yaml", overrides)


def measure(family: Any, network: Any, folder: Path) -> dict[str, Any]:
    """Greedy reports and answers on the held-out part."""

    def said(name: str, tokens: int) -> list[str]:
        table = open_vlm(folder / f"{name}.jsonl", progress=False)
        examples = [family.encode(table[row], training=False) for row in range(len(table))]
        found = family.generate(network, examples, max_new_tokens=tokens, temperature=0.0, batch_size=TOGETHER)
        return [one[0] for one in found]

    return {"reports": said("reports", MAX_NEW_TOKENS), "answers": said("questions", ANSWER_TOKENS)}


def run(arm: Arm | None, seed: int, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Answers of one arm and seed (None: the starting model), from the store or fresh."""
    name = f"{arm.name}-{seed}" if arm is not None else "base"
    kept = out / f"{name}.json"
    if kept.exists():
        stored: dict[str, Any] = json.loads(kept.read_text())
        return stored
    data = studies(out, seed, options)
    print(f"--- {name}", flush=True)
    if arm is None:
        loaded = load_experiment("configs/tiny/cxr_dpo.yaml", [f"model.path={assets.path(demo_cxr.MODEL)}"])
        family = load_any(loaded.config, torch.device("cpu"))
        result = measure(family, family.network, data / "held_out")
    else:
        folder = options.work / name
        if not (folder / "summary.json").exists():
            resume = (folder / "config.yaml").exists()
            train_experiment(experiment(arm, data, folder, seed, options), resume=resume, page=False, evaluate=False)
        opened = open_run(folder, device="cpu")
        result = measure(opened.family, opened.aligned, data / "held_out")
    write(kept, result)
    return result


def write(path: Path, values: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(values))
    os.replace(temporary, path)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run's figures per study and per question."""

    score: np.ndarray
    controlled: np.ndarray
    verbosity: np.ndarray
    unreadable: int
    right: np.ndarray
    findings: FindingCounts


def figures(result: Mapping[str, Any], folder: Path) -> Measured:
    """Judge a run's answers against the held-out tables."""
    table = open_vlm(folder / "reports.jsonl", progress=False)
    records = [table[row] for row in range(len(table))]
    references = [str(record.meta["reference"]) for record in records]
    said = judgements(load_judge(demo_cxr.JUDGE), records, result["reports"])
    controlled = judgements(load_judge(LENGTH_JUDGE), records, result["reports"])
    asked = open_vlm(folder / "questions.jsonl", progress=False)
    words = [len(text.split()) / len(wanted.split()) for text, wanted in zip(result["reports"], references, strict=True)]
    return Measured(
        score=values([one.score for one in said]), controlled=values([one.score for one in controlled]),
        verbosity=np.array(words),
        unreadable=sum(one.score is None for one in said),
        right=np.array([is_right(text, asked[row].answers[0].text) for row, text in enumerate(result["answers"])], float),
        findings=count_findings(load_extractor("cxr-findings"), references, result["reports"]),
    )  # fmt: skip


def values(scores: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if score is None else score for score in scores], float)


def together(runs: Sequence[Measured]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators of the micro F1, per study summed over runs."""
    parts = [one.findings.parts() for one in runs]
    return sum(part[0] for part in parts), sum(part[1] for part in parts)  # type: ignore[return-value]


def row(name: str, runs: Sequence[Measured], base: Measured) -> str:
    """One line of the table: figures over all seeds, and changes against the starting model."""

    def stack(field: str) -> np.ndarray:
        return np.stack([getattr(one, field) for one in runs], 1)

    def change(field: str) -> Interval:
        return paired_difference(stack(field), np.repeat(getattr(base, field)[:, None], len(runs), 1))

    cells = [
        name, shown(mean_interval(stack("score"))), shown(mean_interval(stack("controlled"))),
        shown(ratio_interval(*together(runs))), shown(mean_interval(stack("verbosity")), scale=1),
        shown(mean_interval(stack("right"))),
    ]  # fmt: skip
    if runs[0] is base:
        return f"| {' | '.join([*cells, '', '', '', ''])} |"
    by_seed = [f1_change(one.findings, base.findings, seed=0) for one in runs]
    f1 = Interval(**{key: float(np.mean([found[key] for found in by_seed])) for key in ("mean", "low", "high")})
    changes = [change("score"), change("controlled"), f1, change("right")]
    return f"| {' | '.join([*cells, *(shown(found, sign=True) for found in changes)])} |"


def shown(value: Interval, *, sign: bool = False, scale: float = 100) -> str:
    form = ("+" if sign else "") + (".1f" if scale == 100 else ".3f")
    return f"{scale * value.mean:{form}} ({scale * value.low:{form}} to {scale * value.high:{form}})"


def tell(options: argparse.Namespace) -> None:
    """The table of what is there."""
    out, drawn = options.out, options.work / "held_out"
    held_out = drawn / "held_out"
    if not held_out.exists():
        demo_cxr.prepare_studies(
            drawn, seed=0, studies=1, held_out=HELD_OUT, questions=QUESTIONS, held_out_seed=options.held_out
        )
    base = figures(run(None, options.seeds[0], out, options), held_out)
    print("\n| | judge score | length-controlled | finding F1 | words / reference | questions | change of score | "
          "change, length-controlled | change of F1 | change of questions |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    print(row("start (SFT)", [base], base))
    for arm in ARMS:
        found = [out / f"{arm.name}-{seed}.json" for seed in options.seeds]
        if all(path.exists() for path in found):
            runs = [figures(json.loads(path.read_text()), held_out) for path in found]
            print(row(f"{arm.name} ({arm.stated})", runs, base))
            before = base.findings.rates()["micro_f1"]
            seeds = ", ".join(
                f"{np.nanmean(one.score) - np.nanmean(base.score):+.3f}/{one.findings.rates()['micro_f1'] - before:+.3f}"
                for one in runs
            )
            print(f"  score/F1 by seed: {seeds}; unreadable reports: {sum(one.unreadable for one in runs)}")
    for seed in options.seeds:
        if (out / f"pairs-{seed}.json").exists():
            print(f"seed {seed}: {(out / f'pairs-{seed}.json').read_text()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=["data", "table", *names], default=names)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--studies", type=int, default=demo_cxr.STUDIES)
    parser.add_argument("--held-out", type=int, default=0, help="which held-out studies; another number to choose settings on")
    parser.add_argument("--out", type=Path, default=Path("runs/cxr"), help="answers as JSON, and what the table is made of")
    parser.add_argument("--work", type=Path, help="studies, pairs and runs; default: --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work = options.work or options.out
    options.out.mkdir(parents=True, exist_ok=True)
    plan = {"steps": options.steps, "lr": options.lr, "studies": options.studies, "held_out": options.held_out}
    stated = options.out / "plan.json"
    if stated.exists() and json.loads(stated.read_text()) != plan:
        raise SystemExit(f"{options.out} holds runs made with {stated.read_text().strip()}; choose another --out")
    write(stated, plan)
    for seed in options.seeds if options.arms != ["table"] else ():
        studies(options.out, seed, options)
        for arm in (arm for arm in ARMS if arm.name in options.arms):
            run(arm, seed, options.out, options)
    if options.arms != ["data"]:
        tell(options)


if __name__ == "__main__":
    main()
