"""TEMPLE's pairs through the public command: captions, frames and clips perturbed, filters, stages, provenance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign import assets
from mmalign.data import open_vlm
from mmalign.errors import ConfigError, DataError
from mmalign.media import decode_video
from mmalign.sampling.job import SamplingReport, sample_answers
from mmalign.sampling.settings import load_sampling
from mmalign.sampling.temple import caption, join
from mmalign.world.clip_tables import video_prompt, write_clips
from mmalign.world.clips import Clip

FILMS = 3


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Clip]]:
    """Films of four events, one second each, and where each event begins and ends."""
    folder = tmp_path_factory.mktemp("films")
    clips = write_clips(folder, FILMS, seed=2, held_out=False, numbers=(4,))
    rows: list[dict[str, Any]] = [
        {"id": f"c{index}", "prompt": video_prompt("Describe the video."), "videos": [f"clips/{index}.mp4"],
         "meta": {"clip": clip.key, "clips": [[at, at + 1] for at in range(4)], "groups": [0, 0, 1, 1]}}
        for index, clip in enumerate(clips)
    ]  # fmt: skip
    (folder / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "films.jsonl", clips


@pytest.fixture
def made(films: tuple[Path, list[Clip]], tmp_path: Path) -> Callable[..., tuple[SamplingReport, Any]]:
    """Run the sampler with some settings: the report and the table made."""

    def run(sampler: str, *overrides: str) -> tuple[SamplingReport, Any]:
        (tmp_path / "config.yaml").write_text(
            f"sampler: {{name: temple, frames_per_clip: 12, caption_prompt: Describe the video., {sampler}}}\n"
            f"model: {{name: vlm, path: {assets.path('tiny-video-vlm')}, video_fps: 2}}\n"
            f"manifest: {films[0]}\nout: {tmp_path}/out\nmax_new_tokens: 24\ndevice: cpu\ntemperature: 0\nrows_per_part: 2\n"
        )
        report = sample_answers(load_sampling(tmp_path / "config.yaml", overrides), progress=False)
        return report, open_vlm(tmp_path / "out", progress=False)

    return run


def test_narrations_of_perturbed_lists_of_captions(made: Callable[..., Any], films: tuple[Path, list[Clip]]) -> None:
    report, table = made("narrator: join, instruction: own")
    pairs = {table.row_id(row): table[row] for row in range(len(table))}
    # Four clips: 16, 8 and 4 all move single clips, so two levels of each kind are left.
    assert report.rows == FILMS and report.used == FILMS
    assert set(pairs) <= {
        f"c{film}-{kind}-{rate}" for film in range(FILMS) for kind in ("drop", "shuffle", "reverse") for rate in (4, 2)
    }
    assert len(pairs) + sum(report.refused.values()) == FILMS * 6
    backwards = next(pairs[name] for name in pairs if "reverse-4" in name)
    assert backwards.meta["sampled"]["numbers"] == [3, 2, 1, 0]
    assert backwards.meta["sampled"]["strength"] == 1.0 and backwards.stage == 0
    assert backwards.media[0].order == ()  # type: ignore[union-attr]  # the film as it is
    assert Path(backwards.media[0].path).name.endswith(".mp4")  # type: ignore[union-attr, arg-type]
    assert backwards.messages[0].parts[1].text == "Describe the video."
    assert table.stages == ("2", "3")
    assert report.figures["reverse_chosen_words"] == report.figures["reverse_rejected_words"]


def test_the_rejected_list_is_the_chosen_one_in_the_perturbed_order(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.sampling import temple

    seen: list[list[str]] = []

    def watched(captions: list[str]) -> str:
        seen.append(list(captions))
        return join(captions)

    monkeypatch.setattr(temple, "join", watched)
    _, table = made("narrator: join, kinds: [reverse], rates: [2]", "max_rows=1")
    assert len(seen) == 2 and seen[1] == [*seen[0][2:], *seen[0][:2]]
    assert len(table) == 1


def test_frames_perturbed_and_decoded_once(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mmalign.data import frames
    from mmalign.models.vlm.base import VlmFamily

    decoded = []
    monkeypatch.setattr(
        frames, "decode_video", lambda ref, *a, **k: decoded.append(ref.path) or decode_video(ref, *a, **k)
    )
    shown: list[tuple[str, tuple[int, ...]]] = []
    encode = VlmFamily.encode

    def watched(self: VlmFamily, record: Any, **settings: Any) -> Any:
        shown.append((record.id, record.media[0].order))
        return encode(self, record, **settings)

    monkeypatch.setattr(VlmFamily, "encode", watched)
    report, _ = made(
        f"input: video, kinds: [shuffle, drop], rates: [4], difficulty: effective, cache: {tmp_path}/cache",
        "max_rows=2",
    )
    assert len(decoded) == 2 == len(set(decoded))
    orders = dict(shown)
    assert (
        orders["c0#clean"] == () and sorted(orders["c0#shuffle-4"]) == list(range(8)) and len(orders["c0#drop-4"]) == 2
    )
    assert report.rows == 2


def test_clips_in_context_are_captioned_anew_and_the_question_is_drawn(made: Callable[..., Any]) -> None:
    from mmalign.data.formats.temple import INSTRUCTIONS

    report, table = made("input: clips, context: previous, narrator: join, kinds: [reverse], rates: [4]", "max_rows=1")
    assert report.rows == 1 and len(table) + sum(report.refused.values()) == 1
    assert table[0].messages[0].parts[1].text in INSTRUCTIONS


def test_a_model_is_asked_to_narrate_each_list_and_what_it_leaves_empty_is_counted(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model was never taught to rewrite a list: the requests are right, its empty answers are refused by name."""
    from mmalign.sampling import base

    asked: dict[str, str] = {}
    encode = base.encode_prompts

    def watched(family: Any, records: list[Any]) -> Any:
        asked.update({record.id: record.messages[0].parts[-1].text for record in records if not record.media})
        return encode(family, records)

    monkeypatch.setattr(base, "encode_prompts", watched)
    try:
        made("kinds: [reverse], rates: [2]", "max_rows=1")
    except DataError as error:
        assert "the model says nothing" in str(error) or "contained" in str(error) or "length_ratio" in str(error)
    numbered = {
        name.rsplit("#", 1)[1]: [line[3:] for line in text.splitlines() if line[:2] in ("1.", "2.", "3.", "4.")]
        for name, text in asked.items()
    }
    assert len(numbered["clean"]) == 4 and numbered["reverse-2"] == [*numbered["clean"][2:], *numbered["clean"][:2]]


def test_films_without_clips_or_without_film(films: tuple[Path, list[Clip]], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in films[0].read_text().splitlines()]
    rows[0]["meta"] = {}
    rows[1]["videos"], rows[1]["prompt"] = [], [{"role": "user", "content": "What?"}]
    rows[2]["meta"]["clips"] = [[0, 4]]
    path = films[0].parent / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(
        "sampler: {name: temple, narrator: join, pieces: 2, rates: [2]}\n"
        f"model: {{name: vlm, path: {assets.path('tiny-video-vlm')}}}\n"
        f"manifest: {path}\nout: {tmp_path}/out\nmax_new_tokens: 6\ndevice: cpu\ntemperature: 0\n"
    )
    report = sample_answers(load_sampling(tmp_path / "c.yaml"), progress=False)
    assert report.refused["missing_media"] == 1 and report.refused["too_few"] == 1


@pytest.mark.parametrize(
    "sampler",
    ["kinds: [stretch]", "kinds: []", "rates: [1]", "rates: [2, 2]", "input: video, kinds: [splice]",
     "input: video, drop_by: group", "pieces: 1"],
)  # fmt: skip
def test_settings_without_meaning_are_refused(made: Callable[..., Any], sampler: str) -> None:
    with pytest.raises(ConfigError):
        made(sampler)


def test_captions_are_cleaned_and_joined() -> None:
    assert (
        caption('I think.\nCaption: "After video clip 1, a cat in video clip 2."')
        == "After the previous clip, a cat in this clip."
    )
    assert caption("<think>hm</think> A cat. ") == "A cat."
    assert (
        join(["First a cat sits.", "A dog runs", "Finally a bird sings!"])
        == "First a cat sits. Then a dog runs. Finally a bird sings!"
    )
    assert join(["", "A cat."]) == "First a cat." and join([]) == ""
