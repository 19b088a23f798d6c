"""The embedded default of personalised methods: simulated people, one model for all of them, and a comparison person by person.

``mmalign demo --method personalized_dpo``: everybody chooses among candidates of the embedded generator by their own stated
taste; the method trains on the choices of some; then pictures are made for trained people and for newcomers, each taken in
from four fresh choices, and judged by that person's taste against the base from equal noise.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign import assets
from mmalign.statistics import Interval, mean_interval, win_rate
from mmalign.world.people import Person, liking, people, properties
from mmalign.world.people_tables import choices, write_choices

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.experiment.opening import OpenRun

EACH = 60
"""Choices of a person for training."""
FRESH = 16
"""Further choices of everybody, for taking them in."""
SHOTS = 4
PROMPTS = "assets/prompts/shapes_held_out.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Pictures to choose among."""

    files: list[bytes]
    prompts: list[str]
    """One per four pictures."""
    measured: np.ndarray
    """What tastes are about, [N, 2]."""


@lru_cache(maxsize=1)
def candidates() -> Candidates:
    """The embedded candidates with their measured properties."""
    from PIL import Image

    from mmalign import data

    table = data.open_ranked(assets.path("tiny-candidates"))
    files = [bytes(image.data or b"") for row in range(len(table)) for image in table[row].images]
    prompts = [table[row].prompt for row in range(len(table))]
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in files])
    return Candidates(files=files, prompts=prompts, measured=properties(pictures, np.repeat(prompts, 4).tolist()))


def make_people(folder: Path, seed: int, persons: Sequence[Person] | None = None) -> Path:
    """Choices of the trained people (``people/pairs.jsonl``), and fresh ones of everybody (``fresh/<name>.jsonl``).

    Returns:
        the training table.
    """
    found, everybody = candidates(), persons or people()
    trained = [person for person in everybody if person.trained]
    table = write_choices(folder / "people", choices(trained, found.measured, each=EACH, seed=seed), found.files, found.prompts)
    fresh = choices(everybody, found.measured, each=FRESH, seed=seed, first=EACH)
    write_choices(folder / "fresh", fresh, found.files, found.prompts)
    lines = (folder / "fresh" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    for person in everybody:
        own = [line for line in lines if json.loads(line)["user"] == person.name]
        (folder / "fresh" / f"{person.name}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    return table


def take_in(run: OpenRun, folder: Path, person: Person, *, shots: int = SHOTS, seed: int = 0) -> Tensor:
    """A person's embedding from their first fresh choices, as ``mmalign personalize`` makes it."""
    from mmalign import data
    from mmalign.personalize import embed_user

    table = data.open_table(folder / "fresh" / f"{person.name}.jsonl", progress=False)
    return embed_user(run, [table[row] for row in range(shots)], seed=seed)[0]


def picture_sets(
    run: OpenRun, mixtures: Mapping[str, Sequence[tuple[Tensor, float]]], prompts: Sequence[str], *, seed: int, **asked: Any
) -> dict[str, np.ndarray]:
    """Pictures of the same prompts from the same noise for each of several people or mixtures; an empty one is for nobody."""
    from mmalign.personalize import sample_for

    return {
        name: sample_for(run, [list(mixture)] * len(prompts), prompts, seed=seed, **asked)
        for name, mixture in mixtures.items()
    }


def wins(person: Person, own: np.ndarray, other: np.ndarray, prompts: Sequence[str], seed: int) -> Interval:
    """How often a person likes their own picture better than another of the same prompt and noise."""
    first, second = (liking(person, properties(pictures, prompts)) for pictures in (own, other))
    return win_rate(first, second, list(prompts), seed=seed)


def demo_people(folder: Path, config: Path, *, seed: int, overrides: Sequence[str] = ()) -> Any:
    """See the module's head. Returns the ``RunResult``."""
    from mmalign.experiment.opening import open_run
    from mmalign.experiment.prompts import read_prompts, spread
    from mmalign.experiment.running import RunResult, train_experiment
    from mmalign.experiment.settings import load_experiment
    from mmalign.report import build_report

    everybody = people()
    print(f"{len(everybody)} people choose among the embedded candidates")
    table = make_people(folder / "data", seed)
    experiment = load_experiment(config, [
        f"data.manifest={table}", f"run.seed={seed}", f"model.path={assets.path('tiny-sd')}",
        f"method.users.path={assets.path('tiny-clip')}", *overrides, f"run.out={folder}",
    ])  # fmt: skip
    result = train_experiment(experiment, page=False, evaluate=False)
    opened = open_run(folder)
    prompts = spread(read_prompts(PROMPTS), 16)
    shown = [person for person in everybody if person.trained][::6] + [one for one in everybody if not one.trained][::3]
    mixtures = {person.name: [(take_in(opened, folder / "data", person), 1.0)] for person in shown}
    made = picture_sets(opened, {"base": [], **mixtures}, prompts, seed=seed)
    rows: list[dict[str, Any]] = [
        {"person": person.name, "likes": person.words, "trained": person.trained,
         "win_rate": wins(person, made[person.name], made["base"], prompts, seed).as_dict()}
        for person in shown
    ]  # fmt: skip
    write_people(folder, rows, made, prompts, shown)
    page = build_report(folder)
    for kind, trained in (("trained people", True), ("newcomers", False)):
        some = [row["win_rate"]["mean"] for row in rows if row["trained"] is trained]
        found = mean_interval(some, seed=seed)
        print(f"{kind}: own pictures beat the base's by own taste in {found.mean:.1%} ({found.low:.1%} to {found.high:.1%}"
              f" over {len(some)} people)")  # fmt: skip
    print(f"report: {page}")
    return RunResult(folder=folder, metrics=result.metrics, summary=json.loads((folder / "summary.json").read_text()))


def write_people(
    folder: Path, rows: Sequence[Mapping[str, Any]], made: Mapping[str, np.ndarray], prompts: Sequence[str],
    shown: Sequence[Person],
) -> None:
    """What the page shows of people: ``personal/people.json`` and a sheet, a row of pictures per person, the base first."""
    from mmalign.experiment.folder import write_json
    from mmalign.report.grids import grid

    target, columns = folder / "personal", min(6, len(prompts))
    target.mkdir(parents=True, exist_ok=True)
    pictures = [picture for name in ("base", *(person.name for person in shown)) for picture in made[name][:columns]]
    captions = ["nobody: the base"] * columns
    for person in shown:
        captions += [f"likes {person.words}" + ("" if person.trained else " (a newcomer)")] * columns
    grid(pictures, columns, captions, headings=list(prompts[:columns])).save(target / "people.png")
    write_json(target / "people.json", {"rows": list(rows), "prompts": list(prompts)})
