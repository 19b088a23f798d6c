"""Streams of pairs beyond one table in one shape: mixtures of tables, and aspect buckets."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from mmalign.data import Cache, CheckPolicy, CheckResult, PairTable
    from mmalign.data.bucketed import BucketedLoader
    from mmalign.data.order import Order, Shuffle
    from mmalign.experiment.settings import DataConfig

LARGE_SIDE = 256
"""Pixels from which buckets differ by 64, as diffusion models' releases have it; below, by what the network needs."""


def open_pairs(settings: DataConfig) -> PairTable:
    """The table of an experiment, or its mixture as one table.

    Raises:
        DataError: a table that cannot be opened, or tables that do not go together.
    """
    from mmalign import data
    from mmalign.data.mixtures import open_mixture

    return open_mixture([settings.manifest, *settings.mix]) if settings.mix else data.open_table(settings.manifest)


def usable(settings: DataConfig, table: PairTable, policy: CheckPolicy, *, progress: bool) -> CheckResult:
    """The rows a run may use, of all tables of a mixture together.

    Raises:
        DataError: a table that is not checked, has too many bad rows, or none usable.
    """
    from mmalign import data
    from mmalign.data.mixtures import JoinedTable, usable_of_each

    if not isinstance(table, JoinedTable):
        return data.usable_rows(table, check=settings.check, policy=policy, progress=progress)
    rows, results, media = usable_of_each(table, check=settings.check, policy=policy, progress=progress)
    flags: dict[str, int] = {}
    for result in results:
        for name, number in result.flags.items():
            flags[name] = flags.get(name, 0) + number
    return replace(
        results[0],
        total=len(table),
        rows=np.concatenate(rows),
        problems=tuple(problem for result in results for problem in result.problems),
        conflicts=sum(result.conflicts for result in results),
        media=media,
        flags=flags,
    )


def masked_limit(processes: int) -> int:
    """How many rows a loader may mask before it stops its process: where there are several, one that stopped alone would leave
    the others waiting, and the loop stops all of them together (``rowcounts``)."""
    from mmalign.data.pair_loader import MAX_MASKED

    return MAX_MASKED if processes == 1 else sys.maxsize


def mixture(settings: DataConfig, table: PairTable, rows: np.ndarray, *, seed: int, global_batch: int) -> Order | None:
    """The order of a mixture's rows; None for a single table, whose loader has its own.

    Raises:
        DataError: weights that do not fit the tables.
    """
    from mmalign.data.mixtures import JoinedTable, mixture_order

    if not isinstance(table, JoinedTable):
        return None
    ends = [*table.starts[1:], len(table)]
    parts = [rows[(rows >= start) & (rows < end)] for start, end in zip(table.starts, ends, strict=True)]
    weights = settings.weights or tuple(float(len(part)) for part in parts)
    return mixture_order(
        table,
        parts,
        weights,
        seed=seed,
        global_batch=global_batch,
        policy=settings.mix_policy,
        shuffle=settings.shuffle,
    )


def capped(settings: DataConfig, table: PairTable, rows: np.ndarray, *, seed: int, global_batch: int) -> Order | None:
    """The order with `data.max_per_prompt`; None without.

    Raises:
        DataError: an epoch is smaller than a global batch.
    """
    if settings.max_per_prompt is None:
        return None
    from mmalign.data.capped import CappedOrder, prompt_numbers

    return CappedOrder(
        table_fingerprint=table.fingerprint, rows=rows, prompts=prompt_numbers(table, rows), cap=settings.max_per_prompt,
        seed=seed, global_batch=global_batch, shuffle=settings.shuffle,
    )  # fmt: skip


def bucketed(
    table: PairTable,
    checked: CheckResult,
    *,
    side: int,
    multiple: int,
    fill: Callable[[Any, tuple[int, int]], tuple[Cache, Cache, Any, Sequence[Any]]] | None,
    shuffle: Shuffle,
    settings: dict[str, Any],
) -> tuple[BucketedLoader, list[Any]]:
    """A loader with one shape a step, and what was left out for its shape or its latents.

    Args:
        side: the buckets' area is this squared.
        multiple: what the network needs both sides to be multiples of.
        fill: (rows, (height, width)) to the filled caches of latents and text, the rows that are in them, and problems; None
            decodes in every step.
        settings: of the loaders.

    Raises:
        ConfigError: the pictures' sizes are not known.
        DataError: no bucket fills a global batch.
    """
    from mmalign.data.bucketed import BucketedLoader, assign_buckets
    from mmalign.data.buckets import make_buckets
    from mmalign.data.orders import BucketedOrder

    if checked.media is None:
        raise ConfigError("data.buckets: the pictures' sizes are needed; set data.check to online or required")
    step = math.lcm(64, multiple) if side >= LARGE_SIDE else multiple
    buckets = make_buckets(side * side, step=step)
    rows, chosen, problems = assign_buckets(table, checked.rows, checked.media, buckets)
    lost: list[Any] = list(problems)
    global_batch = settings["batch_size"] * settings["accumulate"] * settings["world_size"]

    def order() -> BucketedOrder:
        return BucketedOrder(
            table_fingerprint=table.fingerprint, rows=rows, buckets=chosen, table=buckets, seed=settings["seed"],
            global_batch=global_batch, shuffle=shuffle,
        )  # fmt: skip

    made = order()
    latents: dict[int, Cache] | None = None
    text = None
    while fill is not None:
        latents, kept = {}, []
        for bucket, some in made.by_bucket.items():
            latents[bucket], text, good, found = fill(some, buckets.sizes[bucket])
            kept.append(np.asarray(good))
            lost += found
        keep = np.isin(rows, np.concatenate(kept))
        if keep.all():
            break
        # A latent that is not finite takes its row away, and that may leave a bucket too small: sort the others again.
        rows, chosen = rows[keep], chosen[keep]
        made = order()
    return BucketedLoader(table, made, latents=latents, media=checked.media, text=text, **settings), lost
