"""The embedded default for answers at a small size: tables, pairs, measures, and the whole way to the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign import assets, demo_vlm
from mmalign.data import open_vlm
from mmalign.demo import demo, shown
from mmalign.experiment.opening import load_any
from mmalign.experiment.settings import load_experiment
from mmalign.statistics import ratio_interval
from mmalign.world.hallucination import check_caption
from mmalign.world.questions import KINDS
from mmalign.world.scenes import parse_key

EXPERIMENT = "configs/tiny/vlm_dpo.yaml"


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boards")
    demo_vlm.prepare_boards(folder, seed=3, pictures=10, held_out=9, questions=18)
    return folder


@pytest.fixture(scope="module")
def family() -> Any:
    torch.set_num_threads(1)
    return load_any(load_experiment(EXPERIMENT, [f"model.path={assets.path('tiny-vlm')}"]).config, torch.device("cpu"))


def scenes(path: Path) -> list[str]:
    return [json.loads(line)["meta"]["scene"] for line in path.read_text().splitlines()]


def test_training_and_held_out_boards_are_apart(boards: Path) -> None:
    assert not any(parse_key(key).is_held_out for key in scenes(boards / "train" / "descriptions.jsonl"))
    assert all(parse_key(key).is_held_out for key in scenes(boards / "held_out" / "descriptions.jsonl"))
    kinds = [record.meta["kind"] for record in _records(boards / "held_out" / "questions.jsonl")]
    assert kinds == [*KINDS, *KINDS]


def test_the_held_out_boards_are_the_same_for_every_seed(boards: Path, tmp_path: Path) -> None:
    demo_vlm.prepare_boards(tmp_path, seed=4, pictures=2, held_out=9, questions=18)
    for name in ("descriptions.jsonl", "questions.jsonl", "pictures/0.png", "pictures/8.png"):
        assert (tmp_path / "held_out" / name).read_bytes() == (boards / "held_out" / name).read_bytes()
    assert scenes(tmp_path / "train" / "descriptions.jsonl") != scenes(boards / "train" / "descriptions.jsonl")[:2]


def _records(path: Path) -> list[Any]:
    table = open_vlm(path, progress=False)
    return [table[index] for index in range(len(table))]


def test_reference_descriptions_are_right(boards: Path) -> None:
    for record in _records(boards / "held_out" / "descriptions.jsonl"):
        check = check_caption(record.answers[0].text, parse_key(record.meta["scene"]))
        assert check.f1 == 1.0 and check.misplaced == 0 and check.unread == 0


def test_chosen_descriptions_score_higher_than_rejected_ones(boards: Path, family: Any) -> None:
    path, figures = demo_vlm.sample_pairs(family, family.network, boards / "train", seed=1)
    records = _records(path)
    assert 0 < len(records) == figures["pairs"] <= figures["pictures"] == 10
    for record in records:
        scene = parse_key(record.meta["scene"])
        chosen, rejected = (check_caption(answer.text, scene) for answer in record.answers)
        assert chosen.f1 - 0.01 * chosen.misplaced > rejected.f1 - 0.01 * rejected.misplaced
    again, _ = demo_vlm.sample_pairs(family, family.network, boards / "train", seed=1)
    assert [record.answers for record in _records(again)] == [record.answers for record in records]


def test_the_shipped_model_answers_well_and_hallucinates(boards: Path, family: Any) -> None:
    """Its card says how much on many boards; on a few, both are far from the ends."""
    found = demo_vlm.measure(family, family.network, boards / "held_out")
    card = json.loads((assets.path("tiny-vlm") / "card.json").read_text())["metrics"]
    assert np.mean(found.right) > 0.5 and card["accuracy"] > 0.7
    assert 0.2 < card["greedy_chair_s"] < 0.7
    assert all(check.unread == 0 for check in found.checks)
    told = demo_vlm.measure(family, family.network, boards / "held_out", found.descriptions)
    assert told == found


def test_figures_worked_by_hand() -> None:
    scene = parse_key("grey|0 red circle|4 blue star")
    texts = ("A red circle.", "A red circle and a green star.")
    figures = demo_vlm.BoardFigures(
        descriptions=texts, checks=tuple(check_caption(text, scene) for text in texts), answers=("Yes.", "No.", "Two."),
        right=(True, False, True), kinds=("presence", "presence", "count_all"),
    )  # fmt: skip
    shown_figures = figures.as_dict()
    assert shown_figures["chair_s"]["mean"] == 0.5 and shown_figures["chair_i"]["mean"] == pytest.approx(1 / 3)
    assert shown_figures["accuracy"]["mean"] == pytest.approx(2 / 3) and shown_figures["recall"] == 0.5
    assert shown_figures["accuracy_by_kind"] == {"presence": 0.5, "count_all": 1.0}
    assert demo_vlm.compare(figures, figures)["chair_s"]["mean"] == 0.0


def test_the_interval_of_a_ratio_is_that_of_its_sums() -> None:
    """One wrong in ten named, spread over 200 captions: the interval holds 0.1 and is about 1.96 sqrt(.1 .9 / 2000) wide."""
    wrong = np.random.default_rng(1).binomial(10, 0.1, 200)
    found = ratio_interval(wrong, np.full(200, 10))
    assert found.mean == wrong.sum() / 2000 and found.low < 0.1 < found.high
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * np.sqrt(0.1 * 0.9 / 2000), rel=0.25)


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_demo_compares_base_aligned_and_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"vlm_dpo", "vlm_kto", "vlm_sft"} <= set(shown())
    small = {"pictures": 8, "held_out": 6, "questions": 9}
    real = demo_vlm.prepare_boards
    monkeypatch.setattr(demo_vlm, "prepare_boards", lambda folder, *, seed: real(folder, seed=seed, **small))
    out = tmp_path / "demo"
    result = demo(out, "vlm_dpo", seed=1, overrides=["optim.steps=2", "optim.batch_size=4", "evaluate.every=0"])
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["hallucination"]) == ["base", "aligned", "control"]
    assert summary["boards"]["pairs"]["pictures"] == 8 and set(summary["boards"]["change"]) == {
        "chair_s",
        "accuracy",
        "f1",
    }
    assert result.summary == summary and summary["seed"] == 1
    page = (out / "report.html").read_text()
    assert "What is named and not there" in page and "https://" not in page.replace("https://www.w3.org", "")
    assert (out / "export" / "adapter_model.safetensors").is_file()


def test_methods_on_lists_read_all_answers_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = demo_vlm.prepare_boards
    small = {"pictures": 12, "held_out": 4, "questions": 4}
    monkeypatch.setattr(demo_vlm, "prepare_boards", lambda folder, *, seed: real(folder, seed=seed, **small))
    out = tmp_path / "demo"
    demo(out, "vlm_list", seed=1, overrides=["optim.steps=1", "optim.batch_size=2", "evaluate.every=0"])
    rows = [json.loads(line) for line in (out / "data" / "train" / "lists.jsonl").read_text().splitlines()]
    assert rows and all(len(row["answers"]) == len(row["scores"]["f1"]) == 4 for row in rows)
    assert json.loads((out / "summary.json").read_text())["method"] == "vlm_list"
