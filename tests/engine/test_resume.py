"""Stopping and going on is the same as never having stopped, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from mmalign.engine.checkpoint import find_checkpoints, read_checkpoint
from mmalign.errors import ModelError
from tests import forks
from tests.engine.test_plain import same
from tests.engine.toy import Session, Toy, ToyStream, session

SETTINGS = {"steps": 11, "ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 3}
RUN = {"log_every": 3, "save_every": 4, "keep_checkpoints": 0}


def start(folder: Path, **optim: object) -> Session:
    return session(folder, toy=Toy(dropout=0.3), stream=ToyStream(), run=RUN, **{**SETTINGS, **optim})


def go_on(folder: Path) -> Session:
    again = start(folder)
    again.loop.restore(find_checkpoints(folder / "checkpoints")[-1])
    return again


def state(run: Session) -> dict[str, object]:
    assert run.loop.average is not None
    return {
        "weights": run.weights(), "average": dict(run.loop.average.shadow), "updates": run.loop.average.updates,
        "optimizer": run.loop.optimizers["main"].state_dict()["state"], "lines": run.lines(), "step": run.loop.step,
        "own": run.toy.counter.seen,  # type: ignore[attr-defined]
    }  # fmt: skip


@pytest.fixture
def straight(tmp_path: Path) -> dict[str, object]:
    run = start(tmp_path / "straight")
    run.fit()
    assert [line["step"] for line in run.lines()] == [1, 3, 6, 9, 11]
    return state(run)


@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_asked_to_stop_and_resumed(tmp_path: Path, straight: dict[str, object], stop_after: int) -> None:
    folder = tmp_path / "stopped"
    run = start(folder)
    before = signal.getsignal(signal.SIGTERM)

    def ask(step: int, values: object) -> None:
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    result = run.fit(progress=ask)
    # The signal arrived after `stop_after` steps; the step boundary after the next one ends the run.
    assert result.interrupted and result.step == stop_after + 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert run.checkpoints()[-1] == f"step-{stop_after + 1:08d}"
    again = go_on(folder)
    assert again.loop.step == stop_after + 1
    assert not again.fit().interrupted
    assert same(straight, state(again))


def test_killed_without_warning_and_resumed(tmp_path: Path, straight: dict[str, object]) -> None:
    """The newest checkpoint is behind the metrics file; the lines after it are written again and not twice."""
    folder = tmp_path / "killed"
    run = start(folder)

    def die(step: int, values: object) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.fit(progress=die)
    assert [line["step"] for line in run.lines()] == [1, 3, 6] and run.checkpoints() == ["step-00000004"]
    again = go_on(folder)
    assert [line["step"] for line in again.lines()] == [1, 3]
    again.fit()
    assert same(straight, state(again))


def test_stopped_twice(tmp_path: Path, straight: dict[str, object]) -> None:
    folder = tmp_path / "twice"
    for last in (2, 7):
        run = start(folder)
        if find_checkpoints(folder / "checkpoints"):
            run.loop.restore(find_checkpoints(folder / "checkpoints")[-1])
        run.fit(progress=lambda step, values, last=last: os.kill(os.getpid(), signal.SIGTERM) if step == last else None)
    again = go_on(folder)
    again.fit()
    assert same(straight, state(again))


def test_the_clock_goes_on(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.fit(progress=lambda step, values: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    spent = run.loop.seconds
    again = go_on(tmp_path)
    assert spent > 0 and again.loop.seconds == spent
    assert again.fit().seconds > spent


def test_a_finished_run_resumed_does_nothing_more(tmp_path: Path, straight: dict[str, object]) -> None:
    folder = tmp_path / "straight"
    again = go_on(folder)
    assert again.fit().step == 11
    assert same(straight, state(again))


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    settings = {"schedule": "constant"}
    whole = start(tmp_path / "whole", **settings)
    whole.fit()
    short = start(tmp_path / "parts", **settings, steps=6)
    short.fit()
    rest = start(tmp_path / "parts", **settings)
    rest.loop.restore(find_checkpoints(tmp_path / "parts" / "checkpoints")[-1])
    rest.fit()
    assert same(whole.weights(), rest.weights())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "first", steps=1).fit()
    toy = Toy()
    toy.policy = torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Linear(5, 1))
    other = session(tmp_path / "second", toy=toy, **SETTINGS)
    with pytest.raises(ModelError, match="does not fit what is trained now"):
        other.loop.restore(find_checkpoints(tmp_path / "first" / "checkpoints")[-1])


def test_a_checkpoint_without_the_average_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    start(tmp_path, steps=1, ema_decay=0.0).fit()
    with pytest.raises(ModelError, match="step-00000001/average cannot be read"):
        go_on(tmp_path)


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    start(tmp_path, steps=1).fit()
    (path,) = find_checkpoints(tmp_path / "checkpoints")
    parts = {file.stem for file in path.iterdir()}
    assert parts == {"policy", "optimizer", "loop", "extra", "experiment", "average", "state"}
    assert read_checkpoint(path, "state") == {"format": 1, "step": 1}
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def job(folder: str) -> None:
    """Slow steps; what they came to is told in a file."""
    result = start(Path(folder)).fit(progress=lambda step, values: time.sleep(0.2))
    Path(folder, "told").write_text(f"interrupted {result.interrupted} after {result.step}")


def test_a_terminated_process_leaves_a_checkpoint_that_goes_on(tmp_path: Path, straight: dict[str, object]) -> None:
    """A real process that gets a real SIGTERM in the middle of its steps, as a scheduler ends a job."""
    folder = tmp_path / "job"
    folder.mkdir()
    process = forks.start(job, str(folder))
    try:
        deadline = time.monotonic() + 60
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline and process.exitcode is None:
            time.sleep(0.02)
        process.terminate()
        process.join(timeout=30)
    finally:
        process.kill()
    out = (folder / "told").read_text()
    assert process.exitcode == 0 and out.startswith("interrupted True after "), out
    (newest,) = find_checkpoints(folder / "checkpoints")
    assert newest.name == f"step-{int(out.split()[-1]):08d}" and int(out.split()[-1]) < 11
    again = go_on(folder)
    again.fit()
    assert same(straight, state(again))
