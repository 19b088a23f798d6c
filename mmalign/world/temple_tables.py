"""Films as tables for temporal preferences: where each event begins and ends, answers in a loose order, and other faults.

``films.jsonl`` asks what happens and names the events' seconds in ``meta.clips``, for the sampler `temple`; ``answers.jsonl``
holds answers for fine-tuning, a share of which tell the events in a random order (weak temporal supervision). `swapped` puts
wrong things, not a wrong order, into a caption: the control that shows whether the order is what was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmalign import rng
from mmalign.world.board_tables import reply, write_rows
from mmalign.world.clip_tables import FILMS, video_prompt
from mmalign.world.clips import ACTIONS, DESCRIBE, DIRECTIONS, STYLES, Clip, Event, read_clip_caption, tell
from mmalign.world.shapes import COLOURS, SHAPES


def write_films(folder: Path, clips: Sequence[Clip]) -> Path:
    """``films.jsonl``: a request about each film that ``clip_tables.write_clips`` wrote, with its clips of one second each."""
    rows = [
        {"id": f"f{index}", "prompt": video_prompt(DESCRIBE[index % len(DESCRIBE)]), "videos": [f"{FILMS}/{index}.mp4"],
         "meta": {"clip": clip.key, "clips": [[at, at + 1] for at in range(len(clip.events))]}}
        for index, clip in enumerate(clips)
    ]  # fmt: skip
    return write_rows(folder / "films.jsonl", rows)


def write_loose_answers(folder: Path, clips: Sequence[Clip], *, seed: int, loose: float) -> Path:
    """``answers.jsonl``: an answer to each request; a share `loose` of them, drawn, tell the events in a random order."""
    rows = []
    for index, clip in enumerate(clips):
        draws = rng.numpy_stream(seed, "loose-answer", 0, str(index))
        order = draws.permutation(len(clip.events)) if draws.random() < loose else np.arange(len(clip.events))
        text = tell([clip.events[int(at)] for at in order], STYLES[index % len(STYLES)])
        rows.append(
            {"id": f"a{index}", "prompt": video_prompt(DESCRIBE[index % len(DESCRIBE)]), "completion": reply(text),
             "videos": [f"{FILMS}/{index}.mp4"], "meta": {"clip": clip.key}}
        )  # fmt: skip
    return write_rows(folder / "answers.jsonl", rows)


def swapped(text: str, *, seed: int, key: str) -> str | None:
    """A caption with half of its events, one at least, given another colour, shape or action, the order kept; None where it
    names no event of this world."""
    events = list(read_clip_caption(text).events)
    if not events:
        return None
    draws = rng.numpy_stream(seed, "swapped", 0, key)
    for at in draws.choice(len(events), max(1, len(events) // 2), replace=False):
        events[int(at)] = other_event(events[int(at)], draws)
    return tell(events, "first")


def other_event(event: Event, draws: np.random.Generator) -> Event:
    """The event with another colour, another shape or another action."""
    what = int(draws.integers(3))
    if what == 0:
        colours = [colour for colour in COLOURS if colour not in (event.colour, event.detail)]
        return Event(str(draws.choice(colours)), event.shape, event.action, event.detail)
    if what == 1:
        return Event(event.colour, str(draws.choice([s for s in SHAPES if s != event.shape])), event.action, event.detail)
    action = str(draws.choice([name for name in ACTIONS if name != event.action]))
    details = {"moves": tuple(DIRECTIONS), "appears": ("one",), "turns": tuple(c for c in COLOURS if c != event.colour)}
    return Event(event.colour, event.shape, action, str(draws.choice(details.get(action, ("",)))))
