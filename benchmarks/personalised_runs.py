"""The arms of ``personalised.py``: train, take everybody in, make pictures, measure them by everybody's taste."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmalign import assets
from mmalign.demo_people import PROMPTS, SHOTS, make_people, picture_sets, take_in
from mmalign.experiment.folder import write_text
from mmalign.experiment.opening import OpenRun, open_run
from mmalign.experiment.prompts import read_prompts, spread
from mmalign.experiment.running import train_experiment
from mmalign.experiment.settings import load_experiment
from mmalign.world.oracle import oracle_scores
from mmalign.world.people import Person, people, properties

CLIP, VLM = "users.path=assets/tiny-clip", "users.path=assets/tiny-vlm"
ARMS: Mapping[str, Sequence[str]] = {
    "dpo": (),
    "clip": ("users.encoder=clip", CLIP),
    "vlm": ("users.encoder=vlm_difference", VLM),
    "profile": ("users.encoder=vlm", "users.new_tokens=16", "users.instructions=Describe.", VLM),
    "table": ("users.source=table",),
    "prototypes": ("users.source=prototypes",),
}
"""Arm -> settings of `method`; dpo is Diffusion-DPO of every weight on the same choices, names left out."""
MIXES = (("opposite", 0, 12), ("neighbours", 0, 6))
"""Interpolations: between person A and person B of the trained ones (24 at even angles: 12 apart is opposite)."""
MODES = ("prediction", "attention", "embedding")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained and measured."""

    steps: int = 200
    batch: int = 32
    prompts: int = 16
    trained: int = 24
    unseen: int = 12
    curve: tuple[int, ...] = (1, 2, 4, 8, 16)
    curve_people: int = 6
    """Newcomers of the other numbers of pairs; every second one, so that opposites stay."""
    inner: tuple[float, ...] = (0.25, 0.5, 0.75)
    sampling: int = 15


def run_arm(out: Path, seed: int, arm: str, size: Size) -> Path:
    """Make one arm of one seed, unless its result is there; what an interrupted call had measured is kept."""
    folder = out / f"seed-{seed}"
    result = folder / f"{arm}.json"
    before = json.loads(result.read_text()) if result.is_file() else {"pictures": {}, "complete": False}
    if before["complete"]:
        return result
    begin = time.monotonic()
    persons = people(size.trained, size.unseen)
    if not (folder / "data" / "people" / "pairs.jsonl").is_file():
        make_people(folder / "data", seed, persons)
    opened = open_run(trained_run(folder, seed, arm, size))
    prompts = spread(read_prompts(PROMPTS), size.prompts)
    pictures: dict[str, Any] = before["pictures"]
    sets = {"dpo": ([], {})} if arm == "dpo" else asked_for(opened, folder, persons, size, seed)
    for number, (name, (mixture, words)) in enumerate(sets.items(), 1):
        if name not in pictures:
            made = picture_sets(opened, {name: mixture}, prompts, seed=seed, **words)[name]
            pictures[name] = measure(made, prompts)
            told = {"prompts": prompts, "steps": size.steps, "seconds": time.monotonic() - begin, "complete": number == len(sets)}
            write_text(result, json.dumps({**told, "pictures": pictures}, indent=1) + "\n")
    return result


def trained_run(folder: Path, seed: int, arm: str, size: Size) -> Path:
    """The run of one arm, trained unless it is."""
    run = folder / arm
    config = assets.shipped("configs") / "tiny" / ("diffusion_dpo.yaml" if arm == "dpo" else "personalized_dpo.yaml")
    method = [f"method.{value}" for value in ARMS[arm]]
    experiment = load_experiment(
        config,
        [
            f"data.manifest={folder / 'data' / 'people' / 'pairs.jsonl'}", f"run.seed={seed}", f"run.out={run}",
            f"optim.steps={size.steps}", *method, f"optim.batch_size={size.batch}", f"run.save_every={min(50, size.steps)}",
            "evaluate.every=0", "evaluate.grid_prompts=2", f"evaluate.steps={size.sampling}", "data.max_bad_fraction=1",
        ],
    )  # fmt: skip
    if not (run / "checkpoints" / f"step-{size.steps:08d}" / "state.json").is_file():
        train_experiment(experiment, resume=run.exists(), page=False, evaluate=False)
    return run


def asked_for(
    run: OpenRun, folder: Path, persons: Sequence[Person], size: Size, seed: int
) -> dict[str, tuple[list[tuple[Any, float]], dict[str, Any]]]:
    """Name -> mixture and mode: everybody from 4 choices; newcomers from 1 to 16; from one person to another."""
    data = folder / "data"
    known = {person.name: take_in(run, data, person, seed=seed) for person in persons}
    sets: dict[str, tuple[list[tuple[Any, float]], dict[str, Any]]] = {"base": ([], {})}
    sets |= {name: ([(embedding, 1.0)], {}) for name, embedding in known.items()}
    trained = [person for person in persons if person.trained]
    for mode in MODES:
        for label, first, second in MIXES:
            a, b = known[trained[first % len(trained)].name], known[trained[second % len(trained)].name]
            for share in size.inner:
                sets[f"{label} {mode} {share:g}"] = ([(a, 1 - share), (b, share)], {"mode": mode})
        if mode == MODES[0]:
            newcomers = [person for person in persons if not person.trained]
            for one in newcomers[:: max(1, len(newcomers) // size.curve_people)]:
                for shots in size.curve:
                    if shots != SHOTS:
                        sets[f"{one.name} x{shots}"] = ([(take_in(run, data, one, shots=shots, seed=seed), 1.0)], {})
    return sets


def measure(pictures: np.ndarray, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """What tastes are about, and how well captions are followed, picture by picture."""
    return {
        "properties": np.round(properties(pictures, prompts), 5).tolist(),
        "oracle": np.round(oracle_scores(pictures, prompts).astype(float), 4).tolist(),
    }
