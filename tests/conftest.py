"""What every test shares: no network, few threads, and tiny real models that are built once per session."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before any library is imported: a test that would download something must fail, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from mmalign.models.diffusion.base import DiffusionFamily
    from mmalign.models.vlm.base import VlmFamily


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers that take whole files get those with few tests first: these are the long runs, and the short ones fill the end."""
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: tests[item.path])


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: leave them out of every full garbage collection, of which some code makes dozens."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by variant name (``fixtures.tiny.VARIANTS``), built when first asked for. Read-only."""
    from tests.fixtures.tiny import VARIANTS

    built: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in built:
            built[variant] = VARIANTS[variant].build(tmp_path_factory.mktemp("models") / variant)
        return built[variant]

    return folder


@pytest.fixture(scope="session")
def tiny_family(tiny_folder: Callable[[str], Path]) -> Callable[[str], DiffusionFamily]:
    """A loaded tiny family by variant name, shared by the session: copy its network before changing it."""
    from tests.fixtures.tiny import load

    loaded: dict[str, DiffusionFamily] = {}

    def family(variant: str) -> DiffusionFamily:
        if variant not in loaded:
            loaded[variant] = load(variant, tiny_folder(variant))
        return loaded[variant]

    return family


@pytest.fixture(scope="session")
def tiny_vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny vision-language model by variant name (``fixtures.tiny_vlm.VARIANTS``), built when first asked for."""
    root = tmp_path_factory.mktemp("tiny_vlm")

    @cache
    def folder(variant: str) -> Path:
        from tests.fixtures import tiny_vlm

        return tiny_vlm.build(variant, root / variant)

    return folder


@pytest.fixture(scope="session")
def tiny_vlm_family(tiny_vlm_folder: Callable[[str], Path]) -> Callable[[str], VlmFamily]:
    """The loaded variant, shared by the session: tests leave its weights as they are."""

    @cache
    def family(variant: str) -> VlmFamily:
        from tests.fixtures import tiny_vlm

        return tiny_vlm.load(variant, tiny_vlm_folder(variant))

    return family


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in singletons; give each test that makes an Accelerator its own."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
