"""Options of the form NAME=VALUE."""

from __future__ import annotations

from collections.abc import Iterable


def by_name(items: Iterable[str] | None, option: str, value: str) -> dict[str, str]:
    """What an option that may be repeated gives for each name.

    Args:
        items: as typed.
        option, value: how the option and the right side are called in messages.

    Raises:
        DataError: an item that is not NAME=VALUE.
    """
    from mmalign.errors import DataError

    pairs = [item.partition("=") for item in items or ()]
    for name, separator, given in pairs:
        if not (name and separator and given):
            raise DataError(f"{option} {name}{separator}{given}: expected NAME={value}")
    return {name: given for name, _, given in pairs}
