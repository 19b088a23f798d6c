"""Sampled rows as rows of a table: messages, media with their bytes, answers, and where they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.branches import MediaRef, VideoRef
from mmalign.data.conversations import MediaFile, content_of, keep_file
from mmalign.data.formats.base import plain
from mmalign.sampling.base import SampledRow
from mmalign.types import ImageRef

MEDIA = "media"
"""Folder of clips within the table."""


def table_row(
    row: SampledRow, kind: str, rewards: tuple[str, ...], folder: Path, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Values by column; clips are put into `folder` under the name of their content.

    Args:
        kind: ``pairs`` or ``lists``.
        rewards: names in the column `scores`.
        provenance: goes into ``meta.sampled``, with what the sampler says of the row.

    Raises:
        DataError: a picture or clip cannot be read.
        ValueError: a pair without two answers, or an answer that says nothing.
    """
    if (len(row.answers) != 2 if kind == "pairs" else len(row.answers) < 2) or not all(text.strip() for text in row.answers):
        raise ValueError(f"row '{row.id}': a row of {kind} needs its answers, got {list(row.answers)}")
    record = row.record
    order = [part.media for message in record.messages for part in message.parts if part.media is not None]
    media = [record.media[number] for number in order]
    said = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in row.answers]
    known = {key: plain(value) for key, value in record.meta.items() if key != "sampled"}
    values: dict[str, Any] = {
        "id": row.id, "prompt": _messages(record.messages, record.media),
        "images": [_picture(item) for item in media if isinstance(item, ImageRef)],
        "videos": [_clip(item, folder) for item in media if isinstance(item, VideoRef)],
        "stage": row.stage, "group": row.group if row.group is not None else record.group,
        "meta": json.dumps({**known, "sampled": {**provenance, **row.meta}}, ensure_ascii=False),
    }  # fmt: skip
    values |= {"chosen": said[0], "rejected": said[1]} if kind == "pairs" else {"answers": said}
    if rewards:
        values["scores"] = {name: _numbers(row.scores.get(name)) for name in rewards}
    return values


def _numbers(values: Any) -> list[float | None] | None:
    return None if values is None else [None if value is None else float(value) for value in values]


def _messages(messages: Any, media: tuple[MediaRef, ...]) -> list[dict[str, Any]]:
    def content(part: Any) -> dict[str, Any]:
        if part.media is None:
            return {"type": "text", "text": part.text or ""}
        return {"type": "image" if isinstance(media[part.media], ImageRef) else "video", "text": None}

    return [{"role": message.role, "content": [content(part) for part in message.parts]} for message in messages]


def _file(item: ImageRef | VideoRef) -> MediaFile:
    return MediaFile(data=item.data, path=None if item.path is None else Path(item.path))


def _picture(item: ImageRef) -> dict[str, Any]:
    return {"bytes": content_of(_file(item)), "path": Path(item.path).name if item.path else None}


def _clip(item: VideoRef, folder: Path) -> dict[str, Any]:
    where = None if item.frames else keep_file(_file(item), folder / MEDIA, MEDIA)
    frames = [_picture(frame) for frame in item.frames] or None
    return {"path": where, "bytes": None, "frames": frames, "fps": item.fps, "start": item.start, "end": item.end}
