"""What a browser may say, checked: names of users, and refusals in words for the person."""

from __future__ import annotations

import unicodedata

MOST_LETTERS = 64
"""Length of a user's name."""


class Refused(Exception):
    """A request that is not right; the text is for the person."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


def user_name(value: object) -> str:
    """A user's name as it is written: trimmed, composed, at most 64 characters, without control characters.

    Raises:
        Refused: it is none.
    """
    if not isinstance(value, str) or len(value) > 4 * MOST_LETTERS:
        raise Refused(400, f"a name has 1 to {MOST_LETTERS} characters")
    name = " ".join(unicodedata.normalize("NFC", value).split())
    if not 1 <= len(name) <= MOST_LETTERS or any(unicodedata.category(letter)[0] == "C" for letter in name):
        raise Refused(400, f"a name has 1 to {MOST_LETTERS} characters, none of them invisible")
    return name
