"""Readers of benchmark files in the manner of Video-MME, MLVU, TempCompass and Vinoground, into one form.

The layouts are those of the published files as we know them; a file that differs is refused with the key that it lacks, never
guessed at.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.errors import DataError

LETTERS = "ABCDEFGHIJ"
_OPTION = re.compile(r"^\s*\(?([A-J])[.):]\s*(.+?)\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoQuestion:
    """One question with options, of which one is right."""

    id: str
    videos: tuple[Path, ...]
    question: str
    options: tuple[str, ...]
    """Without letters."""
    answer: int
    """Number of the right option."""
    group: str = ""
    """Kind of task or aspect, for accuracy by group."""
    pair: str | None = None
    """Questions of one pair count together where a benchmark says so (Vinoground)."""
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_benchmark(name: str, file: Path, videos: Path) -> list[VideoQuestion]:
    """All questions of a file.

    Args:
        name: one of `READERS`.
        file: JSON, JSONL, CSV or Parquet, as the format has it.
        videos: folder of the films.

    Raises:
        DataError: the file cannot be read, or a row lacks something; names file, row and key.
    """
    found = list(READERS[name](file, videos))
    if not found:
        raise DataError(f"{file}: holds no questions")
    ids = [question.id for question in found]
    if len(set(ids)) != len(ids):
        repeated = next(item for item in ids if ids.count(item) > 1)
        raise DataError(f"{file}: two questions have the id '{repeated}'")
    return found


def _rows(file: Path) -> list[Any]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_table(file).to_pylist())
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        if file.suffix in (".jsonl", ".ndjson"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        loaded = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return loaded if isinstance(loaded, list) else [loaded]


def _need(row: Any, key: str, file: Path, number: int) -> Any:
    if not isinstance(row, Mapping) or row.get(key) in (None, ""):
        raise DataError(f"{file}, row {number}: lacks '{key}'")
    return row[key]


def _options(values: Sequence[Any], file: Path, number: int) -> tuple[str, ...]:
    """Options with or without letters in front."""
    texts = [str(value) for value in values]
    if not 2 <= len(texts) <= len(LETTERS):
        raise DataError(f"{file}, row {number}: {len(texts)} options")
    found = [_OPTION.match(text) for text in texts]
    if all(match is not None and match[1] == LETTERS[place] for place, match in enumerate(found)):
        return tuple(match[2] for match in found if match is not None)
    return tuple(text.strip() for text in texts)


def _right(answer: str, options: Sequence[str], file: Path, number: int) -> int:
    """Number of the option that an answer names by letter, by letter and text, or by text."""
    plain = answer.strip()
    match = _OPTION.match(plain)
    letter = plain if len(plain) == 1 else match[1] if match is not None else ""
    if letter and letter in LETTERS[: len(options)]:
        return LETTERS.index(letter)
    if plain in options:
        return list(options).index(plain)
    raise DataError(f"{file}, row {number}: the answer '{answer}' is none of its options")


def videomme(file: Path, videos: Path) -> Iterator[VideoQuestion]:
    """Video-MME: videoID, question_id, question, options with letters, answer (a letter), task_type, duration."""
    for number, row in enumerate(_rows(file)):
        options = _options(_need(row, "options", file, number), file, number)
        yield VideoQuestion(
            id=str(_need(row, "question_id", file, number)), videos=(_film(videos, str(_need(row, "videoID", file, number))),),
            question=str(_need(row, "question", file, number)), options=options,
            answer=_right(str(_need(row, "answer", file, number)), options, file, number), group=str(row.get("task_type") or ""),
            meta={"duration": row.get("duration")},
        )  # fmt: skip


def mlvu(file: Path, videos: Path) -> Iterator[VideoQuestion]:
    """MLVU: video, question, candidates, answer (a candidate's text), question_type."""
    for number, row in enumerate(_rows(file)):
        options = _options(_need(row, "candidates", file, number), file, number)
        yield VideoQuestion(
            id=f"{file.stem}-{number}", videos=(_film(videos, str(_need(row, "video", file, number))),),
            question=str(_need(row, "question", file, number)), options=options, group=str(row.get("question_type") or ""),
            answer=_right(str(_need(row, "answer", file, number)), options, file, number),
        )  # fmt: skip


def tempcompass(file: Path, videos: Path) -> Iterator[VideoQuestion]:
    """TempCompass: {film: {aspect: [{question, answer}]}}; options stand in the question, one a line, or are yes and no."""
    for number, whole in enumerate(_rows(file)):
        if not isinstance(whole, Mapping):
            raise DataError(f"{file}: expected films with aspects")
        for film, aspects in whole.items():
            if not isinstance(aspects, Mapping):
                raise DataError(f"{file}, film {film}: expected aspects with questions")
            for aspect, asked in aspects.items():
                for place, row in enumerate(asked):
                    text, answer = str(_need(row, "question", file, number)), str(_need(row, "answer", file, number))
                    lines = text.splitlines()
                    marked = [line for line in lines if _OPTION.match(line)]
                    if answer.strip().lower().rstrip(".") in ("yes", "no"):
                        options: tuple[str, ...] = ("yes", "no")
                        right = int(answer.strip().lower().startswith("no"))
                    else:
                        options = _options(marked, file, number)
                        right = _right(answer, options, file, number)
                    yield VideoQuestion(
                        id=f"{film}-{aspect}-{place}", videos=(_film(videos, str(film)),), options=options, answer=right,
                        question="\n".join(line for line in lines if line not in marked).strip(), group=str(aspect),
                    )  # fmt: skip


def vinoground(file: Path, videos: Path) -> Iterator[VideoQuestion]:
    """Vinoground: index, pos_vid, neg_vid, pos_cap, neg_cap, major. Four questions a pair: which caption fits each film
    (`text`), and which of both films fits each caption (`video`); a pair counts where both of a kind are right."""
    for number, row in enumerate(_rows(file)):
        keys = ("index", "pos_vid", "neg_vid", "pos_cap", "neg_cap")
        name, pos, neg, pos_cap, neg_cap = (str(_need(row, key, file, number)) for key in keys)
        films, captions = (_film(videos, pos), _film(videos, neg)), (pos_cap, neg_cap)
        for side in (0, 1):
            yield VideoQuestion(
                id=f"{name}-text-{side}", videos=(films[side],), question="Which caption best describes this video?",
                options=captions, answer=side, group="text", pair=f"{name}-text",
            )  # fmt: skip
            yield VideoQuestion(
                id=f"{name}-video-{side}", videos=films, options=("the first video", "the second video"), answer=side,
                group="video", question=f"Which video fits the caption? Caption: {captions[side]}", pair=f"{name}-video",
            )  # fmt: skip


def choices(file: Path, videos: Path) -> Iterator[VideoQuestion]:
    """The plain form of our own: id, video, question, options, answer (a letter or an option's text), group."""
    for number, row in enumerate(_rows(file)):
        options = _options(_need(row, "options", file, number), file, number)
        yield VideoQuestion(
            id=str(_need(row, "id", file, number)), videos=(_film(videos, str(_need(row, "video", file, number))),),
            question=str(_need(row, "question", file, number)), options=options,
            answer=_right(str(_need(row, "answer", file, number)), options, file, number), group=str(row.get("group") or ""),
        )  # fmt: skip


def _film(folder: Path, name: str) -> Path:
    """The file of a film named with or without its ending.

    Raises:
        DataError: the name leads out of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"the film '{name}' lies outside {folder}")
    if path.is_file() or path.suffix:
        return path
    named = [path.with_name(path.name + end) for end in (".mp4", ".mkv", ".webm", ".avi")]
    return next((found for found in named if found.is_file()), named[0])


READERS = {"videomme": videomme, "mlvu": mlvu, "tempcompass": tempcompass, "vinoground": vinoground, "choices": choices}
