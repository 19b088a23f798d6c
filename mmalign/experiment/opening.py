"""A finished (or interrupted) run opened again: base and aligned network, prompts and judges of its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mmalign.engine.checkpoint import find_checkpoints, load_trainable, read_checkpoint
from mmalign.errors import ConfigError
from mmalign.experiment.absent import ORACLE
from mmalign.experiment.assembly import load_family, tune
from mmalign.experiment.freezing import verify_held
from mmalign.experiment.prompts import read_prompts
from mmalign.experiment.settings import ExperimentConfig, LoraConfig, load_experiment

if TYPE_CHECKING:
    from mmalign.evaluation import RewardSpec



@dataclass(kw_only=True)
class OpenRun:
    """A run with its networks in memory."""

    folder: Path
    config: ExperimentConfig
    family: Any
    aligned: nn.Module
    """The trained network, weights averaged where the run kept an average."""
    controls: Mapping[str, nn.Module] | None = None
    """Further networks to compare, by name."""

    def evaluate(self) -> None:
        """Compare aligned with base on the prompts of the experiment; figures go to the run folder's summary."""
        if self.config.on_answers:
            from mmalign.experiment.vlm_evaluation import evaluate_answers

            evaluate_answers(self)
            return
        from mmalign.evaluation import evaluate_run

        evaluate_run(self)

    def networks(self) -> dict[str, nn.Module]:
        """``base``, ``aligned``, then further ones, in this order."""
        return {"base": self.base(), "aligned": self.aligned, **(self.controls or {})}

    def base(self) -> nn.Module:
        """The network as it was before training."""
        if isinstance(self.config.tuning, LoraConfig) or self.family.network is self.aligned:
            # Training changed the family's own network, so the starting weights are read again.
            return load_any(self.config, self.family.device).network.eval()  # type: ignore[no-any-return]
        return self.family.network

    def prompts(self) -> list[tuple[str, str]]:
        """(prompt, group) pairs of the evaluation."""
        settings = self.config.evaluate
        if settings.prompts is None:
            raise ConfigError("evaluate.prompts: required for an evaluation; name a prompt file")
        return read_prompts(settings.prompts, settings.max_prompts)

    def scorers(self) -> list[RewardSpec]:
        """The training reward first, then other rewards, then the hold-out judges."""
        from mmalign.evaluation import RewardSpec

        settings = self.config.evaluate
        specs = []
        for index, name in enumerate((*settings.rewards, *settings.holdout)):
            role = "holdout" if index >= len(settings.rewards) else ("training" if index == 0 else "other")
            specs.append(RewardSpec(name=name, role=ORACLE if name == ORACLE else role, score=self._scorer(name)))
        return specs

    def _scorer(self, name: str) -> _Score:
        if name == ORACLE:
            from mmalign.world.oracle import oracle_scores

            return oracle_scores
        from mmalign import rewards

        scorer = rewards.load(name, device=str(self.family.device))

        def score(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
            return np.asarray(scorer.score(list(images), list(prompts)))

        return score


if TYPE_CHECKING:
    from collections.abc import Callable

    _Score = Callable[[np.ndarray, Sequence[str]], np.ndarray]


def load_any(config: ExperimentConfig, device: torch.device) -> Any:
    """The family of a run, of pictures or of answers."""
    if config.on_answers:
        from mmalign.experiment.vlm_assembly import load_vlm

        return load_vlm(config, device)
    return load_family(config, device)


def tune_any(config: ExperimentConfig, family: Any) -> nn.Module:
    """Its network made trainable as the experiment says."""
    if config.on_answers:
        from mmalign.experiment.vlm_assembly import tune_vlm

        return tune_vlm(config, family)
    return tune(config, family)


def open_run(path: str | Path, overrides: Sequence[str] = (), device: str | None = None) -> OpenRun:
    """Open a run folder at its newest checkpoint.

    Raises:
        ConfigError: no run there, or no complete checkpoint in it.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml")
    checkpoints = find_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise ConfigError(f"{folder} has no complete checkpoint; run 'mmalign train {folder}/config.yaml --resume' first")
    config = load_experiment(folder / "config.yaml", [*overrides, f"run.out={folder}"]).config
    found = device or ("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    family = load_any(config, torch.device(found))
    policy = tune_any(config, family)
    load_trainable(policy, read_checkpoint(checkpoints[-1], "policy"), str(checkpoints[-1]))
    if config.optim.ema_decay:
        shadow = read_checkpoint(checkpoints[-1], "average")["shadow"]
        with torch.no_grad():
            for name, value in policy.named_parameters():
                if name in shadow:
                    value.copy_(shadow[name])
    verify_held(policy, f"in {checkpoints[-1]}")
    return OpenRun(folder=folder, config=config, family=family, aligned=policy.eval())


