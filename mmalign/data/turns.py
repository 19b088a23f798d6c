"""Messages in the one form of ours, from the forms that data sets use: inline tags, parts, plain text, `from`/`value` turns.

The form is TRL's conversational one: a list of ``{"role", "content"}``, content a list of ``{"type": "text", "text": ...}``,
``{"type": "image"}`` and ``{"type": "video"}``. Neighbouring text parts are one part, there are no empty ones, and the line break
that data sets put between a tag and the words is no part of the words. Media are listed beside the messages, in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

Part = dict[str, Any]
Message = dict[str, Any]

ROLES: Final = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system",
}  # fmt: skip
TAG: Final = re.compile(r"<(image|video|audio)>")
MEDIA_KINDS: Final = ("image", "video")


class TurnsError(Exception):
    """Messages that have no form of ours; `reason` is one of the fixed reasons."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def media_part(kind: str) -> Part:
    return {"type": kind, "text": None}


def turn(role: str, parts: Sequence[Part]) -> Message:
    return {"role": role, "content": list(parts)}


def say(role: str, text: str) -> Message:
    """A turn of words alone; tags in them are words."""
    return turn(role, [text_part(text)] if text else [])


def tagged(text: str) -> list[Part]:
    """Text with ``<image>`` and ``<video>`` tags as parts.

    Raises:
        TurnsError: it has a tag for sound.
    """
    pieces = TAG.split(text)
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            if piece not in MEDIA_KINDS:
                raise TurnsError("unsupported_format", f"<{piece}>: sound is not read")
            parts.append(media_part(piece))
            continue
        words = piece.removeprefix("\n") if number else piece
        words = words.removesuffix("\n") if number + 1 < len(pieces) else words
        if words:
            parts.append(text_part(words))
    return parts


def untagged(parts: Sequence[Part]) -> str:
    """The inverse of `tagged`.

    Raises:
        TurnsError: words that would be read as a tag.
    """
    words = ""
    for number, part in enumerate(parts):
        if part["type"] in MEDIA_KINDS:
            words += f"<{part['type']}>"
            continue
        text = str(part["text"])
        if TAG.search(text):
            raise TurnsError("placeholder_count_mismatch", f"the words hold a tag themselves: {text[:80]!r}")
        # One line break beside a tag is read as layout, so one that belongs to the words needs a second.
        text = "\n" + text if number and text.startswith("\n") else text
        words += text + "\n" if number + 1 < len(parts) and text.endswith("\n") else text
    return words


def messages(value: Any, *, media: dict[str, list[Any]] | None = None) -> list[Message]:
    """A conversation in our form.

    Args:
        value: turns with role/content or from/value; content is text with tags, or parts.
        media: collects pictures and clips that lie inside the parts, by kind.

    Raises:
        TurnsError: a role or a part that has no meaning here.
    """
    if not isinstance(value, list | tuple):
        raise TurnsError("unsupported_format", f"expected a list of turns, got {type(value).__name__}")
    return [_message(item, media) for item in value]


def _message(item: Any, media: dict[str, list[Any]] | None) -> Message:
    if not isinstance(item, Mapping):
        raise TurnsError("unsupported_format", f"a turn is {type(item).__name__}, expected an object")
    name = str(item.get("role", item.get("from")))
    role = ROLES.get(name)
    if role is None:
        raise TurnsError("unsupported_format", f"role '{name}' is not one of {', '.join(ROLES)}")
    content = item.get("content", item.get("value"))
    if content is None:
        return turn(role, [])
    if isinstance(content, str):
        return turn(role, tagged(content))
    if not isinstance(content, list | tuple):
        raise TurnsError("unsupported_format", f"content is {type(content).__name__}, expected text or parts")
    return turn(role, merged([part for piece in content for part in _parts(piece, media)]))


def _parts(piece: Any, media: dict[str, list[Any]] | None) -> list[Part]:
    if isinstance(piece, str):
        return [text_part(piece)] if piece else []
    if not isinstance(piece, Mapping):
        raise TurnsError("unsupported_format", f"a part is {type(piece).__name__}, expected an object")
    kind = str(piece.get("type"))
    if kind == "text":
        text = piece.get("text")
        if text is not None and not isinstance(text, str):
            raise TurnsError("unsupported_format", f"the text of a part is {type(text).__name__}")
        return [text_part(text)] if text else []
    kind = kind.removesuffix("_url")
    if kind not in MEDIA_KINDS:
        raise TurnsError("unsupported_format", f"parts of type '{kind}' are not read")
    inside = piece.get(kind) or piece.get(f"{kind}_url")
    if inside is not None and media is not None:
        media[kind].append(inside["url"] if isinstance(inside, Mapping) and "url" in inside else inside)
    return [media_part(kind)]


def merged(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring words as one part."""
    out: list[Part] = []
    for part in parts:
        if part["type"] == "text" and out and out[-1]["type"] == "text":
            out[-1] = text_part(out[-1]["text"] + part["text"])
        else:
            out.append(part)
    return out


def count_media(turns: Sequence[Message]) -> dict[str, int]:
    """How many pictures and clips the turns stand for."""
    kinds = [part["type"] for message in turns for part in message["content"]]
    return {kind: kinds.count(kind) for kind in MEDIA_KINDS}


def words(turns: Sequence[Message]) -> str:
    """All text of some turns, turn by turn."""
    return "\n".join("".join(part["text"] or "" for part in message["content"]) for message in turns)


def place_media(
    prompt: list[Message], answers: Sequence[Sequence[Message]], have: Mapping[str, int], *, strict: bool = False
) -> list[Message]:
    """The prompt with a place for every picture and clip.

    Where nothing says where media belong, they stand in front of the first user turn's words, pictures first, as TRL and ms-swift
    do; otherwise the numbers must agree, kind by kind.

    Args:
        prompt: shared turns.
        answers: turns that may have places of their own.
        have: number of files by kind.
        strict: a prompt without any place is a mismatch too.

    Raises:
        TurnsError: placeholder_count_mismatch.
    """
    said = count_media([*prompt, *(message for turns in answers for message in turns)])
    if sum(said.values()) == 0 and not strict:
        return front(prompt, have)
    for kind in MEDIA_KINDS:
        if said[kind] != have.get(kind, 0):
            raise TurnsError(
                "placeholder_count_mismatch", f"{said[kind]} places for {have.get(kind, 0)} files of kind {kind}"
            )
    return prompt


def front(prompt: list[Message], have: Mapping[str, int]) -> list[Message]:
    """The prompt with its media in front of the first user turn's words."""
    places = [media_part(kind) for kind in MEDIA_KINDS for _ in range(have.get(kind, 0))]
    if not places:
        return prompt
    for number, message in enumerate(prompt):
        if message["role"] == "user":
            opened = turn("user", [*places, *message["content"]])
            return [*prompt[:number], opened, *prompt[number + 1 :]]
    raise TurnsError("placeholder_count_mismatch", f"{len(places)} files and no user turn that could show them")


def split_shared(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Two whole dialogues as (shared turns, chosen rest, rejected rest); the shared turns end with a user's.

    Raises:
        TurnsError: the dialogues begin differently.
    """
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    while length and chosen[length - 1]["role"] == "assistant":
        length -= 1
    if length == 0:
        raise TurnsError("different_prompts", "the two dialogues share no question")
    return chosen[:length], chosen[length:], rejected[length:]


def split_answer(dialogue: list[Message]) -> tuple[list[Message], list[Message]]:
    """A dialogue as (prompt, last answer).

    Raises:
        TurnsError: it does not end with an answer.
    """
    if not dialogue or dialogue[-1]["role"] != "assistant":
        raise TurnsError("missing_chosen", "the dialogue does not end with an answer")
    return dialogue[:-1], dialogue[-1:]
