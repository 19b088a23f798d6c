"""From a record to token ids: the chat template rendered once per answer, masks from spans, limits that never cut media.

The prefix is what the model sees when it generates; an answer's tokens are what the template writes after it: the answer,
the turn end, and what stands behind that (a newline, in many templates). Where a template writes no turn end, the
end-of-sequence token is appended: an answer that never ends would otherwise be as good as one that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.branches import Answer, BranchRecord, EncodedExample, EncodedRow, MediaRef, Unit
from mmalign.models.vlm.errors import VlmDataError
from mmalign.models.vlm.media import Clip, open_media

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmFamily

SENTINEL = "zqxjkv"
"""Stands for an answer where the template's own text around it is wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One answer's tokens with what was special about them."""

    ids: Tensor  # [L]
    weights: Tensor | None  # [L]
    flags: tuple[str, ...]


def encode(family: VlmFamily, record: BranchRecord, *, training: bool) -> EncodedExample:
    """See ``VlmFamily.encode``."""
    answers = record.answers if training else ()
    own = any(answer.media is not None for answer in answers)
    apart = own or record.joint or any(answer.messages is not None for answer in answers)
    if training and not answers:
        raise VlmDataError(record.id, "empty_answer", "the record has no answer")
    flags = ["own_media"] if own else []
    if not apart:
        row, more = _row(family, record, record.media, tuple(range(len(answers))))
        rows, flags = [row], [*flags, *more]
    else:
        rows = []
        for number, answer in enumerate(answers):
            asked = record if answer.messages is None else replace(record, messages=answer.messages)
            row, more = _row(family, asked, answer.media or record.media, (number,))
            rows.append(from_media(family, row) if record.joint else row)
            flags += more
        rows = together(rows)
        if len(rows) > 1 and not own:
            flags.append("own_prompt")
    pair = len(answers) == 2 and all(answer.label is None for answer in answers)
    labels = (1.0, 0.0) if pair else tuple(float("nan") if a.label is None else float(a.label) for a in answers)
    names = sorted({name for answer in answers for name in answer.scores})
    return EncodedExample(
        id=record.id, rows=tuple(rows), p_chosen=record.p_chosen, weight=record.weight, margin=record.margin,
        labels=labels, scores={n: tuple(float(a.scores.get(n, float("nan"))) for a in answers) for n in names},
        stage=record.stage, group=record.group, flags=tuple(dict.fromkeys(flags)),
    )  # fmt: skip


def from_media(family: VlmFamily, row: EncodedRow) -> EncodedRow:
    """The same tokens with the border moved: the prefix ends behind its last medium, the branch has the rest of the prompt.

    Without media the prefix is the first token, which nothing predicts.
    """
    seen = (family.token_types(row.prefix) > 0).nonzero()
    cut = int(seen[-1]) + 1 if len(seen) else 1
    moved = row.prefix[cut:]
    weights = tuple(None if weight is None else torch.cat([torch.ones(len(moved)), weight]) for weight in row.weights)
    branches = tuple(torch.cat([moved, branch]) for branch in row.branches)
    return replace(row, prefix=row.prefix[:cut], branches=branches, weights=weights)


def together(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """Rows of one branch each as one row where their prefixes are the same, media included; else as they are."""
    first, cut = rows[0], len(rows[0].prefix)
    for row in rows[1:]:
        same_media = [unit.digest for unit in row.units] == [unit.digest for unit in first.units]
        if not same_media or not torch.equal(row.prefix, first.prefix) or not torch.equal(
            row.positions[..., :cut], first.positions[..., :cut]
        ):  # fmt: skip
            return list(rows)
    types = None if first.token_types is None else torch.cat(
        [first.token_types, *[row.token_types[cut:] for row in rows[1:] if row.token_types is not None]]
    )  # fmt: skip
    return [
        replace(
            first, branches=tuple(branch for row in rows for branch in row.branches),
            weights=tuple(weight for row in rows for weight in row.weights),
            answers=tuple(number for row in rows for number in row.answers), token_types=types,
            positions=torch.cat([first.positions, *[row.positions[..., cut:] for row in rows[1:]]], dim=-1),
        )
    ]  # fmt: skip


def conversation(record: BranchRecord, media: Sequence[MediaRef]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates take.

    Raises:
        VlmDataError: placeholder_mismatch, a part that names no media, or media that no part names.
    """
    named = [part.media for message in record.messages for part in message.parts if part.media is not None]
    if sorted(named) != list(range(len(media))):
        raise VlmDataError(
            record.id, "placeholder_mismatch", f"the messages name media {sorted(named)}, the record has {len(media)}"
        )

    def content(part: Any) -> dict[str, Any]:
        if part.media is None:
            return {"type": "text", "text": part.text or ""}
        return {"type": "image" if _is_image(media[part.media]) else "video"}

    return [
        {"role": message.role, "content": [content(part) for part in message.parts]} for message in record.messages
    ]


def _is_image(reference: MediaRef) -> bool:
    from mmalign.types import ImageRef

    return isinstance(reference, ImageRef)


def _row(
    family: VlmFamily, record: BranchRecord, media: Sequence[MediaRef], numbers: tuple[int, ...]
) -> tuple[EncodedRow, list[str]]:
    messages = conversation(record, media)
    text = render(family, record.id, messages, generation=True)
    prefix, units = _prefix(family, record, text, media)
    limit = family.config.max_prefix
    if limit is not None and len(prefix) > limit:
        raise VlmDataError(record.id, "too_long", f"the prompt has {len(prefix)} tokens, max_prefix is {limit}")
    cap = family.config.max_answer
    if family.config.max_length is not None:
        room = family.config.max_length - len(prefix)
        if room < 1:
            detail = f"the prompt has {len(prefix)} tokens of max_length {family.config.max_length}; media are never cut"
            raise VlmDataError(record.id, "too_long", detail)
        cap = room if cap is None else min(cap, room)
    tokens = [_answer(family, record.id, messages, text, record.answers[number], cap) for number in numbers]
    types = family.token_types(prefix)
    start = family.positions(prefix, types, units)
    after = start.new_tensor(family.next_position(start))
    tails = [after + torch.arange(len(item.ids)) for item in tokens]
    if start.ndim == 2:
        tails = [tail.expand(len(start), -1) for tail in tails]
    extended = torch.cat([types, *[torch.zeros(len(item.ids), dtype=torch.int64) for item in tokens]])
    row = EncodedRow(
        prefix=prefix, branches=tuple(item.ids for item in tokens), weights=tuple(item.weights for item in tokens),
        answers=numbers, positions=torch.cat([start, *tails], dim=-1), token_types=extended, units=tuple(units),
    )  # fmt: skip
    return row, [flag for item in tokens for flag in item.flags]


def render(family: VlmFamily, record: str, messages: list[dict[str, Any]], *, generation: bool) -> str:
    """The chat template's text.

    Raises:
        VlmDataError: template, when it refuses the messages (roles that do not alternate, a system turn it lacks).
    """
    from jinja2 import TemplateError

    try:
        return str(family.local_processor().apply_chat_template(messages, add_generation_prompt=generation, tokenize=False))
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        raise VlmDataError(record, "template", f"the chat template refuses the messages: {error}") from error


def opened(
    family: VlmFamily, record: BranchRecord, media: Sequence[MediaRef]
) -> tuple[list[Image.Image], list[Clip]]:
    """Decoded pictures and clips, each in the order in which the messages name them."""
    order = [part.media for message in record.messages for part in message.parts if part.media is not None]
    settings = family.config
    found = [
        open_media(
            record.id, media[number], fps=settings.video_fps, max_frames=settings.max_frames, read_clip=family.read_clip
        )
        for number in order
    ]
    return [item for item in found if isinstance(item, Image.Image)], [item for item in found if isinstance(item, Clip)]


def _prefix(
    family: VlmFamily, record: BranchRecord, text: str, media: Sequence[MediaRef]
) -> tuple[Tensor, list[Unit]]:
    """Token ids of the prompt with expanded placeholders, and the units in the order of their placeholders."""
    images, clips = opened(family, record, media)
    for kind, count in (("image", len(images)), ("video", len(clips))):
        mark = family.mark(kind)
        found = text.count(mark) if mark else 0
        if found != count:
            raise VlmDataError(
                record.id, "placeholder_mismatch",
                f"the rendered prompt has {found} marks '{mark}' for {count} {kind}s: does its text hold the mark, or has"
                " the model no input of this kind?",
            )  # fmt: skip
    if images and clips and not family.mixes_media:
        raise VlmDataError(
            record.id, "placeholder_mismatch",
            "this model's processor takes pictures or clips in a prompt, not both: it would lose the pictures",
        )  # fmt: skip
    processor = family.local_processor()
    options: dict[str, Any] = {"images": images} if images else {}
    if clips:
        options |= {"videos": [clip.frames for clip in clips], "do_sample_frames": False,
                    "video_metadata": [_metadata(clip) for clip in clips]}  # fmt: skip
    try:
        found_inputs = processor(text=[text], return_tensors="pt", add_special_tokens=_adds_special(family, text), **options)
    except (ValueError, IndexError, RuntimeError, TypeError, KeyError) as error:
        raise VlmDataError(record.id, "undecodable_media", f"the processor refuses it: {error}") from error
    return found_inputs["input_ids"][0], family.units(found_inputs)


def _metadata(clip: Clip) -> Any:
    from transformers.video_utils import VideoMetadata

    height, width = clip.frames.shape[1:3]
    return VideoMetadata(
        total_num_frames=clip.total, fps=clip.fps, duration=clip.total / clip.fps, frames_indices=list(clip.indices),
        height=int(height), width=int(width),
    )  # fmt: skip


def _adds_special(family: VlmFamily, text: str) -> bool:
    """Whether the tokenizer should add its start token: not when the template has written it."""
    return not starts_itself(family, text)


def starts_itself(family: VlmFamily, text: str) -> bool:
    """Whether a rendered prompt needs no start token: the template has written it, or wants none."""
    bos = family.tokenizer.bos_token
    return family.config.template_only or bool(bos and text.startswith(bos))


def _answer(
    family: VlmFamily, record: str, messages: list[dict[str, Any]], prompt: str, answer: Answer, cap: int | None
) -> Tokens:
    tail, body = _placed(family, record, messages, prompt, answer.text)
    stop = body + len(answer.text.strip())
    closed = family.config.template_only or any(mark in tail[stop:] for mark in family.end_marks)
    if not closed:
        tail = tail[:stop]  # white space that a template without turn ends puts behind an answer
    ids, offsets, flags = _tokenize(family, prompt, tail, spans=bool(answer.spans))
    if not closed:
        ids = [*ids, family.tokenizer.eos_token_id]
    if cap is not None and len(ids) > cap:
        ids = ids[:cap]
        flags.append("truncated")
    _refuse_placeholders(family, record, ids)
    lead = body - (len(answer.text) - len(answer.text.lstrip()))
    weights = _weights(answer, len(ids), [(first - lead, last - lead) for first, last in offsets]) if answer.spans else None
    return Tokens(ids=torch.tensor(ids, dtype=torch.int64), weights=weights, flags=tuple(flags))


def spread(family: VlmFamily, record: BranchRecord, text: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """An answer's tokens as `encode` makes them, without what the template writes behind it, and where each lies in it.

    Returns:
        ids ``[L]``, and for each the characters [first, end) of the stripped text; white space that the template puts in
        front has negative places.

    Raises:
        VlmDataError: as `encode`.
    """
    text, messages = text.strip(), conversation(record, record.media)
    prompt = render(family, record.id, messages, generation=True)
    tail, body = _placed(family, record.id, messages, prompt, text)
    ids, offsets, _ = _tokenize(family, prompt, tail, spans=True)
    places = [(first - body, last - body) for first, last in offsets]
    count = next((number for number, (first, last) in enumerate(places) if first >= len(text) and last > first), len(places))
    _refuse_placeholders(family, record.id, ids[:count])
    return torch.tensor(ids[:count], dtype=torch.int64), places[:count]


def _placed(family: VlmFamily, record: str, messages: list[dict[str, Any]], prompt: str, answer: str) -> tuple[str, int]:
    """What the template writes after the prompt for this answer, and where in it the stripped answer begins."""
    if not answer.strip():
        raise VlmDataError(record, "empty_answer", "an answer without text")
    tail = _continuation(family, record, messages, prompt, answer)
    body = tail.find(answer.strip())
    if body < 0:
        raise VlmDataError(record, "template", "the chat template changes the answer's text")
    return tail, body


def _refuse_placeholders(family: VlmFamily, record: str, ids: list[int]) -> None:
    if family.placeholder_ids & set(ids):
        raise VlmDataError(record, "placeholder_in_answer", "an answer holds the token that stands for a picture or clip")


def _tokenize(
    family: VlmFamily, prompt: str, tail: str, *, spans: bool
) -> tuple[list[int], list[tuple[int, int]], list[str]]:
    """Tokens of what follows the prompt, with their characters in it where asked for, and flags."""
    processor = family.local_processor()
    special = _adds_special(family, prompt)
    before = processor.tokenizer(prompt, add_special_tokens=special).input_ids
    found = processor.tokenizer(prompt + tail, add_special_tokens=special, return_offsets_mapping=spans)
    if found.input_ids[: len(before)] == before:
        offsets = found["offset_mapping"][len(before) :] if spans else []
        return found.input_ids[len(before) :], [(first - len(prompt), last - len(prompt)) for first, last in offsets], []
    # Tokens merge across the border. The model generates after the prompt's own tokens, so the answer keeps to them.
    found = processor.tokenizer(tail, add_special_tokens=False, return_offsets_mapping=spans)
    return found.input_ids, list(found["offset_mapping"]) if spans else [], ["border"]


def _continuation(family: VlmFamily, record: str, messages: list[dict[str, Any]], prompt: str, answer: str) -> str:
    """What the template writes after the prompt for this answer, turn end included."""

    def turn(text: str) -> list[dict[str, Any]]:
        return [*messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]

    whole = render(family, record, turn(answer), generation=False)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    # The generation prompt is no prefix (an empty thinking block, other white space): only the turn end is the template's.
    probe = render(family, record, turn(SENTINEL), generation=False)
    place = probe.rfind(SENTINEL)
    if place < 0:
        raise VlmDataError(record, "template", "the chat template does not render the assistant's turn")
    return answer + probe[place + len(SENTINEL) :]


def _weights(answer: Answer, length: int, offsets: Sequence[tuple[int, int]]) -> Tensor:
    """The weight of the span that a token's middle lies in; 1 elsewhere and at the turn end."""
    out = np.ones(length, dtype=np.float32)
    for place, (first, last) in enumerate(offsets[:length]):
        for begin, end, weight in answer.spans:
            if begin <= (first + last) / 2 < end:
                out[place] = weight
    return torch.from_numpy(out)
