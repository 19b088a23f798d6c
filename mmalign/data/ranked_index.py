"""What is known of every candidate of a ranked table, and which lists and candidates a run can use."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.data.augment import Augmentation, variant_crop
from mmalign.data.cache import Cache, FillReport
from mmalign.data.check import CheckPolicy, CheckResult
from mmalign.data.files import head_hash
from mmalign.data.mediaindex import Picture
from mmalign.data.progress import progress_bar
from mmalign.data.ranked import RankedTable
from mmalign.data.reasons import Problem
from mmalign.data.sources import latent_key, prepare, refuse_uncacheable, text_key
from mmalign.errors import DataError
from mmalign.media import DEFAULT, Crop, Limits, MediaError, decode_image, read_bytes
from mmalign.types import RankedRecord

_Defect = tuple[str, str, str, str]
"""Column, reason, detail, and the hash of the picture's first bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListIndex:
    """Candidates by row; None stands for one that is absent: it has no place in ranks, weights or gradients."""

    pictures: Mapping[int, tuple[Picture | None, ...]]
    checked: CheckResult
    """Usable rows (two candidates at least), and one problem for every row that lost a candidate or is not used."""

    @property
    def rows(self) -> np.ndarray:
        return self.checked.rows

    @property
    def width(self) -> int:
        """Most candidates of any usable list."""
        return max(len(self.pictures[int(row)]) for row in self.rows)


def index_lists(
    table: RankedTable, *, policy: CheckPolicy, workers: int | None = None, progress: bool = True
) -> ListIndex:
    """Decode every candidate once. A candidate that cannot be read, or that lacks a finite score, becomes absent.

    Raises:
        DataError: a row without prompt or pictures, more rows with defects than the policy allows, or none usable.
    """
    index = look_at_lists(table, policy=policy, workers=workers, progress=progress)
    return replace(index, checked=index.checked.demand())


def look_at_lists(
    table: RankedTable, *, policy: CheckPolicy, workers: int | None = None, progress: bool = True
) -> ListIndex:
    """As `index_lists`, whatever the share of rows with defects."""
    with progress_bar(f"Checking {table.path.name}", len(table), enabled=progress) as advance:
        part = look(table, 0, len(table), limits=policy.limits, workers=workers, advance=advance)
    return joined(table, [part], policy)


def look(
    table: RankedTable, first: int, stop: int, *, limits: Limits, workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """What some consecutive rows show, as plain JSON; `joined` makes an index of all parts."""

    def work(row: int) -> tuple[tuple[Picture | None, ...], list[_Defect]]:
        return _examine(table[row], table.rewards, limits)

    pictures: list[list[list[Any] | None]] = []
    problems: list[list[Any]] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="mmalign-lists") as pool:
        for start in range(first, stop, 1024):
            numbers = range(start, min(start + 1024, stop))
            for row, (found, defects) in zip(numbers, pool.map(work, numbers), strict=True):
                pictures.append([None if one is None else [one.sha256, *one.size] for one in found])
                if defects:
                    problems.append([row, asdict(_problem(table, row, defects))])
                elif len(found) < 2:
                    few = Problem.at(table, row, column="images", reason="too_few", detail="one picture is no list")
                    problems.append([row, asdict(few)])
                advance(1)
    return {"pictures": pictures, "problems": problems}


def joined(table: RankedTable, parts: Iterable[Mapping[str, Any]], policy: CheckPolicy) -> ListIndex:
    """The index of a whole table from what its parts showed, in order."""
    pictures: dict[int, tuple[Picture | None, ...]] = {}
    problems: dict[int, Problem] = {}
    for part in parts:
        for found in part["pictures"]:
            pictures[len(pictures)] = tuple(
                None if one is None else Picture(sha256=one[0], size=(one[1], one[2])) for one in found
            )
        problems.update({int(row): Problem(**values) for row, values in part["problems"]})
    return _index(table, pictures, problems, policy)


def _examine(
    record: RankedRecord, rewards: tuple[str, ...], limits: Limits
) -> tuple[tuple[Picture | None, ...], list[_Defect]]:
    """Pictures of a list, and what is wrong with those that are absent."""
    found: list[Picture | None] = []
    defects: list[_Defect] = []
    for number, ref in enumerate(record.images):
        unscored = [
            name for name in rewards if name not in record.scores or not math.isfinite(record.scores[name][number])
        ]
        if unscored:
            defects.append((f"scores.{unscored[0]}", "non_finite_score", f"candidate {number} has no finite score", ""))
            found.append(None)
            continue
        try:
            data, source = read_bytes(ref, limits)
            size = decode_image(data, limits, source=source).original_size
        except MediaError as error:
            defects.append((f"images[{number}]", error.reason, error.detail, head_hash(ref.data, ref.path)))
            found.append(None)
            continue
        found.append(Picture(sha256=hashlib.sha256(data).hexdigest(), size=size))
    return tuple(found), defects


def _problem(table: RankedTable, row: int, defects: list[_Defect]) -> Problem:
    column, reason, detail, head = defects[0]
    more = f" (and {len(defects) - 1} more candidates of this list)" if len(defects) > 1 else ""
    return Problem.at(table, row, column=column, reason=reason, detail=detail + more, head=head)


def _index(
    table: RankedTable,
    pictures: Mapping[int, tuple[Picture | None, ...]],
    problems: Mapping[int, Problem],
    policy: CheckPolicy,
) -> ListIndex:
    usable = [row for row, found in pictures.items() if sum(picture is not None for picture in found) >= 2]
    checked = CheckResult(
        path=table.path, total=len(table), rows=np.array(usable, dtype=np.int64),
        problems=tuple(problems[row] for row in sorted(problems)), conflicts=0, policy=policy, media=None,
    )  # fmt: skip
    return ListIndex(pictures=pictures, checked=checked)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    row: int
    number: int
    crop: Crop
    flip: bool


def needed_list_latents(index: ListIndex, augmentation: Augmentation) -> Iterator[tuple[str, _Request]]:
    """Every (key, candidate) that some epoch may ask for; the same picture may appear several times."""
    variants = range(augmentation.crop_variants) if augmentation.crop == "random" else (-1,)
    for row in index.rows.tolist():
        for number, picture in enumerate(index.pictures[row]):
            if picture is None:
                continue
            for variant in variants:
                crop: Crop = "center" if variant < 0 else variant_crop(variant)
                for flip in (False, True) if augmentation.flip else (False,):
                    request = _Request(row=row, number=number, crop=crop, flip=flip)
                    yield latent_key(picture.sha256, variant=variant, flip=flip), request


def fill_list_latents(
    cache: Cache,
    table: RankedTable,
    index: ListIndex,
    augmentation: Augmentation,
    *,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    batch_size: int,
    limits: Limits = DEFAULT,
    progress: bool = True,
) -> ListIndex:
    """Store the latents of all candidates; those whose encoding is not finite become absent in the index returned.

    Args:
        encode: pixels [B, 3, H, W] float32 in [-1, 1] -> {"mean", "std"}, [B, C, h, w] each.

    Raises:
        DataError: random crops without variants, or too many lists lost.
    """
    refuse_uncacheable(augmentation)
    left = set(cache.missing(key for key, _ in needed_list_latents(index, augmentation)))

    def items() -> Iterator[tuple[str, Tensor]]:
        waiting = set(left)
        for key, request in needed_list_latents(index, augmentation):
            if key in waiting:
                waiting.remove(key)
                data, source = read_bytes(table[request.row].images[request.number], limits)
                yield key, prepare(
                    data, source=source, resolution=augmentation.resolution, crop=request.crop, flip=request.flip, limits=limits
                ).pixels  # fmt: skip

    def run(pixels: list[Tensor]) -> Mapping[str, Tensor]:
        return encode(torch.stack(pixels))

    report = cache.fill(items(), run, batch_size=batch_size, progress=progress, total=len(left))
    return _without_refused(table, index, augmentation, report)


def fill_list_text(
    cache: Cache,
    prompts: set[str],
    *,
    encode: Callable[[list[str]], Mapping[str, Tensor]],
    batch_size: int,
    progress: bool,
) -> None:
    """Store the text-encoder outputs of distinct prompts.

    Raises:
        DataError: an output is not finite.
    """
    distinct = sorted(prompts)
    report = cache.fill(
        ((text_key(prompt), prompt) for prompt in distinct), encode, batch_size=batch_size, progress=progress,
        total=len(distinct),
    )  # fmt: skip
    if report.refused:
        raise DataError(
            f"the text encoder gave values that are not finite for {len(report.refused)} prompts; use float32"
        )


def _without_refused(table: RankedTable, index: ListIndex, augmentation: Augmentation, report: FillReport) -> ListIndex:
    if not report.refused:
        return index
    refused = set(report.refused)
    pictures = {row: list(found) for row, found in index.pictures.items()}
    problems = list(index.checked.problems)
    for key, request in needed_list_latents(index, augmentation):
        if key in refused and pictures[request.row][request.number] is not None:
            pictures[request.row][request.number] = None
            problems.append(
                Problem.at(table, request.row, column=f"images[{request.number}]", reason="nonfinite_latent",
                           detail="the encoder gave NaN or infinity; use float32 or bfloat16 for the VAE")
            )  # fmt: skip
    fixed = {row: tuple(found) for row, found in pictures.items()}
    rows = [row for row in index.rows.tolist() if sum(picture is not None for picture in fixed[row]) >= 2]
    checked = replace(index.checked, rows=np.array(rows, dtype=np.int64), problems=tuple(problems))
    return ListIndex(pictures=fixed, checked=checked.demand())
