"""Prompt lists for samples and evaluation: a text file with a prompt a line, or JSONL with prompt and group."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mmalign import assets
from mmalign.errors import ConfigError, DataError, ModelError


def read_prompts(source: str, limit: int | None = None) -> list[tuple[str, str]]:
    """(prompt, group) pairs in file order; the group is '' where none is given.

    A path that does not exist but starts with ``assets/`` is looked up among the embedded assets, so that shipped
    configurations work from any folder.

    Raises:
        ConfigError: no such file. DataError: a line that cannot be read, or no prompt at all.
    """
    try:
        path = assets.placed(source)
    except ModelError as error:
        raise ConfigError(f"evaluate.prompts: {error}") from error
    if not path.is_file():
        raise ConfigError(f"evaluate.prompts: no file '{source}'")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append((line.strip(), ""))
            continue
        try:
            row = json.loads(line)
            found.append((str(row["prompt"]), str(row.get("group", ""))))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: expected an object with 'prompt' ({type(error).__name__}: {error})") from error
    if not found:
        raise DataError(f"{path}: no prompts in it")
    return found if limit is None else found[:limit]


def spread(prompts: Sequence[tuple[str, str]], number: int) -> list[str]:
    """`number` prompts taken evenly over the list, for sample grids."""
    count = min(number, len(prompts))
    return [prompts[index * len(prompts) // count][0] for index in range(count)]
