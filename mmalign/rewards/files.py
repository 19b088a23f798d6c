"""Weights from disk: safetensors, or tensors-only torch files. Nothing here runs code that a file carries."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import ModelError


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of one weight file, on the CPU; ``{"state_dict": ...}`` and a ``module.`` prefix are unwrapped.

    Raises:
        ModelError: missing, damaged, or a pickle that holds anything but tensors and plain containers.
    """
    if not path.is_file():
        raise ModelError(f"no weight file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    return _plain_state(_read_torch(path), path)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors, so it is not loaded: unpickling could run its code. "
            "'mmalign rewards convert FILE OUT' extracts its tensors safely"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{path} is not a readable torch file: {error}") from error


def _plain_state(loaded: Any, path: Path) -> dict[str, Tensor]:
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} does not hold a table of tensors")
    return strip_prefix(dict(state), "module.")


def strip_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Drop `prefix` if every name has it."""
    if state and all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def read_folder_state(folder: Path, names: Iterable[str]) -> tuple[dict[str, Tensor], Path]:
    """The tensors of the first of `names` that exists in a folder; sharded safetensors are joined.

    Raises:
        ModelError: none of them exists.
    """
    names = list(names)
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read_state(folder / name), folder / name
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            state: dict[str, Tensor] = {}
            for shard in shards:
                state.update(read_state(folder / Path(shard).name))
            return state, index
    raise ModelError(f"{folder} holds none of: {', '.join(names)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: missing, damaged or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def load_strictly(
    module: torch.nn.Module, state: Mapping[str, Tensor], source: Path | str, *, assign: bool = False
) -> None:
    """Fill a module; every name and shape must fit. `assign` takes the tensors themselves, for a module without memory.

    Raises:
        ModelError: missing or unexpected names, or shapes that differ, all listed.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    problems = [f"missing: {_some(missing)}"] if missing else []
    problems += [f"unexpected: {_some(unexpected)}"] if unexpected else []
    problems += [f"shapes: {_some(shapes)}"] if shapes else []
    if problems:
        raise ModelError(f"{source} does not fit the network; " + "; ".join(problems))
    module.load_state_dict(dict(state), assign=assign)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of names, types and values: equal weights, equal fingerprint."""
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
