"""Masks and arms of the selectivity benchmark, each computed once and kept as a file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from filelock import FileLock

from mmalign.engine.settings import OptimConfig
from mmalign.evaluate_guard.bench import GuardBench
from mmalign.evaluate_guard.measures import Effect, effect
from mmalign.experiment.assembly import load_family
from mmalign.experiment.folder import write_json
from mmalign.experiment.running import train_experiment
from mmalign.experiment.settings import load_experiment
from mmalign.freezing import FreezeMask
from mmalign.freezing.baselines import matched_random, matched_scored
from mmalign.freezing.masked import ROLES
from mmalign.freezing.relaxation import top_names

CONFIG = "configs/tiny/freeze_as_guard.yaml"
DOMAINS = "assets/tiny-domains"
USER = {"lr": 5e-4, "steps": 30, "batch_size": 8, "weight_decay": 0.0}
"""The user's fine-tuning."""
STEPS = {"learned": 180, "saliency": 60}
"""Of mask learning: what configs/tiny/freeze_as_guard.yaml says, and one fine-tuning of the joint user."""
ONE_SHOT = ("method.scheme=saliency", "method.users=joint", "method.episode=0", "method.user_steps=4")
FOLDS = (
    ({"ann", "cai", "rows", "slant"}, {"bob", "dov", "dots"}),
    ({"bob", "dov", "dots", "slant"}, {"ann", "cai", "rows"}),
)
"""Persons and papers of the split `learn`: what a mask is learnt from, and what it is validated on. What masks are reported on is
in neither. Nothing is validated on ``slant``: the published model draws it nearly as well as a user does, so that the share of
a user's gain that a mask takes would be noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How scores come about."""

    name: str
    """``learned`` or ``saliency``."""
    weight: float
    """What an innocent user's cost counts."""
    count: str = "tensors"
    """What the ratio of a learned mask is of: ``tensors`` or ``parameters``."""

    def key(self, ratio: float) -> str:
        """Saliency scores depend neither on the ratio nor on what it counts."""
        more = f"-r{ratio:g}" + ("-parameters" if self.count == "parameters" else "")
        return f"{self.name}-w{self.weight:.4g}" + (more if self.name == "learned" else "")


@dataclass(slots=True)
class World:
    """One table of domains with everything that was computed on it."""

    manifest: str
    folder: Path
    user_steps: int = 30
    shortened: int = 1
    """Mask learning is divided by this; 1 for every figure that is reported."""
    _bench: GuardBench | None = field(default=None, repr=False)

    # Masks

    def scored(self, scheme: Scheme, *, ratio: float, seed: int, more: tuple[str, ...] = (), name: str = "") -> FreezeMask:
        """The mask of a run of mask learning, run if it is not there."""
        folder = self.folder / "masks" / f"{name or scheme.key(ratio)}-seed{seed}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):  # several jobs may need one mask
            if not (folder / "export" / "freeze_mask.json").is_file():
                one_shot = ONE_SHOT if scheme.name == "saliency" else ()
                kept = ratio if scheme.name == "learned" else 0.3
                overrides = [
                    f"data.manifest={self.manifest}", f"method.ratio={kept}", f"method.count={scheme.count}",
                    f"method.innocent_weight={scheme.weight}", f"optim.steps={STEPS[scheme.name] // self.shortened}",
                    f"run.seed={seed}", f"run.out={folder}",
                    *one_shot, *more,
                ]  # fmt: skip
                if train_experiment(load_experiment(CONFIG, overrides), resume=True, page=False).interrupted:
                    raise KeyboardInterrupt(f"{folder} goes on from its checkpoint when the command is run again")
        return FreezeMask.load(folder / "export" / "freeze_mask.json")

    def by_tensors(self, scheme: Scheme, *, ratio: float, seed: int) -> FreezeMask:
        """The wanted share of tensors, highest scores first."""
        mask = self.scored(scheme, ratio=ratio, seed=seed)
        return chosen(mask, top_names({name: entry.score for name, entry in mask.tensors.items()}, ratio))

    def by_share(self, scheme: Scheme, like: FreezeMask, *, ratio: float, seed: int) -> FreezeMask:
        """As many parameters as another mask freezes, highest scores first."""
        mask = self.scored(scheme, ratio=ratio, seed=seed)
        scores = {name: entry.score for name, entry in mask.tensors.items()}
        return chosen(mask, matched_scored(scores, sizes(mask), share=like.ratio["parameters"]))

    def by_density(self, scheme: Scheme, *, ratio: float, seed: int) -> FreezeMask:
        """The wanted share of parameters, highest scores per parameter first, as mask learning itself chooses them."""
        mask = self.scored(scheme, ratio=ratio, seed=seed)
        scores = {name: entry.score / entry.parameters for name, entry in mask.tensors.items()}
        return chosen(mask, top_names(scores, ratio, sizes=sizes(mask)))

    @staticmethod
    def by_chance(like: FreezeMask, *, seed: int) -> FreezeMask:
        """As many tensors and as many parameters as another mask freezes."""
        found = matched_random(sizes(like), count=len(like.frozen), share=like.ratio["parameters"], seed=seed)
        return chosen(like, found)

    # Arms

    def bench(self) -> GuardBench:
        if self._bench is None:
            config = load_experiment(CONFIG, [f"data.manifest={self.manifest}"]).config
            self._bench = GuardBench(
                load_family(config, torch.device("cpu")), config.data.manifest, side=32, folder=self.folder
            )
        return self._bench

    def losses(
        self, name: str, mask: Callable[[], FreezeMask | None], seed: int, *, steps: int | None = None
    ) -> dict[str, np.ndarray]:
        """Test losses by role of a user under a mask (None: without); ``base`` is no user at all."""
        path = self.folder / "arms" / f"{name}-seed{seed}.json"
        if not path.is_file():
            bench, held = self.bench(), mask()
            if name == "base":
                found = bench.base_losses()
            else:
                optim = OptimConfig(**{**USER, "steps": steps or self.user_steps})
                users = {role: bench.adapt(held, role, optim=optim, seed=seed).network for role in ROLES}
                found = {role: bench.test_losses(network, role) for role, network in users.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            # Several processes may compute the same arm; whoever comes last writes the same numbers.
            part = path.with_name(f".{path.name}.{os.getpid()}")
            shown = {role: values.tolist() for role, values in found.items()}
            write_json(part, {"losses": shown, "ratio": None if held is None else held.ratio})
            part.rename(path)
            words = ", ".join(f"{role} {values.mean():.4f}" for role, values in found.items())
            print(f"{self.folder.name}: {name} seed {seed}: {words}", flush=True)
        return {role: np.array(values) for role, values in json.loads(path.read_text())["losses"].items()}

    def ratio(self, name: str, seed: int) -> dict[str, float]:
        """Shares that the mask of a finished arm froze."""
        return dict(json.loads((self.folder / "arms" / f"{name}-seed{seed}.json").read_text())["ratio"])

    def done(self, name: str, seed: int) -> bool:
        return (self.folder / "arms" / f"{name}-seed{seed}.json").is_file()

    def plain(self, seed: int, *, steps: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Losses without any user, and of a user without a mask."""
        name = "full" if steps is None else f"full-steps{steps}"
        return self.losses("base", lambda: None, 0), self.losses(name, lambda: None, seed, steps=steps)

    def effect(self, name: str, mask: Callable[[], FreezeMask | None], seed: int, *, steps: int | None = None) -> Effect:
        """What a mask prevented."""
        base, full = self.plain(seed, steps=steps)
        return effect(base, full, self.losses(name, mask, seed, steps=steps), seed=seed)


def held_out(out: Path, user_steps: int, shortened: int = 1) -> World:
    """The world that is reported."""
    return World(manifest=DOMAINS, folder=out / "held-out", user_steps=user_steps, shortened=shortened)


def validation(out: Path, fold: int, user_steps: int, shortened: int = 1) -> World:
    """A table made of the split `learn` alone; of what is validated on, every third row is scored, the others are the user's."""
    folder = out / f"validation-{fold}"
    file = folder / "domains" / "part-00000.parquet"
    if not file.is_file():
        learnt, judged = FOLDS[fold]
        table = pq.read_table(Path(DOMAINS) / "part-00000.parquet")
        rows, seen = [], dict.fromkeys(judged, 0)
        for row in table.to_pylist():
            if row["split"] == "learn" and row["domain"] in learnt:
                rows.append(row)
            elif row["split"] == "learn" and row["domain"] in judged:
                seen[row["domain"]] += 1
                rows.append({**row, "split": "test" if seen[row["domain"]] % 3 == 0 else "adapt"})
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{os.getpid()}.parquet")
        pq.write_table(type(table).from_pylist(rows, schema=table.schema), part)
        part.rename(file)
    return World(manifest=str(file.parent), folder=folder, user_steps=user_steps, shortened=shortened)


def sizes(mask: FreezeMask) -> dict[str, int]:
    """Parameters by tensor."""
    return {name: entry.parameters for name, entry in mask.tensors.items()}


def chosen(mask: FreezeMask, names: tuple[str, ...]) -> FreezeMask:
    """The same base under another choice."""
    kept = set(names)
    tensors = {name: dataclasses.replace(entry, frozen=name in kept) for name, entry in mask.tensors.items()}
    return dataclasses.replace(mask, tensors=tensors)
