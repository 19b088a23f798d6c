"""`sampler: bdhs` and what it is compared with, through the public job on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign import assets
from mmalign.data import open_vlm
from mmalign.errors import ConfigError, DataError
from mmalign.sampling.job import SamplingReport, sample_answers
from mmalign.sampling.settings import load_sampling
from mmalign.statistics import paired_difference
from mmalign.world.board_tables import prompt, reply, write_boards, write_rows
from mmalign.world.captions import describe
from mmalign.world.hallucination import check_caption
from mmalign.world.scenes import parse_key


def sample(folder: Path, manifest: Path, sampler: str, *overrides: str, model: Any = None) -> SamplingReport:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.yaml").write_text(
        f"sampler: {sampler}\nmodel: {{name: vlm, path: {model or assets.path('tiny-vlm')}}}\nmanifest: {manifest}\n"
        f"out: {folder}/out\nseed: 5\nmax_new_tokens: 60\ndevice: cpu\nbatch_size: 64\n"
    )
    return sample_answers(load_sampling(folder / "config.yaml", list(overrides)), progress=False)


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty boards with right descriptions."""
    folder = tmp_path_factory.mktemp("boards")
    rows = []
    for index, scene in enumerate(write_boards(folder, 40, seed=8, held_out=False)):
        right = reply(describe(scene.items, scene.background, "there"))
        rows.append({"id": f"d{index}", "prompt": prompt("Describe the picture."), "completion": right,
                     "images": [f"pictures/{index}.png"], "meta": {"scene": scene.key}})  # fmt: skip
    return write_rows(folder / "boards.jsonl", rows)


def hallucinated(texts: list[str], table: Any) -> np.ndarray:
    """Objects named that are not there, per answer."""
    return np.array(
        [check_caption(text, parse_key(table[row].meta["scene"])).hallucinated for row, text in enumerate(texts)], float
    )


def test_pairs_for_training_with_how_each_was_made(boards: Path, tmp_path: Path) -> None:
    report = sample(tmp_path, boards, "{name: bdhs, rho: 0.7}")
    table = open_vlm(tmp_path / "out")
    assert table.kind == "pairs" and report.made == len(table) >= 38
    source = {record.id: record for record in (open_vlm(boards)[row] for row in range(40))}
    for row in range(len(table)):
        record = table[row]
        assert record.answers[0].text == source[record.id].answers[0].text != record.answers[1].text
        made = record.meta["sampled"]
        assert 1 <= made["round"] <= 5 and made["image_tokens"] == 36 and made["measure"] == "words"
        assert made["similarity"] < 0.97 and (made["cuts"] or not made["guided"])
        assert made["sampler"]["rho"] == 0.7 and made["from"] == record.id
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["figures"]
    assert 0.6 < kept["hidden_share"] < 0.8 and kept["made_in_round_1"] > 0.5


def test_rejected_answers_name_more_that_is_not_there_than_plain_samples(boards: Path, tmp_path: Path) -> None:
    """Paired by board, with an interval that leaves zero out; figures over more boards are in docs/results.md."""
    sample(tmp_path / "plain", boards, "{name: candidates, samples: 2}")
    sample(tmp_path / "made", boards, "{name: bdhs, rho: 0.7, keep_similar: true}")
    plain, made = open_vlm(tmp_path / "plain" / "out"), open_vlm(tmp_path / "made" / "out")
    both = [hallucinated([plain[row].answers[number].text for row in range(len(plain))], plain) for number in (0, 1)]
    own = dict(zip([plain.row_id(row) for row in range(len(plain))], np.mean(both, axis=0), strict=True))
    rejected = hallucinated([made[row].answers[1].text for row in range(len(made))], made)
    change = paired_difference(rejected, [own[made.row_id(row)] for row in range(len(made))])
    assert change.low > 0, change


def test_rate_0_and_temperature_0_give_the_models_own_answer_back(boards: Path, tmp_path: Path) -> None:
    """Every pair would be of equal answers, so there is none."""
    with pytest.raises(DataError, match="identical_responses: 40"):
        sample(tmp_path, boards, "{name: bdhs, rho: 0.0, reference: model, swap_yes_no: 0.0}", "temperature=0")


def test_the_models_own_answer_as_reference(boards: Path, tmp_path: Path) -> None:
    sample(tmp_path, boards, "{name: bdhs, rho: 0.7, reference: model}", "max_rows=4")
    table, source = open_vlm(tmp_path / "out"), open_vlm(boards)
    assert len(table) >= 3
    assert any(table[row].answers[0].text != source[row].answers[0].text for row in range(len(table)))


@pytest.mark.parametrize(
    "sampler",
    ["no_image", "{name: no_image, guided: true}", "noisy_image", "{name: noisy_image, noise_steps: 900, guided: true}",
     "word_swap"],
)  # fmt: skip
def test_baselines_keep_question_picture_and_reference(sampler: str, boards: Path, tmp_path: Path) -> None:
    sample(tmp_path, boards, sampler, "max_rows=12")
    table, source = open_vlm(tmp_path / "out"), open_vlm(boards)
    by_id = {source.row_id(row): source[row] for row in range(12)}
    assert 10 <= len(table) <= 12
    for row in range(len(table)):
        record, original = table[row], by_id[table.row_id(row)]
        assert record.messages == original.messages and len(record.media) == 1
        assert record.answers[0].text == original.answers[0].text != record.answers[1].text
    if sampler == "word_swap":
        pairs = [[answer.text.split() for answer in table[row].answers] for row in range(len(table))]
        assert all(len(chosen) == len(rejected) for chosen, rejected in pairs)


def test_words_are_exchanged_the_same_in_any_part(boards: Path, tmp_path: Path) -> None:
    sample(tmp_path / "one", boards, "word_swap")
    sample(tmp_path / "many", boards, "word_swap", "rows_per_part=7")
    one, many = open_vlm(tmp_path / "one" / "out"), open_vlm(tmp_path / "many" / "out")
    assert [one[row].answers for row in range(len(one))] == [many[row].answers for row in range(len(many))]


def test_rows_without_an_answer_are_named(boards: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in boards.read_text().splitlines()][:3]
    for row in rows:
        del row["completion"]
    asked = write_rows(boards.with_name("asked.jsonl"), rows)
    with pytest.raises(DataError, match=r"missing_chosen: 3.*reference: model"):
        sample(tmp_path, asked, "bdhs")
    assert sample(tmp_path, asked, "{name: bdhs, reference: model, rho: 0.9}").made == 3


def test_clips_are_hidden_too(tiny_vlm_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from tests.fixtures import tiny_vlm

    frames = []
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(tiny_vlm.picture(number).data or b"")
        frames.append(f"{number}.png")
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Describe what happens in the clip."}]}]
    row = {"id": "c", "prompt": turn, "completion": reply("A red circle. Then a star."), "videos": [{"frames": frames}]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("llava_onevision", "qwen3_vl"):
        model = tiny_vlm_folder(name)
        sample(tmp_path / name, tmp_path / "clips.jsonl", "{name: bdhs, rho: 1.0}", "max_new_tokens=8", model=model)
        made = open_vlm(tmp_path / name / "out")[0].meta["sampled"]
        assert made["hidden"] == made["image_tokens"] > 4


@pytest.mark.parametrize(
    ("sampler", "message"),
    [("{name: bdhs, rho: 1.5}", "rho"), ("{name: bdhs, rho: 0.5, visible_tokens: 2}", "not both"),
     ("{name: bdhs, strategy: block}", "strategy"), ("{name: noisy_image, noise_steps: 0}", "noise_steps"),
     ("{name: word_swap, share: 0}", "share"), ("{name: no_image, rho: 0.5}", "rho"), ("bdsh", "did you mean 'bdhs'")],
)  # fmt: skip
def test_settings_without_meaning_are_refused(sampler: str, message: str, boards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(tmp_path, boards, sampler)
