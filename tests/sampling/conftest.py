"""A table of questions about pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.world.board_tables import prompt, reply, write_boards, write_rows
from mmalign.world.captions import describe


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five boards with a right description each, as JSONL with pictures beside it."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for index, scene in enumerate(write_boards(folder, 5, seed=3, held_out=False)):
        right = reply(describe(scene.items, scene.background, "there"))
        rows.append(
            {"id": f"d{index}", "prompt": prompt("Describe the picture."), "completion": right,
             "images": [f"pictures/{index}.png"], "meta": {"scene": scene.key}}
        )  # fmt: skip
    return write_rows(folder / "questions.jsonl", rows)
