"""The whole selection: look at every film, decide, write the table of kept ones, the list of refused ones, and the page.

What was seen of a film is kept in ``facts/`` under its content and the settings that it depends on, so that other thresholds,
or a run that was stopped, look at no film twice.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from mmalign.data.conversations import MediaFile, keep_file
from mmalign.data.files import canonical_hash, file_hash, write_json, write_text
from mmalign.data.progress import progress_bar
from mmalign.data.reasons import QUARANTINE
from mmalign.errors import DataError
from mmalign.media import MediaError, Sampler, decode_video
from mmalign.selection.detectors import ShotDetector, load_detector
from mmalign.selection.features import FrameFeatures
from mmalign.selection.page import write_page
from mmalign.selection.rules import (
    REASONS,
    Clip,
    Refusal,
    clips_of,
    frames_of,
    groups_of,
    refuse_blur,
    refuse_clips,
    refuse_shots,
    shots_of,
)
from mmalign.selection.settings import SelectionConfig
from mmalign.selection.shots import Survey, survey
from mmalign.types import ImageRef

VERSION: Final = 1
SUFFIXES: Final = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv")
SEEN_SIDE: Final = 448
"""Longer side of the frames that the encoder gets."""
THUMB_SIDE: Final = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one film."""

    id: str
    path: str
    reason: str | None = None
    """None: kept."""
    detail: str = ""
    clips: tuple[Clip, ...] = ()
    frames: tuple[tuple[float, ...], ...] = ()
    """Seconds of the frames that stand for each clip."""
    similarity: tuple[tuple[float, ...], ...] = ()
    """Cosine of the clips' first shots."""
    thumbs: tuple[str, ...] = ()
    """A JPEG in base64 for every shot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionReport:
    """What came of a selection."""

    out: Path
    films: int
    kept: int
    refused: Mapping[str, int] = field(default_factory=dict)
    ignored: int = 0
    """Files of the folder that do not have the name of a video."""

    @property
    def failed(self) -> int:
        """Films that cannot be read."""
        return sum(number for reason, number in self.refused.items() if reason in QUARANTINE)

    def __str__(self) -> str:
        lines = [f"{self.out / 'films.jsonl'}: {self.kept} of {self.films} films kept"]
        lines += [f"  {reason:<18}{number:>6}  {REASONS.get(reason, 'defect')}" for reason, number in self.refused.items()]
        if self.ignored:
            lines.append(f"  {self.ignored} other files lie in the folder")
        return "\n".join([*lines, f"  page: {self.out / 'selection.html'}"])


def select(config: SelectionConfig, *, progress: bool = True) -> SelectionReport:
    """Look at all films and write what was decided.

    Raises:
        DataError: no films, or the folder cannot be written.
        MissingExtraError: a library for video or for shots is missing.
        ModelError: weights of the detector that cannot be loaded.
    """
    out = Path(config.out)
    films, ignored = find_films(config)
    features = FrameFeatures(config.features, config.features_path, config.device)
    detector = load_detector(config.shots, config.device)
    verdicts = []
    with progress_bar("Looking at films", len(films), enabled=progress) as advance:
        for name, path in films:
            verdicts.append(judge(name, path, config, features, detector, out / "facts"))
            advance(1)
    rows = [_row(config, verdict, out) for verdict in verdicts if verdict.reason is None]
    refused = Counter(verdict.reason for verdict in verdicts if verdict.reason is not None)
    write_text(out / "films.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    listed = [{"id": v.id, "path": v.path, "reason": v.reason, "detail": v.detail} for v in verdicts if v.reason is not None]
    write_text(out / "refused.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in listed))
    counts = {reason: refused[reason] for reason in sorted(refused, key=lambda reason: -refused[reason])}
    write_json(
        out / "report.json",
        {"films": len(films), "kept": len(rows), "refused": counts, "ignored_files": ignored, "features": features.identity,
         "detector": detector.identity or config.shots.detector,
         "settings": config.model_dump(mode="json", exclude={"out", "device"})},
    )  # fmt: skip
    write_page(out / "selection.html", config, verdicts)
    return SelectionReport(out=out, films=len(films), kept=len(rows), refused=counts, ignored=ignored)


def find_films(config: SelectionConfig) -> tuple[list[tuple[str, Path]], int]:
    """(id, file) of every film, and how many other files a folder holds.

    Raises:
        DataError: nothing there.
    """
    source = Path(config.films)
    ignored = 0
    if source.is_dir() and not any(source.glob("part-*.parquet")):
        files = sorted(path for path in source.rglob("*") if path.is_file())
        films = [path for path in files if path.suffix.lower() in SUFFIXES]
        found = [(path.relative_to(source).as_posix(), path) for path in films]
        ignored = len(files) - len(films)
    elif source.exists():
        found = list(_of_table(source))
    else:
        raise DataError(f"films: no folder or table '{source}'")
    if not found:
        raise DataError(f"films: {source} holds no video ({', '.join(SUFFIXES)})")
    return found[: config.max_films], ignored


def _of_table(source: Path) -> Iterator[tuple[str, Path]]:
    from mmalign.branches import VideoRef
    from mmalign.data.vlm import open_vlm

    table = open_vlm(source)
    for row in range(len(table)):
        record = table[row]
        for item in record.media:
            if isinstance(item, VideoRef) and item.path is not None:
                yield record.id, Path(item.path)


def judge(
    name: str, path: Path, config: SelectionConfig, features: FrameFeatures, detector: ShotDetector, facts: Path
) -> Verdict:
    """Look at one film, or read what was seen of it, and decide."""
    thumbs: tuple[str, ...] = ()
    try:
        seen, vectors, thumbs = _seen(path, config, features, detector, facts)
        shots = shots_of(seen, config.shots)
        refuse_shots(shots, config.rules)
        groups = groups_of(vectors, config.rules.similarity)
        clips = clips_of(shots, groups)
        refuse_clips(clips, config.rules)
        frames = [frames_of(clip, seen, config.rules.frames_per_clip) for clip in clips]
        refuse_blur([number for own in frames for number in own], seen, config.rules)
    except MediaError as error:
        return Verdict(id=name, path=str(path), reason=error.reason, detail=error.detail)
    except OSError as error:
        return Verdict(id=name, path=str(path), reason="missing_media", detail=str(error))
    except Refusal as refusal:
        return Verdict(id=name, path=str(path), reason=refusal.reason, detail=refusal.detail, thumbs=thumbs)
    firsts = [next(n for n, shot in enumerate(shots) if shot.first == clip.first) for clip in clips]
    alike = vectors[firsts] @ vectors[firsts].T
    return Verdict(
        id=name, path=str(path), clips=tuple(clips), thumbs=tuple(thumbs[number] for number in firsts),
        frames=tuple(tuple(round(float(seen.times[number]), 6) for number in own) for own in frames),
        similarity=tuple(tuple(round(float(value), 4) for value in row) for row in alike),
    )  # fmt: skip


def _seen(
    path: Path, config: SelectionConfig, features: FrameFeatures, detector: ShotDetector, facts: Path
) -> tuple[Survey, np.ndarray, tuple[str, ...]]:
    """Survey, features of the middle frame of every shot ``[S, D]``, and its thumbnails."""
    settings = [config.shots.model_dump(mode="json", exclude={"weights"}), detector.identity]
    key = canonical_hash([VERSION, file_hash(path), *settings, features.identity])[:40]
    kept = facts / f"{key}.json"
    try:
        stored = json.loads(kept.read_text())
        return Survey.of(stored["survey"]), np.asarray(stored["features"], dtype=np.float32), tuple(stored["thumbs"])
    except (OSError, ValueError, KeyError):
        pass  # not looked at yet, or written by a run that was stopped
    ref = ImageRef(path=str(path), label=str(path))
    seen = survey(ref, detector, max_side=config.shots.side, timeout_seconds=config.timeout_seconds)
    shots = shots_of(seen, config.shots)
    vectors, thumbs = np.zeros((0, 1), dtype=np.float32), []
    if shots:
        moments = ",".join(f"{float(seen.times[shot.middle]) + 1e-4:.6f}" for shot in shots)
        frames = decode_video(
            ref, Sampler(name=f"at:{moments}"), max_side=SEEN_SIDE, timeout_seconds=config.timeout_seconds
        ).frames
        vectors, thumbs = features(list(frames)), [thumbnail(frame) for frame in frames]
    write_json(kept, {"survey": seen.record(), "features": vectors.tolist(), "thumbs": thumbs})
    return seen, vectors, tuple(thumbs)


def thumbnail(frame: np.ndarray) -> str:
    """A small JPEG in base64."""
    from PIL import Image

    picture = Image.fromarray(frame)
    picture.thumbnail((THUMB_SIDE, THUMB_SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return base64.b64encode(out.getvalue()).decode()


def _row(config: SelectionConfig, verdict: Verdict, out: Path) -> dict[str, Any]:
    where = keep_file(MediaFile(path=Path(verdict.path)), out / "media", "media")
    clips = [asdict(clip) for clip in verdict.clips]
    return {
        "id": verdict.id,
        "prompt": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": config.prompt}]}],
        "videos": [where],
        "meta": {
            "source": verdict.path, "clips": [[round(c["start"], 6), round(c["end"], 6)] for c in clips],
            "groups": [c["group"] for c in clips], "similarity": verdict.similarity, "frames": verdict.frames,
        },
    }  # fmt: skip
