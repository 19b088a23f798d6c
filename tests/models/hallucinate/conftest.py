"""Tiny folders, built once per run and loaded once per variant."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mmalign.models.vlm.base import VlmFamily
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
