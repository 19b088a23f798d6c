"""The embedded default: align the tiny generator on pairs labelled by the tiny reward, beside a control, and show it.

One command from nothing to a page: label candidates, build pairs, train the method and the control (plain fine-tuning on the
winners, same data, steps, batches and rate), sample base, aligned and control from equal noise, judge them by the training
reward, a hold-out judge and the oracle. Methods on ranked lists train on the scored candidates themselves.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign import assets
from mmalign.errors import ConfigError
from mmalign.registry import did_you_mean

CONTROL = "diffusion_sft"
REWARD = "tiny-clip"
ALSO = {"inpo": "ddim_inpo", "dpo": "diffusion_dpo", "kto": "diffusion_kto", "orpo": "diffusion_orpo", "sft": "vlm_sft"}
"""Short names that are understood as well."""
ON_ANSWERS = "mmalign.demo_vlm:demo_answers"
RECIPES = {
    "personalized_dpo": "mmalign.demo_people:demo_people", "temple": "mmalign.demo_temple:demo_temple",
    "cxr_dpo": "mmalign.demo_cxr:demo_reports",
}  # fmt: skip
"""Methods with an experiment of their own making: ``function(folder, experiment, *, seed, overrides)``."""
SHARED = ("lr", "warmup_steps", "steps", "batch_size")
"""What the control takes over from the method."""


def shown() -> tuple[str, ...]:
    """Methods with an embedded experiment, that is a file under ``configs/tiny``."""
    from mmalign.trainers import METHODS

    folder = assets.shipped("configs") / "tiny"
    there = [name for name in METHODS.names() if (folder / f"{name}.yaml").is_file()]
    return tuple(name for name in there if METHODS.get(name).batches in ("pairs", "lists", "domains") or on_answers(name))


def on_answers(name: str) -> bool:
    """Whether a method trains a vision-language model; ``mmalign.demo_vlm`` shows those."""
    from mmalign.trainers import METHODS

    return METHODS.get(name).batches.startswith("vlm_")


def demo(out: str | Path, method: str = "diffusion_dpo", seed: int = 0, overrides: Sequence[str] = ()) -> Any:
    """Run the embedded experiment of a method into a fresh run folder.

    Args:
        method: one of `shown`, or a short name in `ALSO`.
        out: run folder; an earlier demo there is moved aside to ``<out>.previous-N``, never deleted.
        seed: of training, data order and evaluation noise. The candidates and their labels are the same for every seed.

    Returns:
        The ``RunResult`` of the method's run, evaluated against base and control.
    """
    from mmalign.experiment.opening import open_run
    from mmalign.experiment.running import RunResult, train_experiment
    from mmalign.experiment.settings import load_experiment
    from mmalign.trainers import METHODS

    name, known = ALSO.get(method, method), shown()
    if name not in known:
        raise ConfigError(f"--method: '{method}' is not known{did_you_mean(method, (*known, *ALSO))}")
    folder = Path(out)
    _move_aside(folder)
    if name in RECIPES or on_answers(name):
        module, _, function = RECIPES.get(name, ON_ANSWERS).partition(":")
        show = getattr(importlib.import_module(module), function)
        return show(folder, assets.shipped("configs") / "tiny" / f"{name}.yaml", seed=seed, overrides=overrides)
    if METHODS.get(name).batches == "domains":
        return demo_mask(folder, assets.shipped("configs") / "tiny" / f"{name}.yaml", seed=seed, overrides=overrides)
    pairs = label_candidates(folder / "data")
    manifest = folder / "data" / "candidates" if METHODS.get(name).batches == "lists" else pairs
    common = [f"run.seed={seed}", f"model.path={assets.path('tiny-sd')}", *overrides]
    configs = assets.shipped("configs") / "tiny"
    main = load_experiment(configs / f"{name}.yaml", [f"data.manifest={manifest}", *common, f"run.out={folder}"])
    if name != CONTROL:
        optim = main.config.optim.model_dump()
        same = [f"optim.{key}={optim[key]}" for key in SHARED]
        more = [f"data.manifest={pairs}", *common, *same, f"run.out={folder / 'control'}"]
        train_experiment(load_experiment(configs / f"{CONTROL}.yaml", more), page=False, evaluate=False)
    result = train_experiment(main, page=False, evaluate=False)
    opened = open_run(folder)
    if name != CONTROL:
        opened.controls = {"control": open_run(folder / "control").aligned}
    from mmalign.evaluation import evaluate_run
    from mmalign.report import build_report

    evaluate_run(opened)
    page = build_report(folder)
    summary = json.loads((folder / "summary.json").read_text())
    print(headline(summary, page))
    return RunResult(folder=folder, metrics=result.metrics, summary=summary)


def demo_mask(folder: Path, experiment: Path, *, seed: int, overrides: Sequence[str] = ()) -> Any:
    """Learn the embedded freeze mask into a fresh folder. What training under it costs and prevents is measured elsewhere
    (``mmalign evaluate-guard``), so nothing is compared here."""
    from mmalign.experiment.running import train_experiment
    from mmalign.experiment.settings import load_experiment

    given = [f"data.manifest={assets.path('tiny-domains')}", f"model.path={assets.path('tiny-sd')}", f"run.seed={seed}"]
    result = train_experiment(load_experiment(experiment, [*given, *overrides, f"run.out={folder}"]))
    mask = folder / "export" / "freeze_mask.json"
    print(f"a mask was learnt; what it prevents: mmalign evaluate-guard configs/evaluate_guard/tiny.yaml masks.learned={mask}")
    print(f"report: {folder / 'report.html'}")
    return result


def label_candidates(folder: Path) -> Path:
    """Score the embedded candidates with the embedded reward; best against worst of each prompt becomes a pair.

    Returns the manifest of pairs, with both scores and the reward's probability in every row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mmalign import data, rewards

    source = assets.path("tiny-candidates")
    ranked = data.open_ranked(source)
    scorer = rewards.load(REWARD)
    images = [image.data for row in range(len(ranked)) for image in ranked[row].images]
    prompts = [ranked[row].prompt for row in range(len(ranked)) for _ in ranked[row].images]
    print(f"labelling {len(images)} pictures with {REWARD}")
    scores = scorer.score(images, prompts).tolist()
    table = pq.read_table(source / "part-00000.parquet")
    rows, at = [], 0
    for row in range(len(ranked)):
        count = len(ranked[row].images)
        rows.append({REWARD: scores[at : at + count]})
        at += count
    column = pa.array(rows, type=pa.struct([(REWARD, pa.list_(pa.float32()))]))
    scored = folder / "candidates"
    scored.mkdir(parents=True)
    pq.write_table(table.append_column("scores", column), scored / "part-00000.parquet")
    pairs = folder / "pairs"
    print(data.make_pairs(scored, pairs, rule="best_worst", reward=REWARD, soft=True))
    return pairs


def headline(summary: dict[str, Any], page: Path) -> str:
    """What a person reads at the end."""
    win = summary["win_rate"]
    return (
        f"aligned beats base on {win['mean']:.1%} of {summary['evaluation']['prompts']} held-out prompts by {win['reward']} "
        f"(95 % interval {win['low']:.1%} to {win['high']:.1%})\nreport: {page}"
    )


def _move_aside(folder: Path) -> None:
    """Keep an earlier demo under another name."""
    if not folder.exists():
        return
    if not (folder / "config.yaml").exists() and any(folder.iterdir()) and not (folder / "data").exists():
        raise ConfigError(f"--out: {folder} holds something that is no demo; choose another folder")
    number = 1
    while (aside := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"the earlier demo in {folder} is now {aside}")
