"""Checkpoints: complete or absent. Written to a temporary folder beside the final one, synced, renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmalign.engine.plain import load_state, save_state
from mmalign.errors import ModelError, TrainingError

FORMAT = 1
_NAME = re.compile(r"^step-(\d{8})$")


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor that training changes: trainable parameters, and buffers when nothing is frozen."""
    named = dict(module.named_parameters())
    state = {name: value.detach() for name, value in named.items() if value.requires_grad}
    if len(state) == len(named):
        state |= {name: value for name, value in module.named_buffers() if name in module.state_dict()}
    return state


def load_trainable(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a saved state into a module, in place.

    Raises:
        ModelError: names or shapes differ from what is trained now.
    """
    own = trainable_state(module)
    wrong = sorted(set(own) ^ set(state)) or [
        name for name in own if own[name].shape != state[name].shape
    ]
    if wrong:
        raise ModelError(f"{source} does not fit what is trained now, e.g. '{wrong[0]}'; same model and tuning settings?")
    for name, value in own.items():
        value.copy_(state[name])


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name) and (path / "state.json").is_file())


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was taken after."""
    found = _NAME.match(checkpoint.name)
    if found is None:
        raise ModelError(f"{checkpoint} is not a checkpoint folder (step-00000000)")
    return int(found[1])


@contextmanager
def complete_or_absent(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` if the block succeeds and vanishes if not.

    Raises:
        TrainingError: the disk is full or the place cannot be written; names the place and the remedy.
    """
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(final, error) from error
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports what the system refused as an exception type of its own.
        if "os error" in str(error) or "No space left" in str(error):
            raise _cannot_write(final, error) from error
        raise


def _cannot_write(place: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"cannot write {place}: {error}. Nothing half-written was left; earlier checkpoints are intact. Free space or "
        f"choose another place with run.out=..., then continue with --resume"
    )


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write ``folder/step-<step>`` and remove the oldest beyond `keep` (0 keeps all), and what a killed run had begun."""
    final = folder / f"step-{step:08d}"
    for begun in folder.glob(".step-*.tmp-*"):  # a run folder has one writer, and that is here
        shutil.rmtree(begun, ignore_errors=True)
    with complete_or_absent(final) as temporary:
        for name, value in state.items():
            save_state(temporary / name, value)
        save_state(temporary / "state", {"format": FORMAT, "step": step})
    if keep:
        for old in find_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def read_checkpoint(checkpoint: Path, name: str) -> Any:
    """One part of a checkpoint as it was given to ``save_checkpoint``.

    Raises:
        ModelError: the part is missing or unreadable.
    """
    try:
        return load_state(checkpoint / name)
    except Exception as error:
        raise ModelError(f"{checkpoint}/{name} cannot be read: {error}") from error
