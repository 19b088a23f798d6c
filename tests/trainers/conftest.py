"""The tiny families with a short text side."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mmalign.models.diffusion.base import DiffusionFamily


@pytest.fixture(scope="session")
def tiny_family(tiny_folder: Callable[[str], Path]) -> Callable[[str], DiffusionFamily]:
    """As everywhere, but T5 reads 48 tokens, which the prompts fit in, and not 256 or 512 that are mostly padding: what a
    trainer does with a step does not depend on it, and a step takes a fourth of the time."""
    from tests.fixtures.tiny import VARIANTS, load

    @cache
    def family(variant: str) -> DiffusionFamily:
        short = {"t5_length": 48} if VARIANTS[variant].family in ("sd3", "flux") else {}
        return load(variant, tiny_folder(variant), **short)

    return family
