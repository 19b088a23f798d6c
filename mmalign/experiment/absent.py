"""Tables and models that an experiment names and that are not there, each with what makes it."""

from __future__ import annotations

import difflib
import os
from pathlib import Path, PurePath

from mmalign.data.remote import is_remote
from mmalign.errors import RewardError
from mmalign.experiment.settings import ExperimentConfig
from mmalign.rewards import card

ORACLE = "oracle"

MADE_BY = {
    "runs/demo": "mmalign demo --method {method}",
    "runs/tiny-answers": "mmalign generate configs/generate/tiny_candidates.yaml",
}
"""Folders that shipped experiments read from -> the command that makes them."""


def absent_tables(config: ExperimentConfig) -> list[str]:
    """One problem for each local table of the section `data` that does not exist."""
    named = [("data.manifest", config.data.manifest), *(("data.mix", path) for path in config.data.mix)]
    return [
        f"{key}: no file or folder '{path}'{_nearest(path)}; {_remedy(path, config.method_name)}"
        for key, path in named
        if not is_remote(path) and not Path(path).exists()
    ]


def absent_model(path: str) -> list[str]:
    """The problem of a `model.path` that is neither a folder nor of the form of a hub id; none for what may be one."""
    may_be_id = path.count("/") == 1 and path[0] not in "./~" and path[-1] != "/"
    if Path(path).exists() or may_be_id:
        return []
    return [f"model.path: no folder '{path}'{_nearest(path)}, and a hub id has the form owner/name"]


def unknown_rewards(config: ExperimentConfig) -> list[str]:
    """Rewards of an evaluation of pictures that nobody knows; sums of several are taken as they are."""
    if config.on_answers:
        return []  # judges of answers are tried by the check of those
    problems = []
    for key in ("rewards", "holdout"):
        for name in getattr(config.evaluate, key):
            try:
                if name != ORACLE and not set(name) & set("*+, "):
                    card(name)
            except RewardError as error:
                problems.append(f"evaluate.{key}: {error}; see 'mmalign rewards list'")
    return problems


def _remedy(path: str, method: str) -> str:
    for folder, command in MADE_BY.items():
        if PurePath(path).is_relative_to(folder):
            return f"'{command.format(method=method)}' makes it"
    return "'mmalign data import' makes a table from a source"


def _nearest(path: str) -> str:
    """A hint at what stands beside it; relative paths also say where they were looked for."""
    folder, name = os.path.split(os.path.normpath(path))
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = difflib.get_close_matches(name, beside, n=1)
    hint = f"; did you mean '{os.path.join(folder, near[0])}'?" if near else ""
    return hint if os.path.isabs(path) else f" in {os.getcwd()}{hint}"
