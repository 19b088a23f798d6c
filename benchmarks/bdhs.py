"""Rejected answers that a model makes up half blind, against plain fine-tuning on the same chosen answers: what is learned,
and why.

    python benchmarks/bdhs.py --seeds 0 1 2

For each seed: draw training boards with right descriptions, let the base make up a rejected answer for each in several ways,
and train every arm on equally many rows, with equal steps and rate. `sft` trains on the chosen descriptions alone: the
control. All are measured with greedy answers on the same held-out boards and questions, and on one decision: after the last
object, does the model say what the background is, or invent one more? Its log-odds there say whether training moved the habit
itself. Intervals are 95 % bootstrap intervals over boards (or questions), each averaged over the seeds. Finished parts are
kept; `--arms` makes some, `--jobs 14` makes as many at a time, `--report` only prints.

Two bases: `plain` is the embedded model, which falls apart without its picture; `fluent` (``bdhs_base.py``) goes on in whole
sentences.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bdhs_base
import numpy as np
import torch

from mmalign import assets, demo_vlm
from mmalign.data import open_vlm
from mmalign.data.files import write_text
from mmalign.experiment.opening import open_run
from mmalign.experiment.running import train_experiment
from mmalign.experiment.settings import load_experiment
from mmalign.sampling.job import sample_answers
from mmalign.sampling.settings import load_sampling
from mmalign.statistics import Interval, mean_interval, paired_difference
from mmalign.world.captions import companion, describe
from mmalign.world.hallucination import check_caption, ratio_interval
from mmalign.world.scenes import MAX_OBJECTS, Item, parse_key

HELD_OUT, QUESTIONS = 150, 90
ROUNDS = "rounds: 5, max_similarity: 0.97"
PAIRS: Mapping[str, str] = {
    "bdhs": f"{{name: bdhs, rho: 0.99, {ROUNDS}}}",
    "bdhs_low": f"{{name: bdhs, rho: 0.5, {ROUNDS}}}",
    "bdhs_whole": "{name: bdhs, rho: 0.99, rounds: 1, guided: false, keep_similar: true}",
    "no_image": "{name: no_image}",
    "noisy_image": "{name: noisy_image}",
    "word_swap": "{name: word_swap}",
    "own": "{name: bdhs, rho: 0.0, rounds: 5, guided: false}",
}
"""Ways to a rejected answer -> the sampler's section. `own` is the model's plain sample, nothing hidden."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training; ``stated`` is what the table says about it."""

    name: str
    method: str
    pairs: str
    settings: tuple[str, ...] = ()
    base: str = "fluent"
    stated: str = ""


NLL = ("method.nll_weight=1.0",)
ARMS = (
    Arm("sft", "vlm_sft", "bdhs", stated="control: fine-tuning on the chosen descriptions"),
    Arm("bdhs", "bdhs_dpo", "bdhs", stated="BDHS at 0.99, offline, plain"),
    Arm("bdhs_nll", "bdhs_dpo", "bdhs", NLL, stated="the same with NLL anchor"),
    Arm("low", "bdhs_dpo", "bdhs_low", stated="BDHS at 0.5, plain"),
    Arm("low_nll", "bdhs_dpo", "bdhs_low", NLL, stated="the same with NLL anchor"),
    Arm("whole", "bdhs_dpo", "bdhs_whole", stated="hidden at 0.99, whole answers, plain"),
    Arm("online", "bdhs_dpo", "bdhs", ("method.offline=0.0", "method.made_up.rho=0.99"), stated="BDHS at 0.99, online, plain"),
    Arm("no_image", "bdhs_dpo", "no_image", stated="no picture, plain"),
    Arm("no_image_nll", "bdhs_dpo", "no_image", NLL, stated="the same with NLL anchor"),
    Arm("noisy", "bdhs_dpo", "noisy_image", stated="picture under noise, plain"),
    Arm("words", "bdhs_dpo", "word_swap", stated="words exchanged, plain"),
    Arm("own", "bdhs_dpo", "own", stated="the model's plain samples as rejected, plain"),
    Arm("sft_broken", "vlm_sft", "bdhs", base="plain", stated="control on the base that falls apart"),
    Arm("bdhs_broken", "bdhs_dpo", "bdhs", base="plain", stated="BDHS at 0.99, plain, on the base that falls apart"),
)


def base_of(name: str, options: argparse.Namespace) -> Path:
    """Folder of a base."""
    return assets.path(demo_vlm.MODEL) if name == "plain" else bdhs_base.make(options.base)


def boards(seed: int, options: argparse.Namespace) -> Path:
    """Training and held-out boards of a seed, made once."""
    folder: Path = options.out / f"data-{seed}"
    if not (folder / "held_out" / "questions.jsonl").exists():
        demo_vlm.prepare_boards(
            folder, seed=seed, pictures=options.pictures, held_out=HELD_OUT, questions=QUESTIONS, held_out_seed=options.boards
        )
    return folder


def pairs(way: str, base: str, seed: int, options: argparse.Namespace) -> Path:
    """The table of a seed's pairs, made once by ``mmalign generate``."""
    out: Path = options.out / f"pairs-{base}-{way}-{seed}"
    if not (out / "report.json").exists():
        print(f"--- pairs {base} {way} {seed}", flush=True)
        config = options.out / f"pairs-{base}-{way}-{seed}.yaml"
        write_text(
            config,
            f"sampler: {PAIRS[way]}\nmodel: {{name: vlm, path: {base_of(base, options)}}}\n"
            f"manifest: {boards(seed, options) / 'train' / 'descriptions.jsonl'}\nout: {out}\nseed: {seed}\nmax_new_tokens: 80\n"
            f"batch_size: 128\ndevice: cpu\nrows_per_part: 128\n",
        )
        sample_answers(load_sampling(config), progress=False)
    return out


def experiment(arm: Arm, manifest: Path, folder: Path, seed: int, options: argparse.Namespace) -> Any:
    """The embedded experiment of an arm's method with the arm's settings and no evaluation of its own."""
    offline = ("method.offline=1.0", "method.made_up.rho=0.99") if arm.method == "bdhs_dpo" else ()
    overrides = [
        *offline, *arm.settings, f"data.manifest={manifest}", f"model.path={base_of(arm.base, options)}", "evaluate.prompts=null",
        "evaluate.rewards=[]", "evaluate.holdout=[]", "evaluate.every=0", f"optim.lr={options.lr}",
        f"optim.steps={options.steps}", f"run.save_every={options.steps}", f"run.seed={seed}", "run.device=cpu",
        f"run.out={folder}",
    ]  # fmt: skip
    return load_experiment(f"configs/tiny/{arm.method}.yaml", overrides)


def decision(family: Any, network: Any, folder: Path) -> list[float]:
    """Per held-out board: log-odds of the right next word against that of one more object, behind the last true one."""
    from dataclasses import replace

    from mmalign.branches import Answer

    table = open_vlm(folder / "descriptions.jsonl", progress=False)
    records, scenes = [], []
    for row in range(len(table)):
        scene = parse_key(table[row].meta["scene"])
        free = next(cell for cell in range(MAX_OBJECTS) if all(item.cell != cell for item in scene.items))
        more = [*scene.items, Item(free, *companion(scene.items[-1]))]
        texts = [describe(items, scene.background, "there") for items in (scene.items, more)]
        records.append(replace(table[row], answers=tuple(Answer(text=text) for text in texts)))
        scenes.append(scene)
    found = []
    with torch.no_grad():
        for start in range(0, len(records), 32):
            batch = family.collate([family.encode(record) for record in records[start : start + 32]])
            tokens = family.log_probs(network, batch, per_token=True).tokens
            for number in range(0, len(tokens), 2):
                ids = [batch.target[number // 2][batch.flat[number // 2] == number + side].tolist() for side in (0, 1)]
                place = next(at for at, (one, other) in enumerate(zip(*ids, strict=False)) if one != other)
                found.append(float(tokens[number, place] - tokens[number + 1, place]))
    return found


def measured(family: Any, network: Any, folder: Path) -> dict[str, Any]:
    """What is kept of a measurement: counts per description, right or wrong per question, log-odds of the decision."""
    found = demo_vlm.measure(family, network, folder)
    keys = ("named", "hallucinated", "found", "there", "unread", "words")
    return {
        **{key: [getattr(check, key) for check in found.checks] for key in keys},
        "right": [int(right) for right in found.right], "descriptions": list(found.descriptions),
        "decision": decision(family, network, folder),
    }  # fmt: skip


def keep(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def run_base(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of an untrained base."""
    kept = options.out / f"base-{name}.json"
    if not kept.exists():
        family = bdhs_base.load(base_of(name, options))
        keep(kept, measured(family, family.network, boards(options.seeds[0], options) / "held_out"))
    result: dict[str, Any] = json.loads(kept.read_text())
    return result


def run(arm: Arm, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one arm and seed, from the store or fresh."""
    kept = options.out / f"{arm.name}-{seed}.json"
    if not kept.exists():
        data, manifest = boards(seed, options), pairs(arm.pairs, arm.base, seed, options)
        print(f"--- {arm.name} {seed}", flush=True)
        folder = options.out / f"run-{arm.name}-{seed}"
        if not (folder / "summary.json").exists():
            loaded = experiment(arm, manifest, folder, seed, options)
            train_experiment(loaded, resume=(folder / "config.yaml").exists(), page=False, evaluate=False)
        opened = open_run(folder, device="cpu")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["step"] > options.steps - 10]
        drift = {name: float(np.mean([line[name] for line in last])) for name in
                 ("chosen_drift_per_token", "reward_chosen", "reward_rejected", "accuracy") if name in last[-1]}  # fmt: skip
        keep(kept, {**measured(opened.family, opened.aligned, data / "held_out"), **drift})
    result: dict[str, Any] = json.loads(kept.read_text())
    return result


def pair_figures(way: str, base: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What rejected answers are like: hallucinated objects in each, beside those of the base's own samples of the boards."""
    kept = options.out / f"figures-{base}-{way}-{seed}.json"
    if not kept.exists():
        table = open_vlm(pairs(way, base, seed, options), progress=False)
        own = open_vlm(pairs("own", base, seed, options), progress=False)
        plain = {own.row_id(row): own[row].answers[1].text for row in range(len(own))}
        rows = []
        for row in range(len(table)):
            record = table[row]
            scene = parse_key(record.meta["scene"])
            made = check_caption(record.answers[1].text, scene)
            beside = check_caption(plain[record.id], scene) if record.id in plain else None
            rows.append({"named": made.named, "hallucinated": made.hallucinated, "there": made.there, "unread": made.unread,
                         "round": record.meta["sampled"].get("round", 0),
                         "plain": None if beside is None else beside.hallucinated})  # fmt: skip
        refused = json.loads((pairs(way, base, seed, options) / "report.json").read_text())["refused"]
        keep(kept, {"rows": rows, "refused": refused})
    result: dict[str, Any] = json.loads(kept.read_text())
    return result


def shown(value: Interval, *, scale: float = 100, sign: bool = False, digits: int = 1) -> str:
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{scale * value.mean:{form}} ({scale * value.low:{form}} to {scale * value.high:{form}})"


PAIR_HEAD = (
    "base", "rejected answers", "rows", "hallucinated objects each", "minus the base's own samples", "no sentence in it",
    "more objects than there are", "fewer", "made in round 1",
)  # fmt: skip
HEAD = (
    "", "CHAIR_s", "CHAIR_i", "recall", "objects named", "questions right", "log-odds of stopping", "change of CHAIR_s",
    "minus control", "drift of chosen per token", "rewards chosen / rejected",
)  # fmt: skip


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_of_pairs(options: argparse.Namespace) -> list[str]:
    """One line per base and way, over the seeds."""
    lines = [line(PAIR_HEAD), "|" + "---|" * len(PAIR_HEAD)]
    for base in ("fluent", "plain"):
        for way in PAIRS:
            files = [options.out / f"figures-{base}-{way}-{seed}.json" for seed in options.seeds]
            rows = [row for file in files if file.exists() for row in json.loads(file.read_text())["rows"]]
            if not rows:
                continue
            wrong = np.array([row["hallucinated"] for row in rows], float)
            both = np.array([(row["hallucinated"], row["plain"]) for row in rows if row["plain"] is not None], float)
            surplus = np.array([row["named"] - row["there"] for row in rows])
            cells = [
                base, way, str(len(rows)), shown(mean_interval(wrong), scale=1, digits=2),
                shown(paired_difference(both[:, 0], both[:, 1]), scale=1, sign=True, digits=2),
                f"{np.mean([row['unread'] > 0 for row in rows]):.0%}", f"{np.mean(surplus > 0):.0%}",
                f"{np.mean(surplus < 0):.0%}",
                f"{np.mean([row['round'] == 1 for row in rows]):.0%}" if rows[0]["round"] else "",
            ]  # fmt: skip
            lines.append(line(cells))
    return lines


def row(name: str, runs: Sequence[dict[str, Any]], base: dict[str, Any], control: Sequence[dict[str, Any]]) -> str:
    """One line of the table: figures over all seeds, and changes against the untrained base and the control."""

    def said(of: Sequence[dict[str, Any]]) -> np.ndarray:
        return np.stack([np.array(one["hallucinated"]) > 0 for one in of], 1).astype(float)

    named = np.stack([one["named"] for one in runs], 1)
    wrong = np.stack([one["hallucinated"] for one in runs], 1)
    found, there = (sum(sum(one[key]) for one in runs) for key in ("found", "there"))
    right = np.stack([one["right"] for one in runs], 1).astype(float)
    cells = [
        name, shown(mean_interval(said(runs))), shown(ratio_interval(wrong.sum(1), named.sum(1))), f"{found / there:.1%}",
        f"{named.mean():.2f}", f"{right.mean():.1%}", f"{np.mean([one['decision'] for one in runs]):+.2f}",
    ]  # fmt: skip
    if runs[0] is base:
        return line([*cells, "", "", "", ""])
    before = np.repeat(said([base]), len(runs), 1)
    same = runs is control or len(control) != len(runs)
    versus = "" if same else shown(paired_difference(said(runs), said(control)), sign=True)
    drift = ["", ""]
    if "reward_chosen" in runs[0]:
        keys = ("chosen_drift_per_token", "reward_chosen", "reward_rejected")
        mean = {key: np.mean([one[key] for one in runs]) for key in keys}
        drift = [f"{mean['chosen_drift_per_token']:+.3f}", f"{mean['reward_chosen']:+.2f} / {mean['reward_rejected']:+.2f}"]
    return line([*cells, shown(paired_difference(said(runs), before), sign=True), versus, *drift])


def report(options: argparse.Namespace) -> None:
    print(
        f"\nseeds {options.seeds}, {options.pictures} boards, {options.steps} steps of 16, rate {options.lr:g}, "
        f"{HELD_OUT} held-out boards, {QUESTIONS} questions; percent, 95 % intervals\n"
    )
    print("\n".join([*table_of_pairs(options), "", line(HEAD), "|" + "---|" * len(HEAD)]))
    for base, control in (("fluent", "sft"), ("plain", "sft_broken")):
        file = options.out / f"base-{base}.json"
        if not file.exists():
            continue
        before = json.loads(file.read_text())
        print(row(f"untrained {base} base", [before], before, []))
        stored = {
            arm.name: [json.loads(kept.read_text()) for seed in options.seeds
                       if (kept := options.out / f"{arm.name}-{seed}.json").exists()]
            for arm in ARMS if arm.base == base
        }  # fmt: skip
        for arm in ARMS:
            if stored.get(arm.name):
                print(row(f"{arm.name}: {arm.stated}", stored[arm.name], before, stored[control]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=[arm.name for arm in ARMS], default=[arm.name for arm in ARMS])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--pictures", type=int, default=192)
    parser.add_argument("--boards", type=int, default=0, help="which held-out boards; others to choose settings on")
    parser.add_argument("--base", type=Path, default=Path("runs/bdhs/base"), help="folder of the fluent base; made if absent")
    parser.add_argument("--out", type=Path, default=Path("runs/bdhs"))
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread at a time")
    parser.add_argument("--report", action="store_true", help="print what is there and make nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    plan = {"steps": options.steps, "lr": options.lr, "pictures": options.pictures, "boards": options.boards}
    stated = options.out / "plan.json"
    if stated.exists() and json.loads(stated.read_text()) != plan:
        raise SystemExit(f"{options.out} holds runs made with {stated.read_text().strip()}; choose another --out")
    stated.write_text(json.dumps(plan) + "\n")
    if not options.report:
        arms = [arm for name in options.arms for arm in ARMS if arm.name == name]
        for stage in stages(arms, options.seeds):
            work(stage, options)
    report(options)


def stages(arms: Sequence[Arm], seeds: Sequence[int]) -> list[list[tuple[str, ...]]]:
    """Tasks by stage; those of a stage do not need each other."""
    bases = list(dict.fromkeys(arm.base for arm in arms))
    ways = list(dict.fromkeys((way, arm.base) for arm in arms for way in ("own", arm.pairs)))
    each = [str(seed) for seed in seeds]
    return [
        [("base", base) for base in bases],
        [("boards", seed) for seed in each],
        [("figures", base) for base in bases] + [("pairs", way, base, seed) for seed in each for way, base in ways],
        [("run", arm.name, seed) for arm in arms for seed in each]
        + [("compare", way, base, seed) for seed in each for way, base in ways],
    ]


def do(task: Sequence[str], options: argparse.Namespace) -> None:
    """One task of a stage."""
    torch.set_num_threads(1)
    kind, *rest = task
    if kind == "base":
        base_of(rest[0], options)
    elif kind == "boards":
        boards(int(rest[0]), options)
    elif kind == "figures":
        run_base(rest[0], options)
    elif kind == "pairs":
        pairs(rest[0], rest[1], int(rest[2]), options)
    elif kind == "run":
        run(next(arm for arm in ARMS if arm.name == rest[0]), int(rest[1]), options)
    else:
        pair_figures(rest[0], rest[1], int(rest[2]), options)


def work(tasks: Sequence[Sequence[str]], options: argparse.Namespace) -> None:
    """The tasks of a stage, `jobs` at a time, each in a process of its own."""
    if options.jobs == 1:
        for task in tasks:
            do(task, options)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in [pool.submit(do, task, options) for task in tasks]:
            future.result()


if __name__ == "__main__":
    main()
