"""One row of a vision-language table: from messages as people write them to a checked `BranchRecord`.

Accepts the conversational form of TRL (turns with typed parts, or plain text), media in order of appearance. Nothing is
repaired: a row that cannot be used is a `RowProblem` with column, reason and detail.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from mmalign.branches import Answer, BranchRecord, MediaRef, Message, Part
from mmalign.errors import DataError

PLACEHOLDER: Final = re.compile(r"<(image|video)>")
KINDS: Final = ("image", "video")


class RowProblem(DataError):
    """A row that cannot be used.

    Args:
        reason: one of `mmalign.data.reasons`.
    """

    def __init__(self, column: str, reason: str, detail: str) -> None:
        self.column, self.reason, self.detail = column, reason, detail
        super().__init__(f"column '{column}': {reason}: {detail}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn as written: (kind, text) parts in order, kind being text, image or video."""

    role: str
    parts: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        return "".join(text for kind, text in self.parts if kind == "text")

    @property
    def media(self) -> tuple[str, ...]:
        return tuple(kind for kind, _ in self.parts if kind != "text")


def turns_of(value: Any, column: str, *, role: str) -> tuple[Turn, ...]:
    """Messages as turns; plain text is one turn of `role`.

    Raises:
        RowProblem: no list of messages, or a part of an unknown type.
    """
    if isinstance(value, str):
        return (Turn(role=role, parts=(("text", value),)),)
    if not isinstance(value, Sequence) or not value:
        missing = {"prompt": "empty_prompt", "chosen": "missing_chosen", "rejected": "missing_rejected"}
        raise RowProblem(column, missing.get(column, "empty_answer"), "no messages")
    return tuple(_turn(item, column) for item in value)


def _turn(item: Any, column: str) -> Turn:
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        raise RowProblem(column, "bad_turns", "a message needs the keys 'role' and 'content'")
    content = item["content"]
    if content is None or isinstance(content, str):
        return Turn(role=str(item["role"]), parts=(("text", content or ""),))
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(("text", part))
            continue
        kind = str(part.get("type")) if isinstance(part, Mapping) else ""
        if kind not in ("text", *KINDS):
            raise RowProblem(column, "bad_turns", f"a part of type '{kind}'; known are text, image and video")
        parts.append((kind, str(part.get("text") or "") if kind == "text" else ""))
    return Turn(role=str(item["role"]), parts=tuple(parts))


def split_shared(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], ...]:
    """Whole conversations as (prompt, chosen, rejected): the shared turns are the prompt, the last ones the answers.

    Raises:
        RowProblem: the conversations differ before their last turn.
    """
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise RowProblem(
            "rejected", "bad_turns", "without a prompt, both conversations must agree up to their last turn"
        )
    return chosen[:-1], chosen[-1:], rejected[-1:]


def answer_text(turns: tuple[Turn, ...], column: str) -> str:
    """The text of one answer.

    Raises:
        RowProblem: several turns, another role than assistant, media in the answer, or nothing said.
    """
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = ", ".join(turn.role for turn in turns)
        raise RowProblem(column, "bad_turns", f"an answer is one turn of the assistant, got {roles}")
    if turns[0].media or PLACEHOLDER.search(turns[0].text):
        raise RowProblem(column, "placeholder_in_answer", "an answer holds text alone, and no placeholder of media")
    if not turns[0].text.strip():
        raise RowProblem(column, f"empty_{column}" if column in ("chosen", "rejected") else "empty_answer", "nothing is said")
    return turns[0].text


def messages_of(turns: tuple[Turn, ...], counts: Mapping[str, int]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The prompt's turns with numbered media, and the kinds of media in order of appearance.

    A prompt that names no media at all gets those of the row in front of its first user turn, clips behind pictures; tags
    ``<image>`` and ``<video>`` in the text stand for media where no part has a type.

    Args:
        counts: how many pictures and clips the row has.

    Raises:
        RowProblem: other turns than system, user and assistant, the last not the user's, no words of the user, a last turn with
            nothing in it, or another
            number of media than the row has.
    """
    roles = [turn.role for turn in turns]
    if set(roles) - {"system", "user", "assistant"} or roles[-1] != "user":
        raise RowProblem(
            "prompt", "bad_turns", f"expected system, user and assistant, the user last; got {', '.join(roles)}"
        )
    parts = [list(turn.parts) for turn in turns]
    if not any(turn.media for turn in turns):
        parts = [_tags(turn) for turn in turns]
    kinds = [kind for turn in parts for kind, _ in turn if kind != "text"]
    if not kinds and any(counts.values()):
        first = roles.index("user")
        parts[first] = [(kind, "") for kind in KINDS for _ in range(counts[kind])] + parts[first]
        kinds = [kind for kind, _ in parts[first] if kind != "text"]
    for kind in KINDS:
        if kinds.count(kind) != counts[kind]:
            raise RowProblem(
                f"{kind}s",
                "placeholder_count_mismatch",
                f"the prompt names {kinds.count(kind)} of them, the row holds {counts[kind]}",
            )
    asked = [text for role, turn in zip(roles, parts, strict=True) if role == "user" for kind, text in turn if kind == "text"]
    if not any(text.strip() for text in asked) or not any(kind != "text" or text.strip() for kind, text in parts[-1]):
        raise RowProblem("prompt", "empty_prompt", "no text")
    number, messages = 0, []
    for role, turn in zip(roles, parts, strict=True):
        made = []
        for kind, text in turn:
            made.append(Part(text=text) if kind == "text" else Part(media=number))
            number += kind != "text"
        messages.append(
            Message(role=cast(Literal["system", "user", "assistant"], role),
                    parts=tuple(part for part in made if part.media is not None or part.text))
        )  # fmt: skip
    return tuple(messages), tuple(kinds)


def _tags(turn: Turn) -> list[tuple[str, str]]:
    """A turn of plain text with its tags as parts."""
    pieces = PLACEHOLDER.split(turn.text)
    found = [(piece, "") if at % 2 else ("text", piece) for at, piece in enumerate(pieces)]
    return [part for part in found if part[0] != "text" or part[1]]


def ordered(kinds: Sequence[str], images: Sequence[MediaRef], videos: Sequence[MediaRef]) -> tuple[MediaRef, ...]:
    """Pictures and clips of a row in the order in which the prompt names them."""
    streams = {"image": iter(images), "video": iter(videos)}
    return tuple(next(streams[kind]) for kind in kinds)


def reference_of(values: Mapping[str, Any]) -> str | None:
    """The reference answer of a row: text, or one turn of the assistant; None where the column says nothing.

    Raises:
        RowProblem: something else, or nothing said.
    """
    value = values.get("reference")
    return None if value is None else answer_text(turns_of(value, "reference", role="assistant"), "reference")


def number_of(values: Mapping[str, Any], column: str, default: float) -> float:
    """A finite number of a row.

    Raises:
        RowProblem: something else.
    """
    value = values.get(column)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowProblem(column, "non_finite_score", f"{value!r} is not a finite number")
    return float(value)


def probability_of(values: Mapping[str, Any]) -> float:
    """p_chosen of a pair, 1 where the column is absent.

    Raises:
        RowProblem: null, or outside [0.5, 1].
    """
    if "p_chosen" in values and values["p_chosen"] is None:
        raise RowProblem("p_chosen", "no_label", "null")
    found = number_of(values, "p_chosen", 1.0)
    if not 0.5 <= found <= 1.0:
        raise RowProblem(
            "p_chosen", "label_out_of_range", f"{found} is not in [0.5, 1]; swap chosen and rejected for less"
        )
    return found


def scores_of(values: Mapping[str, Any], count: int, *, may_lack: bool = False) -> list[dict[str, float]]:
    """Reward -> score of every answer.

    Args:
        may_lack: null stands for an answer that a judge could not score; it then lacks that reward.

    Raises:
        RowProblem: a list of another length, or a number that is not finite.
    """
    found: list[dict[str, float]] = [{} for _ in range(count)]
    for name, given in (values.get("scores") or {}).items():
        if given is None:
            continue
        there = [value for value in given if value is not None or not may_lack]
        if len(given) != count or any(value is None or not math.isfinite(value) for value in there):
            raise RowProblem(f"scores.{name}", "non_finite_score", f"expected {count} finite numbers, got {given}")
        for answer, value in zip(found, given, strict=True):
            if value is not None:
                answer[name] = float(value)
    return found


def pair_record(
    row_id: str, values: Mapping[str, Any], media: Callable[[str], tuple[MediaRef, ...]], *, stage: int
) -> BranchRecord:
    """A pair: columns prompt (or whole conversations), chosen and rejected; `media` reads one column of media.

    Raises:
        RowProblem: anything that makes the row unusable.
    """
    chosen = turns_of(values["chosen"], "chosen", role="assistant")
    rejected = turns_of(values["rejected"], "rejected", role="assistant")
    if values.get("prompt") is None:
        prompt, chosen, rejected = split_shared(chosen, rejected)
    else:
        prompt = turns_of(values["prompt"], "prompt", role="user")
    texts = (answer_text(chosen, "chosen"), answer_text(rejected, "rejected"))
    images, videos = media("images"), media("videos")
    messages, kinds = messages_of(prompt, {"image": len(images), "video": len(videos)})
    other = media("rejected_images") if values.get("rejected_images") else None
    if other is not None and len(other) != len(images):
        raise RowProblem("rejected_images", "placeholder_count_mismatch", f"{len(other)} pictures in place of {len(images)}")
    own = None
    if values.get("rejected_prompt") is not None:
        own, own_kinds = messages_of(
            turns_of(values["rejected_prompt"], "rejected_prompt", role="user"), {"image": len(images), "video": len(videos)}
        )
        if own_kinds != kinds:
            raise RowProblem("rejected_prompt", "placeholder_count_mismatch", "it names the media in another order than prompt")
    scores = scores_of(values, 2)
    return BranchRecord(
        id=row_id, messages=messages, media=ordered(kinds, images, videos),
        answers=(
            Answer(text=texts[0], scores=scores[0]),
            Answer(
                text=texts[1], scores=scores[1], media=None if other is None else ordered(kinds, other, videos), messages=own
            ),
        ),
        p_chosen=probability_of(values), weight=_weight(values), margin=number_of(values, "margin", 0.0), stage=stage,
        group=_text(values.get("group")),
    )  # fmt: skip


def list_record(
    row_id: str, values: Mapping[str, Any], media: Callable[[str], tuple[MediaRef, ...]], *, stage: int, column: str | None
) -> BranchRecord:
    """A prompt with one labelled answer (`column` completion), several scored ones (`column` answers), or none (None).

    Raises:
        RowProblem: anything that makes the row unusable.
    """
    single = column == "completion"
    texts: list[str] = []
    if column is not None:
        given = [values[column]] if single else list(values[column] or ())
        if not given:
            raise RowProblem(column, "too_few", "no answers")
        texts = [answer_text(turns_of(value, column, role="assistant"), column) for value in given]
    label = values.get("label") if single else None
    if label is not None and not isinstance(label, bool):
        raise RowProblem("label", "label_out_of_range", f"expected true or false, got {label!r}")
    images, videos = media("images"), media("videos")
    messages, kinds = messages_of(
        turns_of(values["prompt"], "prompt", role="user"), {"image": len(images), "video": len(videos)}
    )
    scores = scores_of(values, len(texts), may_lack=True) if column == "answers" else [{}] * len(texts)
    return BranchRecord(
        id=row_id, messages=messages, media=ordered(kinds, images, videos),
        answers=tuple(
            Answer(text=text, label=None if label is None else float(label), scores=said)
            for text, said in zip(texts, scores, strict=True)
        ),
        weight=_weight(values), stage=stage, group=_text(values.get("group")),
    )  # fmt: skip


def _weight(values: Mapping[str, Any]) -> float:
    found = number_of(values, "weight", 1.0)
    if found < 0:
        raise RowProblem("weight", "non_finite_score", f"{found} is not a weight")
    return found


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
