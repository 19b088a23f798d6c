"""Tables written back in the formats of other tools; importing what was written gives the same table again.

Columns of ours that a format does not know travel beside its own, under names that its readers ignore.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from mmalign.data.conversations import MediaFile, keep_file
from mmalign.data.files import atomic_file, write_json
from mmalign.data.progress import progress_bar
from mmalign.data.reasons import reasons_table
from mmalign.data.remote import is_remote, results_at
from mmalign.data.tables import PairTable, open_table
from mmalign.data.turns import Message, TurnsError, messages, untagged
from mmalign.data.vlm import VlmTable, is_vlm, open_vlm
from mmalign.data.writer import FolderWriter
from mmalign.errors import ConfigError, DataError
from mmalign.media import MediaError, image_kind, read_bytes
from mmalign.types import ImageRef

TARGETS: Final = ("trl", "ms-swift", "pickapic")
KEPT: Final = ("p_chosen", "margin", "weight", "stage", "user", "group", "scores", "meta")
"""Columns of a vision-language table beside messages and media."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export wrote, and which rows the format cannot hold."""

    path: Path
    target: str
    written: int
    counts: Mapping[str, int]

    def __str__(self) -> str:
        head = f"{self.path}: {self.written} rows written as {self.target}"
        if not self.counts:
            return head
        table = reasons_table(self.counts, total=self.written + sum(self.counts.values()), used=self.written)
        return f"{head}\n{table}\n  listed in {self.path / 'import' / 'quarantine.jsonl'}"


def export_table(path: str | Path, out: str | Path, *, to: str, progress: bool = True) -> ExportReport:
    """Write a table in another tool's format.

    Args:
        path: a table of pairs of pictures (for ``pickapic``), or a vision-language table (for ``trl`` and ``ms-swift``).
        out: the folder to make.
        to: ``trl`` (Parquet), ``ms-swift`` (JSONL with media as files) or ``pickapic`` (Parquet).

    Raises:
        ConfigError: an unknown format.
        DataError: the table is not of the kind that the format holds, or a row of it cannot be used.
    """
    if is_remote(out):
        with results_at(out) as folder:
            return export_table(path, folder, to=to, progress=progress)
    to = {"msswift": "ms-swift", "swift": "ms-swift"}.get(to, to)
    if to not in TARGETS:
        raise ConfigError(f"export format '{to}' is not known (known: {', '.join(TARGETS)})")
    talks = is_vlm(path)
    if (to == "pickapic") == talks:
        holds = "answers about media" if talks else "pairs of pictures"
        other = "trl or ms-swift" if talks else "pickapic"
        raise DataError(f"{path}: a table of {holds}; '{to}' holds the other kind; export to {other}")
    if to == "pickapic":
        return _pickapic(open_table(path, progress=progress), Path(out), progress)
    table = open_vlm(path, progress=progress)
    if table.kind == "lists":
        raise DataError(f"{path}: lists of answers; export pairs or single answers")
    return _trl(table, Path(out), progress) if to == "trl" else _swift(table, Path(out), progress)


# ------------------------------------------------------------------------------------------------- pairs of pictures
def _pickapic(table: PairTable, out: Path, progress: bool) -> ExportReport:
    """Pick-a-Pic's columns, the two sides as the source had them where that is known; ours under ``mmalign_...``."""
    metas = [table.meta(row) for row in range(len(table))]
    extra = dict.fromkeys(name for meta in metas for name in meta)
    known = [name for name in extra if name not in ("chosen_side", "prompt_weight")]
    kinds = {name: _kind_of([meta.get(name) for meta in metas]) for name in known}
    raws = [table.raw(row, pictures=False) for row in range(len(table))]
    numbers, groups = all(_decimal(raw.user) for raw in raws), all(_decimal(raw.group) for raw in raws)
    fields: dict[str, pa.DataType] = {
        "are_different": pa.bool_(), "best_image_uid": pa.string(), "caption": pa.string(),
        "created_at": pa.timestamp("us"), "has_label": pa.bool_(), "image_0_uid": pa.string(), "image_1_uid": pa.string(),
        "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64(),
        "ranking_id": pa.int64() if groups else pa.string(), "user_id": pa.int64() if numbers else pa.string(),
    }  # fmt: skip
    fields |= {name: kind for name, kind in kinds.items() if name not in fields}
    fields |= dict.fromkeys(("mmalign_id", "mmalign_meta", "mmalign_scores", "mmalign_names"), pa.string())
    fields["mmalign_weight"] = pa.float32()
    fields["mmalign_p_chosen"] = pa.float32()
    with FolderWriter(out, pa.schema(list(fields.items())), media=("jpg_0", "jpg_1"), card=_PICKAPIC_CARD) as writer:
        with progress_bar("Exporting", len(table), enabled=progress) as advance:
            for row in range(len(table)):
                values = _pickapic_row(table, row, metas[row], known)
                writer.add_row(
                    {name: values.get(name) for name in fields}, sum(len(values[f"jpg_{n}"] or b"") for n in (0, 1))
                )
                advance(1)
        return ExportReport(path=out, target="pickapic", written=writer.count, counts={})


_PICKAPIC_CARD = """Pick-a-Pic's columns (yuvalkirstain/pickapic_v1). `mmalign_...` hold what those cannot: ids, weights, scores.
"""


def _pickapic_row(table: PairTable, row: int, meta: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    raw = table.raw(row)
    side = meta.get("chosen_side", 0)
    sides = {side: raw.chosen, 1 - side: raw.rejected}
    stored = table.values(row)
    names = {
        which: (stored[which] or {}).get("path") for which in ("chosen", "rejected") if isinstance(stored[which], dict)
    }
    label = {side: raw.p_chosen, 1 - side: None if raw.p_chosen is None else 1.0 - raw.p_chosen}
    picture = {number: _bytes(ref) for number, ref in sides.items()}
    uid = {side: names.get("chosen"), 1 - side: names.get("rejected")}
    values = {name: meta.get(name) for name in known}
    return {
        **values,
        "caption": raw.prompt,
        "jpg_0": picture[0], "jpg_1": picture[1],
        "label_0": label[0], "label_1": label[1],
        "image_0_uid": values.get("image_0_uid") or uid[0], "image_1_uid": values.get("image_1_uid") or uid[1],
        "has_label": True if values.get("has_label") is None else values["has_label"],
        "are_different": values.get("are_different", True),
        "best_image_uid": values.get("best_image_uid") or (uid[side] if raw.p_chosen != 0.5 else None),
        "created_at": _time(values.get("created_at")),
        "user_id": _plain_number(raw.user), "ranking_id": _plain_number(raw.group),
        "mmalign_id": raw.id, "mmalign_weight": raw.weight, "mmalign_p_chosen": raw.p_chosen,
        "mmalign_meta": json.dumps(dict(meta), ensure_ascii=False),
        "mmalign_scores": json.dumps(dict(raw.scores)) if raw.scores else None,
        "mmalign_names": json.dumps(names, ensure_ascii=False),
    }  # fmt: skip


def _bytes(ref: ImageRef) -> bytes | None:
    try:
        return read_bytes(ref)[0]
    except MediaError as error:
        if error.reason == "missing_image":
            return None  # as absent there as here; the check names such rows
        raise


def _kind_of(values: list[Any]) -> pa.DataType:
    try:
        kind = pa.array([value for value in values if value is not None]).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.string()
    return pa.string() if pa.types.is_null(kind) else kind


def _decimal(text: str | None) -> bool:
    return text is None or (text.isdecimal() and str(int(text)) == text and len(text) < 19)


def _plain_number(text: str | None) -> Any:
    return int(text) if text is not None and _decimal(text) else text


def _time(value: Any) -> Any:
    from datetime import datetime

    try:
        return datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------- answers about media
def _trl(table: VlmTable, out: Path, progress: bool) -> ExportReport:
    """Parquet in the canonical columns, which are TRL's; media as they are in the table, clips as files."""
    from mmalign.data.conversations import ConversationWriter
    from mmalign.data.formats.base import plain

    rewards = _rewards(table)
    with ConversationWriter(out, paired=table.kind == "pairs", rewards=rewards) as writer:
        with progress_bar("Exporting", len(table), enabled=progress) as advance:
            for row in range(len(table)):
                said = _row_of(table, row)
                writer.add(said, json.dumps(plain(dict(said.meta)), ensure_ascii=False))
                advance(1)
        return ExportReport(path=out, target="trl", written=writer.count, counts={})


def _swift(table: VlmTable, out: Path, progress: bool) -> ExportReport:
    """One JSON object a line with inline tags; pictures and clips as files named by their content."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: already exists; remove it or choose another name")
    counts: dict[str, int] = {}
    refused: list[dict[str, Any]] = []
    written = 0
    with (
        progress_bar("Exporting", len(table), enabled=progress) as advance,
        atomic_file(out / "train.jsonl") as handle,
    ):
        for row in range(len(table)):
            try:
                line = _swift_row(table, row, out)
            except TurnsError as error:
                counts[error.reason] = counts.get(error.reason, 0) + 1
                file, number = table.file_and_number(row)
                refused.append({"file": file, "row": number, "id": table.row_id(row), "reason": error.reason,
                                "detail": error.detail})  # fmt: skip
            else:
                handle.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                written += 1
            advance(1)
    if refused:
        with atomic_file(out / "import" / "quarantine.jsonl") as handle:
            for item in refused:
                handle.write((json.dumps(item, ensure_ascii=False) + "\n").encode())
    write_json(out / "import" / "report.json", {"format": "ms-swift", "written": written, "reasons": counts})
    return ExportReport(path=out, target="ms-swift", written=written, counts=counts)


def _swift_row(table: VlmTable, row: int, out: Path) -> dict[str, Any]:
    from mmalign.data.formats.base import plain

    said = _row_of(table, row)

    def flat(turns: list[Message]) -> list[dict[str, str]]:
        return [{"role": message["role"], "content": untagged(message["content"])} for message in turns]

    def files(items: Any, folder: str) -> list[str]:
        return [keep_file(item, out / folder, folder) for item in items]

    line: dict[str, Any] = {"id": said.id, "messages": flat([*said.prompt, *said.chosen])}
    if said.rejected is not None:
        simple = len(said.rejected) == 1 and len(said.chosen) == 1 and all(
            part["type"] == "text" for part in said.rejected[0]["content"]
        )  # fmt: skip
        if simple:
            line["rejected_response"] = untagged(said.rejected[0]["content"])
        else:
            line["rejected_messages"] = flat([*said.prompt, *said.rejected])
    if said.images:
        line["images"] = files(said.images, "images")
    if said.videos:
        line["videos"] = files(said.videos, "videos")
    if said.rejected_images is not None:
        line["rejected_images"] = files(said.rejected_images, "images")
    values = {name: getattr(said, name) for name in ("p_chosen", "margin", "weight", "stage", "user", "group")}
    if said.scores is not None:
        values["scores"] = {name: list(pair) for name, pair in said.scores.items()}
    values["meta"] = json.dumps(plain(dict(said.meta)), ensure_ascii=False)
    return {**line, **{name: value for name, value in values.items() if value is not None}}


def _rewards(table: VlmTable) -> tuple[str, ...]:
    for row in range(len(table)):
        scores = table.values(row).get("scores") if "scores" in table.columns else None
        return tuple(scores) if scores else ()
    return ()


def _row_of(table: VlmTable, row: int) -> Any:
    """A row with everything it holds, whatever the check would say of it.

    Raises:
        DataError: messages that are none, or media that cannot be read.
    """
    from mmalign.data.conversations import ConversationRow

    values = table.values(row)
    where = table.where(row)
    try:
        sides = {name: _turns(values.get(name)) for name in ("prompt", "chosen", "rejected", "completion")}
    except TurnsError as error:
        raise DataError(f"{where}: {error}") from error
    answer = sides["chosen"] if table.kind == "pairs" else sides["completion"]
    other = values.get("rejected_images")
    scores = values.get("scores")
    return ConversationRow(
        id=table.row_id(row),
        prompt=sides["prompt"] or [],
        chosen=answer or [],
        rejected=sides["rejected"],
        images=list(_media(table, values, row, "images")),
        videos=list(_media(table, values, row, "videos")),
        rejected_images=None if other is None else list(_media(table, values, row, "rejected_images")),
        p_chosen=values.get("p_chosen", 1.0) if table.kind == "pairs" else None,
        margin=values.get("margin"),
        weight=1.0 if values.get("weight") is None else float(values["weight"]),
        stage=values["stage"] if isinstance(values.get("stage"), int) else None,
        user=_text(values.get("user")),
        group=_text(values.get("group")),
        scores=None if not scores else {name: (pair[0], pair[1]) for name, pair in scores.items()},
        meta=table.meta(row),
    )


def _turns(value: Any) -> list[Message] | None:
    return None if value is None else messages(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _media(table: VlmTable, values: Mapping[str, Any], row: int, column: str) -> Iterator[MediaFile]:
    for number, value in enumerate(values.get(column) or ()):
        name = value.get("path") if isinstance(value, Mapping) else value if isinstance(value, str) else None
        ref = table.image(value, row, f"{column}[{number}]")
        try:
            if column == "videos" and ref.path is not None:
                yield MediaFile(path=Path(ref.path), name=name)
                continue
            data, _ = read_bytes(ref)
        except MediaError as error:
            raise DataError(f"{error}; export sound rows only: run 'mmalign data check' first") from error
        kind = image_kind(data)
        yield MediaFile(data=data, name=name or (None if kind is None else f"picture.{kind.pillow.lower()}"))
