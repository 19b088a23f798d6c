"""Tiny models by variant, built once, and a table of questions about pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mmalign.models.vlm.base import VlmFamily
from mmalign.world.board_tables import prompt, reply, write_boards, write_rows
from mmalign.world.captions import describe
from tests.fixtures import tiny_vlm


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant."""
    root = tmp_path_factory.mktemp("tiny_vlm")

    @cache
    def made(name: str) -> Path:
        return tiny_vlm.build(name, root / name)

    return made


@pytest.fixture(scope="session")
def family_of(folder_of: Callable[[str], Path]) -> Callable[[str], VlmFamily]:
    """The loaded variant, shared by all tests: they leave its weights as they are."""

    @cache
    def loaded(name: str) -> VlmFamily:
        return tiny_vlm.load(name, folder_of(name))

    return loaded


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
