"""The embedded default for temporal preferences: a video model that tells events in a loose order learns the order.

One command from nothing to a page: draw films, let the model caption their clips one by one, join the captions in order and in
perturbed orders (``mmalign.sampling.temple``), train stages from easy to hard and then fine-tune, beside a control that spends
all its steps on fine-tuning. The order is read from captions of held-out films by a program, never by another model.

`arm` and `measure` also serve ``benchmarks/temple_world.py``, which compares curricula over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmalign import assets
from mmalign.demo import SHARED
from mmalign.report.files import merge_json
from mmalign.statistics import mean_interval, paired_difference
from mmalign.world.board_tables import reply, write_rows
from mmalign.world.clip_questions import PLAIN, TEMPORAL, OrderCheck, check_order
from mmalign.world.clip_tables import video_prompt, write_captions, write_clip_questions, write_clips
from mmalign.world.clips import parse_clip_key
from mmalign.world.hallucination import ratio_interval
from mmalign.world.questions import normalise
from mmalign.world.temple_tables import swapped, write_films, write_loose_answers

MODEL = "tiny-video-vlm"
FILMS = 160
"""Training films; each gives up to six pairs."""
HELD_OUT = 150
QUESTIONS = 200
LOOSE = 0.85
"""Share of the answers for fine-tuning that tell the events in a random order."""
RATES = (4, 2)
"""Levels that differ on films of four to six events."""
MAX_NEW_TOKENS = 90
ANSWER_TOKENS = 16
TOGETHER = 64
FRAMES = {"video_fps": 8.0, "max_frames": 12}
"""How films are shown to the embedded model, as it was trained."""
CONTROL = "vlm_sft"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderFigures:
    """How one model does on the held-out films and questions."""

    checks: tuple[OrderCheck, ...]
    right: tuple[bool, ...]
    kinds: tuple[str, ...]

    def as_dict(self, seed: int = 0) -> dict[str, Any]:
        """Rates with 95 % intervals over films and questions, for JSON."""
        checks = self.checks
        return {
            "order": ratio_interval([c.concordant for c in checks], [c.pairs for c in checks], seed=seed).as_dict(),
            "recall": mean_interval([c.recall for c in checks], seed=seed).as_dict(),
            "temporal": mean_interval(self.of(TEMPORAL), seed=seed).as_dict(),
            "plain": mean_interval(self.of(PLAIN), seed=seed).as_dict(),
            "by_kind": {kind: float(np.mean(self.of((kind,)))) for kind in dict.fromkeys(self.kinds)},
            "events_named": sum(c.named for c in checks) / sum(c.events for c in checks),
            "unread": float(np.mean([c.unread > 0 for c in checks])),
        }  # fmt: skip

    def of(self, kinds: Sequence[str]) -> list[float]:
        """Whether each question of some kinds was answered right, as numbers."""
        return [float(right) for right, kind in zip(self.right, self.kinds, strict=True) if kind in kinds]

    def orders(self) -> list[float]:
        """Per film, the share of pairs of events told in the right order; half where fewer than two are named."""
        return [0.5 if check.order is None else check.order for check in self.checks]


def prepare(folder: Path, *, seed: int, films: int = FILMS, held_out: int = HELD_OUT, questions: int = QUESTIONS,
            loose: float = LOOSE, held_out_seed: int = 0) -> None:  # fmt: skip
    """Training films with requests and loose answers under ``train``, held-out films and questions under ``held_out``.

    The held-out part does not depend on `seed`; another `held_out_seed` gives others, for choosing settings.
    """
    clips = write_clips(folder / "train", films, seed=seed, held_out=False)
    write_films(folder / "train", clips)
    write_loose_answers(folder / "train", clips, seed=seed, loose=loose)
    kept = write_clips(folder / "held_out", held_out, seed=held_out_seed, held_out=True)
    write_captions(folder / "held_out", kept)
    write_clip_questions(folder / "held_out", kept, questions, seed=held_out_seed)


def make_pairs(folder: Path, *, seed: int, rates: Sequence[int] = RATES) -> Any:
    """``train/pairs``: narrations of the model's own clip captions in order and in perturbed orders; and the same prompts with
    rejected answers that are wrong about things (``train/pairs/swapped.jsonl``). Returns the sampler's report."""
    from mmalign.models.vlm.base import VlmConfig
    from mmalign.sampling.job import sample_answers
    from mmalign.sampling.settings import SamplingConfig
    from mmalign.sampling.temple import TempleSamplerConfig

    sampler = TempleSamplerConfig(
        rates=tuple(rates), narrator="join", instruction="own", frames_per_clip=FRAMES["max_frames"],  # type: ignore[arg-type]
        caption_prompt="Describe the video.", caption_sentences=1, cache=str(folder / "cache"),
    )  # fmt: skip
    report = sample_answers(
        SamplingConfig(
            sampler=sampler, model=VlmConfig(path=str(assets.path(MODEL)), **FRAMES),  # type: ignore[arg-type]
            manifest=str(folder / "train" / "films.jsonl"), out=str(folder / "train" / "pairs"), seed=seed, temperature=0.0,
            max_new_tokens=32, batch_size=TOGETHER, device="cpu",
        ),
        progress=False,
    )  # fmt: skip
    write_swapped(folder / "train" / "pairs", seed=seed)
    return report


def write_swapped(table: Path, *, seed: int) -> int:
    """``swapped.jsonl`` in a folder of pairs: its prompts, films and chosen answers, with rejected ones that are wrong about
    things.

    Returns how many rows were left out because their chosen answer names no event of this world.
    """
    from mmalign.branches import VideoRef
    from mmalign.data import open_vlm

    source, rows = open_vlm(table, progress=False), []
    for number in range(len(source)):
        record = source[number]
        chosen = record.answers[0].text
        worse = swapped(chosen, seed=seed, key=record.id)
        film = next(item for item in record.media if isinstance(item, VideoRef))
        if worse is None:
            continue
        rows.append(
            {"id": record.id, "prompt": video_prompt("".join(part.text or "" for part in record.messages[-1].parts)),
             "chosen": reply(chosen), "rejected": reply(worse), "stage": source.stages[record.stage],
             "videos": [Path(str(film.path)).relative_to(table.resolve()).as_posix()], "meta": dict(record.meta)}
        )  # fmt: skip
    write_rows(table / "swapped.jsonl", rows)
    return len(source) - len(rows)


def measure(family: Any, network: Any, folder: Path, captions: Sequence[str] | None = None) -> OrderFigures:
    """Greedy captions and answers about the held-out films, checked against what happens in them.

    `captions` are the network's answers to the requests where they are known already.
    """
    from mmalign.data import open_vlm

    def records(name: str) -> list[Any]:
        table = open_vlm(folder / f"{name}.jsonl", progress=False)
        return [table[index] for index in range(len(table))]

    def said(asked: Sequence[Any], tokens: int) -> list[str]:
        found = []
        for start in range(0, len(asked), TOGETHER):
            examples = [family.encode(record, training=False) for record in asked[start : start + TOGETHER]]
            found += family.generate(network, examples, max_new_tokens=tokens, temperature=0.0, batch_size=TOGETHER)
        return [answers[0] for answers in found]

    requests, questions = records("captions"), records("questions")
    told = list(captions) if captions is not None else said(requests, MAX_NEW_TOKENS)
    answers = said(questions, ANSWER_TOKENS)
    return OrderFigures(
        checks=tuple(
            check_order(text, parse_clip_key(record.meta["clip"])) for record, text in zip(requests, told, strict=True)
        ),
        right=tuple(
            normalise(text) == normalise(record.answers[0].text) for record, text in zip(questions, answers, strict=True)
        ),
        kinds=tuple(record.meta["kind"] for record in questions),
    )


def demo_temple(folder: Path, experiment: Path, *, seed: int, overrides: Sequence[str] = ()) -> Any:
    """Run the embedded experiment into a fresh folder; see ``mmalign.demo.demo``.

    Returns:
        The ``RunResult`` of the method's run; its summary holds all figures under `order`.
    """
    from mmalign.experiment.opening import open_run
    from mmalign.experiment.running import RunResult, train_experiment
    from mmalign.experiment.settings import load_experiment
    from mmalign.report import build_report

    data = folder / "data"
    prepare(data, seed=seed)
    print(f"{FILMS} films; {MODEL} captions their clips one by one")
    print(make_pairs(data, seed=seed))
    common = [f"evaluate.prompts={data / 'held_out' / 'captions.jsonl'}", f"model.path={assets.path(MODEL)}",
              f"data.cache={data / 'cache'}", f"run.seed={seed}"]  # fmt: skip
    main = load_experiment(experiment, [f"data.manifest={data / 'train' / 'pairs'}", *common, *overrides, f"run.out={folder}"])
    main = with_answers(main, data / "train" / "answers.jsonl")
    optim = main.config.optim.model_dump()
    control = load_experiment(
        experiment.with_name(f"{CONTROL}.yaml"),
        [f"data.manifest={data / 'train' / 'answers.jsonl'}", *common, *(f"optim.{key}={optim[key]}" for key in SHARED),
         *(f"model.{name}={value}" for name, value in FRAMES.items()), "data.cache_vision=true", "data.cache_frames=true",
         "evaluate.every=0", "evaluate.rewards=[clip-order]", "evaluate.holdout=[]", f"run.out={folder / 'control'}"],
    )  # fmt: skip
    train_experiment(control, page=False, evaluate=False)
    result = train_experiment(main, page=False, evaluate=False)
    opened = open_run(folder)
    opened.controls = {"control": open_run(folder / "control").aligned}
    opened.evaluate()
    found = {name: measure(opened.family, network, data / "held_out") for name, network in opened.networks().items()}
    figures = {name: one.as_dict(seed) for name, one in found.items()}
    change = {
        other: paired_difference(found["aligned"].orders(), found[other].orders(), seed=seed).as_dict()
        for other in ("base", "control")
    }
    summary = merge_json(folder / "summary.json", {"order": {"models": figures, "aligned_minus": change}})
    page = build_report(folder)
    print(headline(figures, page))
    return RunResult(folder=folder, metrics=result.metrics, summary=summary)


def with_answers(experiment: Any, answers: Path) -> Any:
    """The experiment with its fine-tuning stages on another table."""
    from dataclasses import replace

    config = experiment.config
    stages = tuple(
        stage.model_copy(update={"manifest": str(answers)}) if stage.loss == "answers" else stage
        for stage in config.method.stages
    )
    method = config.method.model_copy(update={"stages": stages})
    return replace(experiment, config=config.model_copy(update={"method": method}))


def headline(figures: Mapping[str, Any], page: Path | None = None) -> str:
    """What a person reads at the end: one line a model."""

    def shown(value: Mapping[str, float]) -> str:
        return f"{value['mean']:6.1%} ({value['low']:.1%} to {value['high']:.1%})"

    lines = [f"{'held-out films':<16}{'pairs of events in order':>27}{'temporal questions':>27}{'recall':>27}"]
    for name, one in figures.items():
        lines.append(f"{name:<16}{shown(one['order']):>27}{shown(one['temporal']):>27}{shown(one['recall']):>27}")
    lines.append("95 % intervals in brackets")
    return "\n".join(lines + ([] if page is None else [f"report: {page}"]))
