"""TEMPLE's pairs (arXiv:2503.16929; lscpku/TEMPLE): what a video model tells of a film against what it tells of a perturbed one.

A film is cut into clips (``meta.clips`` of the row, as ``mmalign data select`` writes them, or equal pieces). With `input`:

- ``captions`` (what the release does): every clip is captioned, and the narration of the captions in order is chosen; the
  narration of the list perturbed is rejected.
- ``clips``: the clips are put into the perturbed order and captioned anew, so that a caption that refers to the clip before
  refers to the wrong one; differs from ``captions`` with `context: previous` alone.
- ``video`` (what the paper's abstract says): the model answers the row's own question about the frames in their order, and
  about the perturbed frames.

The row of the new table always shows the film as it is. Levels that coincide on a short film are made once, a shuffle is never
the identity, and filters and counts are those of the release (``data.formats.temple``). Departures: `repetition_penalty` holds
for captions as well as narrations; the instruction is drawn by seed and row; the narration can also be joined by rule
(`narrator: join`), for models that cannot rewrite a list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np

from mmalign import rng
from mmalign.branches import BranchRecord, Message, Part, VideoRef
from mmalign.config import Section
from mmalign.data.formats.answers import Refusal
from mmalign.data.formats.temple import INSTRUCTIONS, refuse_unequal
from mmalign.data.frames import FrameCache
from mmalign.media import PERTURBATIONS, RATES, MediaError, Perturbed, decode_video, distinct_rates, perturb
from mmalign.sampling.base import AnswerSampler, Refused, SampledRow

LABEL = re.compile(r"^(?:caption|description)\s*:\s*", re.IGNORECASE)
LINK = re.compile(r"^(?:first|then|next|after that|finally|lastly)\b,?\s+", re.IGNORECASE)
NARRATE = (
    "These captions describe the consecutive clips of one video, in order:\n{captions}\nTell what happens in the video from "
    "beginning to end as one fluent paragraph. Keep the order and every detail; do not mention clips or captions."
)


class TempleSamplerConfig(Section):
    """Settings of the pairs."""

    name: str = "temple"
    input: Literal["captions", "clips", "video"] = "captions"
    """What is perturbed; see the module's head."""
    kinds: tuple[str, ...] = ("drop", "shuffle", "reverse")
    """Of drop, shuffle, reverse and, ours, speed, freeze, splice (with `input: captions`)."""
    rates: tuple[int, ...] = RATES
    """Levels from strong to weak."""
    drop_by: Literal["rate", "similarity", "group"] = "rate"
    """The last two read ``meta.similarity`` and ``meta.groups``, as `mmalign data select` writes them."""
    difficulty: Literal["rate", "effective"] = "rate"
    """What numbers the stages: the rate (0 is the largest), or the strength that a perturbation really has on its film."""
    levels: int = 4
    """Stages with `difficulty: effective`."""
    context: Literal["none", "previous"] = "none"
    """Caption a clip alone, or shown behind the clip before it."""
    narrator: Literal["model", "join"] = "model"
    """Who makes one text of the captions."""
    pieces: int = 8
    """Equal clips of a film whose row names none."""
    frames_per_clip: int = 2
    """Frames shown of a clip."""
    instruction: Literal["drawn", "own"] = "drawn"
    """The new row's question: one of six paraphrases, or the row's own."""
    caption_prompt: str = "Describe this clip."
    next_prompt: str = "The second clip follows the first. Describe the second clip and how it goes on from the first."
    """With `context: previous`."""
    caption_sentences: int = 0
    """Sentences kept of a caption; 0 keeps all."""
    caption_temperature: float = 0.0
    cache: str | None = None
    """Folder in which sampled frames are kept, so that each film is decoded once for all its perturbed versions."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        unknown = [kind for kind in self.kinds if kind not in PERTURBATIONS]
        if unknown or not self.kinds:
            raise ValueError(f"kinds: {', '.join(unknown) or 'none given'}; known are {', '.join(PERTURBATIONS)}")
        if not self.rates or min(self.rates) < 2 or len(set(self.rates)) != len(self.rates):
            raise ValueError(f"rates: at least one, each at least 2 and once, got {self.rates}")
        if "splice" in self.kinds and self.input != "captions":
            raise ValueError("kinds: 'splice' puts in another film's captions; use input 'captions'")
        if self.drop_by != "rate" and self.input == "video":
            raise ValueError("drop_by: similarity and groups are those of clips; use input 'captions' or 'clips'")
        low = min(self.caption_temperature, self.caption_sentences)
        if min(self.levels, self.frames_per_clip) < 1 or self.pieces < 2 or low < 0:
            raise ValueError(
                "levels and frames_per_clip must be at least 1, pieces 2, the rest not negative"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """One row with its film cut into clips."""

    record: BranchRecord
    place: int
    """Which of the record's media the film is."""
    clips: tuple[tuple[float, float], ...]
    """First and last second of each; of `input: video`, one entry per sampled frame."""

    @property
    def video(self) -> VideoRef:
        found = self.record.media[self.place]
        assert isinstance(found, VideoRef)  # `TempleSampler._film` looked
        return found


class TempleSampler(AnswerSampler):
    """See the module's head."""

    Config: ClassVar[type[Section]] = TempleSamplerConfig
    MAKES: ClassVar[Literal["pairs", "lists"]] = "pairs"
    GENERATORS: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    config: TempleSamplerConfig

    def __init__(self, config: TempleSamplerConfig, job: Any, family: Any) -> None:
        super().__init__(config, job, family)
        self.frames = None if config.cache is None else FrameCache(config.cache)
        if self.frames is not None:
            family.read_clip = self.frames.read

    def sample(self, records: Sequence[BranchRecord]) -> list[SampledRow | Refused]:
        made: list[SampledRow | Refused] = []
        films: list[Film] = []
        for record in records:
            found = self._film(record)
            if isinstance(found, Refused):
                made.append(found)
            else:
                films.append(found)
        told = self._told(films)
        if self.frames is not None:
            self.frames.flush()
        for number, film in enumerate(films):
            said = told[number]
            made += [said] if isinstance(said, Refused) else self._rows(film, said)
        return made

    # Films

    def _film(self, record: BranchRecord) -> Film | Refused:
        videos = [place for place, item in enumerate(record.media) if isinstance(item, VideoRef)]
        if len(videos) != 1:
            return Refused(id=record.id, reason="missing_media", detail=f"{len(videos)} videos; one is needed")
        video = record.media[videos[0]]
        assert isinstance(video, VideoRef)
        try:
            clips = self._clips(record, video)
        except MediaError as error:
            reason = "undecodable_media" if error.reason == "unreadable_video" else error.reason
            return Refused(id=record.id, reason=reason, detail=str(error))
        if len(clips) < 2:
            return Refused(id=record.id, reason="too_few", detail=f"{len(clips)} clips; a perturbation needs two")
        return Film(record=record, place=videos[0], clips=tuple(clips))

    def _clips(self, record: BranchRecord, video: VideoRef) -> list[tuple[float, float]]:
        if self.config.input == "video":
            from mmalign.models.vlm.media import open_media

            settings = self.family.config
            opened: Any = open_media(record.id, video, fps=settings.video_fps, max_frames=settings.max_frames,
                                     read_clip=self.family.read_clip)  # fmt: skip
            return [(0.0, 0.0)] * len(opened.frames)
        given = record.meta.get("clips")
        if isinstance(given, Sequence) and not isinstance(given, str):
            return [(float(first), float(last)) for first, last in given]
        if video.frames:
            seconds = len(video.frames) / (video.fps or 1.0)
        else:
            from mmalign.types import ImageRef

            ref = ImageRef(path=video.path, data=video.data, label=video.label)
            seconds = decode_video(ref).duration
        edges = np.linspace(0.0, seconds, self.config.pieces + 1)
        return [(float(first), float(last)) for first, last in pairwise(edges)]

    def _perturbations(self, film: Film, other: int) -> Iterator[Perturbed]:
        config, total = self.config, len(film.clips)
        for kind in config.kinds:
            if kind == "splice" and other < total:
                continue
            by = config.drop_by if kind == "drop" else "rate"
            alike = film.record.meta.get("similarity")
            for rate in distinct_rates(total, config.rates):
                yield perturb(
                    total, kind, seed=self.job.seed, key=film.record.id, rate=rate, by=by, other=other,
                    groups=film.record.meta.get("groups"), similarity=None if alike is None else np.asarray(alike, dtype=float),
                )  # fmt: skip

    # What the model says

    def _told(self, films: Sequence[Film]) -> list[dict[str, Any] | Refused]:
        """Per film: the clean text, and (perturbation, text) of every perturbed version."""
        asked: list[BranchRecord] = []
        plans: list[list[Perturbed]] = []
        for number, film in enumerate(films):
            other = films[(number + 1) % len(films)]
            plans.append(list(self._perturbations(film, len(other.clips) if len(films) > 1 else 0)))
            asked += self._questions(film, plans[-1])
        said, refused = self._answers(asked, self.config.caption_temperature if self.config.input != "video" else None)
        results: list[dict[str, Any] | Refused] = []
        lists: list[tuple[int, str, list[str]]] = []
        for number, film in enumerate(films):
            bad = next((refused[item.id] for item in self._questions(film, plans[number]) if item.id in refused), None)
            if bad is not None:
                results.append(replace(bad, id=film.record.id))
                continue
            results.append({"plans": plans[number], "texts": {}})
            if self.config.input == "video":
                results[-1] = {"plans": plans[number], "texts": said_of(film, plans[number], said)}
                continue
            own = [self._caption(said[clip_id(film, place)]) for place in range(len(film.clips))]
            lists.append((number, "clean", own))
            follows = films[(number + 1) % len(films)]
            others = [self._caption(said.get(clip_id(follows, place), "")) for place in range(len(follows.clips))]
            lists += [(number, label(plan), self._listed(film, plan, own, others, said)) for plan in plans[number]]
        for (number, name, _), text in zip(lists, self._narrated(films, lists), strict=True):
            found = results[number]
            assert isinstance(found, dict)
            found["texts"][name] = text
        return results

    def _questions(self, film: Film, plans: Sequence[Perturbed]) -> list[BranchRecord]:
        """Everything that the model is asked about one film's frames."""
        if self.config.input == "video":
            clean = replace(film.record, id=f"{film.record.id}#clean")
            return [clean, *(shown(film, plan) for plan in plans)]
        found = [self._about(film, place, place - 1, clip_id(film, place)) for place in range(len(film.clips))]
        if self.config.input == "clips" and self.config.context == "previous":
            for plan in plans:
                order = plan.numbers
                found += [
                    self._about(film, now, order[at - 1] if at else -1, f"{film.record.id}#{label(plan)}#{at}")
                    for at, now in enumerate(order)
                ]
        return found

    def _about(self, film: Film, place: int, before: int, name: str) -> BranchRecord:
        """A request for the caption of one clip, behind another one where the context asks for it."""
        pair = self.config.context == "previous" and before >= 0
        places = [before, place] if pair else [place]
        text = self.config.next_prompt if pair else self.config.caption_prompt
        media = tuple(self._piece(film, at) for at in places)
        parts = (*(Part(media=number) for number in range(len(media))), Part(text=text))
        return BranchRecord(id=name, messages=(Message(role="user", parts=parts),), answers=(), media=media)

    def _piece(self, film: Film, place: int) -> VideoRef:
        first, last = film.clips[place]
        video, count = film.video, self.config.frames_per_clip
        if video.frames:
            rate = video.fps or 1.0
            start, stop = int(first * rate), max(int(first * rate) + 1, int(last * rate))
            return replace(video, frames=video.frames[start:stop])
        length = last - first
        # A hair less than `count` intervals, so that rounding never asks for a frame of the next clip.
        return replace(video, start=first, end=last - 1e-4 * length, fps=count / length)

    def _listed(
        self, film: Film, plan: Perturbed, own: Sequence[str], others: Sequence[str], said: Mapping[str, str]
    ) -> list[str]:
        if self.config.input == "clips" and self.config.context == "previous":
            return [self._caption(said[f"{film.record.id}#{label(plan)}#{at}"]) for at in range(len(plan.numbers))]
        return [own[number] if number < plan.total else others[number - plan.total] for number in plan.numbers]

    def _caption(self, text: str) -> str:
        found, most = caption(text), self.config.caption_sentences
        return " ".join(re.split(r"(?<=[.!?])\s+", found)[:most]) if most else found

    def _narrated(self, films: Sequence[Film], lists: Sequence[tuple[int, str, list[str]]]) -> list[str]:
        if self.config.narrator == "join":
            return [join(texts) for _, _, texts in lists]
        asked = []
        for number, name, texts in lists:
            numbered = "\n".join(f"{place}. {text}" for place, text in enumerate(texts, start=1))
            part = Part(text=NARRATE.format(captions=numbered))
            made_id = f"{films[number].record.id}#narrate#{name}"
            asked.append(BranchRecord(id=made_id, messages=(Message(role="user", parts=(part,)),), answers=()))
        said, _ = self._answers(asked, None)
        return [said.get(record.id, "") for record in asked]

    def _answers(
        self, asked: Sequence[BranchRecord], temperature: float | None
    ) -> tuple[dict[str, str], dict[str, Refused]]:
        good, found, refused = self.ask(asked, temperature=temperature)
        said = {record.id: texts[0] for record, texts in zip(good, found, strict=True)}
        return said, {item.id: item for item in refused}

    # Rows

    def _rows(self, film: Film, told: Mapping[str, Any]) -> list[SampledRow | Refused]:
        record, clean = film.record, final(told["texts"]["clean"])
        shown_record = self._instructed(film)
        rows: list[SampledRow | Refused] = []
        for plan in told["plans"]:
            name, worse = f"{record.id}-{label(plan)}", final(told["texts"][label(plan)])
            try:
                if not clean or not worse:
                    raise Refusal("response", "empty_answer", "the model says nothing")
                refuse_unequal(clean, worse, plan.kind)
            except Refusal as refusal:
                detail = f"{label(plan)}: {refusal.detail}"
                rows.append(Refused(id=record.id, reason=refusal.reason, detail=detail))
                continue
            about = {"input": self.config.input, **plan.record(), "words": [len(clean.split()), len(worse.split())]}
            rows.append(
                SampledRow(id=name, record=shown_record, answers=(clean, worse), stage=self._stage(plan), meta=about)
            )
        if not rows:
            rows.append(Refused(id=record.id, reason="too_few", detail="no perturbation fits its clips"))
        return rows

    def _stage(self, plan: Perturbed) -> int:
        config = self.config
        if config.difficulty == "rate":
            return sorted(config.rates, reverse=True).index(plan.rate)
        return min(config.levels - 1, int((1.0 - plan.strength) * config.levels))

    def _instructed(self, film: Film) -> BranchRecord:
        if self.config.instruction == "own":
            return film.record
        draw = rng.key(self.job.seed, "temple-instruction", 0, film.record.id) % len(INSTRUCTIONS)
        parts = (Part(media=film.place), Part(text=INSTRUCTIONS[draw]))
        return replace(film.record, messages=(Message(role="user", parts=parts),))

    @classmethod
    def figures(cls, metas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Pairs, mean words of both sides and mean strength, by kind; drops prefer the longer text by construction."""
        counts = Counter(meta["kind"] for meta in metas)
        found: dict[str, float] = {}
        for kind, number in counts.items():
            own = [meta for meta in metas if meta["kind"] == kind]
            found |= {
                f"{kind}_pairs": float(number), f"{kind}_strength": sum(meta["strength"] for meta in own) / number,
                f"{kind}_chosen_words": sum(meta["words"][0] for meta in own) / number,
                f"{kind}_rejected_words": sum(meta["words"][1] for meta in own) / number,
            }  # fmt: skip
        return found


def label(plan: Perturbed) -> str:
    """For ids: kind and rate."""
    return f"{plan.kind}-{plan.rate}"


def clip_id(film: Film, place: int) -> str:
    """Id of the request for the caption of one clip."""
    return f"{film.record.id}#clip#{place}"


def shown(film: Film, plan: Perturbed) -> BranchRecord:
    """The row with its film's frames in the perturbed order."""
    media = list(film.record.media)
    media[film.place] = replace(film.video, order=plan.numbers)
    return replace(film.record, id=f"{film.record.id}#{label(plan)}", media=tuple(media))


def said_of(film: Film, plans: Sequence[Perturbed], said: Mapping[str, str]) -> dict[str, str]:
    """Answers about the frames as they are and about every perturbed version."""
    return {name: said[f"{film.record.id}#{name}"] for name in ("clean", *(label(plan) for plan in plans))}


def final(text: str) -> str:
    """An answer without what a reasoning model thought before it."""
    return text.split("</think>")[-1].strip()


def caption(text: str) -> str:
    """The last line of an answer, without a label and quotation marks; clips are named as a narration names them."""
    lines = [line.strip() for line in final(text).splitlines() if line.strip()]
    last = LABEL.sub("", lines[-1]).strip().strip('"').strip() if lines else ""
    last = re.sub(r"\bvideo clip 1\b", "the previous clip", last, flags=re.IGNORECASE)
    return re.sub(r"\bvideo clip 2\b", "this clip", last, flags=re.IGNORECASE)


def join(captions: Sequence[str]) -> str:
    """Captions as one text by rule: *First ... Then ... Finally ...*; words of order that a caption begins with go."""
    sentences = []
    for place, text in enumerate(text for text in captions if text):
        plain = LINK.sub("", text).strip()
        plain = plain[:1].lower() + plain[1:]
        sentences.append((place, plain if plain.endswith((".", "!", "?")) else plain + "."))
    last = len(sentences) - 1
    words = ["First" if place == 0 else "Finally" if place == last else "Then" for place, _ in sentences]
    return " ".join(f"{word} {text}" for word, (_, text) in zip(words, sentences, strict=True))
