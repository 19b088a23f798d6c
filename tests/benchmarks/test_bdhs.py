"""The comparison of made-up answers: what is run when, the decision that is measured, and tables of figures by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bdhs
import bdhs_base
import numpy as np
import torch

from mmalign import assets
from mmalign.world.board_tables import write_boards, write_descriptions
from mmalign.world.captions import read_caption


def arms(*names: str) -> list[bdhs.Arm]:
    return [arm for arm in bdhs.ARMS if arm.name in names]


def test_tasks_of_a_stage_need_each_other_in_no_order() -> None:
    """Pairs are made once per base, way and seed, and the base's own samples always."""
    base, boards, made, last = bdhs.stages(arms("sft", "bdhs", "bdhs_broken"), [0, 1])
    assert base == [("base", "fluent"), ("base", "plain")] and boards == [("boards", "0"), ("boards", "1")]
    assert len(made) == len(set(made)) == 2 + 2 * 4
    assert ("pairs", "own", "plain", "1") in made and ("pairs", "bdhs", "fluent", "0") in made
    assert [task for task in last if task[0] == "run"][:3] == [("run", "sft", "0"), ("run", "sft", "1"), ("run", "bdhs", "0")]
    assert set(bdhs.PAIRS) >= {arm.pairs for arm in bdhs.ARMS}


def test_the_careless_writer_adds_objects_and_questions_stay_right() -> None:
    draw = np.random.default_rng(0)
    records = [bdhs_base.draw_record(str(n), draw, question=n % 4 == 0) for n in range(40)]
    read = [read_caption(record.answers[0].text) for record in records if len(record.answers[0].text.split()) > 8]
    assert len(read) == 30 and all(not reading.unread and reading.background for reading in read)
    assert {record.id for record in records} == {str(n) for n in range(40)}


def test_the_decision_is_the_first_word_that_differs(tmp_path: Path) -> None:
    """Against the whole model read anew: log-odds of The (is the background) against There (is one more)."""
    scenes = write_boards(tmp_path, 3, seed=1, held_out=True)
    write_descriptions(tmp_path, scenes)
    family = bdhs_base.load(assets.path("tiny-vlm"))
    found = bdhs.decision(family, family.network, tmp_path)
    assert len(found) == 3
    from dataclasses import replace

    from mmalign.branches import Answer
    from mmalign.data import open_vlm
    from mmalign.models.vlm.continuing import Draft, _begin
    from mmalign.models.vlm.encoding import spread
    from mmalign.world.captions import describe

    record = open_vlm(tmp_path / "descriptions.jsonl")[0]
    text = describe(scenes[0].items, scenes[0].background, "there")
    ids, places = spread(family, replace(record, answers=(Answer(text=text),)), text)
    cut = next(number for number, (first, _) in enumerate(places) if first >= text.index(" The background"))
    with torch.no_grad():
        draft = Draft(example=family.encode(record, training=False), given=ids, cuts=(cut,), names=("x",))
        logits = _begin(family, family.network, [draft]).logits[0]
    more = family.tokenizer(" There", add_special_tokens=False).input_ids[0]
    assert abs(found[0] - float(logits[ids[cut]] - logits[more])) < 1e-4


def figures(hallucinated: list[int], right: list[int], **more: Any) -> dict[str, Any]:
    count = len(hallucinated)
    return {
        "named": [4] * count, "hallucinated": hallucinated, "found": [2] * count, "there": [4] * count, "right": right,
        "decision": [0.5] * count, **more,
    }  # fmt: skip


def test_a_line_of_the_table_by_hand() -> None:
    """Two seeds of four boards: 3 of 8 hallucinate against 4 of 4 before and 2 of 8 of the control."""
    base = figures([1, 1, 2, 1], [1, 0])
    drift = {"chosen_drift_per_token": 0.1, "reward_chosen": 1.0, "reward_rejected": -2.0}
    runs = [figures([1, 0, 0, 0], [1, 1], **drift), figures([1, 1, 0, 0], [1, 0], **drift)]
    control = [figures([1, 0, 0, 0], [1, 1]), figures([1, 0, 0, 0], [1, 1])]
    cells = [cell.strip() for cell in bdhs.row("x", runs, base, control).strip("|").split("|")]
    assert cells[0] == "x" and cells[1].startswith("37.5 (") and cells[2].startswith("9.4 (")
    assert cells[3:7] == ["50.0%", "4.00", "75.0%", "+0.50"]
    assert cells[7].startswith("-62.5 (") and cells[8].startswith("+12.5 (")
    assert cells[9:] == ["+0.100", "+1.00 / -2.00"]
    assert len(bdhs.HEAD) == len(cells)
    assert bdhs.row("base", [base], base, []).count("|") == len(bdhs.HEAD) + 1


def test_pairs_are_told_by_what_they_name(tmp_path: Path) -> None:
    rows = [{"named": 3, "hallucinated": 2, "there": 2, "unread": 0, "round": 1, "plain": 1},
            {"named": 1, "hallucinated": 0, "there": 2, "unread": 1, "round": 2, "plain": 0}]  # fmt: skip
    (tmp_path / "figures-fluent-bdhs-0.json").write_text(json.dumps({"rows": rows, "refused": {}}))
    (line,) = bdhs.table_of_pairs(argparse.Namespace(out=tmp_path, seeds=[0]))[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["fluent", "bdhs", "2"] and cells[3].startswith("1.00 (") and cells[4].startswith("+0.50 (")
    assert cells[5:] == ["50%", "50%", "50%", "50%"] and len(cells) == len(bdhs.PAIR_HEAD)
