"""Where weights come from: a local path, or a hub repository in its ordinary cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import ModelError, RewardError
from mmalign.rewards.table import LoadRequest

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


def local_weights(request: LoadRequest, *, more: tuple[str, ...] = ()) -> Path:
    """The folder or file with the weights, fetched if need be; `more` patterns of files of a folder besides the usual ones.

    Raises:
        RewardError: the path does not exist, or the hub could not be reached; with what to do.
    """
    if request.path is not None:
        if not request.path.exists():
            raise RewardError(f"reward '{request.name}': there is nothing at {request.path}")
        return request.path
    card = request.card
    if not card.weights:
        raise RewardError(f"reward '{request.name}' has no weights to fetch: give path=")
    from huggingface_hub import hf_hub_download, snapshot_download

    offline = request.local_files_only or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    revision = request.revision or card.revision or None
    try:
        if card.weights_file:
            return Path(hf_hub_download(card.weights, card.weights_file, revision=revision, local_files_only=offline))
        patterns = ["*.json", "*.safetensors", "*.txt", *more]
        return Path(
            snapshot_download(card.weights, revision=revision, local_files_only=offline, allow_patterns=patterns)
        )
    except Exception as error:  # the hub client raises many unrelated kinds; all mean "not here"
        raise RewardError(
            f"reward '{request.name}': cannot get '{card.weights}' (about {card.bytes() / 1e9:.1f} GB) from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
            "With a local copy: load(name, path='/folder')"
        ) from error


def pick_device(device: str | None) -> torch.device:
    """The asked device, else CUDA where there is one.

    Raises:
        RewardError: there is no such device.
    """
    if not device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise RewardError(f"'{device}' is no device; write cpu, cuda or cuda:1") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise RewardError(f"there is no device '{device}': this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def pick_dtype(dtype: str | None, device: str | None) -> torch.dtype:
    """Precision of the encoders: float32 on a CPU, bfloat16 on an accelerator, unless told. Heads are float32 always.

    Raises:
        RewardError: an unknown name.
    """
    if dtype is None:
        return torch.float32 if pick_device(device).type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise RewardError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_speaker(
    what: str, source: str, reader: Any, model: Any, *, device: str | None, dtype: str | None, revision: str | None,
    local_files_only: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """A judge's processor or tokenizer and its model, ready to be asked; safetensors only.

    Args:
        what: the kind of model, for messages.
        source: local folder or hub id.
        reader, model: transformers' classes with `from_pretrained`.

    Raises:
        ModelError: either cannot be loaded.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only or Path(source).is_dir()}
    try:
        read = reader.from_pretrained(source, **options)
        made = model.from_pretrained(source, dtype=pick_dtype(dtype, device), use_safetensors=True, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"cannot load the {what} '{source}': {first}") from error
    return read, made.to(pick_device(device)).eval().requires_grad_(False)
