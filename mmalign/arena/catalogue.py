"""The pictures an arena may show: groups of pictures of one prompt, from a folder, a table of pairs or of ranked lists.

A picture is named in addresses by an opaque key; nothing a browser sends is ever used as a path. Files are opened when they
are shown, again checked to lie below the source's folder, and judged by their content.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign import rng
from mmalign.errors import DataError
from mmalign.media import DEFAULT, MediaError, decode_image, image_kind, read_bytes
from mmalign.types import ImageRef

MOST_GROUPS = 5000
"""Larger sources are sampled by the seed: nobody looks at more, and every group is kept in memory."""
FOR_BROWSERS = frozenset({"image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/avif"})


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture that can be shown."""

    key: str
    """Names it in addresses."""
    origin: str
    """Where it comes from, for the vote's row."""
    open: Callable[[], bytes]
    """Its encoded bytes; raises MediaError."""


@dataclass(frozen=True, slots=True)
class Group:
    """Pictures of one prompt."""

    key: str
    prompt: str
    pictures: tuple[Picture, ...]


class Catalogue:
    """All groups, and what is known to be broken. Threads may ask at once; groups are only added."""

    def __init__(self, groups: Sequence[Group] = (), *, notes: Sequence[str] = ()) -> None:
        self._lock = threading.Lock()
        self._groups: dict[str, Group] = {}
        self._pictures: dict[str, Picture] = {}
        self._sound: set[str] = set()
        self._broken: dict[str, str] = {}
        self.notes = list(notes)
        """What was left out of the source, in words."""
        self.expected = 0
        """Groups there will be; more than there are while a model is still at work."""
        for group in groups:
            self.add(group)

    def add(self, group: Group) -> None:
        with self._lock:
            self._groups[group.key] = group
            self._pictures.update({picture.key: picture for picture in group.pictures})
            self.expected = max(self.expected, len(self._groups))

    def groups(self) -> list[Group]:
        with self._lock:
            return list(self._groups.values())

    def __len__(self) -> int:
        return len(self._groups)

    def group(self, key: str) -> Group | None:
        return self._groups.get(key)

    def picture(self, key: str) -> Picture | None:
        return self._pictures.get(key)

    def sound(self, picture: Picture) -> bool:
        """Whether the picture can be decoded; looked at once."""
        if picture.key in self._sound:
            return True
        if picture.key in self._broken:
            return False
        try:
            decode_image(picture.open(), DEFAULT, source=picture.origin)
        except (MediaError, DataError, OSError) as error:
            with self._lock:
                self._broken[picture.key] = f"{picture.origin}: {error}"
            return False
        with self._lock:
            self._sound.add(picture.key)
        return True

    def broken(self) -> list[str]:
        """Pictures that turned out not to be readable, in words."""
        return list(self._broken.values())


def servable(data: bytes, origin: str) -> tuple[bytes, str]:
    """Bytes and media type that every browser shows: the file itself, or a PNG of what browsers cannot read.

    Raises:
        MediaError: not a picture.
    """
    kind = image_kind(data)
    if kind is not None and kind.mime in FOR_BROWSERS:
        return data, kind.mime
    buffer = io.BytesIO()
    decode_image(data, DEFAULT, source=origin).image.save(buffer, "PNG")
    return buffer.getvalue(), "image/png"


def suffix(data: bytes) -> str:
    """The file name's ending for encoded bytes."""
    kind = image_kind(data)
    return "bin" if kind is None else {"JPEG": "jpg"}.get(kind.pillow, kind.pillow.lower())


def open_source(source: Path, *, seed: int, prompt: str | None = None) -> Catalogue:
    """The catalogue of a folder of pictures with prompts, or of a table of pairs or ranked lists.

    Args:
        prompt: of every picture, for folders that state none.

    Raises:
        DataError: nothing there, or no two pictures of one prompt.
    """
    if not source.exists():
        raise DataError(f"{source}: there is nothing; give a folder of pictures, a table, or a YAML file of mmalign generate")
    groups, notes = _from_table(source, seed) if is_table(source) else _from_folder(source, prompt)
    if not groups:
        told = "".join(f"\n  {note}" for note in notes)
        raise DataError(f"{source}: no prompt has two pictures{told}")
    if len(groups) > MOST_GROUPS:
        notes.append(f"{len(groups)} prompts; {MOST_GROUPS} of them, drawn by the seed, are shown")
        groups = sorted(groups, key=lambda group: rng.key(seed, "arena/sample", 0, group.key))[:MOST_GROUPS]
    return Catalogue(groups, notes=notes)


def is_table(source: Path) -> bool:
    """Whether a source is a table of ours rather than a folder of pictures."""
    if source.is_file():
        return source.suffix in (".parquet", ".arrow", ".jsonl", ".ndjson")
    return any(source.glob("*.parquet")) or any(source.glob("*.arrow")) or (source / "pairs.jsonl").is_file()


def _from_folder(folder: Path, prompt: str | None) -> tuple[list[Group], list[str]]:
    """Pictures that share a prompt make a group."""
    from mmalign.scoring.sources import Columns, ListSource

    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder, .parquet, .arrow, .jsonl or .yaml")
    source = ListSource.from_folder(folder, Columns(fixed_prompt=prompt))
    root = folder.resolve()
    by_prompt: dict[str, list[Picture]] = {}
    bad, silent = 0, 0
    for row in source.rows(0, len(source)):
        for image in row.images.values():
            if not isinstance(image, ImageRef):
                bad += 1
            elif row.prompt is None or not row.prompt.strip():
                silent += 1
            else:
                by_prompt.setdefault(row.prompt, []).append(_file(root, image, row.key))
    lone = sum(len(pictures) == 1 for pictures in by_prompt.values())
    notes = []
    if bad:
        notes.append(f"{bad} pictures are missing or lie outside the folder, and are not shown")
    if silent:
        notes.append(f"{silent} pictures have no prompt (metadata.jsonl, prompts.json, NAME.txt, or --prompt), and are not shown")
    if lone:
        notes.append(f"{lone} prompts have one picture only, and are not shown")
    groups = [
        Group(_key("prompt", text), text, tuple(pictures)) for text, pictures in by_prompt.items() if len(pictures) > 1
    ]
    return groups, notes


def _file(root: Path, image: ImageRef, name: str) -> Picture:
    def opened() -> bytes:
        # Looked at again: the file may have become a link since the folder was read.
        path = Path(str(image.path)).resolve()
        if not path.is_relative_to(root):
            raise MediaError(reason="missing_image", detail="lies outside the folder", source=name)
        return read_bytes(ImageRef(path=str(path), label=name))[0]

    return Picture(_key("file", str(root), name), name, opened)


def _from_table(source: Path, seed: int) -> tuple[list[Group], list[str]]:
    from mmalign.annotate import open_either

    table = open_either(source)
    rows: Sequence[int] = range(len(table))
    notes = []
    if len(rows) > MOST_GROUPS:
        notes.append(f"{len(table)} rows; {MOST_GROUPS} of them, drawn by the seed, are shown")
        rows = sorted(rows, key=lambda row: rng.key(seed, "arena/rows", row))[:MOST_GROUPS]
    groups, bad = [], 0
    for row in rows:
        try:
            record: Any = table[row]
        except DataError as error:
            bad += 1
            if bad == 1:
                notes.append(str(error))
            continue
        count = len(record.images) if hasattr(record, "images") else 2
        if count > 1:
            pictures = tuple(_cell(table, row, place, record.id) for place in range(count))
            groups.append(Group(_key("row", record.id), record.prompt, pictures))
    if bad:
        notes.append(f"{bad} rows cannot be used and are not shown; 'mmalign data check' lists them")
    return groups, notes


def _cell(table: Any, row: int, place: int, name: str) -> Picture:
    def opened() -> bytes:
        record = table[row]
        images = record.images if hasattr(record, "images") else (record.chosen, record.rejected)
        return read_bytes(images[place])[0]

    return Picture(_key("cell", table.fingerprint, str(row), str(place)), f"{name}#{place}", opened)


def _key(*parts: str) -> str:
    return hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
