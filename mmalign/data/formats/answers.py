"""What readers of preferences between answers share: media found and placed, rows named, defects turned into reasons."""

from __future__ import annotations

import base64
import binascii
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from mmalign.data.conversations import ConversationRow, MediaFile
from mmalign.data.formats.base import Names, Reader
from mmalign.data.formats.rowfiles import Row, RowFiles, first_row
from mmalign.data.reasons import Problem
from mmalign.data.tables import inside
from mmalign.data.turns import Message, Part, TurnsError, place_media, tagged
from mmalign.errors import DataError
from mmalign.media import MediaError, read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A row on its way: messages are ours already, media are as the source names them."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message] | None
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    rejected_images: Sequence[Any] | None = None
    p_chosen: float | None = 1.0
    margin: float | None = None
    scores: Mapping[str, tuple[float, float]] | None = None
    used: Sequence[str] = ()
    """Columns that are expressed by the fields above; the others go to `meta`."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """More for `meta`."""
    strict: bool = False
    """Media need places of their own in the prompt."""
    stage: int | None = None
    part: str = ""
    """Which of several rows that one source row gives."""


class Refusal(Exception):
    """A source row that gives no row, or one of the rows it could give."""

    def __init__(self, column: str, reason: str, detail: str) -> None:
        self.column, self.reason, self.detail = column, reason, detail
        super().__init__(f"column '{column}': {reason}: {detail}")


class AnswersReader(Reader):
    """Reads rows of JSON, JSONL or Parquet files; a format says which columns it knows and what they mean."""

    KIND: ClassVar[str] = "answers"
    PREFIX: ClassVar[str] = "answers"
    """Beginning of the ids it makes."""

    def __init__(self, source: Path, split: str | None, **settings: Any) -> None:
        super().__init__(source, split, **settings)
        self._files = RowFiles(source, split, keep_broken=True)

    @classmethod
    @abstractmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        """True when the columns (and kinds of values) of a row are of this format."""

    @abstractmethod
    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        """What one source row gives.

        Raises:
            Refusal, TurnsError: it gives nothing.
        """

    @classmethod
    def recognises(cls, source: Path) -> bool:
        row = first_row(source)
        return row is not None and cls.fits(row)

    def total(self) -> int:
        return self._files.total()

    def source_rows(self) -> Iterator[Row]:
        """The rows as they are, those that can be read."""
        return (row for row in self._files if not row.broken)

    def rows(self) -> Iterator[ConversationRow | Problem]:
        names, given = Names(self.PREFIX), _Given()
        for row in self._files:
            if row.broken:
                yield self.broken(row, names)
                continue
            try:
                for draft in self.drafts(row):
                    name = given.name(row) or names.name(*_identity(row))
                    if isinstance(draft, Refusal):
                        yield _problem(row, name, draft.column, draft.reason, draft.detail)
                        continue
                    yield self._finish(row, draft, f"{name}:{draft.part}" if draft.part else name)
            except Refusal as found:
                yield _problem(
                    row, given.name(row) or names.name(*_identity(row)), found.column, found.reason, found.detail
                )
            except TurnsError as found:
                yield _problem(
                    row, given.name(row) or names.name(*_identity(row)), "prompt", found.reason, found.detail
                )

    def _finish(self, row: Row, draft: Draft, name: str) -> ConversationRow | Problem:
        column = "images"
        values = row.values
        try:
            images = [self._media(value, "image") for value in draft.images]
            column = "rejected_images"
            other = None
            if draft.rejected_images is not None:
                other = [self._media(value, "image") for value in _several(draft.rejected_images)]
                other = None if [_key(item) for item in other] == [_key(item) for item in images] else other
            column = "videos"
            videos = [self._media(value, "video") for value in draft.videos]
            numbers = {
                name: _number(values.get(name), default, name)
                for name, default in (("p_chosen", draft.p_chosen), ("margin", draft.margin), ("weight", 1.0))
            }
            column = "prompt"
            have = {"image": len(images), "video": len(videos)}
            prompt = place_media(draft.prompt, [draft.chosen], have, strict=draft.strict)
        except MediaError as error:
            return _problem(row, name, column, error.reason, error.detail)
        except TurnsError as error:
            return _problem(row, name, column, error.reason, error.detail)
        except Refusal as found:
            return _problem(row, name, found.column, found.reason, found.detail)
        return ConversationRow(
            id=name, prompt=prompt, chosen=draft.chosen, rejected=draft.rejected, images=images, videos=videos,
            rejected_images=other, p_chosen=numbers["p_chosen"], margin=numbers["margin"], weight=numbers["weight"] or 0.0,
            stage=values["stage"] if isinstance(values.get("stage"), int) else draft.stage, user=_text(values.get("user")),
            group=_text(values.get("group")), scores=draft.scores, meta=_meta(values, draft),
        )  # fmt: skip

    def broken(self, row: Row, names: Names) -> Problem:
        """A line that is no row, as its entry in the list of what is not used."""
        return _problem(row, names.name(row.file.name, row.number, row.broken), "", "unsupported_format", row.broken)

    def problem(self, row: Row, name: str, found: Refusal) -> Problem:
        """A refusal as the row's entry in the list."""
        return _problem(row, name, found.column, found.reason, found.detail)

    def _media(self, value: Any, kind: str) -> MediaFile:
        """A picture or clip as the source names it.

        Raises:
            MediaError: it is not there.
        """
        missing = "missing_image" if kind == "image" else "unreadable_video"
        path = value.get("path") if isinstance(value, Mapping) else value
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(data, bytes):
            return MediaFile(data=data, name=path if isinstance(path, str) else None)
        if not isinstance(path, str) or not path:
            raise MediaError(reason=missing, detail="neither a path nor bytes")
        if path.startswith("data:"):
            try:
                return MediaFile(data=base64.b64decode(path.partition(",")[2], validate=True))
            except binascii.Error as error:
                raise MediaError(reason=missing, detail=f"its data address is not base64: {error}") from error
        if path.partition("://")[0] in ("http", "https", "s3", "gs"):
            raise MediaError(reason=missing, detail=f"{path}: an address; fetch the file first")
        found = self._inside(path.removeprefix("file://"), missing)
        if kind == "image":
            return MediaFile(data=read_bytes(found)[0], path=found, name=path)
        if not found.is_file():
            raise MediaError(reason=missing, detail=f"{found}: no such file")
        return MediaFile(path=found, name=path)

    def _inside(self, path: str, reason: str) -> Path:
        root = self.media.resolve()
        pure = PurePosixPath(path)
        if pure.is_absolute() and Path(path).resolve().is_relative_to(root):
            path = str(Path(path).resolve().relative_to(root))
        try:
            return inside(root, path, "media")
        except DataError as error:
            raise MediaError(reason=reason, detail=f"{error}; name their folder with --media") from error


class _Given:
    """Ids that the source itself gives; the second row with one is named by its content instead."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[Path, int]] = {}

    def name(self, row: Row) -> str | None:
        given = row.values.get("id")
        if given is None or given == "":
            return None
        place = (row.file, row.number)
        return str(given) if self._rows.setdefault(str(given), place) == place else None


def _identity(row: Row) -> list[Any]:
    """All that a row says, pictures by their bytes' place in it."""
    return [[name, row.values[name]] for name in sorted(row.values) if row.values[name] is not None]


def _key(item: MediaFile) -> Any:
    return item.data if item.data is not None else str(item.path)


def _meta(values: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    known = {"id", "p_chosen", "margin", "weight", "user", "group", "scores", "meta", *draft.used}
    kept = {name: value for name, value in values.items() if name not in known and value is not None}
    if isinstance(values.get("stage"), int):
        kept.pop("stage", None)
    given = values.get("meta")
    if isinstance(given, str) and given:
        try:
            given = json.loads(given)
        except ValueError:
            given = {"meta": given}
    return {**(given if isinstance(given, dict) else {}), **kept, **draft.meta}


def _number(value: Any, default: float | None, column: str) -> float | None:
    """A number beside the messages; one that is not finite is left to the check, which names it.

    Raises:
        Refusal: something else.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal(column, "non_finite_score", f"{value!r:.80} is no number")
    return float(value)


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _problem(row: Row, name: str, column: str, reason: str, detail: str) -> Problem:
    return Problem(file=row.file.name, row=row.number, id=name, column=column, reason=reason, detail=detail)


def listed(values: Mapping[str, Any], *columns: str) -> list[Any]:
    """The media that the first of some columns to hold any names, one or several."""
    for column in columns:
        given = values.get(column)
        if given is None:
            continue
        return _several(given)
    return []


def one_picture(values: Mapping[str, Any], *columns: str) -> list[Any]:
    """As `listed`, for formats whose every row is about a picture.

    Raises:
        Refusal: missing_image.
    """
    found = listed(values, *columns)
    if not found:
        raise Refusal(columns[0], "missing_image", "no picture")
    return found


def question_parts(value: Any, column: str) -> list[Part]:
    """A question given as text with tags; a null one has no parts, and is then refused by the check as empty_prompt.

    Raises:
        Refusal: not text.
        TurnsError: it has a tag for sound.
    """
    if value is not None and not isinstance(value, str):
        raise Refusal(column, "unsupported_format", f"{type(value).__name__} is no text")
    return tagged(value or "")


def answer_text(value: Any, column: str) -> str:
    """An answer given as plain text; a null one has the reason `missing_chosen` or `missing_rejected`.

    Raises:
        Refusal: null, or not text.
    """
    if not isinstance(value, str):
        side = "rejected" if "rejected" in column else "chosen"
        raise Refusal(column, f"missing_{side}", "no answer" if value is None else f"{type(value).__name__} is no text")
    return value
