"""What a run knows of ranked lists before it starts (`data.check`): looked at now, stored by `mmalign data check`, or trusted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from mmalign.data.check import CheckPolicy, CheckResult
from mmalign.data.checkfiles import CHECK_VERSION, check_folder
from mmalign.data.files import write_json
from mmalign.data.mediaindex import Picture
from mmalign.data.progress import progress_bar
from mmalign.data.ranked import RankedTable
from mmalign.data.ranked_index import ListIndex, index_lists
from mmalign.data.reasons import Problem
from mmalign.errors import DataError
from mmalign.media import Limits, decode_image, read_bytes

FACTS: Final = "lists.json"
UNREAD: Final = Picture(sha256="", size=(0, 0))
"""Stands for a candidate that nobody has looked at; only a run without caches has such."""


def usable_lists(
    table: RankedTable, *, check: str, policy: CheckPolicy, cached: bool, workers: int | None, progress: bool
) -> ListIndex:
    """The lists and candidates a run may use.

    Args:
        check: ``online`` decodes every candidate now; ``required`` takes what `mmalign data check` stored for exactly this
            content; ``off`` trusts the table: with caches the first candidate that cannot be read is an error, without
            them it is masked when its batch comes.
        cached: whether the run uses caches, whose keys are hashes of the pictures.

    Raises:
        DataError: not checked or changed since (with the command to run), too many bad rows, or none usable.
        MediaError: with ``off`` and caches, a candidate that cannot be read.
    """
    if check == "online":
        return index_lists(table, policy=policy, workers=workers, progress=progress)
    if check == "required":
        index = read_facts(table, policy)
    elif check == "off":
        index = _trusted(table, policy, cached=cached, workers=workers, progress=progress)
    else:
        raise DataError(f"data.check must be 'required', 'online' or 'off', got '{check}'")
    return replace(index, checked=index.checked.demand())


def write_facts(table: RankedTable, index: ListIndex, limits: Limits) -> None:
    """Store what a check found beside the table, with the content it belongs to."""
    pictures = [
        [None if picture is None else [picture.sha256, *picture.size] for picture in index.pictures[row]]
        for row in range(len(table))
    ]
    problems = [problem.as_json() for problem in index.checked.problems]
    write_json(check_folder(table.path) / FACTS, {**_identity(table, limits), "pictures": pictures, "problems": problems})


def read_facts(table: RankedTable, policy: CheckPolicy) -> ListIndex:
    """What a check stored for exactly this content and these limits.

    Raises:
        DataError: none, or of another content; names the command that makes it.
    """
    path = check_folder(table.path) / FACTS
    remedy = f"run 'mmalign data check {table.path}', or set data.check: online"
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{table.path}: this table has not been checked; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    changed = [name for name, value in _identity(table, policy.limits).items() if stored.get(name) != value]
    if changed:
        what = "the table has changed" if "table" in changed else f"{', '.join(changed)} differ"
        raise DataError(f"{table.path}: {what} since it was checked; {remedy}")
    try:
        pictures = {
            row: tuple(None if one is None else Picture(sha256=one[0], size=(one[1], one[2])) for one in found)
            for row, found in enumerate(stored["pictures"])
        }
        names = ("file", "row", "id", "column", "reason", "detail", "head")
        problems = tuple(
            Problem(**{name: values[name] for name in names if name in values}) for values in stored["problems"]
        )
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__} {error}); {remedy}") from error
    return _index(table, pictures, problems, policy)


def _trusted(
    table: RankedTable, policy: CheckPolicy, *, cached: bool, workers: int | None, progress: bool
) -> ListIndex:
    def work(row: int) -> tuple[Picture | None, ...]:
        record = table[row]
        found: list[Picture | None] = []
        for number, ref in enumerate(record.images):
            known = all(math.isfinite(record.scores.get(name, (math.nan,) * (number + 1))[number]) for name in table.rewards)
            if not known:
                found.append(None)
            elif cached:
                data, source = read_bytes(ref, policy.limits)
                size = decode_image(data, policy.limits, source=source).original_size
                found.append(Picture(sha256=hashlib.sha256(data).hexdigest(), size=size))
            else:
                found.append(UNREAD)
        return tuple(found)

    pictures: dict[int, tuple[Picture | None, ...]] = {}
    with (
        progress_bar("Indexing pictures", len(table), enabled=progress) as advance,
        ThreadPoolExecutor(workers, thread_name_prefix="mmalign-lists") as pool,
    ):
        for first in range(0, len(table), 1024):
            numbers = range(first, min(first + 1024, len(table)))
            for row, found in zip(numbers, pool.map(work, numbers), strict=True):
                pictures[row] = found
                advance(1)
    return _index(table, pictures, (), policy)


def _index(
    table: RankedTable, pictures: Mapping[int, tuple[Picture | None, ...]], problems: tuple[Problem, ...], policy: CheckPolicy
) -> ListIndex:
    usable = [row for row, found in pictures.items() if sum(picture is not None for picture in found) >= 2]
    checked = CheckResult(
        path=table.path, total=len(table), rows=np.array(usable, dtype=np.int64), problems=problems, conflicts=0,
        policy=policy, media=None,
    )  # fmt: skip
    return ListIndex(pictures=pictures, checked=checked)


def _identity(table: RankedTable, limits: Limits) -> dict[str, Any]:
    return {"version": CHECK_VERSION, "table": table.fingerprint, "rows": len(table), "limits": asdict(limits)}
