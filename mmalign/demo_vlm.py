"""The embedded default for answers: align the tiny vision-language model on its own samples, judged by what is in the picture.

One command from nothing to a page: draw boards, let the model describe them four times each, make the best against the worst
description of a picture a pair, train, and compare base and aligned on held-out boards: how much of what they name is not there,
and how many questions they still answer. Descriptions are checked against the scene, never against another model.

Not for: the worlds themselves (``mmalign.world``); several objectives side by side (``benchmarks/vlm_objectives.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmalign import assets
from mmalign.demo import SHARED
from mmalign.report.files import merge_json
from mmalign.statistics import Interval, mean_interval, paired_difference, ratio_interval
from mmalign.world.board_tables import prompt, reply, write_boards, write_descriptions, write_questions, write_rows
from mmalign.world.captions import describe
from mmalign.world.hallucination import CaptionCheck, check_caption, rates
from mmalign.world.questions import normalise
from mmalign.world.scenes import parse_key

MODEL = "tiny-vlm"
SAMPLES = 4
"""Descriptions drawn of each training picture."""
PICTURES = 384
HELD_OUT = 250
QUESTIONS = 450
MAX_NEW_TOKENS = 80
ANSWER_TOKENS = 16
TOGETHER = 128
"""Answers generated at a time."""
CONTROL = "vlm_sft"
RATES = ("chair_s", "chair_i", "accuracy")
ANSWERS = Path("samples") / "evaluation" / "answers.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardFigures:
    """How one model does on the held-out tables, in their order."""

    descriptions: tuple[str, ...]
    checks: tuple[CaptionCheck, ...]
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    kinds: tuple[str, ...]

    def as_dict(self, seed: int = 0) -> dict[str, Any]:
        """Rates with 95 % intervals over pictures and questions, for JSON."""
        hallucinated = [check.hallucinated for check in self.checks]
        by_kind = {
            kind: float(np.mean([right for right, other in zip(self.right, self.kinds, strict=True) if other == kind]))
            for kind in dict.fromkeys(self.kinds)
        }
        return {
            "chair_i": ratio_interval(hallucinated, [check.named for check in self.checks], seed=seed).as_dict(),
            "chair_s": self.interval("chair_s", seed).as_dict(),
            "accuracy": self.interval("accuracy", seed).as_dict(),
            "accuracy_by_kind": by_kind,
            **{name: value for name, value in asdict(rates(self.checks)).items() if not name.startswith("chair")},
        }

    def values(self, name: str) -> list[float]:
        """Per picture or question, for paired comparisons: ``chair_s``, ``accuracy`` or ``f1``."""
        if name == "accuracy":
            return [float(right) for right in self.right]
        return [float(check.has_hallucination) if name == "chair_s" else check.f1 for check in self.checks]

    def interval(self, name: str, seed: int = 0) -> Interval:
        return mean_interval(self.values(name), seed=seed)


def prepare_boards(
    folder: Path, *, seed: int, pictures: int = PICTURES, held_out: int = HELD_OUT, questions: int = QUESTIONS,
    held_out_seed: int = 0,
) -> None:  # fmt: skip
    """Training pictures with requests under ``train``, held-out pictures with requests and questions under ``held_out``.

    The held-out part does not depend on `seed`: every run is measured on the same pictures. Another `held_out_seed` gives
    others, for choosing settings.
    """
    write_descriptions(folder / "train", write_boards(folder / "train", pictures, seed=seed, held_out=False))
    scenes = write_boards(folder / "held_out", held_out, seed=held_out_seed, held_out=True)
    write_descriptions(folder / "held_out", scenes)
    write_questions(folder / "held_out", scenes, questions, seed=held_out_seed)


def sample_pairs(
    family: Any, network: Any, folder: Path, *, seed: int, samples: int = SAMPLES
) -> tuple[Path, dict[str, float]]:
    """Let a network describe the pictures of a table and pair its best with its worst description of each.

    The score is the F1 of the objects named (``CaptionCheck.f1``), less a hundredth for each object in a wrong place, so that of
    two equally complete descriptions the better placed one is chosen. Pictures whose descriptions all score alike give no pair.

    Beside the pairs it writes ``lists.jsonl``: all answers of the same pictures with their scores, for methods on lists.

    Returns:
        ``pairs.jsonl`` in the folder, and figures about it.
    """
    from mmalign.data import open_vlm

    table = open_vlm(folder / "descriptions.jsonl", progress=False)
    records = [table[index] for index in range(len(table))]
    told = family.generate(
        network, [family.encode(record, training=False) for record in records], max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0, seed=seed, samples=samples, batch_size=TOGETHER,
    )  # fmt: skip
    rows, lists, checks = [], list[dict[str, Any]](), []
    for record, texts in zip(records, told, strict=True):
        scene = parse_key(record.meta["scene"])
        found = [check_caption(text, scene) for text in texts]
        checks += found
        scores = [check.f1 - 0.01 * check.misplaced for check in found]
        best, worst = int(np.argmax(scores)), int(np.argmin(scores))
        if scores[best] - scores[worst] <= 1e-8 or not texts[worst].strip():
            continue
        question = "".join(part.text or "" for part in record.messages[-1].parts)
        path = record.media[0].path  # type: ignore[union-attr]
        shared = {"id": record.id, "prompt": prompt(question), "images": [f"pictures/{Path(str(path)).name}"]}
        lists.append({**shared, "answers": [reply(text) for text in texts], "scores": {"f1": scores}})
        rows.append(
            {**shared, "chosen": reply(texts[best]), "rejected": reply(texts[worst]),
             "reference": describe(scene.items, scene.background, "there"),
             "scores": {"f1": [scores[best], scores[worst]]},
             "meta": {"scene": scene.key, "samples": samples, "seed": seed}}
        )  # fmt: skip
    figures = {
        "pictures": float(len(records)), "pairs": float(len(rows)), "samples": float(samples),
        "sampled_chair_s": rates(checks).chair_s, "sampled_chair_i": rates(checks).chair_i,
        "chosen_words": _words(rows, "chosen"), "rejected_words": _words(rows, "rejected"),
    }  # fmt: skip
    write_rows(folder / "lists.jsonl", lists)
    return write_rows(folder / "pairs.jsonl", rows), figures


def _words(rows: Sequence[dict[str, Any]], side: str) -> float:
    return float(np.mean([len(row[side][0]["content"].split()) for row in rows])) if rows else float("nan")


def measure(family: Any, network: Any, folder: Path, descriptions: Sequence[str] | None = None) -> BoardFigures:
    """Greedy answers to every request and question of a folder that ``prepare_boards`` wrote, checked against the scenes.

    `descriptions` are the network's answers to the requests where they are known already.
    """
    from mmalign.data import open_vlm

    def records(name: str) -> list[Any]:
        table = open_vlm(folder / f"{name}.jsonl", progress=False)
        return [table[index] for index in range(len(table))]

    def said(asked: Sequence[Any], tokens: int) -> list[str]:
        examples = [family.encode(record, training=False) for record in asked]
        found = family.generate(network, examples, max_new_tokens=tokens, temperature=0.0, batch_size=TOGETHER)
        return [answers[0] for answers in found]

    requests, questions = records("descriptions"), records("questions")
    told = list(descriptions) if descriptions is not None else said(requests, MAX_NEW_TOKENS)
    answers = said(questions, ANSWER_TOKENS)
    return BoardFigures(
        descriptions=tuple(told),
        checks=tuple(
            check_caption(text, parse_key(record.meta["scene"])) for record, text in zip(requests, told, strict=True)
        ),
        answers=tuple(answers),
        right=tuple(
            normalise(text) == normalise(record.answers[0].text)
            for record, text in zip(questions, answers, strict=True)
        ),
        kinds=tuple(record.meta["kind"] for record in questions),
    )


def demo_answers(folder: Path, experiment: Path, *, seed: int, overrides: Sequence[str] = ()) -> Any:
    """Run the embedded experiment of a method on answers into a fresh folder; see ``mmalign.demo.demo``.

    Base, aligned and a control are compared; the control is fine-tuned on the chosen descriptions alone, with the same data,
    steps, batches and rate.

    Returns:
        The ``RunResult`` of the method's run; its summary holds rates under `hallucination` and all figures under `boards`.
    """
    from mmalign.experiment.opening import load_any, open_run
    from mmalign.experiment.running import RunResult, train_experiment
    from mmalign.experiment.settings import load_experiment
    from mmalign.report import build_report
    from mmalign.trainers import METHODS

    boards = folder / "data"
    prepare_boards(boards, seed=seed)
    tables = boards / "train" / "pairs.jsonl", boards / "held_out" / "descriptions.jsonl"
    given = [f"data.manifest={tables[0]}", f"evaluate.prompts={tables[1]}"]
    given += [f"model.path={assets.path(MODEL)}", f"run.seed={seed}", *overrides, f"run.out={folder}"]
    method = load_experiment(experiment, given).config.method_name
    listed = [f"data.manifest={boards / 'train' / 'lists.jsonl'}"] if METHODS.get(method).batches == "vlm_lists" else []
    main = load_experiment(experiment, [*given, *listed])
    base = load_any(main.config, _device(main.config.run.device))
    print(f"{PICTURES} boards, {SAMPLES} descriptions of each by {MODEL}")
    _, pairs = sample_pairs(base, base.network, boards / "train", seed=seed)
    del base
    print(f"{pairs['pairs']:.0f} pairs; {pairs['sampled_chair_s']:.1%} of these descriptions name what is not there")
    if main.config.method_name != CONTROL:
        train_experiment(
            load_experiment(experiment.with_name(f"{CONTROL}.yaml"), _same(main, given, folder)),
            page=False,
            evaluate=False,
        )
    result = train_experiment(main, page=False, evaluate=False)
    opened = open_run(folder)
    if main.config.method_name != CONTROL:
        opened.controls = {"control": open_run(folder / "control").aligned}
    opened.evaluate()
    lines = [json.loads(line) for line in (folder / ANSWERS).read_text(encoding="utf-8").splitlines()]
    found = {
        name: measure(opened.family, network, boards / "held_out", [line["answers"][name] for line in lines])
        for name, network in opened.networks().items()
    }
    figures = {name: one.as_dict(seed) for name, one in found.items()}
    extra = {
        "hallucination": {name: {rate: one[rate] for rate in RATES} for name, one in figures.items()},
        "boards": {"models": figures, "change": compare(found["base"], found["aligned"], seed=seed), "pairs": pairs},
    }
    summary = merge_json(folder / "summary.json", extra)
    page = build_report(folder)
    print(headline(figures, page))
    return RunResult(folder=folder, metrics=result.metrics, summary=summary)


def _same(main: Any, given: Sequence[str], folder: Path) -> list[str]:
    """What the control takes over from the method's experiment."""
    optim = main.config.optim.model_dump()
    return [
        *given,
        *(f"optim.{key}={optim[key]}" for key in SHARED),
        "evaluate.every=0",
        f"run.out={folder / 'control'}",
    ]


def compare(before: BoardFigures, after: BoardFigures, *, seed: int = 0) -> dict[str, Any]:
    """Differences, after minus before, paired by picture and by question, with 95 % intervals."""
    return {
        name: paired_difference(after.values(name), before.values(name), seed=seed).as_dict()
        for name in ("chair_s", "accuracy", "f1")
    }


def headline(figures: Mapping[str, Any], page: Path) -> str:
    """What a person reads at the end: one line a model."""

    def shown(value: Mapping[str, float]) -> str:
        return f"{value['mean']:6.1%} ({value['low']:.1%} to {value['high']:.1%})"

    lines = [f"{'held-out boards and questions':<30}{'name what is not there':>27}{'questions right':>27}{'recall':>9}"]
    for name, one in figures.items():
        lines.append(f"{name:<30}{shown(one['chair_s']):>27}{shown(one['accuracy']):>27}{one['recall']:>9.1%}")
    return "\n".join([*lines, "95 % intervals in brackets", f"report: {page}"])


def _device(name: str) -> Any:
    import torch

    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
