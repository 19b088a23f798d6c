"""`mmalign data check` for a table of any kind: pairs of pictures, ranked lists, answers about media."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.data import checkfiles, checkparts
from mmalign.data.check import CheckPolicy, CheckResult, check_table
from mmalign.data.engines import Engine, each_part
from mmalign.data.lookparts import LookParts, PartsMissing
from mmalign.data.ranked import RankedTable, open_ranked
from mmalign.data.remote import is_remote, mirror, publish, remove
from mmalign.data.storage import open_storage
from mmalign.data.tables import PairTable, open_table
from mmalign.data.vlm import VlmTable, is_vlm, open_vlm
from mmalign.media import Limits


def check_any(
    path: str | Path,
    *,
    policy: CheckPolicy,
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
    engine: Engine = "local",
    progress: bool = True,
) -> CheckResult:
    """Check a table of whatever kind its columns make it, and write its report.

    What is decoded is kept part by part: a check that was killed goes on where it was.

    Args:
        workers: decoding processes or threads; with Ray, workers in the cluster.
        shard: (i, n): look at every n-th part from the i-th on; the others are made by processes that share the folder.
        engine: ``processes`` or ``ray`` have the parts made by others, which must see the same folder; the result is the same.

    Raises:
        DataError: too many bad rows or none usable (the report is written first).
        PartsMissing: this shard's parts are done and others' are not.
        MissingExtraError: Ray is not installed.
    """
    if is_remote(path):
        return _check_there(
            path, policy=policy, workers=workers, shard=shard, engine=engine, progress=progress
        )
    path = Path(path)
    if engine != "local":
        todo = parts_left(path, policy.limits, shard)
        for _ in each_part(
            partial(part_maker, str(path.resolve()), policy.limits), todo, engine=engine, workers=workers, title="Checking",
            progress=progress,
        ):  # fmt: skip
            pass
    # Judged here, so that the page is written even where the table is refused.
    lenient = replace(policy, max_bad_fraction=1.0, strict=False)
    table = open_any(path, progress=progress)
    if isinstance(table, PairTable):
        return check_table(table, policy=policy, workers=workers, shard=shard, progress=progress)
    if isinstance(table, RankedTable):
        return _check_lists(table, policy, workers, shard, progress)
    from mmalign.data.vlm_check import check_vlm

    result = check_vlm(table, policy=lenient, workers=workers, shard=shard, progress=progress)
    result = replace(result, policy=policy)
    checkfiles.write_report(table, result)
    checkfiles.write_page(table, result)
    return result.demand(checkfiles.check_folder(table.path) / "quarantine.jsonl")


def _check_there(path: str | Path, **settings: Any) -> CheckResult:
    """Check the mirror of a table in a store, and send the check there. What other machines made meanwhile is fetched."""
    folder = mirror(path)
    try:
        try:
            result = check_any(folder, **settings)
        except PartsMissing:
            publish(folder, path, only=("check",))
            result = check_any(mirror(path), **settings)
        remove(path, "check/parts-")
        return result
    finally:
        if folder.is_dir():
            publish(folder, path, only=("check",))


def open_any(path: Path, *, progress: bool = False) -> PairTable | RankedTable | VlmTable:
    """A table of the kind that its columns make it."""
    if is_ranked(path):
        return open_ranked(path, progress=progress)
    return open_vlm(path, progress=progress) if is_vlm(path) else open_table(path, progress=progress)


def is_ranked(path: Path) -> bool:
    """Whether a table's columns are those of ranked lists of pictures."""
    columns = set(open_storage(path, progress=False).parts[0].schema.names)
    return {"prompt", "images"} <= columns and not columns & {"chosen", "completion", "answers"}


def parts_left(path: Path, limits: Limits, shard: tuple[int, int] = (0, 1)) -> list[int]:
    """Numbers of the parts of a check that are still to be made."""
    return _store(open_any(path), limits).missing(shard)


def part_maker(path: str, limits: Limits) -> Callable[[int], int]:
    """Opens a table where this is called, and gives what makes one part of its check there; returns the part's rows."""
    table = open_any(Path(path))
    store = _store(table, limits)

    def make(number: int) -> int:
        first, stop = store.ranges[number]
        if isinstance(table, PairTable) and isinstance(store, checkparts.PartStore):
            store.save(checkparts.examine_part(table, first, stop, limits))
        elif isinstance(table, RankedTable) and isinstance(store, LookParts):
            from mmalign.data import ranked_index

            store.make(number, lambda one, other: ranked_index.look(table, one, other, limits=limits, workers=1))
        elif isinstance(table, VlmTable) and isinstance(store, LookParts):
            from mmalign.data import vlm_check

            store.make(number, lambda one, other: vlm_check.look(table, one, other, limits=limits, workers=1))
        return stop - first

    return make


def _store(table: PairTable | RankedTable | VlmTable, limits: Limits) -> checkparts.PartStore | LookParts:
    if isinstance(table, PairTable):
        return checkparts.PartStore(checkfiles.check_folder(table.path), table, limits)
    if isinstance(table, RankedTable):
        return _list_parts(table, limits)
    from mmalign.data.vlm_check import answer_parts

    return answer_parts(table, limits)


def _list_parts(table: RankedTable, limits: Limits) -> LookParts:
    return LookParts(table, {"kind": "lists", "table": table.fingerprint, "rows": len(table), "limits": asdict(limits)})


def _check_lists(
    table: RankedTable, policy: CheckPolicy, workers: int | None, shard: tuple[int, int], progress: bool
) -> CheckResult:
    from mmalign.data.ranked_facts import write_facts
    from mmalign.data.ranked_index import joined, look

    parts = _list_parts(table, policy.limits)
    made = parts.all(
        lambda first, stop: look(table, first, stop, limits=policy.limits, workers=workers), shard, progress=progress
    )
    index = joined(table, made, policy)
    write_facts(table, index, policy.limits)
    parts.discard()
    checkfiles.write_report(table, index.checked)
    checkfiles.write_page(table, index.checked)
    return index.checked.demand(checkfiles.check_folder(table.path) / "quarantine.jsonl")
