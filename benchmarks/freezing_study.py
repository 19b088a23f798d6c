"""Masks and arms of the selectivity benchmark, each computed once and kept as a file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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
from mmalign.world.domains import domain_rows

CONFIG = "configs/tiny/freeze_as_guard.yaml"
DOMAINS = "assets/tiny-domains"
USER = {"lr": 5e-4, "steps": 30, "batch_size": 8, "weight_decay": 0.0}
"""The user's fine-tuning."""
STEPS = {"learned": 180, "saliency": 60}
"""Of mask learning: what configs/tiny/freeze_as_guard.yaml says, and one fine-tuning of the joint user."""
ONE_SHOT = ("method.scheme=saliency", "method.users=joint", "method.episode=0", "method.user_steps=4")
REPORTED = {"adapt": 256, "test": 128}
"""Splits of the third group, and pictures of each role."""
REPORTED_SEED = 72


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
    source: World | None = None
    """Where masks are learnt, if not here."""
    _bench: GuardBench | None = field(default=None, repr=False)

    # Masks

    def scored(self, scheme: Scheme, *, ratio: float, seed: int, more: tuple[str, ...] = (), name: str = "") -> FreezeMask:
        """The mask of a run of mask learning, run if it is not there."""
        if self.source is not None:
            return self.source.scored(scheme, ratio=ratio, seed=seed, more=more, name=name)
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


def second_group(out: Path, user_steps: int, shortened: int = 1) -> World:
    """Masks of the split `learn` under users of the second group: what the innocent weight is chosen on."""
    return World(manifest=DOMAINS, folder=out / "chosen-on", user_steps=user_steps, shortened=shortened)


def third_group(masks: World, out: Path) -> World:
    """The same masks under users of the third group, which the embedded table does not have and nothing was chosen on."""
    folder = out / "reported"
    file = folder / "domains" / "part-00000.parquet"
    if not file.is_file():
        schema = pq.read_schema(Path(DOMAINS) / "part-00000.parquet")
        rows = [
            row for place, (split, number) in enumerate(REPORTED.items())
            for row in domain_rows(split, group=2, number=number, seed=REPORTED_SEED, stream=10 * place)
        ]  # fmt: skip
        _write(file, rows, schema)
    return World(
        manifest=str(file.parent), folder=folder, user_steps=masks.user_steps, shortened=masks.shortened, source=masks
    )


def _write(file: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Whole or not at all, whoever else writes it too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{os.getpid()}.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
    part.rename(file)


def sizes(mask: FreezeMask) -> dict[str, int]:
    """Parameters by tensor."""
    return {name: entry.parameters for name, entry in mask.tensors.items()}


def chosen(mask: FreezeMask, names: tuple[str, ...]) -> FreezeMask:
    """The same base under another choice."""
    kept = set(names)
    tensors = {name: dataclasses.replace(entry, frozen=name in kept) for name, entry in mask.tensors.items()}
    return dataclasses.replace(mask, tensors=tensors)
