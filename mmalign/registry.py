"""Named entries behind one seam: methods, families, objectives, rewards, formats.

An entry is an object or a ``"package.module:Name"`` string that is imported when asked for, so listing names imports
nothing heavy. A name that contains a colon is imported directly: that is how a user's own code plugs in.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmalign.errors import ConfigError

T = TypeVar("T")

MOST_HINTS = 8
"""More names than this are no hint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Generic[T]):
    """A name with its one-line meaning and, where there is one, the paper."""

    name: str
    target: T | str
    summary: str = ""
    cite: str = ""


class Registry(Generic[T]):
    """A table of named entries of one kind (`kind` appears in error messages, e.g. "objective")."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def add(self, name: str, target: T | str, *, summary: str = "", cite: str = "") -> None:
        """Register an entry. A name that is taken is refused: replacing one in silence hides mistakes."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._entries[name] = Entry(name=name, target=target, summary=summary, cite=cite)

    def get(self, name: str) -> T:
        """The object behind a name, imported if need be.

        Raises:
            ConfigError: unknown name; the message gives the nearest known one.
        """
        if name in self._entries:
            target = self._entries[name].target
        elif ":" in name:
            target = name
        else:
            raise ConfigError(self.unknown(name))
        return _import(target) if isinstance(target, str) else target

    def unknown(self, name: str) -> str:
        """The message for a name that is not here."""
        return f"{self.kind} '{name}' is not known{did_you_mean(name, self._entries)}"

    def __contains__(self, name: str) -> bool:
        return name in self._entries or ":" in name

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def names(self) -> list[str]:
        return list(self._entries)


def did_you_mean(name: str, known: object) -> str:
    """``"; did you mean 'x'?"`` for the names that contain this one as a word, else the nearest one, else the whole list."""
    names = list(dict.fromkeys(str(item) for item in known))  # type: ignore[attr-defined]
    folded, word = {_fold(other): other for other in reversed(names)}, _fold(name)
    holding = [other for other in names if len(word) > 1 and word != other and word in re.split(r"[_.]", _fold(other))]
    if word not in folded and 0 < len(holding) <= MOST_HINTS:
        return f"; did you mean {_either(holding)}?"
    near = difflib.get_close_matches(word, folded, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{folded[near[0]]}'?"
    return f" (known: {', '.join(sorted(names))})" if names else ""


def _fold(name: str) -> str:
    """Names that differ in case or in dashes alone are one name to a person."""
    return name.casefold().replace("-", "_")


def _either(names: list[str]) -> str:
    return " or ".join(", ".join(f"'{name}'" for name in names).rsplit(", ", 1))


def _import(target: str) -> T:  # type: ignore[type-var]
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise ConfigError(f"no module named '{error.name}' (asked for by '{target}')") from error
        raise
    except AttributeError as error:
        raise ConfigError(f"module '{module_name}' has no '{attribute}'") from error
