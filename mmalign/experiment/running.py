"""A run from file to report: check, build, cache, train, sample, evaluate, export, write the page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.config import dump_yaml
from mmalign.data.transfer import on_device
from mmalign.engine.loop import Callbacks, FitResult, Loop
from mmalign.errors import ConfigError, ModelError
from mmalign.experiment.absent import absent_model, absent_tables, unknown_rewards
from mmalign.experiment.assembly import Assembled, assemble
from mmalign.experiment.folder import environment, prepare_folder, write_json, write_text
from mmalign.experiment.freezing import verify_held, write_mask
from mmalign.experiment.inputs import Inputs, prepare_inputs
from mmalign.experiment.resuming import require_same_experiment
from mmalign.experiment.rowcounts import RowCounts
from mmalign.experiment.samples import samples_of
from mmalign.experiment.settings import Experiment, ExperimentConfig, load_experiment
from mmalign.experiment.trackers import AccelerateTracker, bar, note_of, require_trackers
from mmalign.experiment.users import write_store
from mmalign.trainers import METHODS

PRECISION = {"fp32": "no", "bf16": "no", "fp16": "fp16"}
"""Autocast is the family's; accelerate only has to scale the loss for fp16 on a GPU."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run left behind."""

    folder: Path
    metrics: dict[str, float]
    """The last logged line."""
    summary: dict[str, Any]
    """The content of summary.json."""
    interrupted: bool = False


def run(config: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None) -> RunResult:
    """Run an experiment file from Python.

    Args:
        config: the YAML file.
        overrides: ``key.sub=value`` texts.
        out: run folder; same as the override ``run.out``.

    Raises:
        MmalignError: anything the user can mend; see ``mmalign.errors``.
    """
    more = list(overrides) + ([f"run.out={out}"] if out is not None else [])
    return train(config, more)


def train(config: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> RunResult:
    """Run an experiment file; with `resume`, from the newest complete checkpoint of its run folder."""
    return train_experiment(load_experiment(config, overrides), resume=resume)


def train_experiment(
    experiment: Experiment, *, resume: bool = False, page: bool = True, evaluate: bool = True
) -> RunResult:
    """Run a decoded experiment; `page` and `evaluate` leave out the last two things a run does."""
    from accelerate.utils import set_seed

    config = experiment.config
    if absent := absent_tables(config) + absent_model(config.model.model_dump()["path"]) + unknown_rewards(config):
        raise ConfigError(absent, experiment.source)
    require_trackers(config)
    accelerator = _accelerator(config)
    main = accelerator.is_main_process
    begin = time.monotonic()
    checkpoint, notes = _on_main_first(accelerator, lambda: _opened(config, resume))
    for note in notes:
        accelerator.print(f"note: {note}")
    if main and checkpoint is None:
        _write_head(config, accelerator)
    set_seed(config.run.seed)
    parts = assemble(config, accelerator.device, accelerator.process_index)
    inputs = _inputs(config, parts, accelerator)
    counts = RowCounts(inputs, accelerator)
    loop = Loop(
        parts.trainer, accelerator, optim=config.optim, run=config.run, folder=config.folder, rows=counts.state,
        plain={"config": config.model_dump(mode="json"), "table": inputs.table_fingerprint},
    )  # fmt: skip
    if checkpoint is not None:
        _same_table(loop, checkpoint, inputs)
        loop.restore(checkpoint)
        counts.restore(checkpoint)
        verify_held(parts.policy, f"after loading {checkpoint}")
        if main:  # not before everything that can refuse the resume: the folder must not name settings it was not made with
            _write_head(config, accelerator)
        accelerator.print(f"continuing from {checkpoint} at step {loop.step}")
    elif resume and main:
        loop.metrics.cut_after(0)  # stopped before its first checkpoint: what it logged will be logged again
    accelerator.print(counts.news("data"))
    if main and inputs.people is not None:
        write_store(config, inputs.people, loop.module)  # the first samples are made for them
    result = _fit(config, accelerator, parts, inputs, loop, counts)
    inputs.masked = counts.gather(loop.step)
    summary: dict[str, Any] = {}
    if main:
        inputs.write_quarantine(config.folder / "quarantine.jsonl")
        summary = _summary(config, parts, result, inputs, time.monotonic() - begin)
        if inputs.people is not None:  # again: a table of users was learned
            with loop.average.applied() if loop.average is not None else nullcontext():
                write_store(config, inputs.people, loop.module)
        if not result.interrupted:
            _finish(config, parts, loop, summary, page=page, evaluate=evaluate)
    accelerator.wait_for_everyone()
    if config.run.trackers:
        accelerator.end_training()
    return RunResult(
        folder=config.folder, metrics=dict(result.metrics), summary=summary, interrupted=result.interrupted
    )


def _opened(config: ExperimentConfig, resume: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, if any, and what to tell about settings that changed since."""
    checkpoint = prepare_folder(config.folder, resume=resume)
    return checkpoint, [] if checkpoint is None else require_same_experiment(checkpoint, config)


def _write_head(config: ExperimentConfig, accelerator: Any) -> None:
    """What a run folder says of its own making."""
    write_text(config.folder / "config.yaml", dump_yaml(config))
    write_json(config.folder / "environment.json", environment(str(accelerator.device), accelerator.num_processes))


def _inputs(config: ExperimentConfig, parts: Assembled, accelerator: Any) -> Inputs:
    """The data of the run, caches filled; what the run needs no more is given back."""
    stored = f"{config.draws} stored draws a row" if config.draws else "stored log-probabilities"
    if config.on_answers:
        from mmalign.experiment.vlm_inputs import prepare_vlm

        inputs = prepare_vlm(config, parts, accelerator)
    else:
        inputs = prepare_inputs(config, parts.family, accelerator, parts.start)
        if config.data.cache != "off" and not config.evaluate.every:
            parts.family.release()
    inputs.loader = on_device(inputs.loader, accelerator.device)
    if accelerator.is_main_process and parts.start is not None:
        accelerator.print(f"reference: precomputed, {stored}; no reference pass in the run")
    return inputs


def _accelerator(config: ExperimentConfig) -> Any:
    import torch
    from accelerate import Accelerator

    wanted, precision = config.run.device, str(config.model.model_dump()["dtype"])
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device: 'cuda' was asked for, but torch sees no CUDA device; use auto or cpu")
    cpu = wanted == "cpu" or not torch.cuda.is_available()
    return Accelerator(
        cpu=cpu, mixed_precision="no" if cpu else PRECISION[precision], log_with=list(config.run.trackers) or None,
        project_dir=str(config.folder),
    )  # fmt: skip


def _on_main_first(accelerator: Any, function: Any) -> Any:
    """Run on the main process, then give every process its result or its error."""
    if accelerator.num_processes == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            box = [(True, function())]
        except ConfigError as error:
            box = [(False, error)]
    broadcast_object_list(box)
    good, value = box[0]
    if not good:
        raise value
    return value


def _same_table(loop: Loop, checkpoint: Path, inputs: Inputs) -> None:
    """A resume on other data would not be a resume. Settings were compared before; here it is the table or the rows of a step."""
    from mmalign.engine.checkpoint import read_checkpoint

    before = read_checkpoint(checkpoint, "experiment")
    old, new = before["config"]["optim"], loop.optim.model_dump(mode="json")
    per_step = [values["batch_size"] * values["accumulate"] for values in (old, new)]
    if per_step[0] != per_step[1] and loop.accelerator.num_processes == 1:
        raise ConfigError(
            f"optim.batch_size: a step had {per_step[0]} rows per process when {checkpoint} was saved and has {per_step[1]} "
            f"now; keep batch_size x accumulate x processes the same"
        )
    if before["table"] != inputs.table_fingerprint:
        raise ConfigError(
            f"data.manifest: the table, its usable rows or the rows of a step (batch_size x accumulate x processes) changed "
            f"since {checkpoint} was saved (fingerprint {before['table'][:12]} then, {inputs.table_fingerprint[:12]} now); "
            f"restore them, or start a new run with another run.name"
        )


def _fit(
    config: ExperimentConfig, accelerator: Any, parts: Assembled, inputs: Inputs, loop: Loop, counts: RowCounts
) -> FitResult:
    samples = samples_of(config, parts.family, loop.module)
    if accelerator.is_main_process and loop.step == 0:
        samples.write(0)
    trackers = [AccelerateTracker(accelerator, config)] if config.run.trackers else []
    title = f"{config.method_name} {config.run.name}"

    def epoch_done(number: int) -> None:
        counts.gather(loop.step)
        if (news := counts.news(f"epoch {number}")) is not None:
            accelerator.print(news)

    with bar(title, config.optim.steps, "steps", done=loop.step, show=accelerator.is_main_process) as shown:
        callbacks = Callbacks(
            samples=samples.write, samples_every=config.evaluate.every, trackers=trackers, epoch_done=epoch_done,
            masked=counts.masked, some_masked=counts.refuse_too_many,
            progress=lambda step, metrics: shown.advance(1, note_of(metrics)),
        )  # fmt: skip
        with _compiler_told(config):
            return loop.fit(inputs.loader, callbacks)


@contextmanager
def _compiler_told(config: ExperimentConfig) -> Iterator[None]:
    """A compiler that fails is the machine's matter, not a fault of ours: say so with the way round it."""
    if not config.model.model_dump().get("compile"):
        yield
        return
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (InductorError, TorchDynamoException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model.compile: torch cannot compile the network on this machine ({reason}); a working C++ compiler is needed "
            f"on a CPU. Use model.compile=false"
        ) from error


def _summary(
    config: ExperimentConfig, parts: Assembled, result: FitResult, inputs: Inputs, seconds: float
) -> dict[str, Any]:
    import json

    rows = config.optim.batch_size * config.optim.accumulate * inputs.processes
    path = config.folder / "summary.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    summary = {
        **before, "method": config.method_name, "name": config.run.name, "seed": config.run.seed, "steps": result.step,
        "interrupted": result.interrupted, "wall_seconds": round(seconds, 2), "train_seconds": round(result.seconds, 2),
        "samples_seen": result.step * rows, "samples_quarantined": inputs.quarantined, "samples_dropped": inputs.dropped,
        "final": dict(result.metrics),
    }  # fmt: skip
    if config.on_answers and (config.data.cache_frames or config.data.cache_vision):
        from mmalign.experiment.vlm_inputs import media_counts

        summary["media"] = media_counts(parts)
    notice = METHODS.get(config.method_name).notice
    if notice:
        summary["notice"] = notice
    write_json(path, summary)
    return summary


def _finish(
    config: ExperimentConfig, parts: Assembled, loop: Loop, summary: dict[str, Any], *, page: bool, evaluate: bool
) -> None:
    """Final samples, export, evaluation and the page, on the main process."""
    import json

    from mmalign.experiment.exporting import export_policy
    from mmalign.experiment.opening import OpenRun
    from mmalign.report import build_report

    if (made := parts.trainer.artefact()) is not None:
        write_mask(config, made, loop.step)
        if page:
            build_report(config.folder)
        return
    with loop.average.applied() if loop.average is not None else nullcontext():
        samples_of(config, parts.family, loop.module).write(loop.step)
        if loop.step:
            export_policy(config, parts.family, loop.module, config.folder / "export")
        if evaluate and config.evaluate.prompts is not None and (config.evaluate.rewards or config.evaluate.holdout):
            OpenRun(folder=config.folder, config=config, family=parts.family, aligned=loop.module).evaluate()
    if page:
        build_report(config.folder)
    summary.clear()
    summary.update(json.loads((config.folder / "summary.json").read_text()))
