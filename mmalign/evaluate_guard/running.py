"""``mmalign evaluate-guard``: every mask against every domain, from fine-tuning to page. Finished arms are kept on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmalign import rng
from mmalign.config import dump_yaml
from mmalign.data.domains import ROLES
from mmalign.errors import ConfigError
from mmalign.evaluate_guard.bench import GuardBench
from mmalign.evaluate_guard.cost import saved_bytes
from mmalign.evaluate_guard.erase import erase
from mmalign.evaluate_guard.measures import effect, interval
from mmalign.evaluate_guard.quality import Judges, Quality, frechet_distance, in_embedded_world
from mmalign.evaluate_guard.settings import GuardEvaluation, load_guard_evaluation
from mmalign.experiment.folder import write_json, write_text
from mmalign.freezing import FreezeMask
from mmalign.freezing.baselines import matched_random
from mmalign.models.diffusion import FAMILIES
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.statistics import mean_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardResult:
    """What an evaluation left behind."""

    folder: Path
    arms: dict[str, dict[str, Any]]
    """Arm -> figures, as in guard.json."""
    table: str
    """The figures as Markdown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arm:
    """One network and domain: held-out losses, pictures, cost."""

    losses: np.ndarray
    pictures: np.ndarray
    cost: Mapping[str, float]


def evaluate_guard(path: str | Path, overrides: Sequence[str] = ()) -> GuardResult:
    """Fine-tune under every mask on held-out domains, sample, score, and write ``guard.json`` and ``guard.html``.

    Raises:
        MmalignError: anything the user can mend; see ``mmalign.errors``.
    """
    config = load_guard_evaluation(path, overrides)
    masks = {name: FreezeMask.load(place) for name, place in config.masks.items()}
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    if config.run.device == "cuda" and device.type != "cuda":
        raise ConfigError("run.device: 'cuda' was asked for, but torch sees no CUDA device; use auto or cpu")
    config.folder.mkdir(parents=True, exist_ok=True)
    write_text(config.folder / "config.yaml", dump_yaml(config))
    return _Evaluation(config, masks, device).run()


class _Evaluation:
    """One evaluation under way."""

    def __init__(self, config: GuardEvaluation, masks: dict[str, FreezeMask], device: torch.device) -> None:
        from mmalign.experiment.assembly import quiet_libraries

        quiet_libraries()
        self.config, self.folder = config, config.folder
        settings: Any = config.model
        self.family: DiffusionFamily = FAMILIES.get(settings.name).load(settings, device=device)  # type: ignore[attr-defined]
        for mask in masks.values():
            mask.check_base(self.family.network)
        self.masks = dict(masks)
        first = next(iter(masks.values()))
        sizes = {name: entry.parameters for name, entry in first.tensors.items()}
        for number in range(config.random):
            seed = 100 * config.run.seed + number
            names = matched_random(sizes, count=len(first.frozen), share=first.ratio["parameters"], seed=seed)
            self.masks[f"random {number + 1}"] = _with(first, names)
        side = config.data.resolution or self.family.latent_shape[1] * self.family.latent_factor
        self.bench = GuardBench(self.family, config.data.manifest, side=side, folder=self.folder, draws=config.draws)
        self.captions = {role: _spread(self.bench.prompts[role], config.sample.prompts) for role in ROLES}
        self.embedded = bool(config.sample.prompts) and in_embedded_world(self.captions)
        self.judges = Judges(config.clip, device) if config.sample.prompts else None

    def run(self) -> GuardResult:
        """All arms, then the files."""
        from mmalign.evaluate_guard.page import page, table
        from mmalign.experiment.trackers import bar

        names = ["base", "none", *(["erased"] if self.config.erase else []), *self.masks]
        found: dict[str, dict[str, _Arm]] = {}
        with bar("evaluate-guard", len(names) * len(ROLES), "fine-tunings") as progress:
            for name in names:
                found[name] = {}
                for role in ROLES:
                    found[name][role] = self._arm(name, role)
                    progress.advance(note=f"{name}, {role}")
        figures = self._figures(found)
        absent = self.judges.topiq_absent if self.judges is not None else None
        write_json(self.folder / "guard.json", {"arms": figures, "domains": self.bench.domains, "topiq_absent": absent})
        shown = table(figures)
        if self.config.sample.prompts:
            grids = self._grids(found)
            shown_page = page(self.config, figures, self.masks, grids, self.bench.domains, note=absent or "")
            write_text(self.folder / "guard.html", shown_page)
        return GuardResult(folder=self.folder, arms=figures, table=shown)

    # One arm

    def _arm(self, name: str, role: str) -> _Arm:
        """Computed, or read where it was computed before under the same settings."""
        store = self.folder / "arms" / f"{name.replace(' ', '-')}-{role}"
        key = self._identity(name)
        if store.with_suffix(".json").is_file() and store.with_suffix(".npz").is_file():
            kept = json.loads(store.with_suffix(".json").read_text())
            if kept["identity"] == key:
                values = np.load(store.with_suffix(".npz"), allow_pickle=False)
                return _Arm(losses=values["losses"], pictures=values["pictures"], cost=kept["cost"])
        made = self._compute(name, role)
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_name(f".{store.name}.npz")
        np.savez_compressed(temporary, losses=made.losses, pictures=made.pictures)
        temporary.rename(store.with_suffix(".npz"))
        write_json(store.with_suffix(".json"), {"identity": key, "cost": dict(made.cost)})
        return made

    def _identity(self, name: str) -> str:
        """What an arm depends on."""
        import hashlib

        config = self.config.model_dump(mode="json")
        parts = {part: config[part] for part in ("model", "data", "optim", "sample", "draws")}
        mask = self.masks[name].digest().hex() if name in self.masks else name
        text = json.dumps([parts, self.config.run.seed, mask, self.bench.fingerprint], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _compute(self, name: str, role: str) -> _Arm:
        bench, config = self.bench, self.config
        cost: dict[str, float] = {}
        if name == "base":
            network: nn.Module = self.family.copy_network()
        else:
            prepare = self._erase if name == "erased" else None
            mask = self.masks.get(name)
            adapted = bench.adapt(mask, role, optim=config.optim, seed=config.run.seed, prepare=prepare)
            network = adapted.network
            kept = saved_bytes(bench, mask, role, batch_size=config.optim.batch_size)
            cost = {
                "cpu_seconds_per_step": adapted.cpu_seconds_per_step, "state_bytes": adapted.state_bytes,
                "trained_parameters": adapted.trained_parameters, "saved_bytes": kept,
            }  # fmt: skip
        return _Arm(losses=bench.test_losses(network, role), pictures=self._sample(network, role), cost=cost)

    def _erase(self, network: nn.Module) -> None:
        prompts = self.bench.prompts
        erase(self.family, network, concepts=sorted(set(prompts["illegal"])), kept=sorted(set(prompts["innocent"])))

    def _sample(self, network: nn.Module, role: str) -> np.ndarray:
        captions, sample = self.captions[role], self.config.sample
        if not captions:
            return np.zeros((0, 1, 1, 3), np.uint8)
        keys = [f"{caption}\x1f{place}" for place, caption in enumerate(captions)]
        noise = rng.normal(keys, self.family.latent_shape, seed=self.config.run.seed, purpose="guard/sample")
        return self.family.sample(
            network, captions, noise, steps=sample.steps, guidance=sample.guidance, batch_size=sample.batch_size
        )

    # Figures

    def _figures(self, found: Mapping[str, Mapping[str, _Arm]]) -> dict[str, dict[str, Any]]:
        base = {role: found["base"][role].losses for role in ROLES}
        full = {role: found["none"][role].losses for role in ROLES}
        figures: dict[str, dict[str, Any]] = {}
        for name, arms in found.items():
            here = {role: arms[role].losses for role in ROLES}
            row: dict[str, Any] = {"loss": {role: mean_interval(here[role]).as_dict() for role in ROLES}}
            if name not in ("base", "none"):
                effects = effect(base, full, here, seed=self.config.run.seed)
                row |= {key: interval([getattr(effects, key)]).as_dict() for key in ("block", "harm", "selectivity")}
            if name in self.masks:
                row["ratio"], row["frozen"] = self.masks[name].ratio, len(self.masks[name].frozen)
            if arms["illegal"].cost:
                row["cost"] = {role: dict(arms[role].cost) for role in ROLES}
            if self.judges is not None:
                row["quality"] = {role: self._quality(self.judges, arms[role], role) for role in ROLES}
            figures[name] = row
        return figures

    def _quality(self, judges: Judges, arm: _Arm, role: str) -> dict[str, Any]:
        captions = self.captions[role]
        measured: Quality = judges.measure(arm.pictures, captions, role=role, embedded=self.embedded)
        real = judges.features(self.bench.test_pictures(role))
        values: dict[str, Any] = {
            "clip": mean_interval(measured.clip, captions).as_dict(), "fid": frechet_distance(measured.features, real),
        }  # fmt: skip
        for key, per_picture in (("judge", measured.judged), ("topiq", measured.topiq)):
            if per_picture is not None:
                values[key] = mean_interval(per_picture, captions).as_dict()
        return values

    def _grids(self, found: Mapping[str, Mapping[str, _Arm]]) -> dict[str, dict[str, np.ndarray]]:
        """Role -> arm -> the first pictures, with those of the domain itself on top."""
        count = self.config.sample.grid
        grids: dict[str, dict[str, np.ndarray]] = {}
        for role in ROLES:
            own = self.bench.test_pictures(role, captions=self.captions[role][:count])
            grids[role] = {"the domain": own, **{name: arms[role].pictures[:count] for name, arms in found.items()}}
        return grids


def _with(mask: FreezeMask, names: Sequence[str]) -> FreezeMask:
    from dataclasses import replace

    chosen = set(names)
    tensors = {name: replace(entry, frozen=name in chosen) for name, entry in mask.tensors.items()}
    return replace(mask, tensors=tensors, signature=None, recipe={"made": "random, matched"})


def _spread(prompts: Sequence[str], number: int) -> list[str]:
    """Up to `number` distinct captions, evenly over the list; with fewer distinct ones, repeated with their own noise."""
    distinct = list(dict.fromkeys(prompts))
    if not number:
        return []
    picked = [distinct[index * len(distinct) // number] for index in range(number)]
    return sorted(picked, key=distinct.index)

