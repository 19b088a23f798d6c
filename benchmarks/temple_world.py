"""Curricula of temporal preferences against each other on the embedded world: same model, same films, equal numbers of steps.

    python benchmarks/temple_world.py --seeds 0 1 2 --out runs/temple-world        # makes what is not there yet, prints the table
    python benchmarks/temple_world.py --seeds 0 --arms temple sft                   # single runs, to be joined later
    python benchmarks/temple_world.py --seeds 0 1 2 --table                         # the table of what is there

Every run leaves ``<arm>-seed<N>.json``; runs may be made on several machines and put together. What the arms are: `ARMS`. A
machine without PyAV can train and measure: ``--pairs-out FOLDER`` keeps the pairs that were made where there is PyAV, and
``--pairs FOLDER`` uses them, with films drawn as the twelve frames that a file would have given (before its compression).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmalign import assets
from mmalign.data import open_vlm
from mmalign.demo_temple import FRAMES, MODEL, make_pairs, measure, prepare
from mmalign.experiment.opening import load_any, open_run
from mmalign.experiment.running import train_experiment
from mmalign.experiment.settings import load_experiment
from mmalign.media.samplers import spread
from mmalign.statistics import mean_interval, paired_difference
from mmalign.world.board_tables import reply, write_rows
from mmalign.world.clip_questions import PLAIN, TEMPORAL
from mmalign.world.clip_tables import FILMS, video_prompt, write_captions, write_clip_questions
from mmalign.world.clips import FRAME_RATE, NUMBERS, Clip, draw_clip, moments, render_frames
from mmalign.world.hallucination import ratio_interval
from mmalign.world.temple_tables import swapped, write_loose_answers

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "tiny"
PAIR_STEPS, ANSWER_STEPS = 20, 40
"""Steps of each of the two stages of pairs, and of fine-tuning."""
ARMS: Mapping[str, str] = {
    "base": "the embedded model as it is",
    "sft": "all steps fine-tune on the loose answers",
    "nontemporal": "pairs whose rejected side is wrong about things, then fine-tuning",
    "temple": "r4, then r2, then fine-tuning",
    "hard_first": "r2, then r4, then fine-tuning",
    "mixed": "the same pairs in one shuffled order, in two stages, then fine-tuning",
    "post": "fine-tuning, then r4, then r2",
    "pairs_only": "r4, then r2, without fine-tuning (fewer steps)",
}


def stages(arm: str, train: Path) -> list[dict[str, Any]]:
    """The curriculum of an arm."""
    answers = {"name": "sft", "loss": "answers", "manifest": str(train / "answers.jsonl"), "steps": ANSWER_STEPS}
    easy, hard = {"name": "r4", "rows": "0", "steps": PAIR_STEPS}, {"name": "r2", "rows": "1", "steps": PAIR_STEPS}
    both = [{"name": f"mixed{number}", "steps": PAIR_STEPS} for number in (1, 2)]
    return {
        "nontemporal": [{**stage, "manifest": str(train / "swapped.jsonl")} for stage in both] + [answers],
        "temple": [easy, hard, answers], "hard_first": [hard, easy, answers], "mixed": [*both, answers],
        "post": [answers, easy, hard], "pairs_only": [easy, hard],
    }[arm]  # fmt: skip


def data(out: Path, seed: int, sizes: Mapping[str, Any], pairs: Path | None) -> Path:
    """Films, answers and pairs of a seed, made once; a half-made folder is made again.

    Args:
        pairs: where pairs that were made elsewhere lie; films are drawn as frames then.
    """
    folder = out / f"data-seed{seed}"
    if not folder.exists():
        building = out / f".data-seed{seed}.building"
        shutil.rmtree(building, ignore_errors=True)
        if pairs is None:
            prepare(building, seed=seed, **sizes)
            print(make_pairs(building, seed=seed), flush=True)
            rows = plain_pairs(building / "train" / "pairs")
        else:
            draw_instead(building, seed=seed, **sizes)
            rows = [json.loads(line) for line in (pairs / f"pairs-seed{seed}.jsonl").read_text().splitlines()]
        write_rows(building / "train" / "pairs.jsonl", rows)
        told = [(row, swapped(row["chosen"][0]["content"], seed=seed, key=row["id"])) for row in rows]
        write_rows(
            building / "train" / "swapped.jsonl",
            [{**row, "rejected": reply(worse)} for row, worse in told if worse is not None],
        )
        if pairs is not None:
            as_frames(building / "train")
            as_frames(building / "held_out")
        os.replace(building, folder)
    return folder


def plain_pairs(table: Path) -> list[dict[str, Any]]:
    """A table of pairs as rows that name films by their number."""
    source, rows = open_vlm(table, progress=False), []
    for number in range(len(source)):
        record = source[number]
        question = "".join(part.text or "" for part in record.messages[-1].parts)
        film = record.meta["sampled"]["from"].removeprefix("f")
        rows.append(
            {"id": record.id, "prompt": video_prompt(question), "chosen": reply(record.answers[0].text),
             "rejected": reply(record.answers[1].text), "stage": source.stages[record.stage], "videos": [f"{FILMS}/{film}.mp4"]}
        )  # fmt: skip
    return rows


def draw_instead(folder: Path, *, seed: int, films: int, held_out: int, questions: int, loose: float, held_out_seed: int) -> None:
    """What ``prepare`` writes, without files of films: the frames that they would have given are drawn."""
    clips = draw_frames(folder / "train", films, seed=seed, held_out=False)
    write_loose_answers(folder / "train", clips, seed=seed, loose=loose)
    kept = draw_frames(folder / "held_out", held_out, seed=held_out_seed, held_out=True)
    write_captions(folder / "held_out", kept)
    write_clip_questions(folder / "held_out", kept, questions, seed=held_out_seed)


def draw_frames(folder: Path, number: int, *, seed: int, held_out: bool) -> list[Clip]:
    """The clips of ``clip_tables.write_clips``, as pictures of the frames that the embedded model is shown."""
    draws, clips = np.random.default_rng((seed, int(held_out), 81)), []
    for index in range(number):
        clip = draw_clip(draws, held_out=held_out, numbers=NUMBERS)
        count = round(clip.seconds * FRAME_RATE)
        frames = render_frames(clip, moments(clip, count), draws)
        place = folder / FILMS / str(index)
        place.mkdir(parents=True, exist_ok=True)
        for at, frame in enumerate(spread(count, int(FRAMES["max_frames"]))):
            Image.fromarray(frames[frame]).save(place / f"{at:02d}.png")
        clips.append(clip)
    return clips


def as_frames(folder: Path) -> None:
    """Films named by their files become films given as frames, in every table of a folder."""
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            place = row["videos"][0].removesuffix(".mp4")
            row["videos"] = [{"frames": [f"{place}/{at:02d}.png" for at in range(int(FRAMES["max_frames"]))], "fps": 2.0}]
        write_rows(path, rows)


def experiment(arm: str, seed: int, folder: Path, run: Path, overrides: Sequence[str]) -> Any:
    """The settings of one run: the demonstration's, with the arm's stages."""
    train = folder / "train"
    common = [f"model.path={assets.path(MODEL)}", f"data.cache={folder / 'cache'}", f"run.seed={seed}", f"run.out={run}",
              "run.save_every=1000", "evaluate.every=0", "evaluate.prompts=null", "evaluate.rewards=[]"]  # fmt: skip
    main = load_experiment(CONFIGS / "temple.yaml", [f"data.manifest={train / 'pairs.jsonl'}", *common, *overrides])
    optim = main.config.optim
    if arm == "sft":
        same = [f"optim.{name}={value}" for name, value in (("lr", optim.lr), ("warmup_steps", optim.warmup_steps),
                ("batch_size", optim.batch_size), ("steps", 2 * PAIR_STEPS + ANSWER_STEPS))]  # fmt: skip
        shown = [f"model.{name}={value}" for name, value in FRAMES.items()]
        return load_experiment(
            CONFIGS / "vlm_sft.yaml",
            [f"data.manifest={train / 'answers.jsonl'}", "data.cache_vision=true", "data.cache_frames=true",
             "evaluate.holdout=[]",
             *common, *same, *shown, *overrides],
        )  # fmt: skip
    plan = stages(arm, train)
    steps = sum(stage["steps"] for stage in plan)
    more = [f"method.stages={json.dumps(plan)}", f"optim.steps={steps}"]
    return load_experiment(CONFIGS / "temple.yaml", [f"data.manifest={train / 'pairs.jsonl'}", *common, *overrides, *more])


def make(
    arm: str, seed: int, out: Path, work: Path, sizes: Mapping[str, Any], overrides: Sequence[str], pairs: Path | None
) -> None:
    """Train and measure one arm of one seed, unless that is done."""
    result = out / f"{arm}-seed{seed}.json"
    if result.exists():
        return
    folder, run = data(work, seed, sizes, pairs), work / "runs" / f"{arm}-seed{seed}"
    if arm == "base":
        config = experiment("temple", seed, folder, run, overrides).config
        family = load_any(config, torch.device("cpu"))
        network = family.network
    else:
        shutil.rmtree(run, ignore_errors=True)
        train_experiment(experiment(arm, seed, folder, run, overrides), page=False, evaluate=False)
        opened = open_run(run, device="cpu")
        family, network = opened.family, opened.aligned
    found = measure(family, network, folder / "held_out")
    lines = {
        "arm": arm, "seed": seed, "figures": found.as_dict(), "concordant": [c.concordant for c in found.checks],
        "pairs": [c.pairs for c in found.checks], "orders": found.orders(), "recall": [c.recall for c in found.checks],
        "right": list(found.right), "kinds": list(found.kinds),
    }  # fmt: skip
    partial = result.with_suffix(".tmp")
    partial.write_text(json.dumps(lines) + "\n")
    partial.replace(result)
    print(f"{arm}, seed {seed}: order {lines['figures']['order']['mean']:.3f}", flush=True)


def table(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> str:
    """Means over seeds with 95 % intervals over held-out films or questions, and differences from `temple`."""
    found = {
        arm: [json.loads(path.read_text()) for seed in seeds if (path := out / f"{arm}-seed{seed}.json").exists()]
        for arm in arms
    }
    lines = ["| arm | seeds | events in order | recall | temporal questions | other questions | order: temple minus this |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for arm, runs in found.items():
        if not runs:
            continue
        order = ratio_interval(
            np.sum([run["concordant"] for run in runs], 0).tolist(), np.sum([run["pairs"] for run in runs], 0).tolist()
        )
        right = {kinds: mean_interval(_right(runs, kinds)) for kinds in (TEMPORAL, PLAIN)}
        each = " / ".join(f"{run['figures']['order']['mean']:.3f}" for run in runs)
        lines.append(
            f"| {arm} | {', '.join(str(run['seed']) for run in runs)} | {_shown(order)}; {each} | "
            f"{_shown(mean_interval(np.mean([run['recall'] for run in runs], 0)))} | {_shown(right[TEMPORAL])} | "
            f"{_shown(right[PLAIN])} | "
            f"{_against(found.get('temple', []), runs) if arm != 'temple' else ''} |"
        )
    return "\n".join(lines)


def _right(runs: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> np.ndarray:
    wanted = [place for place, kind in enumerate(runs[0]["kinds"]) if kind in kinds]
    return np.mean([np.asarray(run["right"], dtype=float)[wanted] for run in runs], 0)


def _against(temple: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """Difference of the mean order per film over the seeds that both have."""
    both = sorted({run["seed"] for run in temple} & {run["seed"] for run in runs})
    if not both:
        return ""
    own, other = (np.mean([run["orders"] for run in side if run["seed"] in both], 0) for side in (temple, runs))
    return _shown(paired_difference(own, other), sign="+")


def _shown(value: Any, sign: str = "") -> str:
    return f"{value.mean:{sign}.3f} ({value.low:{sign}.3f} to {value.high:{sign}.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/temple-world"))
    parser.add_argument("--work", type=Path, help="where films and run folders go; default: --out")
    parser.add_argument("--films", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=150)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument(
        "--loose", type=float, default=0.85, help="share of fine-tuning answers that tell events in a random order"
    )
    parser.add_argument("--held-out-seed", type=int, default=0, help="other held-out films, for choosing settings")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the experiment")
    parser.add_argument("--pairs", type=Path, help="folder of pairs made elsewhere (--pairs-out); films are drawn as frames")
    parser.add_argument("--pairs-out", type=Path, help="make the pairs of the seeds, keep them here, and stop")
    parser.add_argument("--table", action="store_true", help="make nothing")
    found = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sizes = {"films": found.films, "held_out": found.held_out, "questions": found.questions, "loose": found.loose,
             "held_out_seed": found.held_out_seed}  # fmt: skip
    work = found.work or found.out
    if found.pairs is not None:
        found.set.append("data.cache_frames=false")  # films are frames already, and the cache asks PyAV for its version
    found.out.mkdir(parents=True, exist_ok=True)
    if found.pairs_out is not None:
        for seed in found.seeds:
            made = data(work, seed, sizes, None) / "train" / "pairs"
            write_rows(found.pairs_out / f"pairs-seed{seed}.jsonl", plain_pairs(made))
        return
    for seed in [] if found.table else found.seeds:
        for arm in found.arms:
            make(arm, seed, found.out, work, sizes, found.set, found.pairs)
    print(table(found.out, found.arms, found.seeds))


if __name__ == "__main__":
    main()
