"""Where the embedded models and prompt lists lie."""

from __future__ import annotations

import os
from pathlib import Path

from mmalign.errors import ModelError


def shipped(name: str) -> Path:
    """A folder that travels with the package: inside it in an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / f"_{name}" if (package / f"_{name}").is_dir() else package.parent / name


def folder() -> Path:
    """The assets folder: ``MMALIGN_ASSETS`` if set, else the one of the checkout or installation."""
    named = os.environ.get("MMALIGN_ASSETS")
    return Path(named) if named else shipped("assets")


def path(name: str) -> Path:
    """The file or folder of an embedded asset.

    Raises:
        ModelError: it is not there, with how to make it.
    """
    found = folder() / name
    if not found.exists():
        raise ModelError(f"the embedded asset '{name}' is not in {folder()}; run 'make assets' or set MMALIGN_ASSETS")
    return found


def placed(source: str) -> Path:
    """`source` as it is; where it does not exist and starts with ``assets/``, the embedded asset of that name, so that shipped
    experiments work from any folder.

    Raises:
        ModelError: there is no such asset either.
    """
    given = Path(source)
    return path(str(Path(*given.parts[1:]))) if given.parts[:1] == ("assets",) and not given.exists() else given
