"""The exceptions a user can meet. Each says what was wrong, where, and what to do; the command line exits with 2."""

from __future__ import annotations

from collections.abc import Sequence


class MmalignError(Exception):
    """Something the user can mend. Shown without a traceback unless ``--debug`` is given."""


class ConfigError(MmalignError):
    """One or more problems in an experiment file, all reported together.

    Args:
        problems: one line each, starting with the dotted key.
        source: the file they were found in.
    """

    def __init__(self, problems: Sequence[str] | str, source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        head = f"{source}: {count}" if source else count
        alone = source is None and len(self.problems) == 1
        super().__init__(self.problems[0] if alone else "\n".join([head, *(f"  {problem}" for problem in self.problems)]))


class DataError(MmalignError):
    """A table, a row or a media file that cannot be used; the message names file, row and column."""


class ModelError(MmalignError):
    """Weights or a model folder that cannot be loaded or do not fit the experiment."""


class RewardError(MmalignError):
    """A reward that cannot be loaded or asked, with what is missing."""


class MissingExtraError(MmalignError):
    """An optional library is not installed. Names the extra that brings it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the library '{library}': pip install 'mmalign[{extra}]'")


class TrainingError(MmalignError):
    """Training cannot go on (a loss that is not finite, a folder that cannot be written); says what state was saved."""
