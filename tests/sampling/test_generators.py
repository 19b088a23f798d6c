"""Pairs and lists whose answers come from vLLM, by a stand-in for the library, and the repetition penalty of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmalign import assets
from mmalign.data import open_vlm
from mmalign.errors import ConfigError, MissingExtraError
from mmalign.sampling.job import sample_answers
from mmalign.sampling.settings import SamplingConfig, load_sampling
from mmalign.world.clip_tables import video_prompt, write_clips, write_rows
from tests.fixtures import vllm_library


def settings(folder: Path, sampler: str, manifest: Path, *overrides: str, model: str = "tiny-vlm") -> SamplingConfig:
    (folder / "config.yaml").write_text(
        f"sampler: {sampler}\nmodel: {{name: vlm, path: {assets.path(model)}, video_fps: 2}}\nmanifest: {manifest}\n"
        f"out: {folder}/out\nseed: 5\nmax_new_tokens: 12\ndevice: cpu\ngenerator: vllm\n"
    )
    return load_sampling(folder / "config.yaml", list(overrides))


def test_candidates(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_library.install(monkeypatch)
    config = settings(tmp_path, "{name: candidates, samples: 3}", questions, "repetition_penalty=1.1", "max_rows=2")
    report = sample_answers(config, progress=False)
    (engine,) = vllm_library.MADE
    prompts, params, adapter, _ = engine.asked[0]
    assert (report.made, adapter, engine.enable_lora, engine.gpu_memory_utilization) == (2, None, False, 0.9)
    assert len(prompts) == 6 and len({item.seed for item in params}) == 6
    assert {(item.max_tokens, item.temperature, item.repetition_penalty) for item in params} == {(12, 1.0, 1.1)}
    sampled = open_vlm(tmp_path / "out", progress=False)[0].meta["sampled"]
    assert (sampled["generator"], sampled["repetition_penalty"]) == ("vllm", 1.1)


def test_clean_and_perturbed_descriptions_of_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy captions of every clip, then narrations of the lists at the file's temperature: two calls of the engine."""
    vllm_library.install(monkeypatch)
    clips = write_clips(tmp_path, 1, seed=2, held_out=False, numbers=(4,))
    row: dict[str, Any] = {
        "id": "c0", "prompt": video_prompt("Describe the video."), "videos": ["clips/0.mp4"],
        "meta": {"clip": clips[0].key, "clips": [[at, at + 1] for at in range(4)]},
    }  # fmt: skip
    manifest = write_rows(tmp_path / "films.jsonl", [row])
    sampler = "{name: temple, kinds: [reverse], rates: [4, 2], frames_per_clip: 2}"
    config = settings(tmp_path, sampler, manifest, "temperature=0.7", model="tiny-video-vlm")
    report = sample_answers(config, progress=False)
    (engine,) = vllm_library.MADE
    (captions, of_captions, *_), (narrations, of_narrations, *_) = engine.asked
    assert len(captions) == 4 and {item.temperature for item in of_captions} == {0.0}
    frames, facts = captions[0]["multi_modal_data"]["video"][0]
    assert frames.shape[0] == 2 and len(facts["frames_indices"]) == 2
    assert len(narrations) == 3 and {item.temperature for item in of_narrations} == {0.7}  # in order, and two perturbed
    assert all("multi_modal_data" not in prompt for prompt in narrations)
    assert report.made >= 1


def test_what_hides_parts_of_a_picture_needs_transformers(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="sampler 'bdhs' works with transformers, not with 'vllm'"):
        sample_answers(settings(tmp_path, "bdhs", questions), progress=False)
    with pytest.raises(MissingExtraError, match=r"mmalign\[vllm\]"):
        sample_answers(settings(tmp_path, "candidates", questions), progress=False)
    with pytest.raises(ConfigError, match="repetition_penalty must be positive"):
        settings(tmp_path, "candidates", questions, "repetition_penalty=0")


def test_a_penalty_of_the_file_changes_answers(questions: Path, tmp_path: Path) -> None:
    said = {}
    for penalty in (1.0, 3.0):
        folder = tmp_path / str(penalty)
        folder.mkdir()
        config = settings(
            folder, "{name: candidates, samples: 2}", questions, "generator=transformers", "max_rows=1",
            f"repetition_penalty={penalty}",
        )  # fmt: skip
        sample_answers(config, progress=False)
        said[penalty] = [answer.text for answer in open_vlm(folder / "out", progress=False)[0].answers]
    assert said[1.0] != said[3.0]
