"""The only training loop. A step is one move of the optimiser; step N means the same thing after a resume.

It knows no method, model, reward or sampler: a trainer gives losses, a stream gives batches, callbacks do the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmalign import rng
from mmalign.engine.checkpoint import load_trainable, read_checkpoint, save_checkpoint, step_of, trainable_state
from mmalign.engine.ema import WeightAverage
from mmalign.engine.metrics import MetricsFile, Tracker, WindowMeans
from mmalign.engine.optim import build_optimizer, rate_factor
from mmalign.engine.settings import OptimConfig, RunConfig
from mmalign.engine.stopping import StopRequest
from mmalign.errors import TrainingError
from mmalign.trainers.base import Trainer
from mmalign.types import StepContext


class Batches(Protocol):
    """A stream of micro-batches that can start at any step."""

    def micro_batches(self, start_step: int) -> Iterator[tuple[int, int, Any]]:
        """(step, micro index, batch) from `start_step` on, without end."""

    def epoch(self, step: int) -> float:
        """How often the rows have been seen before `step`."""


@dataclass(kw_only=True)
class Callbacks:
    """What the experiment wants done along the way; steps are counted from 1 here, as people count."""

    samples: Callable[[int], None] | None = None
    """Called on the main process with the number of finished steps, with averaged weights in place if there are any."""
    samples_every: int = 0
    epoch_done: Callable[[int], None] | None = None
    """Called on every process when the rows were seen once more, with how often that is."""
    masked: Callable[[int], int] | None = None
    """How many rows of a step, counted from 0, this process could not read and gave weight 0; asked in every step."""
    some_masked: Callable[[int], None] | None = None
    """Called on every process after a step in which any process masked rows, with the number of finished steps."""
    progress: Callable[[int, Mapping[str, float]], None] | None = None
    """Called on the main process after every step with the newest logged metrics."""
    trackers: Sequence[Tracker] = ()


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a run ended."""

    step: int
    interrupted: bool
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last logged line."""


class Loop:
    """Training of one run.

    Args:
        trainer: the method; its policy is replaced by the prepared one.
        accelerator: an ``accelerate.Accelerator``.
        folder: the run folder.
        plain: written beside the weights in every checkpoint (the resolved experiment, say).
        rows: asked at every checkpoint, on every process, with the number of steps: what is kept of the rows of the run.
    """

    def __init__(
        self, trainer: Trainer, accelerator: Any, *, optim: OptimConfig, run: RunConfig, folder: Path,
        plain: Mapping[str, Any] | None = None, rows: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.trainer, self.accelerator, self.optim, self.run, self.folder = trainer, accelerator, optim, run, folder
        self.plain, self.rows = dict(plain or {}), rows
        self.module = trainer.policy  # unwrapped
        self.average = WeightAverage(self.module, optim.ema_decay) if optim.ema_decay else None
        self.groups = {name: list(tensors) for name, tensors in trainer.parameter_groups().items()}
        self.optimizers = dict(trainer.build_optimizers(lambda tensors: build_optimizer(tensors, optim)))
        prepared = accelerator.prepare(self.module, *self.optimizers.values())
        trainer.policy = prepared[0]
        self.prepared = dict(zip(self.optimizers, prepared[1:], strict=True))
        self.window = WindowMeans()
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.step = 0
        self.seconds = 0.0

    # Checkpoints

    def save(self) -> Path | None:
        """A checkpoint of the state after `self.step` steps; all processes wait for it."""
        self.accelerator.wait_for_everyone()
        # The window is summed over processes when it is written, so every process must add its part.
        window = [self.window.state_dict()]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            window = gather_object(window)
        path, rows = None, None if self.rows is None else self.rows(self.step)
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {
                "policy": trainable_state(self.module),
                "optimizer": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "loop": {"windows": window, "seconds": self.seconds, "processes": self.accelerator.num_processes},
                "extra": {name: value.state_dict() for name, value in self.trainer.extra_state().items()},
                "experiment": self.plain,
            }
            if rows is not None:
                state["rows"] = rows
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            if self.average is not None:
                state["average"] = {"shadow": self.average.shadow, "updates": self.average.updates}
            path = save_checkpoint(self.folder / "checkpoints", self.step, state, keep=self.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        return path

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint: weights, optimisers, averages, and the metrics file cut to its step."""
        device = self.accelerator.device
        load_trainable(self.module, read_checkpoint(checkpoint, "policy"), str(checkpoint))
        for name, value in read_checkpoint(checkpoint, "optimizer").items():
            self.optimizers[name].load_state_dict(value)
        if self.average is not None:
            self.average.load(**read_checkpoint(checkpoint, "average"))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(read_checkpoint(checkpoint, "scaler"))
        for name, value in self.trainer.extra_state().items():
            value.load_state_dict(read_checkpoint(checkpoint, "extra")[name])
        loop = read_checkpoint(checkpoint, "loop")
        self.seconds = loop["seconds"]
        if self.accelerator.process_index < len(loop["windows"]):
            self.window.load_state_dict(loop["windows"][self.accelerator.process_index], device)
        self.step = step_of(checkpoint)
        if self.accelerator.is_main_process:
            self.metrics.cut_after(self.step)

    # Training

    def fit(self, batches: Batches, callbacks: Callbacks) -> FitResult:
        """Train to the last step, or to the step boundary after a stop was asked for.

        Raises:
            TrainingError: a loss or gradient is not finite. The optimiser has not moved; a checkpoint of the state before
                the bad step is saved.
        """
        start, before = time.monotonic(), self.seconds
        first, logged, last_log = self.step, {}, (self.step, start)
        waited = 0.0
        stop = StopRequest()
        self._training_mode()
        stream = batches.micro_batches(self.step)
        with stop.listening():
            while self.step < self.optim.steps:
                waited += self._one_step(stream, stop, callbacks.masked)
                self.seconds = before + time.monotonic() - start
                if self._masked and callbacks.some_masked is not None:
                    callbacks.some_masked(self.step)
                interrupted = self._stop_agreed
                if self.step % self.run.log_every == 0 or self.step == self.optim.steps or self.step == first + 1 == 1:
                    now = time.monotonic()
                    steps, seconds = self.step - last_log[0], max(now - last_log[1], 1e-9)
                    logged = self._log(steps, seconds, waited, batches.epoch(self.step), callbacks)
                    last_log, waited = (self.step, now), 0.0
                if callbacks.progress is not None and self.accelerator.is_main_process:
                    callbacks.progress(self.step, logged)
                due = callbacks.samples_every and self.step % callbacks.samples_every == 0
                if due and not interrupted and self.step < self.optim.steps:
                    self._samples(callbacks)
                if callbacks.epoch_done is not None:
                    before_it, now_it = (int(batches.epoch(step) + 1e-9) for step in (self.step - 1, self.step))
                    if now_it > before_it:
                        callbacks.epoch_done(now_it)
                if interrupted or self.step % self.run.save_every == 0 or self.step == self.optim.steps:
                    self.save()
                if interrupted:
                    return FitResult(step=self.step, interrupted=True, seconds=self.seconds, metrics=logged)
        return FitResult(step=self.step, interrupted=False, seconds=self.seconds, metrics=logged)

    def _one_step(
        self, stream: Iterator[tuple[int, int, Any]], stop: StopRequest, masked: Callable[[int], int] | None
    ) -> float:
        """One move of the optimiser; returns the seconds spent waiting for data."""
        accelerator, micros = self.accelerator, self.optim.accumulate
        ctx = StepContext(step=self.step, seed=self.run.seed, device=accelerator.device)
        # Dropout is the only user of the global generator; tie it to the step so that a resume repeats it.
        torch.manual_seed(rng.key(self.run.seed, "dropout", self.step, str(accelerator.process_index)))
        waited, used = 0.0, "main"
        totals = torch.zeros(2, device=accelerator.device)  # weight, rows
        finite = torch.ones((), device=accelerator.device)
        for micro in range(micros):
            begin = time.monotonic()
            step, index, batch = next(stream)
            waited += time.monotonic() - begin
            if (step, index) != (self.step, micro):
                raise TrainingError(f"the loader gave step {step}.{index} where step {self.step}.{micro} was due")
            with nullcontext() if micro == micros - 1 else accelerator.no_sync(self.trainer.policy):
                out = self.trainer.training_step(batch, ctx)
                accelerator.backward(out.loss / micros)
            used = out.optimizer
            weight = out.metrics["weight"]
            self.window.add({name: value for name, value in out.metrics.items() if name != "weight"}, weight)
            totals = totals + torch.stack([weight, torch.full_like(weight, float(len(batch)))])
            finite = finite * torch.isfinite(out.loss.detach()).float()
        lost = 0 if masked is None else masked(self.step)
        self._move(used, totals, finite, torch.tensor([float(stop.asked), float(lost)], device=accelerator.device))
        self.trainer.after_step(ctx)
        return waited

    def _move(self, used: str, totals: Tensor, finite: Tensor, told: Tensor) -> None:
        """Check every process, then scale, clip and step. The only place that waits for the device in a step.

        Args:
            totals: weight and number of this process's rows. ``[2]``
            finite: 1 where all losses were. Scalar.
            told: whether a stop was asked for, and how many rows were masked. ``[2]``
        """
        accelerator, optimizer, tensors = self.accelerator, self.prepared[used], self.groups[used]
        if accelerator.scaler is not None:
            accelerator.unscale_gradients(optimizer)
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # With fp16 the scaler skips steps whose gradients overflow; only a loss that is not finite is then an error.
        sound = finite if accelerator.scaler is not None else finite * torch.isfinite(norm).float()
        packed = torch.cat([(1 - sound).reshape(1), totals, told])
        bad, weight, rows, asked_by, self._masked = accelerator.reduce(packed, "sum").tolist()
        if bad:
            self._refuse(finite)
        self._stop_agreed = asked_by > 0
        if weight <= 0:
            self._pass_over()
            return
        # The loss was divided by the number of rows; the mean is over rows that count.
        scale = rows / weight
        norm = norm * scale
        factor = torch.full_like(norm, scale)
        if self.optim.max_grad_norm:
            factor = factor * (self.optim.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        rate = self._rate()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        # All of them: one step's loss may leave gradients on what another optimiser trains.
        for each in self.optimizers.values():
            each.zero_grad()
        if self.average is not None:
            self.average.update()
        self.window.add({"grad_norm": norm, "lr": torch.full_like(norm, rate)}, torch.ones_like(norm))
        self.step += 1

    def _pass_over(self) -> None:
        """A step of which no row could be read moves nothing, on any process; the rows are listed like all that are masked.

        Raises:
            TrainingError: the rows could be read and count for nothing.
        """
        if not self._masked:
            raise TrainingError(
                f"step {self.step + 1}: every row of the batch has weight 0, so there is nothing to learn from; look at the "
                f"table's column 'weight'"
            )
        for each in self.optimizers.values():
            each.zero_grad()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it was told of these gradients, and would refuse the next ones
        self.step += 1

    def _rate(self) -> float:
        """The learning rate of the step under way; a method of several stages runs the schedule once in each."""
        optim, span = self.optim, self.trainer.rate_span(self.step)
        first, steps, peak, warmup = 0, optim.steps, optim.lr, optim.warmup_steps
        if span is not None:
            first, steps = span.first, span.steps
            peak = peak if span.lr is None else span.lr
            warmup = warmup if span.warmup_steps is None else span.warmup_steps
        return peak * rate_factor(self.step - first, schedule=optim.schedule, warmup_steps=warmup, steps=steps)

    def _refuse(self, finite: Tensor) -> None:
        """Save the state before the bad step and say what happened."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        what = "the gradient" if finite.item() else "the loss"
        self.window = WindowMeans()
        saved = self.save() if self.step else None
        kept = f"The state before it is saved in {saved}." if saved else "No step had been made, so nothing was saved."
        raise TrainingError(
            f"step {self.step + 1}: {what} is not finite on at least one process; the optimiser has not moved. {kept} "
            f"Lower optim.lr, use model.dtype=fp32 or bf16, or run 'mmalign data check' for values that are not finite."
        )

    def _training_mode(self) -> None:
        """Training mode only where dropout is active; elsewhere it changes nothing but the rounding of some kernels."""
        active = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in self.module.modules())
        self.module.train(active)

    def _log(
        self, steps: int, seconds: float, waited: float, epoch: float, callbacks: Callbacks
    ) -> dict[str, float]:
        rows = steps * self.optim.batch_size * self.optim.accumulate * self.accelerator.num_processes
        values = self.window.reduce(self.accelerator)
        line = {
            "step": self.step, "epoch": epoch, **values, "samples_per_second": rows / seconds,
            "data_wait_fraction": min(1.0, waited / seconds), "seconds": self.seconds,
        }  # fmt: skip
        if self.accelerator.is_main_process:
            self.metrics.append(line)
            for tracker in callbacks.trackers:
                tracker.log({name: value for name, value in line.items() if name != "step"}, self.step)
        return line

    def _samples(self, callbacks: Callbacks) -> None:
        if callbacks.samples is not None and self.accelerator.is_main_process:
            with self.average.applied() if self.average is not None else nullcontext():
                callbacks.samples(self.step)
            self._training_mode()
        self.accelerator.wait_for_everyone()

    _stop_agreed = False
    _masked = 0.0
    """Rows that all processes together masked in the step before."""
