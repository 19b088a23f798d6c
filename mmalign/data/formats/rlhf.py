"""Preferences about one picture in the RLHF-V family: RLHF-V, RLAIF-V and VLFeedback."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mmalign.data.formats.answers import AnswersReader, Draft, Refusal, answer_text, one_picture, question_parts
from mmalign.data.formats.rowfiles import Row
from mmalign.data.turns import say, turn
from mmalign.errors import DataError

TURN = ("question", "chosen", "rejected")


def _one_turn(values: Mapping[str, Any], images: Sequence[Any], used: Sequence[str], **more: Any) -> Draft:
    chosen, rejected = (answer_text(values.get(side), side) for side in ("chosen", "rejected"))
    return Draft(
        prompt=[turn("user", question_parts(values.get("question"), "question"))],
        chosen=[say("assistant", chosen)],
        rejected=[say("assistant", rejected)],
        images=images,
        used=used,
        **more,
    )


class RlhfvReader(AnswersReader):
    """RLHF-V (Yu et al., arXiv:2312.00849; hub: openbmb/RLHF-V-Dataset): `text` is JSON with question, chosen, rejected."""

    PREFIX: ClassVar[str] = "rlhfv"

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        return {"text", "image"} <= set(row) and not {"question", "chosen", "conversations"} & set(row)

    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        try:
            said = json.loads(row.values.get("text"))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise Refusal("text", "unsupported_format", f"not JSON: {error}") from error
        if not isinstance(said, dict):
            raise Refusal("text", "unsupported_format", "not an object with question, chosen and rejected")
        more = {name: value for name, value in said.items() if name not in TURN}
        yield _one_turn(said, one_picture(row.values, "image"), ("text", "image"), meta=more)


class RlaifvReader(AnswersReader):
    """RLAIF-V (Yu et al., arXiv:2405.17220; hub: openbmb/RLAIF-V-Dataset): columns question, chosen, rejected, image."""

    PREFIX: ClassVar[str] = "rlaifv"

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        return {*TURN, "image"} <= set(row)

    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        yield _one_turn(row.values, one_picture(row.values, "image"), (*TURN, "image"))


class VlfeedbackReader(AnswersReader):
    """VLFeedback (Li et al., arXiv:2312.10665; hub: MMInstruction/VLFeedback): several answers, rated by aspect.

    An answer's score is the mean of its ratings; an answer with a rating that is no number is left out and listed.
    Option `rule`: ``best_worst`` (default: the highest against the lowest score) or ``all_pairs`` (every two
    answers); option `min_margin`: the smallest difference that makes a pair. Equal scores make none and are listed as
    ties.
    """

    PREFIX: ClassVar[str] = "vlfeedback"
    OPTIONS: ClassVar[Mapping[str, str]] = {"rule": "best_worst", "min_margin": "0"}

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        return {"prompt", "completions"} <= set(row) and bool({"img_path", "image", "images"} & set(row))

    def reward_names(self) -> tuple[str, ...]:
        return ("rating",)

    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        rule = self.options["rule"]
        if rule not in ("best_worst", "all_pairs"):
            raise DataError(f"{self.source}: the option 'rule' is '{rule}', expected best_worst or all_pairs")
        margin = self.number_option("min_margin")
        answers = _completions(row.values.get("completions"))
        scored: list[tuple[int, str, float]] = []
        for number, answer in enumerate(answers):
            column = f"completions[{number}]"
            found = _mean_rating(answer.get("annotations"))
            text = answer.get("response")
            if not isinstance(text, str):
                yield Refusal(column, "missing_rejected", "no answer")
            elif isinstance(found, str):
                yield Refusal(column, "non_finite_score", found)
            else:
                scored.append((number, text, found))
        if len(scored) < 2:
            raise Refusal("completions", "too_few", f"{len(scored)} rated answers make no pair")
        for better, worse in _chosen_pairs(scored, rule):
            difference = better[2] - worse[2]
            which = f"{better[0]}-{worse[0]}"
            if difference == 0:
                yield Refusal("completions", "tie", f"answers {which}: both score {better[2]:g}")
            elif difference < margin:
                yield Refusal("completions", "below_margin", f"answers {which}: {difference:g} < {margin:g}")
            else:
                yield self._draft(row, better, worse, answers)

    def _draft(
        self,
        row: Row,
        better: tuple[int, str, float],
        worse: tuple[int, str, float],
        answers: Sequence[Mapping[str, Any]],
    ) -> Draft:
        models = {
            side: answers[number].get("model") for side, number in (("chosen", better[0]), ("rejected", worse[0]))
        }
        return Draft(
            prompt=[turn("user", question_parts(row.values.get("prompt"), "prompt"))],
            chosen=[say("assistant", better[1])],
            rejected=[say("assistant", worse[1])],
            images=one_picture(row.values, "img_path", "image", "images"),
            scores={"rating": (better[2], worse[2])},
            used=("prompt", "completions", "img_path", "image", "images"),
            meta={"models": models} if any(models.values()) else {},
            part=f"{better[0]}-{worse[0]}",
        )


def _completions(value: Any) -> list[dict[str, Any]]:
    """Answers as objects, from a list of objects or from an object of lists (as Arrow keeps a list of objects)."""
    if isinstance(value, Mapping):
        return _rows_of(value)
    if not isinstance(value, list):
        raise Refusal("completions", "unsupported_format", f"{type(value).__name__} is no list of answers")
    return [dict(item) for item in value if isinstance(item, Mapping)]


def _rows_of(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = {name: _rows_of(value) if isinstance(value, Mapping) else value for name, value in columns.items()}
    length = max((len(value) for value in lists.values() if isinstance(value, list)), default=0)
    return [
        {name: value[number] for name, value in lists.items() if isinstance(value, list) and number < len(value)}
        for number in range(length)
    ]


def _mean_rating(annotations: Any) -> float | str:
    """The mean of all aspects' ratings, or what is wrong with them."""
    if not isinstance(annotations, Mapping) or not annotations:
        return "no ratings"
    ratings = []
    for aspect, said in annotations.items():
        if said is None:
            continue
        given = said.get("Rating") if isinstance(said, Mapping) else None
        try:
            rating = float(str(given).strip())
        except ValueError:
            return f"{aspect}: the rating {given!r} is no number"
        if not math.isfinite(rating):
            return f"{aspect}: the rating {given!r} is not finite"
        ratings.append(rating)
    return sum(ratings) / len(ratings) if ratings else "no ratings"


def _chosen_pairs(
    scored: list[tuple[int, str, float]], rule: str
) -> Iterator[tuple[tuple[int, str, float], tuple[int, str, float]]]:
    if rule == "best_worst":
        best = max(scored, key=lambda item: item[2])
        yield best, min((item for item in scored if item is not best), key=lambda item: item[2])
        return
    for left, right in itertools.combinations(scored, 2):
        yield (left, right) if left[2] >= right[2] else (right, left)
