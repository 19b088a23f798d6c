"""Sample answers of a run: the same prompts and pictures after every so many steps, as data and as text to read.

``samples/step-00000100/answers.jsonl`` holds id, question, answer and its length; ``answers.txt`` is for people. Pictures are
written once, into ``samples/media``, so that the report can show them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from mmalign import assets
from mmalign.branches import BranchRecord, VideoRef
from mmalign.data.files import write_text
from mmalign.data.vlm import open_vlm
from mmalign.data.vlm_rows import RowProblem
from mmalign.errors import ConfigError, DataError, ModelError
from mmalign.experiment.settings import ExperimentConfig
from mmalign.media import MediaError, decode_image, image_kind, read_bytes
from mmalign.models.vlm.base import VlmFamily
from mmalign.models.vlm.errors import VlmDataError
from mmalign.models.vlm.media import open_media
from mmalign.types import ImageRef

MEDIA = "samples/media"
FRAMES = "-frames.png"
"""How the file of a clip's frames ends."""


def question_table(source: str) -> Path:
    """The table of questions; ``assets/...`` is looked up among the embedded assets.

    Raises:
        ConfigError: no such file or folder.
    """
    try:
        path = assets.placed(source)
    except ModelError as error:
        raise ConfigError(f"evaluate.prompts: {error}") from error
    if not path.exists():
        raise ConfigError(f"evaluate.prompts: no file or folder '{source}'")
    return path


def read_questions(config: ExperimentConfig, number: int | None) -> list[BranchRecord]:
    """`number` records taken evenly over the table that `evaluate.prompts` names (all for None); empty without a table.

    Raises:
        ConfigError: no such table. DataError: a row that cannot be used.
    """
    if config.evaluate.prompts is None:
        return []
    table = open_vlm(question_table(config.evaluate.prompts), progress=False)
    limit = min(len(table), config.evaluate.max_prompts or len(table))
    count = limit if number is None else min(number, limit)
    return [table[index * limit // count] for index in range(count)]


def question_text(record: BranchRecord) -> str:
    """The prompt as people read it, media in brackets."""
    lines = []
    for message in record.messages:
        text = "".join(part.text if part.media is None else f"[{_word(record, part.media)}] " for part in message.parts)  # type: ignore[misc]
        lines.append(text if message.role == "user" else f"({message.role}) {text}")
    return "\n".join(lines)


def _word(record: BranchRecord, number: int) -> str:
    return "picture" if isinstance(record.media[number], ImageRef) else "clip"


class AnswerSamples:
    """Writes the sample answers of a step.

    Args:
        config: names the table of questions, how many, and how answers are drawn; without a table none are made.
        family, network: what answers; adapters or averaged weights as they are at the moment.
    """

    def __init__(self, config: ExperimentConfig, family: VlmFamily, network: nn.Module) -> None:
        self.config, self.family, self.network = config, family, network
        self.records = read_questions(config, config.evaluate.grid_prompts)

    def write(self, step: int) -> None:
        """Ask, and write what is answered at `step`."""
        if not self.records:
            return
        answers = [found[0] for found in ask(self.config, self.family, self.network, self.records)]
        folder = self.config.folder / "samples" / f"step-{step:08d}"
        rows, texts = [], []
        for record, answer in zip(self.records, answers, strict=True):
            rows.append(
                {"id": record.id, "question": question_text(record), "answer": answer, "words": len(answer.split()),
                 "media": self.pictures(record), "group": record.group}
            )  # fmt: skip
            texts.append(f"{record.id}\n{question_text(record)}\n-> {answer}\n")
        write_text(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(folder / "answers.txt", "\n".join(texts))

    def pictures(self, record: BranchRecord) -> list[str]:
        """Copies of the record's pictures in the run folder, relative to it; of a clip, frames in the order the model sees."""
        found = []
        safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in record.id)
        for number, item in enumerate(record.media):
            if not isinstance(item, ImageRef):
                found += self._frames(record.id, item, f"{MEDIA}/{safe}-{number}{FRAMES}")
                continue
            try:
                data, _ = read_bytes(item)
                if image_kind(data) is None:  # a radiograph as DICOM, which browsers do not show
                    data = _png(decode_image(data).image)
            except MediaError:
                continue  # the answer was given, so the picture was there a moment ago; the page shows the rest
            kind = image_kind(data)
            relative = f"{MEDIA}/{safe}-{number}.{kind.pillow.lower() if kind else 'bin'}"
            path = self.config.folder / relative
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            found.append(relative)
        return found


    def _frames(self, record: str, clip: VideoRef, relative: str) -> list[str]:
        """A sheet of frames of a clip, written once; none where it cannot be read any more."""
        path, settings = self.config.folder / relative, self.family.config
        if not path.exists():
            try:
                opened = open_media(
                    record, clip, fps=settings.video_fps, max_frames=settings.max_frames, read_clip=self.family.read_clip
                )
            except (MediaError, VlmDataError):
                return []
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_png(frame_sheet(opened.frames)))  # type: ignore[union-attr]
        return [relative]


def frame_sheet(frames: np.ndarray) -> Image.Image:
    """At most eight frames ``[T, H, W, 3]`` uint8, evenly over the clip, four a row; small ones enlarged in whole steps."""
    count = min(len(frames), 8)
    chosen = [frames[index * len(frames) // count] for index in range(count)]
    height, width = chosen[0].shape[:2]
    scale, gap = max(1, 96 // width), 4
    width, height, columns = width * scale, height * scale, min(count, 4)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, frame in enumerate(chosen):
        picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(picture, ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return sheet


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def ask(
    config: ExperimentConfig, family: VlmFamily, network: nn.Module, records: Sequence[BranchRecord], *, samples: int = 1
) -> list[list[str]]:
    """Answers of a network to questions: greedy or drawn as `evaluate` says; a draw depends on seed, id and number alone.

    Raises:
        DataError: a question that the model's processor refuses.
    """
    settings = config.evaluate
    try:
        examples = [family.encode(record, training=False) for record in records]
    except RowProblem as problem:
        raise DataError(f"evaluate.prompts: {problem}") from problem
    return family.generate(
        network, examples, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=config.run.seed,
        step=0, samples=samples, batch_size=settings.batch_size,
    )  # fmt: skip
