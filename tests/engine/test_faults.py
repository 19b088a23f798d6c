"""What goes wrong in a run: nothing is lost, nothing moves that should not, and the message says what to do."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.engine import checkpoint
from mmalign.engine.checkpoint import find_checkpoints, read_checkpoint
from mmalign.engine.stopping import StopRequest
from mmalign.errors import TrainingError
from tests.engine.toy import Toy, ToyStream, session


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move(tmp_path: Path, value: float) -> None:
    good = session(tmp_path / "good", steps=3)
    good.fit()
    run = session(tmp_path / "bad", stream=ToyStream(spoil={3: value}), ema_decay=0.9)
    with pytest.raises(TrainingError) as raised:
        run.fit()
    message = str(raised.value)
    assert "step 4: the loss is not finite" in message and "the optimiser has not moved" in message
    assert "step-00000003" in message and "optim.lr" in message and "mmalign data check" in message
    assert run.loop.step == 3
    for name, expected in good.weights().items():
        assert torch.equal(run.weights()[name], expected)
    saved = read_checkpoint(find_checkpoints(tmp_path / "bad" / "checkpoints")[-1], "policy")
    assert all(torch.equal(saved[name], value) for name, value in good.weights().items())
    assert [line["step"] for line in run.lines()] == [1, 2, 3]


def test_after_the_data_is_mended_the_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = session(tmp_path / "whole")
    whole.fit()
    run = session(tmp_path / "run", stream=ToyStream(spoil={3: float("nan")}))
    with pytest.raises(TrainingError):
        run.fit()
    again = session(tmp_path / "run")
    again.loop.restore(find_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    again.fit()
    assert all(torch.equal(again.weights()[name], value) for name, value in whole.weights().items())
    assert again.lines() == whole.lines()


def test_only_one_micro_batch_of_a_step_is_bad(tmp_path: Path) -> None:
    class Second(ToyStream):
        def rows(self, step: int) -> Any:
            found = super().rows(step)
            if step == 1:
                found.y[-1] = float("nan")
            return found

    run = session(tmp_path, stream=Second(batch_size=2, accumulate=3))
    with pytest.raises(TrainingError, match="step 2: the loss is not finite"):
        run.fit()


def test_a_gradient_that_is_not_finite_is_named_as_such(tmp_path: Path) -> None:
    """sqrt at zero: the loss is 0 and its slope infinite."""
    toy = Toy(root=True)

    class Exact(ToyStream):
        def rows(self, step: int) -> Any:
            found = super().rows(step)
            with torch.no_grad():
                found.y[:] = toy.policy(found.x).squeeze(1)
            return found

    run = session(tmp_path, toy=toy, stream=Exact())
    before = run.weights()
    with pytest.raises(
        TrainingError, match="step 1: the gradient is not finite.*No step had been made, so nothing was saved"
    ):
        run.fit()
    assert all(torch.equal(before[name], value) for name, value in run.weights().items())
    assert not (tmp_path / "checkpoints").exists()


def test_a_step_whose_rows_all_weigh_nothing_is_an_error(tmp_path: Path) -> None:
    run = session(tmp_path, stream=ToyStream(weights=lambda step, row: float(step != 2)))
    with pytest.raises(TrainingError, match="step 3: every row of the batch has weight 0.*column 'weight'"):
        run.fit()
    assert run.loop.step == 2


def test_a_step_of_which_no_row_could_be_read_moves_nothing(tmp_path: Path) -> None:
    """Steps 1 and 2 and then 4 to 6: momentum, decay, average and rate are those of steps that have rows."""
    told: list[int] = []
    stream = ToyStream(weights=lambda step, row: float(step != 2))
    run = session(tmp_path / "run", stream=stream, ema_decay=0.9, weight_decay=0.1)
    before: dict[str, Any] = {}

    def look(step: int, metrics: Any) -> None:
        if step == 2:
            before.update(run.weights())
        if step == 3:
            assert all(torch.equal(before[name], value) for name, value in run.weights().items())
            assert run.loop.average is not None and run.loop.average.updates == 2

    run.fit(masked=lambda step: 4 * (step == 2), some_masked=told.append, progress=look)
    assert told == [3] and run.loop.step == 6 and before
    assert ["loss" in line for line in run.lines()] == [True, True, False, True, True, True]
    assert any(not torch.equal(before[name], value) for name, value in run.weights().items())


def test_a_stream_that_lost_its_place_is_noticed(tmp_path: Path) -> None:
    class Lost(ToyStream):
        def micro_batches(self, start_step: int) -> Any:
            for step, micro, batch in super().micro_batches(start_step):
                yield step + (step >= 2), micro, batch

    run = session(tmp_path, stream=Lost())
    with pytest.raises(TrainingError, match=r"the loader gave step 3.0 where step 2.0 was due"):
        run.fit()


def test_a_disk_that_fills_up_during_a_run_costs_the_newest_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = session(tmp_path / "whole", run={"save_every": 2})
    whole.fit()
    run = session(tmp_path / "run", run={"save_every": 2})
    real = checkpoint.save_state

    def full(path: Path, state: Any) -> None:
        if run.loop.step == 4 and path.name == "optimizer":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, state)

    monkeypatch.setattr(checkpoint, "save_state", full)
    with pytest.raises(TrainingError, match="cannot write .*step-00000004.*No space left on device"):
        run.fit()
    assert run.checkpoints() == ["step-00000002"]
    monkeypatch.setattr(checkpoint, "save_state", real)
    again = session(tmp_path / "run", run={"save_every": 2})
    again.loop.restore(find_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    again.fit()
    assert all(torch.equal(again.weights()[name], value) for name, value in whole.weights().items())
    assert again.lines() == whole.lines()


# Stop requests


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    stop = StopRequest()
    # A job in the background of a script starts with this signal ignored.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)


def test_handlers_are_put_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), StopRequest().listening():
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_in_another_thread_trains_without_signals(tmp_path: Path) -> None:
    """As in a notebook's worker, where handlers cannot be set."""
    run, results = session(tmp_path, steps=2), []
    thread = threading.Thread(target=lambda: results.append(run.fit()))
    thread.start()
    thread.join()
    assert results and results[0].step == 2
