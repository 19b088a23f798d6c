"""The demonstration of temporal preferences in small: tables, pairs by the model itself, figures, a run with its control."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign import assets, demo_temple
from mmalign.data import open_vlm
from mmalign.demo import demo
from mmalign.sampling.temple import LINK
from mmalign.world.clip_questions import check_order
from mmalign.world.clips import parse_clip_key

pytest.importorskip("av")
SMALL = {"FILMS": 6, "HELD_OUT": 4, "QUESTIONS": 10}
STAGES = (
    '[{"name": "r4", "rows": "0", "steps": 1}, {"name": "r2", "rows": "1", "steps": 1},'
    ' {"name": "sft", "loss": "answers", "steps": 1, "manifest": "x"}]'
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("temple-world")
    demo_temple.prepare(folder, seed=0, films=6, held_out=4, questions=10)
    demo_temple.make_pairs(folder, seed=0)
    return folder


def test_pairs_hold_the_events_that_the_model_saw_in_order_and_out_of_it(world: Path) -> None:
    table = open_vlm(world / "train/pairs", progress=False)
    assert table.kind == "pairs" and table.stages == ("0", "1") and len(table) >= 12
    chosen, rejected = [], []
    for row in range(len(table)):
        record = table[row]
        if record.meta["sampled"]["kind"] == "drop":
            assert len(record.answers[1].text) < len(record.answers[0].text)
            continue
        own, other = ([LINK.sub("", part).lower() for part in answer.text.split(". ")] for answer in record.answers)
        assert sorted(part.rstrip(".") for part in own) == sorted(part.rstrip(".") for part in other) and own != other
        checks = [check_order(answer.text, parse_clip_key(record.meta["clip"])) for answer in record.answers]
        chosen.append(checks[0].concordant / max(1, checks[0].pairs))
        rejected.append(checks[1].concordant / max(1, checks[1].pairs))
    assert sum(chosen) / len(chosen) > sum(rejected) / len(rejected) + 0.3


def test_pairs_about_other_faults_share_everything_but_the_rejected_side(world: Path) -> None:
    pairs, other = (open_vlm(path, progress=False) for path in (world / "train/pairs", world / "train/pairs/swapped.jsonl"))
    by_id = {pairs.row_id(row): pairs[row] for row in range(len(pairs))}
    assert len(other) > 0.7 * len(pairs) and other.stages == pairs.stages
    for row in range(len(other)):
        record = other[row]
        assert record.answers[0].text == by_id[record.id].answers[0].text and record.stage == by_id[record.id].stage
        assert Path(record.media[0].path).is_file()  # type: ignore[union-attr, arg-type]


def test_figures_of_the_embedded_model(world: Path) -> None:
    from mmalign.models.vlm import VLM_FAMILIES
    from mmalign.models.vlm.base import VlmConfig
    from tests.fixtures.tiny_vlm import CPU

    config = VlmConfig(path=str(assets.path("tiny-video-vlm")), **demo_temple.FRAMES)  # type: ignore[arg-type]
    family = VLM_FAMILIES.get("vlm").load(config, device=CPU)  # type: ignore[attr-defined]
    right = [open_vlm(world / "held_out/captions.jsonl", progress=False)[row].answers[0].text for row in range(4)]
    found = demo_temple.measure(family, family.network, world / "held_out", right)
    figures = found.as_dict()
    assert figures["order"]["mean"] == figures["recall"]["mean"] == 1.0 and found.orders() == [1.0] * 4
    assert len(found.right) == 10 and set(figures["by_kind"]) == set(found.kinds)
    assert "held-out films" in demo_temple.headline({"base": figures})


def test_the_demonstration_ends_with_figures_of_three_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(demo_temple, name, value)
    real = demo_temple.prepare
    monkeypatch.setattr(
        demo_temple, "prepare", lambda folder, *, seed: real(folder, seed=seed, films=4, held_out=2, questions=10)
    )
    monkeypatch.setattr(demo_temple, "MAX_NEW_TOKENS", 24)
    more = [f"method.stages={STAGES}", "optim.steps=3", "optim.batch_size=4", "evaluate.every=0", "evaluate.grid_prompts=1"]
    result = demo(tmp_path / "run", "temple", 0, [*more, "evaluate.max_new_tokens=24"])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary["order"]["models"]) == {"base", "aligned", "control"}
    assert set(summary["order"]["aligned_minus"]) == {"base", "control"}
    assert result.summary["steps"] == 3 and (tmp_path / "run/report.html").is_file()
    assert json.loads((tmp_path / "run/control/summary.json").read_text())["steps"] == 3
