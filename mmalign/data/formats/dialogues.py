"""Preferences written as dialogues: TRL, ms-swift, LLaMA-Factory's sharegpt, POVID, and LLaVA's single answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mmalign.data.formats.answers import AnswersReader, Draft, Refusal, answer_text, listed
from mmalign.data.formats.rowfiles import Row
from mmalign.data.turns import Message, messages, say, split_answer, split_shared, tagged, turn

IMAGES = ("images", "image")
VIDEOS = ("videos", "video")


class TrlReader(AnswersReader):
    """TRL's preference sets with pictures: `prompt, chosen, rejected` as message lists or text; without `prompt`, two whole
    dialogues whose shared turns are it. Columns of ours beside them (`id, p_chosen, weight, ...`) are taken as what
    they are.
    """

    PREFIX: ClassVar[str] = "trl"

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        if not {"chosen", "rejected"} <= set(row) or {"conversations", "messages", "question"} & set(row):
            return False
        return isinstance(row["chosen"], list) or bool(
            isinstance(row["chosen"], str) and isinstance(row.get("prompt"), str) and {*IMAGES, *VIDEOS} & set(row)
        )

    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        values = row.values
        found: dict[str, list[Any]] = {"image": [], "video": []}
        sides: dict[str, list[Message]] = {}
        for side in ("chosen", "rejected"):
            given = values.get(side)
            if given is None or given == []:
                raise Refusal(side, f"missing_{side}", "no answer")
            if not isinstance(given, list | str):
                raise Refusal(side, "unsupported_format", f"{type(given).__name__} is no answer")
            sides[side] = [say("assistant", given)] if isinstance(given, str) else messages(given, media=None)
        prompt, chosen, rejected = _shared(values.get("prompt"), sides["chosen"], sides["rejected"], found)
        yield Draft(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            images=listed(values, *IMAGES) or found["image"],
            videos=listed(values, *VIDEOS) or found["video"],
            rejected_images=values.get("rejected_images"),
            scores=_scores(values, self.reward_names()),
            used=("prompt", "chosen", "rejected", *IMAGES, *VIDEOS, "rejected_images"),
        )

    def reward_names(self) -> tuple[str, ...]:
        return _reward_names(self)


def _shared(
    prompt: Any, chosen: list[Message], rejected: list[Message], found: dict[str, list[Any]]
) -> tuple[list[Message], list[Message], list[Message]]:
    if prompt is None:
        return split_shared(chosen, rejected)
    turns = [turn("user", tagged(prompt))] if isinstance(prompt, str) else messages(prompt, media=found)
    return turns, chosen, rejected


class SwiftReader(AnswersReader):
    """ms-swift's preference files: `messages` ending with the chosen answer; `rejected_response`, `rejected_messages` or
    `rejected_images`; `<image>` and `<video>` tags in the text (modelscope/ms-swift, docs: Custom dataset).
    """

    PREFIX: ClassVar[str] = "msswift"

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        return "messages" in row and bool({"rejected_response", "rejected_messages", "rejected_images"} & set(row))

    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        values = row.values
        if values.get("audios"):
            raise Refusal("audios", "unsupported_format", "sound is not read")
        if values.get("rejected_videos"):
            raise Refusal("rejected_videos", "unsupported_format", "other clips for the rejected answer are not read")
        dialogue = messages(values.get("messages"))
        prompt, chosen = split_answer(dialogue)
        for number, (start, good, bad) in enumerate(self._rejected(values, dialogue, prompt, chosen)):
            yield Draft(
                prompt=start, chosen=good, rejected=bad, images=listed(values, *IMAGES), videos=listed(values,
                *VIDEOS), rejected_images=values.get("rejected_images"), scores=_scores(values, self.reward_names()),
                used=("messages", "rejected_response", "rejected_messages", "rejected_images", "rejected_videos",
                "audios", *IMAGES, *VIDEOS), part=str(number) if number else "", )  # fmt: skip

    def _rejected(
        self, values: Mapping[str, Any], dialogue: list[Message], prompt: list[Message], chosen: list[Message]
    ) -> Iterator[tuple[list[Message], list[Message], list[Message]]]:
        if values.get("rejected_messages"):
            other = messages(values["rejected_messages"])
            if other[-1:] == chosen and other[:-1] == prompt:
                yield prompt, chosen, chosen
            else:
                yield split_shared(dialogue, other)
            return
        given = values.get("rejected_response")
        if given is None and values.get("rejected_images"):
            yield prompt, chosen, chosen
            return
        for answer in given if isinstance(given, list) and given else [given]:
            yield prompt, chosen, [say("assistant", answer_text(answer, "rejected_response"))]

    def reward_names(self) -> tuple[str, ...]:
        return _reward_names(self)


class LlamaFactoryReader(AnswersReader):
    """LLaMA-Factory's sharegpt preference files: `conversations` ending with a question, `chosen` and `rejected` as one turn
    each, `images` and `videos`; every file needs its tag (hiyouga/LLaMA-Factory, data/README.md).
    """

    PREFIX: ClassVar[str] = "llamafactory"

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        return {"conversations", "chosen", "rejected"} <= set(row)

    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        values = row.values
        prompt = messages(values.get("conversations"))
        if values.get("system"):
            prompt = [say("system", str(values["system"])), *prompt]
        answers = []
        for side in ("chosen", "rejected"):
            if not values.get(side):
                raise Refusal(side, f"missing_{side}", "no answer")
            given = values[side]
            answers.append([say("assistant", given)] if isinstance(given, str) else messages([given]))
        yield Draft(
            prompt=prompt,
            chosen=answers[0],
            rejected=answers[1],
            images=listed(values, *IMAGES),
            videos=listed(values, *VIDEOS),
            used=("conversations", "chosen", "rejected", "system", *IMAGES, *VIDEOS),
            strict=True,
        )


class PovidReader(AnswersReader):
    """POVID (Zhou et al., arXiv:2402.11411; YiyangZhou/POVID): LLaVA dialogues, `rejected_conversations` a whole second one."""

    PREFIX: ClassVar[str] = "povid"

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        return {"conversations", "rejected_conversations"} <= set(row)

    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        values = row.values
        if not values.get("rejected_conversations"):
            raise Refusal("rejected_conversations", "missing_rejected", "no second dialogue")
        prompt, chosen, rejected = split_shared(
            messages(values.get("conversations")), messages(values["rejected_conversations"])
        )
        for column, side in (("conversations", chosen), ("rejected_conversations", rejected)):
            if not side:
                reason = "missing_rejected" if column != "conversations" else "missing_chosen"
                raise Refusal(column, reason, "the dialogue has no answer of its own")
        yield Draft(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            images=listed(values, *IMAGES),
            videos=listed(values, *VIDEOS),
            used=("conversations", "rejected_conversations", *IMAGES, *VIDEOS),
        )


class LlavaReader(AnswersReader):
    """LLaVA's instruction files and LLaVA-Video-178K (arXiv:2304.08485, arXiv:2410.02713): dialogues about a picture or a clip.

    They hold no preference: each becomes a prompt with one answer, the last of its dialogue.
    """

    KIND: ClassVar[str] = "single"
    PREFIX: ClassVar[str] = "llava"

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        others = {"rejected_conversations", "chosen", "rejected"}
        return "conversations" in row and not others & set(row) and bool({*IMAGES, *VIDEOS} & set(row))

    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        values = row.values
        prompt, answer = split_answer(messages(values.get("conversations")))
        clips = listed(values, *VIDEOS)
        # LLaVA-Video's files write `<image>` where the clip belongs.
        if clips and not listed(values, *IMAGES):
            prompt = [_renamed(message) for message in prompt]
        yield Draft(
            prompt=prompt,
            chosen=answer,
            rejected=None,
            p_chosen=None,
            images=listed(values, *IMAGES),
            videos=clips,
            used=("conversations", *IMAGES, *VIDEOS),
        )


def _renamed(message: Message) -> Message:
    parts = [{"type": "video", "text": None} if part["type"] == "image" else part for part in message["content"]]
    return turn(message["role"], parts)


def _reward_names(reader: AnswersReader) -> tuple[str, ...]:
    """Names of the `scores` column, where the source has ours."""
    for row in reader.source_rows():
        given = row.values.get("scores")
        return tuple(given) if isinstance(given, Mapping) else ()
    return ()


def _scores(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, tuple[float, float]] | None:
    given = values.get("scores")
    if not names:
        return None
    found: dict[str, tuple[float, float]] = {}
    for name in names:
        pair = given.get(name) if isinstance(given, Mapping) else None
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(value, int | float) for value in pair):
            raise Refusal("scores", "non_finite_score", f"{name}: expected two numbers, got {pair}")
        found[name] = (float(pair[0]), float(pair[1]))
    return found
