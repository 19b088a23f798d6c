"""`load`: from a name, several names or a weighted expression to something that scores."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from mmalign.errors import RewardError
from mmalign.media import PLAIN, Colours, Limits
from mmalign.registry import did_you_mean
from mmalign.rewards import catalogue as _catalogue  # noqa: F401  (registers the built-in rewards)
from mmalign.rewards.base import Backend, EncodingBackend
from mmalign.rewards.cards import Card
from mmalign.rewards.inputs import SCORED
from mmalign.rewards.scorer import Scorer, ScorerSet
from mmalign.rewards.table import CARDS, REWARDS, Factory, LoadRequest

if TYPE_CHECKING:
    from mmalign.rewards.together import Ensemble

DECODINGS = ("full", "draft2x")
Paths = str | Path | Mapping[str, str | Path] | None


@overload
def load(name: str, path: Paths = None, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
         *, workers: int | None = None, limits: Limits = SCORED, local_files_only: bool = False, compile: bool = False,
         colours: Colours = PLAIN, decode_workers: int = 0, decode: str = "full", fast_preprocess: bool = False,
         **options: Any) -> Scorer: ...  # fmt: skip
@overload
def load(name: Sequence[str], path: Paths = None, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, *, workers: int | None = None, limits: Limits = SCORED,
         local_files_only: bool = False, compile: bool = False, colours: Colours = PLAIN, decode_workers: int = 0,
         decode: str = "full", fast_preprocess: bool = False, **options: Any) -> ScorerSet: ...  # fmt: skip
def load(
    name: str | Sequence[str],
    path: Paths = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    workers: int | None = None,
    limits: Limits = SCORED,
    local_files_only: bool = False,
    compile: bool = False,
    colours: Colours = PLAIN,
    decode_workers: int = 0,
    decode: str = "full",
    fast_preprocess: bool = False,
    **options: Any,
) -> Scorer | ScorerSet | Ensemble:
    """Load one reward, or several that share decoding, preprocessing and equal encoders.

    Args:
        name: ``"pickscore"``, ``"pickscore@revision"``, ``"vqascore:<model>"``, ``"package.module:Name"``, a local CLIP
            folder, a list of names, or a weighted sum ``"0.5*pickscore + 20*hpsv2.1"`` of raw scores (an `Ensemble`).
        path: local weights; for a list, a mapping from name to path.
        device: torch device; CUDA where there is one by default.
        dtype: precision of the encoders (``fp32``, ``bf16``, ``fp16``); heads and scores are float32 always.
        workers: threads that read, decode and resize; one per core by default.
        compile: run image encoders through `torch.compile`: worth it for many pictures, and needs a compiler.
        colours: what becomes of transparency and rotation tags, such as ``Colours(alpha="drop", exif=False)``; ``clip=True`` cuts
            floats off at 0 and 1 instead of refusing them.
        decode_workers: decode in that many processes instead of on the threads; the scores are the same.
        decode: ``full``, or ``draft2x``: JPEGs are decoded at a half, a quarter or an eighth where at least twice the reward's
            size remains. Other pixels, so the preprocessing has another id.
        fast_preprocess: resize with torch's 8-bit kernel, as transformers' default processor does; another id too. Rules without
            such a form (letterboxes, ImageReward's) keep theirs.
        options: of the reward itself, such as ``scale="cosine"``; not with a list.

    Raises:
        RewardError: unknown or unavailable reward, weights that cannot be found or do not fit.
    """
    if isinstance(name, str) and name not in CARDS and ("*" in name or "+" in name):
        from mmalign.rewards.together import Ensemble, parse_expression

        weights = parse_expression(name)
        parts = load(
            list(weights), path, device, dtype, workers=workers, limits=limits, local_files_only=local_files_only,
            compile=compile, colours=colours, decode_workers=decode_workers, decode=decode, fast_preprocess=fast_preprocess,
        )  # fmt: skip
        return Ensemble(parts, weights, normalize="linear", **options)
    if isinstance(name, str):
        if isinstance(path, Mapping):
            _check_paths(path, [name])
            path = path.get(name)
        backend = load_backend(name, path, device, dtype, local_files_only=local_files_only, **options)
        prepare_as([backend], decode=decode, fast_preprocess=fast_preprocess)
        return Scorer(
            backend, workers=workers, limits=limits, compile=compile, colours=colours, decode_workers=decode_workers
        )
    if options:
        raise RewardError(f"options ({', '.join(options)}) belong to one reward: load it alone")
    names = list(name)
    if not names or len(set(names)) != len(names):
        raise RewardError(f"a list of rewards needs distinct names, got {names}")
    if path is not None and not isinstance(path, Mapping):
        raise RewardError("several rewards need a path each: path={'name': folder}")
    _check_paths(path or {}, names)
    shared: dict[str, Any] = {}
    backends = [
        load_backend(item, (path or {}).get(item), device, dtype, local_files_only=local_files_only, shared=shared)
        for item in names
    ]
    prepare_as(backends, decode=decode, fast_preprocess=fast_preprocess)
    return ScorerSet(
        backends, workers=workers, limits=limits, compile=compile, colours=colours, decode_workers=decode_workers
    )


def _check_paths(paths: Mapping[str, str | Path], names: Sequence[str]) -> None:
    """A mistyped name would leave its reward with other weights than its user has in mind."""
    for name in paths:
        if name not in names:
            raise RewardError(f"a path is given for '{name}', which is not among the rewards to load{did_you_mean(name, names)}")


def prepare_as(backends: Sequence[Backend], *, decode: str = "full", fast_preprocess: bool = False) -> None:
    """Change how loaded rewards prepare pictures, as `load` describes it; their cards and records follow.

    Raises:
        RewardError: `decode` is unknown.
    """
    if decode not in DECODINGS:
        raise RewardError(f"decode is one of {', '.join(DECODINGS)}; got {decode!r}")
    for backend in backends:
        if isinstance(backend, EncodingBackend) and (decode != "full" or fast_preprocess):
            backend.preprocess = replace(backend.preprocess, draft=decode == "draft2x", fast=fast_preprocess)
            backend.card = replace(backend.card, preprocess=backend.preprocess.key)


def load_backend(
    name: str,
    path: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    local_files_only: bool = False,
    shared: dict[str, Any] | None = None,
    **options: Any,
) -> Backend:
    """The backend behind one name; `load` wraps it."""
    base, _, revision = name.partition("@")
    if base not in CARDS and (Path(name) / "config.json").is_file():
        # A folder given as the name is a CLIP checkpoint scored as CLIPScore.
        base, revision, path = "clipscore", "", path or name
    stem, _, argument = base.partition(":")
    if base in CARDS:
        stem, argument = base, ""
    request = LoadRequest(
        name=stem if stem in CARDS else base,
        card=CARDS.get(stem, Card(name=base, summary="a user's reward", formula="see its source", nominal_range="?")),
        argument=argument if stem in CARDS else "",
        path=Path(path) if path is not None else None,
        revision=revision or None,
        device=str(device) if device is not None else None,
        dtype=str(dtype).removeprefix("torch.") if dtype is not None else None,
        local_files_only=local_files_only,
        options=options,
        shared={} if shared is None else shared,
    )
    if request.card.unavailable:
        raise RewardError(f"reward '{name}' is not available: {request.card.unavailable}")
    backend = _factory(stem if stem in CARDS else base)(request)
    if not isinstance(backend, Backend):
        raise RewardError(f"the factory of reward '{name}' returned a {type(backend).__name__}, not a Backend")
    if argument and stem in CARDS:
        backend.card = replace(backend.card, name=base)
    return backend


def _factory(name: str) -> Factory:
    if name in CARDS:
        return REWARDS.get(name)
    module, separator, attribute = name.partition(":")
    if not separator:
        raise RewardError(REWARDS.unknown(name))
    try:
        found = vars(importlib.import_module(module)).get(attribute)
    except ModuleNotFoundError as error:
        raise RewardError(f"reward '{name}': no module named '{error.name}'") from error
    if not callable(found):
        raise RewardError(f"reward '{name}': module '{module}' has no callable '{attribute}'")
    return found  # type: ignore[no-any-return]


def ensemble(
    weights: Mapping[str, float] | Sequence[str],
    *,
    normalize: str = "win_rate",
    missing: str = "error",
    path: Mapping[str, str | Path] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Ensemble:
    """Load several rewards as one, compared within the candidates of each prompt by default; see `Ensemble`."""
    from mmalign.rewards.together import Ensemble

    scorers = load(list(weights), path, device, dtype)
    chosen = dict(weights) if isinstance(weights, Mapping) else None
    return Ensemble(scorers, chosen, normalize=normalize, missing=missing, **options)
