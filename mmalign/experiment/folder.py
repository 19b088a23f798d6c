"""The run folder: created once, never mixed with another run, every file written whole."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mmalign.engine.checkpoint import find_checkpoints
from mmalign.errors import ConfigError, TrainingError

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "safetensors", "numpy")


def prepare_folder(folder: Path, *, resume: bool) -> Path | None:
    """Make the folder of a run. Returns the checkpoint to continue from, or None for a fresh start.

    Raises:
        ConfigError: the folder holds a run and `resume` was not asked for, or cannot be written.
    """
    found = find_checkpoints(folder / "checkpoints")
    begun = found or (folder / "metrics.jsonl").exists()
    if begun and not resume:
        raise ConfigError(
            f"run.out: {folder} already holds a run; continue it with --resume, or choose another run.name or run.out"
        )
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run.out: cannot write to {folder} ({error}); choose another place with run.out=...") from error
    return found[-1] if resume and found else None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        TrainingError: it cannot be written; names the file.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {path}: {error}; free space or choose another place with run.out=...") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def environment(device: str, processes: int) -> dict[str, Any]:
    """Versions, device, git state and command: what a reader needs to repeat a run."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, cwd=Path.cwd())
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    commit = git("rev-parse", "HEAD")
    start = "mmalign" if Path(sys.argv[0]).parent.name == "mmalign" else sys.argv[0]  # of `python -m mmalign` the file is told
    return {
        "command": shlex.join([start, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "device": device,
        "processes": processes,
        "cpu_count": os.cpu_count(),
        "git": {"commit": commit, "dirty": bool(git("status", "--porcelain"))} if commit else None,
    }
