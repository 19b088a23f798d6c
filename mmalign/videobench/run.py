"""Ask a model, or a trained run, the questions of a benchmark file and count; answers and figures are written down."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mmalign.branches import BranchRecord, Message, Part, VideoRef
from mmalign.config import Section, Variants, decode, load_yaml
from mmalign.data.files import write_json, write_text
from mmalign.data.progress import progress_bar
from mmalign.errors import ConfigError, DataError
from mmalign.models.vlm import VLM_FAMILIES
from mmalign.statistics import mean_interval
from mmalign.videobench.formats import LETTERS, VideoQuestion, read_benchmark

ASK = "Answer with the letter of the right option alone."
TOGETHER = 32


class VideoBenchConfig(Section):
    """What is asked of whom."""

    benchmark: Literal["videomme", "mlvu", "tempcompass", "vinoground", "choices"]
    """Layout of the file."""
    file: str
    videos: str
    """Folder of the films."""
    model: Annotated[Section, Variants(VLM_FAMILIES, "model")] | None = None
    """Who is asked; or `run`."""
    run: str | None = None
    """A run folder: its trained model is asked."""
    out: str
    """Folder to write: answers.jsonl and summary.json."""
    max_questions: int | None = None
    max_new_tokens: int = 16
    batch_size: int = 8
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    """Of the intervals."""
    cache: str | None = None
    """Folder in which sampled frames are kept: each film is decoded once for all its questions."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if (self.model is None) == (self.run is None):
            raise ValueError("one of model and run says who is asked")
        if min(self.max_new_tokens, self.batch_size, self.max_questions or 1) < 1:
            raise ValueError("max_new_tokens, batch_size and max_questions must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoBenchReport:
    """What came of it."""

    out: Path
    summary: Mapping[str, Any]

    @property
    def failed(self) -> int:
        """Questions whose film could not be read."""
        return sum(self.summary["unreadable"].values())

    def __str__(self) -> str:
        def shown(value: Mapping[str, Any]) -> str:
            return f"{value['mean']:.1%} ({value['low']:.1%} to {value['high']:.1%}) of {value['prompts']}"

        found = self.summary
        lines = [f"accuracy {shown(found['accuracy'])}; chance {found['chance']:.1%}"]
        lines += [f"  {name or '-':<24}{shown(value)}" for name, value in found["by_group"].items()]
        lines += [f"  pairs, {name:<17}{shown(value)}" for name, value in found["pairs"].items()]
        lines.append(f"  {found['unparsed']} answers name no option and count as wrong")
        lines += [f"  {number} questions left out: {reason}" for reason, number in found["unreadable"].items()]
        return "\n".join([*lines, f"  {self.out / 'answers.jsonl'}"])


def load_video_bench(path: str | Path, overrides: Sequence[str] = ()) -> VideoBenchConfig:
    """Read and check a file of settings.

    Raises:
        ConfigError: all problems in one error.
    """
    return decode(VideoBenchConfig, load_yaml(path, list(overrides)), str(path))


def evaluate_video(config: VideoBenchConfig, *, progress: bool = True) -> VideoBenchReport:
    """Ask every question and count.

    Raises:
        DataError: the file cannot be used, or no question's film can be read.
    """
    questions = read_benchmark(config.benchmark, Path(config.file), Path(config.videos))[: config.max_questions]
    family, network = _asked(config)
    if config.cache is not None:
        from mmalign.data.frames import FrameCache

        frames = FrameCache(config.cache)
        family.read_clip = frames.read
    lines: list[dict[str, Any]] = []
    unreadable: Counter[str] = Counter()
    with progress_bar("Asking", len(questions), enabled=progress) as advance:
        for start in range(0, len(questions), TOGETHER):
            some = questions[start : start + TOGETHER]
            lines += _answer(config, family, network, some, unreadable)
            advance(len(some))
    if config.cache is not None:
        frames.flush()
    if not lines:
        raise DataError(f"{config.file}: no film of its {len(questions)} questions can be read ({dict(unreadable)})")
    summary = {
        **figures(lines, seed=config.seed), "benchmark": config.benchmark, "questions": len(questions),
        "unreadable": dict(unreadable), "settings": config.model_dump(mode="json", exclude={"out", "device"}),
    }  # fmt: skip
    out = Path(config.out)
    write_text(out / "answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(out / "summary.json", summary)
    return VideoBenchReport(out=out, summary=summary)


def _asked(config: VideoBenchConfig) -> tuple[Any, Any]:
    import torch

    from mmalign.experiment.assembly import quiet_libraries
    from mmalign.experiment.opening import open_run

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but torch sees no CUDA device; use auto or cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    quiet_libraries()
    if config.run is not None:
        opened = open_run(config.run, device=device)
        if not opened.config.on_answers:
            raise ConfigError(f"run: {config.run} holds no vision-language model")
        return opened.family, opened.aligned
    settings: Any = config.model
    family = VLM_FAMILIES.get(settings.name).load(settings, device=torch.device(device))  # type: ignore[attr-defined]
    return family, family.network


def record_of(question: VideoQuestion) -> BranchRecord:
    """The question as a prompt: films, question, options by letter."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False))
    text = f"{question.question}\n{options}\n{ASK}"
    media = tuple(VideoRef(path=str(path), label=path.name) for path in question.videos)
    parts = (*(Part(media=number) for number in range(len(media))), Part(text=text))
    return BranchRecord(id=question.id, messages=(Message(role="user", parts=parts),), answers=(), media=media)


def _answer(
    config: VideoBenchConfig, family: Any, network: Any, questions: Sequence[VideoQuestion], unreadable: Counter[str]
) -> list[dict[str, Any]]:
    from mmalign.sampling.base import encode_prompts

    good, examples, refused = encode_prompts(family, [record_of(question) for question in questions])
    unreadable.update(item.reason for item in refused)
    said = family.generate(
        network, examples, max_new_tokens=config.max_new_tokens, temperature=0.0, batch_size=config.batch_size
    )
    by_id = {question.id: question for question in questions}
    lines = []
    for record, texts in zip(good, said, strict=True):
        question = by_id[record.id]
        chosen = parse_choice(texts[0], question.options)
        lines.append(
            {"id": question.id, "group": question.group, "pair": question.pair, "said": texts[0], "chosen": chosen,
             "answer": question.answer, "right": chosen == question.answer, "options": len(question.options)}
        )  # fmt: skip
    return lines


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """Number of the option that an answer names: by its letter, or by its text where just one fits; else None."""
    plain = text.split("</think>")[-1].strip()
    letters = LETTERS[: len(options)]
    lowered = plain.lower().rstrip(".")
    fits = [number for number, option in enumerate(options) if option.lower().rstrip(".") == lowered]
    if len(fits) == 1:
        return fits[0]
    for pattern in (rf"^\(?([{letters}])(?:[).:,]|\s*$|\s*\n)", rf"\b(?:answer|option)\s*(?:is|:)?\s*\(?([{letters}])\b"):
        found = re.search(pattern, plain, re.IGNORECASE if "answer" in pattern else 0)
        if found is not None:
            return letters.index(found[1].upper())
    words = re.findall(r"\w+", lowered)
    fits = [number for number, option in enumerate(options) if _holds(words, re.findall(r"\w+", option.lower()))]
    return fits[0] if len(fits) == 1 else None


def _holds(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the words of an option stand in an answer one after the other."""
    length = len(wanted)
    return length > 0 and any(list(words[at : at + length]) == list(wanted) for at in range(len(words) - length + 1))


def figures(lines: Sequence[Mapping[str, Any]], *, seed: int) -> dict[str, Any]:
    """Accuracy with 95 % intervals over questions, by group, and of whole pairs."""

    def share(right: Sequence[bool]) -> dict[str, Any]:
        return mean_interval([float(value) for value in right], seed=seed).as_dict()

    groups = dict.fromkeys(str(line["group"]) for line in lines)
    pairs: dict[str, dict[str, list[bool]]] = {}
    for line in lines:
        if line["pair"] is not None:
            pairs.setdefault(str(line["group"]), {}).setdefault(str(line["pair"]), []).append(bool(line["right"]))
    whole = {name: {pair: all(own) and len(own) == 2 for pair, own in found.items()} for name, found in pairs.items()}
    found = {name: share(list(own.values())) for name, own in whole.items()}
    if len(whole) > 1:
        stems = dict.fromkeys(pair.rsplit("-", 1)[0] for own in whole.values() for pair in own)
        found["group"] = share([all(own.get(f"{stem}-{name}", False) for name, own in whole.items()) for stem in stems])
    return {
        "accuracy": share([line["right"] for line in lines]),
        "by_group": {name: share([line["right"] for line in lines if str(line["group"]) == name]) for name in groups},
        "pairs": found, "chance": sum(1 / line["options"] for line in lines) / len(lines),
        "unparsed": sum(line["chosen"] is None for line in lines),
    }  # fmt: skip
