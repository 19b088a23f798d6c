"""Look at every row of a vision-language table once: messages, labels, and every picture and clip decoded.

Facts are kept apart from policy, as for tables of pictures (``check``): facts are stored beside the table, and any run applies
its own policy to them. What a model's processor says to a row (too long, unknown template) is asked when a run starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from mmalign.branches import BranchRecord, MediaRef, VideoRef
from mmalign.data import checkfiles
from mmalign.data.check import CheckPolicy, CheckResult, _in_order
from mmalign.data.files import file_hash, head_hash, write_json
from mmalign.data.lookparts import LookParts
from mmalign.data.progress import progress_bar
from mmalign.data.reasons import Problem
from mmalign.data.vlm import VlmTable, open_vlm
from mmalign.data.vlm_rows import RowProblem
from mmalign.errors import DataError
from mmalign.media import Limits, MediaError, decode_image, inspect_video, read_bytes
from mmalign.types import ImageRef

FACTS: Final = "vlm.json"
VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmFacts:
    """What looking at every row showed, whatever the policy."""

    verdicts: tuple[tuple[str, int] | None, ...]
    """Per row: what is compared, and which way it went (1 or -1; 0 where nothing is compared); None for a defect."""
    defects: Mapping[int, Problem]
    flags: Mapping[str, int] = field(default_factory=dict)


def check_vlm(
    path: str | Path | VlmTable, *, policy: CheckPolicy | None = None, workers: int | None = None, write: bool = True,
    shard: tuple[int, int] = (0, 1), progress: bool = True,
) -> CheckResult:  # fmt: skip
    """Look at every row and write a report beside the table (`check/`, or `<name>.check/` for a single file).

    What was looked at is kept part by part: a check that was killed goes on where it was.

    Args:
        shard: (i, n): look at every n-th part from the i-th on; the others are made by processes that share the folder.

    Raises:
        DataError: too many bad rows or none usable; the report is written first.
        PartsMissing: this shard's parts are done and others' are not.
    """
    table = path if isinstance(path, VlmTable) else open_vlm(path, progress=progress)
    policy = policy or CheckPolicy()
    folder = checkfiles.check_folder(table.path)
    if write:
        parts, seen = answer_parts(table, policy.limits), dict[str, _Seen]()

        def one(first: int, stop: int) -> dict[str, Any]:
            return look(table, first, stop, limits=policy.limits, workers=workers, seen=seen)

        facts = joined(parts.all(one, shard, progress=progress))
        _write_facts(table, facts, policy.limits)
        parts.discard()
    else:
        facts = scan(table, limits=policy.limits, workers=workers, progress=progress)
    result = apply(table, facts, policy)
    if write:
        _write_report(table, result)
    return result.demand(folder / "quarantine.jsonl" if write else None)


def answer_parts(table: VlmTable, limits: Limits) -> LookParts:
    """Where the parts of a check of answers are."""
    return LookParts(table, _identity(table, limits))


def usable_vlm(
    table: VlmTable, *, check: str, policy: CheckPolicy | None = None, workers: int | None = None, progress: bool = True
) -> CheckResult:
    """The rows a run may use; `check` as for ``data.usable_rows``.

    Raises:
        DataError: not checked or changed since (with the command to run), too many bad rows, or none usable.
    """
    policy = policy or CheckPolicy()
    if check == "required":
        return apply(table, _read_facts(table, policy.limits), policy).demand()
    if check not in ("online", "off"):
        raise DataError(f"data.check must be 'required', 'online' or 'off', got '{check}'")
    facts = scan(table, limits=policy.limits, workers=workers, decode=check == "online", progress=progress)
    return apply(table, facts, policy).demand()


def scan(
    table: VlmTable, *, limits: Limits, workers: int | None = None, decode: bool = True, progress: bool = True
) -> VlmFacts:
    """Read every row; with `decode`, also decode its pictures and clips, each distinct one once."""
    seen: dict[str, _Seen] = {}
    with progress_bar(f"Checking {table.path.name}", len(table), enabled=progress) as advance:
        return joined([look(table, 0, len(table), limits=limits, workers=workers, decode=decode, seen=seen, advance=advance)])


def look(
    table: VlmTable, first: int, stop: int, *, limits: Limits, workers: int | None = None, decode: bool = True,
    seen: dict[str, _Seen] | None = None, advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """What some consecutive rows show, as plain JSON; `joined` makes facts of all parts.

    Args:
        seen: media that were decoded before, by their hash; filled.
    """
    known: dict[str, _Seen] = {} if seen is None else seen
    verdicts: list[tuple[str, int] | None] = []
    defects: list[list[Any]] = []
    met: set[str] = set()

    def work(place: int) -> tuple[Problem | None, tuple[str, int] | None, list[str]]:
        row, hashes = first + place, list[tuple[str, list[str]]]()
        item: MediaRef | None = None
        try:
            record = table.record(row)
            for item in _media_of(record):
                hashes += _look(item, limits, known if decode else None)
        except RowProblem as problem:
            return _problem(table, row, problem.column, problem.reason, problem.detail), None, []
        except MediaError as error:
            head = "" if item is None else head_hash(item.data, item.path)
            return _problem(table, row, "media", error.reason, f"{error.source}: {error.detail}", head), None, []
        return None, _verdict(record, [whole for whole, _ in hashes]), [one for _, parts in hashes for one in parts]

    with ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="mmalign-check") as pool:
        for place, (problem, verdict, hashes) in enumerate(_in_order(pool, work, stop - first)):
            verdicts.append(verdict)
            met.update(hashes)
            if problem is not None:
                defects.append([first + place, asdict(problem)])
            advance(1)
    flags = {value: list(known[value].flags) for value in sorted(met) if value in known and known[value].flags}
    return {"verdicts": verdicts, "defects": defects, "flags": flags}


def joined(parts: Iterable[dict[str, Any]]) -> VlmFacts:
    """The facts of a whole table from those of its parts, in order. A picture that several parts hold is counted once."""
    verdicts: list[tuple[str, int] | None] = []
    defects: dict[int, Problem] = {}
    flags: dict[str, list[str]] = {}
    for part in parts:
        verdicts += [None if value is None else (value[0], value[1]) for value in part["verdicts"]]
        defects.update({int(row): Problem(**values) for row, values in part["defects"]})
        flags.update(part["flags"])
    counts = Counter(flag for found in flags.values() for flag in found)
    return VlmFacts(verdicts=tuple(verdicts), defects=defects, flags=dict(sorted(counts.items())))


def apply(table: VlmTable, facts: VlmFacts, policy: CheckPolicy) -> CheckResult:
    """Which rows are used under a policy."""
    problems: dict[int, Problem] = dict(facts.defects)
    ties = table.kind == "pairs" and "p_chosen" in table.columns and policy.ties == "drop"
    first: set[tuple[str, int]] = set()
    ways: dict[str, set[int]] = {}
    kept = []
    for row, verdict in enumerate(facts.verdicts):
        if verdict is None:
            continue
        if verdict[0] == "":
            problems[row] = _problem(table, row, "rejected", "identical_responses", "both answers say the same")
        elif ties and table.values(row)["p_chosen"] == 0.5:
            problems[row] = _problem(table, row, "p_chosen", "tie", "p_chosen is 0.5")
        elif policy.duplicates == "drop" and verdict in first:
            problems[row] = _problem(table, row, "id", "duplicate", "an earlier row has the same content and verdict")
        else:
            first.add(verdict)
            ways.setdefault(verdict[0], set()).add(verdict[1])
            kept.append((row, verdict[0]))
    return CheckResult(
        path=table.path, total=len(table), rows=np.array([row for row, _ in kept], dtype=np.int64),
        problems=tuple(problems[row] for row in sorted(problems)), policy=policy, media=None, flags=facts.flags,
        conflicts=sum({1, -1} <= ways[key] for _, key in kept),
    )  # fmt: skip


def _problem(table: VlmTable, row: int, column: str, reason: str, detail: str, head: str = "") -> Problem:
    file, number = table.file_and_number(row)
    return Problem(file=file, row=number, id=table.row_id(row), column=column, reason=reason, detail=detail,
                   head=head)  # fmt: skip


def _media_of(record: BranchRecord) -> Iterator[MediaRef]:
    yield from record.media
    for answer in record.answers:
        yield from answer.media or ()


def _verdict(record: BranchRecord, hashes: list[str]) -> tuple[str, int]:
    """What the row says and which way; the key is '' where both answers of a pair are the same."""
    texts = [" ".join(answer.text.split()) for answer in record.answers]
    own = any(answer.media or answer.messages for answer in record.answers)
    if len(texts) == 2 and texts[0] == texts[1] and not own:
        return "", 0
    prompts = [record.messages, *(answer.messages for answer in record.answers if answer.messages is not None)]
    prompt = [[message.role, [[part.text, part.media] for part in message.parts]] for turns in prompts for message in turns]
    way = 0 if len(texts) != 2 or record.p_chosen == 0.5 else 1 if texts[0] < texts[1] else -1
    label = [answer.label for answer in record.answers] if len(texts) == 1 else None
    content = json.dumps([prompt, hashes, sorted(texts), label], ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest(), way


@dataclass(frozen=True, slots=True)
class _Seen:
    """What decoding one picture or clip showed."""

    flags: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""
    """Why it cannot be used; empty where it can."""


def _look(item: MediaRef, limits: Limits, seen: dict[str, _Seen] | None) -> list[tuple[str, list[str]]]:
    """The hash that stands for one picture or clip, and those of the files it is made of; they are decoded unless `seen` is
    None or knows them.
    """
    if isinstance(item, ImageRef):
        data, source = read_bytes(item, limits)
        value = hashlib.sha256(data).hexdigest()
        _once(value, seen, lambda: decode_image(data, limits, source=source).flags)
        return [(value, [value])]
    if item.frames:
        frames = [value for frame in item.frames for value, _ in _look(frame, limits, seen)]
        return [(hashlib.sha256("".join(frames).encode()).hexdigest(), frames)]
    value = _video_hash(item)
    ref = ImageRef(path=item.path, data=item.data, label=item.label)
    _once(value, seen, lambda: inspect_video(ref, limits=limits).flags)
    return [(value, [value])]


def _video_hash(item: VideoRef) -> str:
    if item.data is not None:
        return hashlib.sha256(item.data).hexdigest()
    try:
        return file_hash(Path(item.path or ""))
    except OSError as error:
        raise MediaError(reason="unreadable_video", detail=f"cannot be read: {error}", source=item.label) from error


def _once(value: str, seen: dict[str, _Seen] | None, decode: Callable[[], tuple[str, ...]]) -> None:
    """Decode what was not decoded before; what failed once fails again with the same words."""
    if seen is None:
        return
    known = seen.get(value)
    if known is None:
        try:
            known = _Seen(tuple(decode()))
        except MediaError as error:
            seen[value] = _Seen((), error.reason, error.detail)
            raise
        seen[value] = known
    if known.reason:
        raise MediaError(reason=known.reason, detail=known.detail)


def _identity(table: VlmTable, limits: Limits) -> dict[str, Any]:
    return {"version": VERSION, "table": table.fingerprint, "rows": len(table), "limits": asdict(limits)}


def _write_facts(table: VlmTable, facts: VlmFacts, limits: Limits) -> None:
    defects = [[row, asdict(problem)] for row, problem in sorted(facts.defects.items())]
    content = {**_identity(table, limits), "flags": dict(facts.flags), "defects": defects, "verdicts": facts.verdicts}
    write_json(checkfiles.check_folder(table.path) / FACTS, content)


def _read_facts(table: VlmTable, limits: Limits) -> VlmFacts:
    remedy = f"run 'mmalign data check {table.path}', or set data.check: online"
    path = checkfiles.check_folder(table.path) / FACTS
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{table.path}: this table has not been checked; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    changed = [name for name, value in _identity(table, limits).items() if stored.get(name) != value]
    if changed:
        what = "the table has changed" if "table" in changed else f"{', '.join(changed)} differ"
        raise DataError(f"{table.path}: {what} since it was checked; {remedy}")
    return VlmFacts(
        verdicts=tuple(None if value is None else (value[0], value[1]) for value in stored["verdicts"]),
        defects={int(row): Problem(**values) for row, values in stored["defects"]}, flags=stored["flags"],
    )  # fmt: skip


def _write_report(table: VlmTable, result: CheckResult) -> None:
    checkfiles.write_report(table, result)  # type: ignore[arg-type]  # reads path, fingerprint and nothing of pictures


__all__ = ["FACTS", "VlmFacts", "apply", "check_vlm", "scan", "usable_vlm"]
