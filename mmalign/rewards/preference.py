"""A model as judge of answers: which of two is better, asked in both orders (the annotator of arXiv:2407.02477).

    prefer:<folder or hub id>          any model that transformers loads: with pictures, or of text alone
    prefer-api:<url>#<model>           behind an OpenAI-compatible endpoint; the key from the variable MMALIGN_JUDGE_KEY

A verdict counts where both orders name the same answer; where they do not, the judge went by the place and the two are a tie.
Of more than two answers every pair is asked. An answer's score is its wins less its losses, per comparison that could be read,
in [-1, 1]; where no reply could be read it is missing, which is never a tie. The question is ours; it asks for fewer
hallucinations first and helpfulness second, as the paper's annotator was. Showing that one the reference answer did not help, and
is off here (`show_reference`). Asking in both orders is our choice: the paper saw no bias towards a place.

Not for: ratings of one answer (``mmalign.rewards.judge``).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from mmalign.branches import BranchRecord, VideoRef
from mmalign.config import Section
from mmalign.errors import RewardError
from mmalign.media import MediaError, Sampler, decode_video, open_image
from mmalign.rewards.vlm import Question
from mmalign.types import ImageRef

QUESTION = (
    "{media}A user asked:\n{question}\n\n{reference}Answer 1:\n{first}\n\nAnswer 2:\n{second}\n\n"
    "Which answer says fewer things that are not true of what is shown? If they are equal in that, which one helps more? Length "
    "and style do not matter. Reply with exactly one of: Answer 1 is better. / Answer 2 is better. / Both are equally good."
)
PLACES = ("{question}", "{first}", "{second}")
SHOWN = {"{media}", "{reference}", *PLACES}
FRAMES = 8
"""Frames of a clip that a judge is shown, evenly spread."""


class Asker(Protocol):
    """What answers questions: a local model, or one behind an endpoint."""

    def reply(self, questions: Sequence[Question], *, max_tokens: int) -> list[str]:
        """One reply per question; empty where there is none."""


class PreferenceOptions(Section):
    """How a model is asked (`method.judge_options`)."""

    question: str = QUESTION
    """With {question}, {first} and {second} once each; {media} and {reference} where there is something to say."""
    show_reference: bool = False
    """Show the reference answer of the table (`meta.reference`, else the chosen answer)."""
    max_tokens: int = 32
    """Most tokens of a reply."""
    dtype: str | None = None
    """Precision of a local model."""
    device: str | None = None
    """Where a local model runs; default: a GPU where there is one."""
    batch_size: int = 16
    """Comparisons asked at a time of a local model; both orders each."""
    timeout: float = 120.0
    """Seconds that an endpoint may take."""
    retries: int = 4
    """Repetitions after an endpoint's failure."""
    concurrency: int = 8
    """Requests under way at an endpoint at once."""

    def model_post_init(self, context: Any) -> None:
        """Refuse questions without their places, and numbers without meaning."""
        if any(self.question.count(place) != 1 for place in PLACES):
            raise ValueError("a judge's question needs {question}, {first} and {second} once each")
        if min(self.max_tokens, self.batch_size, self.concurrency) < 1 or self.retries < 0 or self.timeout <= 0:
            raise ValueError("max_tokens, batch_size, concurrency and timeout must be positive, retries not negative")


class PreferenceJudge:
    """See the module's head.

    Args:
        load: makes what is asked, when it is first needed.
        options: how it is asked.
    """

    def __init__(self, load: Callable[[], Asker], options: PreferenceOptions | None = None) -> None:
        self.options = options or PreferenceOptions()
        self._load = load
        self._asker: Asker | None = None
        self.asked = self.unread = self.inconsistent = 0
        """Comparisons since `restart`, those of which a reply could not be read, and those that went by the place."""

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        """Wins less losses of every answer among those of the same record, per readable comparison; None without one."""
        found: list[float | None] = [None] * len(answers)
        groups = [list(places) for _, places in itertools.groupby(range(len(records)), key=lambda place: id(records[place]))]
        pairs = [
            (one, other) for places in groups for one, other in itertools.combinations(places, 2)
            if answers[one].strip() and answers[other].strip()
        ]  # fmt: skip
        different = [pair for pair in pairs if _said(answers[pair[0]]) != _said(answers[pair[1]])]
        verdicts: dict[tuple[int, int], float | None] = dict.fromkeys(pairs, 0.0)
        verdicts |= dict(zip(different, self._verdicts(records, answers, different), strict=True))
        for (one, other), verdict in verdicts.items():
            if verdict is not None:
                found[one] = (found[one] or 0.0) + verdict
                found[other] = (found[other] or 0.0) - verdict
        readable = [pair for pair, verdict in verdicts.items() if verdict is not None]
        counts = [sum(place in pair for pair in readable) for place in range(len(answers))]
        return [None if value is None else value / count for value, count in zip(found, counts, strict=True)]

    def figures(self) -> dict[str, float]:
        """Shares of the comparisons since `restart` that could not be read, and that went by the place."""
        return {
            "judge_unread": self.unread / max(1, self.asked),
            "judge_inconsistent": self.inconsistent / max(1, self.asked - self.unread),
        }

    def restart(self) -> None:
        """Count from here, so that what a step tells does not depend on the steps before it."""
        self.asked = self.unread = self.inconsistent = 0

    def _verdicts(
        self, records: Sequence[BranchRecord], answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> list[float | None]:
        """1 where the first is better in both orders, -1 where the second is, 0 for a tie, None where a reply is unreadable."""
        if not pairs:
            return []
        if self._asker is None:
            self._asker = self._load()
        out: list[float | None] = []
        for start in range(0, len(pairs), self.options.batch_size):
            part = pairs[start : start + self.options.batch_size]
            orders = [(one, other) for one, other in part] + [(other, one) for one, other in part]
            questions = [self.question(records[one], answers[one], answers[other]) for one, other in orders]
            replies = self._asker.reply(questions, max_tokens=self.options.max_tokens)
            for ahead, turned in zip(replies[: len(part)], replies[len(part) :], strict=True):
                out.append(self._verdict(parse_answer_choice(ahead), parse_answer_choice(turned)))
        return out

    def _verdict(self, ahead: float | None, turned: float | None) -> float | None:
        self.asked += 1
        if ahead is None or turned is None:
            self.unread += 1
            return None
        if ahead == -turned:
            return ahead
        self.inconsistent += 1
        return 0.0

    def question(self, record: BranchRecord, first: str, second: str) -> Question:
        """What the model is asked about two answers in this order."""
        images = tuple(pictures(record))
        media = "" if not images else "Look at the picture. " if len(images) == 1 else f"Look at the {len(images)} pictures. "
        said = {
            "{media}": media, "{question}": conversation(record), "{first}": first.strip(), "{second}": second.strip(),
            "{reference}": self._reference(record),
        }  # fmt: skip
        # In one pass: an answer may hold what looks like a place.
        text = re.sub("|".join(map(re.escape, SHOWN)), lambda place: said[place[0]], self.options.question)
        return Question(images=images, text=text)

    def _reference(self, record: BranchRecord) -> str:
        if not self.options.show_reference:
            return ""
        known = record.meta.get("reference") or (record.answers[0].text if record.answers else None)
        if not isinstance(known, str) or not known.strip():
            raise RewardError(f"row '{record.id}': judge_options.show_reference, and the table holds no reference answer")
        return f"An expert's answer, known to be correct:\n{known.strip()}\n\n"


def _said(text: str) -> str:
    return " ".join(text.split())


def parse_answer_choice(reply: str) -> float | None:
    """1 for the first answer, -1 for the second, 0 for a tie, None when the reply says none or several of these."""
    text = reply.lower().replace("*", "")
    first = re.search(r"\banswer\s*1\s+is\s+(?:the\s+)?better\b", text) is not None
    second = re.search(r"\banswer\s*2\s+is\s+(?:the\s+)?better\b", text) is not None
    tie = re.search(r"\bequally\s+good\b", text) is not None
    if first + second + tie != 1:
        return None
    return 1.0 if first else -1.0 if second else 0.0


def conversation(record: BranchRecord) -> str:
    """The prompt's words; of several turns each with its role."""
    turns = [(message.role, " ".join(part.text.strip() for part in message.parts if part.text)) for message in record.messages]
    spoken = [(role, text) for role, text in turns if text and role != "system"]
    return spoken[0][1] if len(spoken) == 1 else "\n".join(f"{role}: {text}" for role, text in spoken)


def pictures(record: BranchRecord) -> Iterator[Image.Image]:
    """Pictures of the prompt, and frames of its clips, in order.

    Raises:
        RewardError: one that cannot be decoded.
    """
    try:
        for item in record.media:
            if isinstance(item, ImageRef):
                yield open_image(item).image
            elif item.frames:
                yield from (open_image(frame).image for frame in _spread(item.frames))
            else:
                yield from _frames(item)
    except MediaError as error:
        raise RewardError(f"row '{record.id}': the judge cannot be shown its media: {error}") from error


def _spread(frames: Sequence[ImageRef]) -> list[ImageRef]:
    count = min(FRAMES, len(frames))
    return [frames[(2 * number + 1) * len(frames) // (2 * count)] for number in range(count)]


def _frames(item: VideoRef) -> list[Image.Image]:
    source = ImageRef(path=item.path, data=item.data, label=item.label)
    found = decode_video(source, Sampler(count=FRAMES))
    return [Image.fromarray(frame) for frame in found.frames]


def load_preference(kind: str, argument: str, options: Mapping[str, Any]) -> PreferenceJudge:
    """The judge of a name ``kind:argument``; the model itself is read when it is first asked.

    Raises:
        RewardError: no model named, a folder that is not there, or options without meaning.
    """
    from pydantic import ValidationError

    try:
        settings = PreferenceOptions(**options)
    except ValidationError as error:
        raise RewardError(f"judge_options: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
    if kind == "prefer-api":
        url, _, model = argument.partition("#")
        if not url.startswith(("http://", "https://")) or not model:
            raise RewardError("name the endpoint and the model: prefer-api:http://host:port/v1#model")
        return PreferenceJudge(lambda: _endpoint(url, model, settings), settings)
    if not argument or ("/" not in argument and not Path(argument).is_dir()):
        raise RewardError(f"prefer:{argument}: name a model's folder, or a hub id of the form owner/name")
    return PreferenceJudge(lambda: _local(argument, settings), settings)


def _endpoint(url: str, model: str, options: PreferenceOptions) -> Asker:
    from mmalign.rewards.api import KEY, ApiVlm

    return ApiVlm(
        url, model, timeout=options.timeout, retries=options.retries, concurrency=options.concurrency,
        key=os.environ.get(KEY, ""),
    )  # fmt: skip


def _local(source: str, options: PreferenceOptions) -> Asker:
    """A model with eyes where the folder's class has them, else a language model."""
    from mmalign.rewards.llm import LocalLlm, has_eyes
    from mmalign.rewards.vlm import LocalVlm

    made = LocalVlm if has_eyes(source) else LocalLlm
    return made(source, device=options.device, dtype=options.dtype, revision=None, local_files_only=Path(source).is_dir())
