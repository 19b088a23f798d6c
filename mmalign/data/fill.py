"""Which pictures and prompts of a table a cache must hold, and the fill that brings them there."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import PIL
import pyarrow.compute as pc
import torch
from torch import Tensor

from mmalign.data.augment import Augmentation, variant_crop
from mmalign.data.cache import Cache, FillReport, digests_of
from mmalign.data.files import canonical_hash
from mmalign.data.mediaindex import SIDES, MediaIndex
from mmalign.data.reasons import Problem
from mmalign.data.sources import latent_digests, latent_key, prepare, refuse_changed, refuse_uncacheable, text_key
from mmalign.data.tables import PairTable, prompts_of
from mmalign.errors import DataError
from mmalign.media import COLOUR_POLICY, DEFAULT, RESIZE_RULE, Crop, Limits, read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FillOutcome:
    """What a fill of latents did to a table."""

    rows: np.ndarray
    """Rows that can be trained on, [n] int64: where a latent is not finite, both pictures are left out."""
    problems: tuple[Problem, ...]
    stored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    row: int
    side: int
    crop: Crop
    flip: bool


def geometry_fields(*, resolution: tuple[int, int], crop: str = "center", crop_variants: int = 0) -> dict[str, object]:
    """What cached latents depend on besides the encoder, for the cache's fields. Whether both flips are stored is no
    part of it: each is its own entry."""
    return {
        "resolution": list(resolution),
        "crop": crop,
        "crop_variants": crop_variants,
        "resize": RESIZE_RULE,
        "colour": COLOUR_POLICY,
        "pillow": PIL.__version__.split(".")[0],
    }


def needed_latents(
    rows: Sequence[int] | np.ndarray, media: MediaIndex, augmentation: Augmentation
) -> Iterator[tuple[str, _Request]]:
    """Every (key, picture) that some epoch may ask for; the same picture may appear several times."""
    variants = range(augmentation.crop_variants) if augmentation.crop == "random" else (-1,)
    for row in rows:
        for side in (0, 1):
            sha256 = media.picture(int(row), side).sha256
            for variant in variants:
                crop: Crop = "center" if variant < 0 else variant_crop(variant)
                for flip in (False, True) if augmentation.flip else (False,):
                    request = _Request(row=int(row), side=side, crop=crop, flip=flip)
                    yield latent_key(sha256, variant=variant, flip=flip), request


def missing_latents(
    cache: Cache, rows: np.ndarray, media: MediaIndex, augmentation: Augmentation
) -> list[tuple[str, _Request]]:
    """The distinct entries of `needed_latents` that are not stored, by the order of rows."""
    variants = range(augmentation.crop_variants) if augmentation.crop == "random" else (-1,)
    found: list[tuple[int, str, _Request]] = []
    seen: set[bytes] = set()
    for variant in variants:
        for flip in (False, True) if augmentation.flip else (False,):
            for side in (0, 1):
                digests = latent_digests(media.hashes[rows, side], variant, flip)
                for place in np.flatnonzero(~cache.holds(digests)).tolist():
                    digest = digests[place].tobytes()
                    if digest in seen:
                        continue
                    seen.add(digest)
                    crop: Crop = "center" if variant < 0 else variant_crop(variant)
                    request = _Request(row=int(rows[place]), side=side, crop=crop, flip=flip)
                    found.append((place, f"#{digest.hex()}", request))
    found.sort(key=lambda item: item[0])
    return [(key, request) for _, key, request in found]


def fill_latents(
    cache: Cache,
    table: PairTable,
    rows: Sequence[int] | np.ndarray,
    media: MediaIndex,
    *,
    resolution: tuple[int, int],
    flip: bool,
    crop: str = "center",
    crop_variants: int = 0,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    batch_size: int,
    workers: int = 2,
    shard: tuple[int, int] = (0, 1),
    limits: Limits = DEFAULT,
    progress: bool = True,
) -> FillOutcome:
    """Store the latents that training with these settings will ask for; each distinct picture is encoded once.

    Args:
        shard: (i, n): only every n-th of them from the i-th on; other processes store the others.
        encode: pixels [B, 3, H, W] float32 in [-1, 1] -> {"mean", "std"}, [B, C, h, w] each.

    Raises:
        DataError: random crops without variants, or an encoder that answers with other tensors.
        MediaError: a picture that was checked cannot be read any more.
    """
    augmentation = Augmentation(resolution=resolution, flip=flip, crop=crop, crop_variants=crop_variants)
    refuse_uncacheable(augmentation)
    numbers = np.asarray(rows, dtype=np.int64)

    def load(request: _Request) -> Tensor:
        record = table.record(request.row)
        data, source = read_bytes(record.chosen if request.side == 0 else record.rejected, limits)
        refuse_changed(data, media.picture(request.row, request.side).sha256, source)
        done = prepare(data, source=source, resolution=resolution, crop=request.crop, flip=request.flip, limits=limits)
        return done.pixels

    def run(pixels: list[Tensor]) -> Mapping[str, Tensor]:
        answers = encode(torch.stack(pixels))
        if set(answers) != {"mean", "std"}:
            raise DataError(f"the latent encoder must answer with 'mean' and 'std', it gave {sorted(answers)}")
        return answers

    demand = _demand(media, numbers, augmentation)
    if cache.is_complete(demand):
        return FillOutcome(rows=numbers, problems=(), stored=0)
    missing = missing_latents(cache, numbers, media, augmentation)
    mine = in_shard(digests_of([key for key, _ in missing]), shard)
    missing = [missing[place] for place in np.flatnonzero(mine).tolist()]
    report = cache.fill(
        _read_ahead(iter(missing), load, workers=workers, ahead=2 * batch_size),
        run,
        batch_size=batch_size,
        progress=progress,
        total=len(missing),
        shard=shard,
    )
    if not report.refused and shard[1] == 1:
        cache.note_complete(demand)
    return _without_refused(table, numbers, media, augmentation, report)


def fill_text(
    cache: Cache,
    table: PairTable,
    rows: Sequence[int] | np.ndarray,
    *,
    encode: Callable[[list[str]], Mapping[str, Tensor]],
    batch_size: int,
    drop_caption: float = 0.0,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> FillReport:
    """Store the text-encoder outputs of every distinct prompt, and of '' when captions are dropped; `shard` as for latents.

    Raises:
        DataError: an output is not finite; there is no row to leave out for a prompt many rows share.
    """
    demand = _text_demand(table, np.asarray(rows, dtype=np.int64), drop_caption)
    if cache.is_complete(demand):
        return FillReport(stored=0, refused=())
    prompts = distinct_prompts(table, rows, drop_caption)
    digests = digests_of([text_key(prompt) for prompt in prompts])
    absent = np.flatnonzero(~cache.holds(digests) & in_shard(digests, shard))
    items = ((text_key(prompts[place]), prompts[place]) for place in absent.tolist())
    report = cache.fill(items, encode, batch_size=batch_size, progress=progress, total=len(absent), shard=shard)
    if report.refused:
        bad = next(prompt for prompt in prompts if text_key(prompt) in report.refused)
        raise DataError(
            f"the text encoder gave values that are not finite for {len(report.refused)} prompts, first {bad!r};"
            " use float32 or bfloat16 for it"
        )
    if shard[1] == 1:
        cache.note_complete(demand)
    return report


def in_shard(digests: np.ndarray, shard: tuple[int, int]) -> np.ndarray:
    """Which entries ([n, 16] uint8) are the share of shard (i, n), whatever is stored already. [n] bool"""
    words = np.ascontiguousarray(digests[:, :4]).view("<u4").reshape(-1)
    return np.asarray(words % shard[1] == shard[0])


def distinct_prompts(table: PairTable, rows: Sequence[int] | np.ndarray, drop_caption: float) -> list[str]:
    """The different prompts training will ask for, in the order in which the rows have them."""
    found = [str(value) for value in pc.unique(prompts_of(table, rows)).to_pylist()]
    return ["", *(prompt for prompt in found if prompt)] if drop_caption > 0 else found


def require_latents(cache: Cache, rows: np.ndarray, media: MediaIndex | None, augmentation: Augmentation) -> MediaIndex:
    """The media facts, once it is sure that the cache holds all that will be asked for.

    Raises:
        DataError: no media facts, uncacheable crops, or entries missing (said apart for mirrored ones).
    """
    if media is None:
        raise DataError(
            "cached latents are found by the pictures' hashes: run the check first (data.check: required or online)"
        )
    refuse_uncacheable(augmentation)
    numbers = np.asarray(rows, dtype=np.int64)
    if cache.is_complete(_demand(media, numbers, augmentation)):
        return media
    missing = missing_latents(cache, numbers, media, augmentation)
    if not missing:
        return media
    remedy = "fill the cache with the settings of this run"
    if augmentation.flip and all(request.flip for _, request in missing):
        remedy = "it lacks mirrored pictures, and a latent must not be mirrored: fill it with flip on, or set flip off"
    raise DataError(f"{cache.folder}: {len(missing)} latents of this table are not in the cache; {remedy}")


def _demand(media: MediaIndex, rows: np.ndarray, augmentation: Augmentation) -> str:
    """Hash of which latents training asks for: of the pictures' own hashes, because a table may name pictures by their paths."""
    settings = [augmentation.flip, augmentation.crop, augmentation.crop_variants]
    return canonical_hash(["latents", hashlib.sha256(media.hashes[rows].tobytes()).hexdigest(), settings])


def _text_demand(table: PairTable, rows: np.ndarray, drop_caption: float) -> str:
    return canonical_hash(["text", table.fingerprint, hashlib.sha256(rows.tobytes()).hexdigest(), drop_caption > 0])


def require_text(cache: Cache, table: PairTable, rows: np.ndarray, drop_caption: float) -> None:
    """Refuse to train from a cache that lacks prompts of the table.

    Raises:
        DataError: how many are missing, and the first.
    """
    if cache.is_complete(_text_demand(table, np.asarray(rows, dtype=np.int64), drop_caption)):
        return
    prompts = distinct_prompts(table, rows, drop_caption)
    missing = np.flatnonzero(~cache.holds(digests_of([text_key(prompt) for prompt in prompts])))
    if len(missing):
        first = prompts[int(missing[0])]
        raise DataError(
            f"{cache.folder}: {len(missing)} prompts are not in the cache, first {first!r};"
            " fill it with the settings of this run"
        )


def _read_ahead(
    items: Iterator[tuple[str, _Request]], load: Callable[[_Request], Tensor], *, workers: int, ahead: int
) -> Iterator[tuple[str, Tensor]]:
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="mmalign-fill") as pool:
        pending: deque[tuple[str, Future[Tensor]]] = deque()
        try:
            for key, request in items:
                pending.append((key, pool.submit(load, request)))
                if len(pending) >= ahead:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _without_refused(
    table: PairTable, rows: np.ndarray, media: MediaIndex, augmentation: Augmentation, report: FillReport
) -> FillOutcome:
    if not report.refused:
        return FillOutcome(rows=rows, problems=(), stored=report.stored)
    refused = set(report.refused)
    bad: dict[int, int] = {}
    for key, request in needed_latents(rows, media, augmentation):
        if key in refused:
            bad.setdefault(request.row, request.side)
    detail = "the encoder gave NaN or infinity; use float32 or bfloat16 for the VAE, or one repaired for half precision"
    problems = tuple(
        Problem.at(table, row, column=SIDES[side], reason="nonfinite_latent", detail=detail)
        for row, side in bad.items()
    )
    kept = np.array([row for row in rows.tolist() if row not in bad], dtype=np.int64)
    return FillOutcome(rows=kept, problems=problems, stored=report.stored)
