"""Aligned against base on equal prompts and equal noise: sampling, scoring, comparing, and the files it leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmalign.errors import ConfigError, DataError, RewardError
from mmalign.registry import did_you_mean
from mmalign.report import build_report, files, samples
from mmalign.report.figures import (
    ALIGNED,
    BASE,
    CONTROL,
    ROLES,
    Comparison,
    EvaluationFigures,
    GroupFigures,
    RewardFigures,
)
from mmalign.report.folder import read_lines
from mmalign.report.reports import reports_text
from mmalign.report.table import table
from mmalign.report.warnings import collect
from mmalign.statistics import mean_interval, paired_difference, win_rate

if TYPE_CHECKING:
    from torch import nn

    from mmalign.experiment.opening import OpenRun
    from mmalign.models.diffusion.base import DiffusionFamily

Scores = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """A reward and what it is to this run."""

    name: str
    role: str
    """``training``, ``holdout``, ``oracle`` or ``other``."""
    score: Callable[[np.ndarray, Sequence[str]], np.ndarray]
    """(uint8 ``[N, H, W, 3]``, N prompts) -> ``[N]``, higher is better; NaN where it cannot answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Figures, and the single scores behind them. Row i is picture `indices[i]` of `prompts[i]` for every model."""

    figures: EvaluationFigures
    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    indices: tuple[int, ...]
    scores: Scores
    """Reward -> model -> float64 ``[N]``."""

    def as_dict(self) -> dict[str, Any]:
        """The ``evaluation`` part of ``summary.json``."""
        return self.figures.as_dict()

    def headline(self) -> dict[str, Any] | None:
        """The ``win_rate`` part of ``summary.json``: the reward the claim rests on, and its win rate."""
        reward = self.figures.headline()
        return None if reward is None else {**reward.against_base[ALIGNED].win_rate.as_dict(), "reward": reward.name}

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of ``evaluation.jsonl``: one per picture and model."""
        for row, (prompt, group, index) in enumerate(zip(self.prompts, self.groups, self.indices, strict=True)):
            for model in self.figures.models:
                scores = {name: float(found[model][row]) for name, found in self.scores.items()}
                known = {name: value if math.isfinite(value) else None for name, value in scores.items()}
                yield {"prompt": prompt, "group": group, "index": index, "model": model, "scores": known}


def spread(prompts: Sequence[str], images_per_prompt: int) -> tuple[list[str], list[int]]:
    """The prompt and picture number of every row, all pictures of the first prompt first.

    A prompt listed twice goes on counting, so its further pictures get noise of their own.
    """
    rows: list[str] = []
    indices: list[int] = []
    used: dict[str, int] = {}
    for prompt in prompts:
        start = used.get(prompt, 0)
        rows += [prompt] * images_per_prompt
        indices += range(start, start + images_per_prompt)
        used[prompt] = start + images_per_prompt
    return rows, indices


def sample_models(
    family: DiffusionFamily,
    networks: Mapping[str, nn.Module],
    prompts: Sequence[str],
    *,
    images_per_prompt: int,
    seed: int,
    steps: int,
    guidance: float,
    batch_size: int,
    during: Callable[[nn.Module, int], Callable[[slice], AbstractContextManager[Any]] | None] | None = None,
) -> dict[str, np.ndarray]:
    """Pictures of every network for the same prompts from the same initial noise.

    `during` says for whom a network makes how many pictures; see ``DiffusionFamily.sample``.

    Noise is a function of (seed, prompt, picture number) alone: neither batch size, nor order, nor the other prompts
    change a picture's start.

    Returns:
        Model -> uint8 ``[P * images_per_prompt, H, W, 3]``, all pictures of the first prompt first.

    Raises:
        ConfigError: no prompts, or less than one picture per prompt.
    """
    from mmalign import rng

    if not prompts or images_per_prompt < 1:
        raise ConfigError(f"evaluate: nothing to sample ({len(prompts)} prompts, {images_per_prompt} pictures of each)")
    rows, indices = spread(prompts, images_per_prompt)
    keys = [f"{prompt}\x1f{index}" for prompt, index in zip(rows, indices, strict=True)]
    noise = rng.normal(keys, family.latent_shape, seed=seed, purpose="evaluation")
    pictures = {}
    columns = (TextColumn("sampling {task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), transient=True) as bar:
        for model, network in networks.items():
            task = bar.add_task(model, total=len(rows), rate="")

            def advance(done: int, task: Any = task) -> None:
                bar.advance(task, done)
                speed = bar.tasks[bar.task_ids.index(task)].speed
                bar.update(task, rate=f"{speed:.1f} pictures/s" if speed else "")

            pictures[model] = family.sample(
                network, rows, noise, steps=steps, guidance=guidance, batch_size=batch_size, progress=advance,
                during=None if during is None else during(network, len(rows)),
            )  # fmt: skip
    return pictures


def compare_models(
    *,
    prompts: Sequence[str],
    groups: Sequence[str],
    images: Mapping[str, np.ndarray],
    rewards: Sequence[RewardSpec],
    seed: int,
    guidance: float | None = None,
    sampling_steps: int | None = None,
    headline: str | None = None,
) -> EvaluationResult:
    """Score every model's pictures and compare with the base (and the control), picture by picture.

    Args:
        prompts: P prompts; one that is listed twice counts as one case with more pictures.
        groups: the group of each prompt.
        images: model -> uint8 ``[P * S, H, W, 3]`` in the order of `sample_models`; must hold ``base``.
        rewards: at least one, names unique.
        seed: of the bootstrap.
        guidance, sampling_steps: how the pictures were made, to be told with the figures.
        headline: the reward the claim rests on; default: a hold-out judge before the oracle before the training reward.

    Raises:
        DataError: no base, or counts that do not fit.
        RewardError: no rewards, a name twice, an unknown role or headline, or not one score per picture.
    """
    if headline is not None and headline not in [reward.name for reward in rewards]:
        hint = did_you_mean(headline, [reward.name for reward in rewards])
        raise RewardError(f"the headline '{headline}' is not among the rewards{hint}")
    per_prompt = _check(prompts, groups, images, rewards)
    rows, indices = spread(prompts, per_prompt)
    row_groups = [group for group in groups for _ in range(per_prompt)]
    scores = {
        reward.name: {model: _score(reward, model, pictures, rows) for model, pictures in images.items()}
        for reward in rewards
    }

    def figures(chosen: np.ndarray) -> tuple[RewardFigures, ...]:
        owners = [rows[row] for row in chosen]
        return tuple(
            reward_figures(
                reward.name, reward.role, {model: found[chosen] for model, found in scores[reward.name].items()}, owners, seed
            )
            for reward in rewards
        )

    names = np.array(row_groups, dtype=object)
    by_group = {}
    for group in dict.fromkeys(groups):
        chosen = np.flatnonzero(names == group)
        by_group[group] = GroupFigures(prompts=len({rows[row] for row in chosen}), rewards=figures(chosen))
    return EvaluationResult(
        figures=EvaluationFigures(
            prompts=len(set(prompts)),
            images_per_prompt=per_prompt,
            guidance=guidance,
            sampling_steps=sampling_steps,
            headline_reward=headline,
            models=tuple(images),
            rewards=figures(np.arange(len(rows))),
            groups=by_group,
        ),
        prompts=tuple(rows),
        groups=tuple(row_groups),
        indices=tuple(indices),
        scores=scores,
    )


def _check(
    prompts: Sequence[str], groups: Sequence[str], images: Mapping[str, np.ndarray], rewards: Sequence[RewardSpec]
) -> int:
    """Pictures per prompt, after everything fits."""
    if not prompts or len(groups) != len(prompts):
        raise DataError(f"{len(prompts)} evaluation prompts with {len(groups)} groups; each prompt needs one group")
    if BASE not in images:
        raise DataError(f"nothing to compare with: pictures of '{BASE}' are missing (there are: {', '.join(images)})")
    for model, pictures in images.items():
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise DataError(f"pictures of '{model}' must be uint8 [N, H, W, 3], got {pictures.dtype} {pictures.shape}")
        if len(pictures) != len(images[BASE]) or not len(pictures) or len(pictures) % len(prompts):
            raise DataError(f"{len(pictures)} pictures of '{model}' do not fit {len(prompts)} prompts and the base")
    names = [reward.name for reward in rewards]
    if not names or len(set(names)) != len(names):
        raise RewardError(f"evaluation needs rewards with names of their own, got {names}; set evaluate.rewards")
    for reward in rewards:
        if reward.role not in ROLES:
            raise RewardError(f"reward '{reward.name}': the role '{reward.role}' is not one of {', '.join(ROLES)}")
    return len(images[BASE]) // len(prompts)


def _score(reward: RewardSpec, model: str, pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    scores = np.asarray(reward.score(pictures, prompts), dtype=np.float64)
    if scores.shape != (len(pictures),):
        raise RewardError(
            f"reward '{reward.name}' gave scores of the shape {scores.shape} for {len(pictures)} pictures of '{model}'"
        )
    return scores


def reward_figures(
    name: str, role: str, scores: Mapping[str, np.ndarray], owners: Sequence[str], seed: int
) -> RewardFigures:
    """One reward's means, differences and win rates.

    Args:
        scores: model -> ``[N]``, NaN where there is none; must hold ``base``.
        owners: the prompt of every row; rows of a prompt are one case.
        seed: of the bootstrap.
    """

    def against(other: str) -> dict[str, Comparison]:
        return {
            model: Comparison(
                difference=paired_difference(found, scores[other], owners, seed=seed),
                win_rate=win_rate(found, scores[other], owners, seed=seed),
            )
            for model, found in scores.items()
            if model not in (BASE, other)
        }

    return RewardFigures(
        name=name,
        role=role,
        means={model: mean_interval(found, owners, seed=seed, resamples=1).mean for model, found in scores.items()},
        against_base=against(BASE),
        against_control=against(CONTROL) if CONTROL in scores else {},
        excluded={model: int((~np.isfinite(found)).sum()) for model, found in scores.items()},
    )


def write_evaluation(run: Path, result: EvaluationResult, images: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Write the picture sheets, ``evaluation.jsonl`` and ``summary.json`` (evaluation, win rate, warnings).

    Other keys of an existing ``summary.json`` stay as they are. It is written last, so that figures never precede
    their files, and returned.

    Raises:
        DataError: the folder cannot be written, or an existing ``summary.json`` cannot be read.
    """
    samples.write(run, images, prompts=result.prompts, groups=result.groups, indices=result.indices)
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in result.rows())
    files.write_text(run / "evaluation.jsonl", "".join(f"{line}\n" for line in lines))
    path = run / "summary.json"
    summary = files.read_json(path) if path.exists() else {}
    findings = collect(read_lines(run / "metrics.jsonl", []) or (), summary, result.figures)
    return files.merge_json(
        path,
        {
            "evaluation": result.as_dict(),
            "win_rate": result.headline(),
            "warnings": [finding.text for finding in findings],
        },
    )


def evaluate_run(run: OpenRun) -> EvaluationResult:
    """Sample, score and compare the networks of an open run, and write what it leaves in the run folder."""
    from mmalign.experiment.user_sampling import in_turn

    settings = run.config.evaluate
    listed = run.prompts()
    prompts, seed = [prompt for prompt, _ in listed], run.config.run.seed
    rewards = run.scorers()
    images = sample_models(
        run.family,
        run.networks(),
        prompts,
        images_per_prompt=settings.images_per_prompt,
        seed=seed,
        steps=settings.steps,
        guidance=settings.guidance,
        batch_size=settings.batch_size,
        during=lambda network, count: in_turn(run.folder, network, count),
    )
    result = compare_models(
        prompts=prompts,
        groups=[group for _, group in listed],
        images=images,
        rewards=rewards,
        seed=seed,
        guidance=settings.guidance,
        sampling_steps=settings.steps,
        headline=settings.rewards[0] if settings.rewards else None,
    )
    write_evaluation(run.folder, result, images)
    return result


def evaluate(run_or_config: str | Path, overrides: Sequence[str] = ()) -> str:
    """Evaluate a run folder, or what an experiment file starts from; returns the table to print.

    An experiment file is run with ``optim.steps=0``: everything is built, nothing is trained, one evaluation is made.

    Raises:
        MmalignError: whatever stands in the way, with its remedy.
    """
    from mmalign import experiment

    path = Path(run_or_config)
    if not path.is_file():
        run = experiment.open_run(path, overrides)
        run.evaluate()
        summary = files.read_json(run.folder / "summary.json")
        build_report(run.folder)
        return _told(summary)
    done = experiment.run(path, [*overrides, "optim.steps=0"])
    if "evaluation" not in done.summary:
        raise ConfigError("evaluate.prompts, evaluate.rewards: both are needed for an evaluation", str(path))
    return _told(done.summary)


def _told(summary: Mapping[str, Any]) -> str:
    """What the command prints: rewards, then reports, tasks and a notice where there are any."""
    return "\n".join(filter(None, (table(EvaluationFigures.from_dict(summary["evaluation"])), reports_text(summary))))
