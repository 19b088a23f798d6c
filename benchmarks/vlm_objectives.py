"""Objectives on answers side by side: hallucination and question accuracy of the embedded vision-language model.

    python benchmarks/vlm_objectives.py --seeds 0 1 2

For each seed: draw training boards, let the embedded model describe them, pair best with worst (as ``mmalign demo --method
vlm_dpo`` does), and train every arm on the same pairs for the same number of steps at the same rate. All arms and seeds are
measured on the same held-out boards and questions. ``sft`` trains on the chosen descriptions alone: the control that any gain
of a preference objective has to beat. Intervals are 95 % bootstrap intervals over pictures (or questions), each averaged over
the seeds; changes are paired with the untrained model. Finished runs are kept and not made again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign import assets, demo_vlm
from mmalign.data.files import write_text
from mmalign.experiment.opening import load_any, open_run
from mmalign.experiment.running import train_experiment
from mmalign.experiment.settings import load_experiment
from mmalign.statistics import Interval, mean_interval, paired_difference, ratio_interval

HELD_OUT, QUESTIONS = 200, 360


@dataclass(frozen=True, slots=True)
class Arm:
    """One objective with its settings; ``stated`` is what the table says about them."""

    name: str
    method: str
    settings: tuple[str, ...]
    stated: str


ARMS = (
    Arm("sft", "vlm_sft", (), "on the chosen descriptions"),
    Arm("dpo", "vlm_dpo", ("method.objective=dpo", "method.beta=0.1"), "beta 0.1"),
    Arm("ipo", "vlm_dpo", ("method.objective=ipo", "method.beta=0.1"), "tau 0.1, per token"),
    Arm("kto", "vlm_kto", ("method.beta=0.1",), "beta 0.1"),
    Arm("orpo", "vlm_dpo", ("method.objective=orpo", "method.beta=0.1"), "lambda 0.1"),
    Arm("simpo", "vlm_dpo", ("method.objective=simpo", "method.beta=2.0", "method.gamma=1.0"), "beta 2, gamma 1"),
)


def experiment(arm: Arm, pairs: Path, folder: Path, seed: int, options: argparse.Namespace) -> Any:
    """The embedded experiment of an arm's method with the arm's settings and no evaluation of its own."""
    overrides = list(arm.settings)
    overrides += [
        f"data.manifest={pairs}", f"model.path={assets.path(demo_vlm.MODEL)}", "evaluate.prompts=null", "evaluate.rewards=[]",
        "evaluate.holdout=[]", "evaluate.every=0",
        f"optim.lr={options.lr}", f"optim.steps={options.steps}", f"run.save_every={options.steps}", f"run.seed={seed}",
        "run.device=cpu", f"run.out={folder}",
    ]  # fmt: skip
    return load_experiment(f"configs/tiny/{arm.method}.yaml", overrides)


def boards(out: Path, seed: int, options: argparse.Namespace) -> Path:
    """Boards and pairs of a seed, made once."""
    folder = out / f"data-{seed}"
    done = folder / "pairs.json"
    if not done.exists():
        demo_vlm.prepare_boards(
            folder,
            seed=seed,
            pictures=options.pictures,
            held_out=HELD_OUT,
            questions=QUESTIONS,
            held_out_seed=options.boards,
        )
        loaded = load_experiment(
            "configs/tiny/vlm_dpo.yaml",
            [f"data.manifest={folder / 'train' / 'pairs.jsonl'}", f"model.path={assets.path(demo_vlm.MODEL)}"],
        )
        family = load_any(loaded.config, torch.device("cpu"))
        _, figures = demo_vlm.sample_pairs(family, family.network, folder / "train", seed=seed)
        write_text(done, json.dumps(figures, indent=2) + "\n")
    return folder


def figures_of(found: demo_vlm.BoardFigures) -> dict[str, Any]:
    """What is kept of a measurement: counts per description, and right or wrong per question."""
    return {
        "named": [check.named for check in found.checks],
        "hallucinated": [check.hallucinated for check in found.checks],
        "found": [check.found for check in found.checks],
        "there": [check.there for check in found.checks],
        "unread": [check.unread for check in found.checks],
        "right": [int(right) for right in found.right],
        "kinds": list(found.kinds),
        "descriptions": list(found.descriptions),
    }


def run(arm: Arm | None, seed: int, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one arm and seed (None: the untrained model), from the store or fresh."""
    name = f"{arm.name}-{seed}" if arm is not None else "base"
    kept = out / f"{name}.json"
    if kept.exists():
        stored: dict[str, Any] = json.loads(kept.read_text())
        return stored
    data = boards(out, seed, options)
    print(f"--- {name}", flush=True)
    if arm is None:
        loaded = load_experiment("configs/tiny/vlm_dpo.yaml", [f"model.path={assets.path(demo_vlm.MODEL)}"])
        family = load_any(loaded.config, torch.device("cpu"))
        found = demo_vlm.measure(family, family.network, data / "held_out")
    else:
        folder = out / name
        done = (folder / "summary.json").exists()
        if not done:
            resume = (folder / "config.yaml").exists()
            train_experiment(
                experiment(arm, data / "train" / "pairs.jsonl", folder, seed, options),
                resume=resume,
                page=False,
                evaluate=False,
            )
        opened = open_run(folder, device="cpu")
        found = demo_vlm.measure(opened.family, opened.aligned, data / "held_out")
    result = figures_of(found)
    temporary = kept.with_suffix(".part")
    temporary.write_text(json.dumps(result))
    os.replace(temporary, kept)
    return result


def row(name: str, runs: Sequence[dict[str, Any]], base: dict[str, Any]) -> str:
    """One line of the table: figures over all seeds, and changes against the untrained model."""

    def chair(one: dict[str, Any]) -> np.ndarray:
        return np.array(one["hallucinated"]) > 0

    said = np.stack([chair(one) for one in runs], 1).astype(float)
    right = np.stack([one["right"] for one in runs], 1).astype(float)
    named = np.stack([one["named"] for one in runs], 1)
    wrong = np.stack([one["hallucinated"] for one in runs], 1)
    found, there = (sum(sum(one[key]) for one in runs) for key in ("found", "there"))
    cells = [
        name, _shown(mean_interval(said)), _shown(ratio_interval(wrong.sum(1), named.sum(1))), f"{found / there:.1%}",
        f"{named.mean():.2f}", _shown(mean_interval(right)),
    ]  # fmt: skip
    if runs[0] is base:
        return f"| {' | '.join([*cells, '', ''])} |"
    changes = [
        paired_difference(said, np.repeat(chair(base)[:, None].astype(float), len(runs), 1)),
        paired_difference(right, np.repeat(np.array(base["right"], float)[:, None], len(runs), 1)),
    ]
    return f"| {' | '.join([*cells, *(_shown(change, sign=True) for change in changes)])} |"


def _shown(value: Interval, *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    return f"{100 * value.mean:{form}} ({100 * value.low:{form}} to {100 * value.high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], default=[arm.name for arm in ARMS])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--pictures", type=int, default=demo_vlm.PICTURES)
    parser.add_argument(
        "--boards", type=int, default=0, help="which held-out boards; another number to choose settings on"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/vlm_objectives"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    plan = {"steps": options.steps, "lr": options.lr, "pictures": options.pictures, "boards": options.boards}
    stated = options.out / "plan.json"
    if stated.exists() and json.loads(stated.read_text()) != plan:
        raise SystemExit(f"{options.out} holds runs made with {stated.read_text().strip()}; choose another --out")
    stated.write_text(json.dumps(plan) + "\n")
    base = run(None, options.seeds[0], options.out, options)
    arms = [arm for arm in ARMS if arm.name in options.arms]
    results = {seed: {arm.name: run(arm, seed, options.out, options) for arm in arms} for seed in options.seeds}
    pairs = [json.loads((options.out / f"data-{seed}" / "pairs.json").read_text())["pairs"] for seed in options.seeds]
    print(
        f"\n{len(options.seeds)} seeds, {', '.join(f'{number:.0f}' for number in pairs)} pairs, {options.steps} steps of 16, "
        f"rate {options.lr:g}, {HELD_OUT} held-out boards, {QUESTIONS} held-out questions; percent, 95 % intervals\n"
    )
    print(
        "| | CHAIR_s | CHAIR_i | recall | objects named | question accuracy | change of CHAIR_s | change of accuracy |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print(row("untrained", [base], base))
    for arm in arms:
        print(row(f"{arm.name} ({arm.stated})", [results[seed][arm.name] for seed in options.seeds], base))


if __name__ == "__main__":
    main()
