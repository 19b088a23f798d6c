"""Films as tables for temporal preferences: seconds of events, answers in a loose order, and faults that are not about order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmalign.world.clip_questions import check_order
from mmalign.world.clips import Event, draw_clip, parse_clip_key, read_clip_caption, tell
from mmalign.world.temple_tables import other_event, swapped, write_films, write_loose_answers

CLIPS = [draw_clip(np.random.default_rng(seed), numbers=(4, 5)) for seed in range(60)]


def lines(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_films_name_the_seconds_of_their_events(tmp_path: Path) -> None:
    rows = lines(write_films(tmp_path, CLIPS[:3]))
    assert [len(row["meta"]["clips"]) for row in rows] == [len(clip.events) for clip in CLIPS[:3]]
    assert rows[1]["meta"]["clips"][:2] == [[0, 1], [1, 2]] and rows[1]["videos"] == ["clips/1.mp4"]


@pytest.mark.parametrize(("loose", "low", "high"), [(0.0, 1.0, 1.0), (1.0, 0.4, 0.6), (0.5, 0.65, 0.85)])
def test_a_share_of_the_answers_is_in_a_random_order(tmp_path: Path, loose: float, low: float, high: float) -> None:
    rows = lines(write_loose_answers(tmp_path, CLIPS, seed=1, loose=loose))
    checks = [check_order(row["completion"][0]["content"], parse_clip_key(row["meta"]["clip"])) for row in rows]
    assert all(check.recall == 1.0 for check in checks)
    assert low <= sum(check.concordant for check in checks) / sum(check.pairs for check in checks) <= high
    assert lines(write_loose_answers(tmp_path, CLIPS, seed=1, loose=loose)) == rows


def test_swapped_captions_keep_the_order_and_change_things() -> None:
    for number, clip in enumerate(CLIPS[:20]):
        text = tell(clip.events, "after")
        worse = swapped(text, seed=0, key=str(number))
        assert worse is not None and worse == swapped(text, seed=0, key=str(number)) != swapped(text, seed=1, key=str(number))
        found = read_clip_caption(worse)
        assert not found.unread and len(found.events) == len(clip.events)
        changed = [a != b for a, b in zip(found.events, clip.events, strict=True)]
        assert sum(changed) == len(clip.events) // 2
    assert swapped("Nothing is here.", seed=0, key="a") is None


def test_another_event_is_always_one_of_this_world() -> None:
    draws = np.random.default_rng(0)
    for clip in CLIPS:
        for event in clip.events:
            made = other_event(event, draws)
            assert isinstance(made, Event) and made != event
