"""A table in parts: parts of another job are never gone on with, and what differs is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.files import canonical_hash
from mmalign.data.partfolder import JOB, PartFolder
from mmalign.errors import DataError

SETTINGS: dict[str, Any] = {
    "seed": 0, "prompts": ["a", "b", "c"], "sources": [{"label": "one", "steps": 20}], "network": "f" * 64,
}  # fmt: skip


def begin(folder: Path, job: dict[str, Any], parts: int = 3) -> Path:
    """A job that was stopped, as the version wrote it whose settings these are."""
    PartFolder(folder / "out", job, parts)
    return folder / ".out.building" / JOB


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"sources": [{"label": "one", "steps": 30}]}, "sources[0].steps was 20 and is 30"),
        ({"prompts": ["a", "b"]}, "prompts had 3 entries and has 2"),
        ({"prompts": ["a", "x", "c"]}, 'prompts[1] was "b" and is "x"'),
        ({"repetition_penalty": None}, "repetition_penalty was not known and is null"),
        ({"network": "e" * 64}, "network was " + '"' + "f" * 56 + "... and is " + '"' + "e" * 56 + "..."),
        ({"prompts": list("xyz"), "seed": 7, "sources": [{"label": "two", "steps": 1}], "network": ""}, "; and 2 more"),
    ],
)
def test_what_differs_is_named_with_the_place_and_the_remedy(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    note = begin(tmp_path, SETTINGS)
    before = note.read_bytes()
    with pytest.raises(DataError) as raised:
        PartFolder(tmp_path / "out", {**SETTINGS, **changed}, 3)
    message = str(raised.value)
    assert message.startswith(f"{note.parent}: ") and said in message and JOB in message and "remove the folder" in message
    assert note.read_bytes() == before


def test_a_setting_that_is_gone_another_number_of_parts_and_another_way_to_count(tmp_path: Path) -> None:
    note = begin(tmp_path, {**SETTINGS, "old": True})
    with pytest.raises(DataError, match="old was true and is not known any more; there were 3 parts and are 4"):
        PartFolder(tmp_path / "out", SETTINGS, 4)
    note.write_text(json.dumps({"fingerprint": canonical_hash("older"), "job": SETTINGS, "parts": 3}))
    with pytest.raises(DataError, match="another version named its settings"):
        PartFolder(tmp_path / "out", SETTINGS, 3)


@pytest.mark.parametrize("content", [b"", b'{"fingerprint": "ab', b"[1, 2]", b"\xff\xfe\x00"])
def test_a_note_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    note = begin(tmp_path, SETTINGS)
    note.write_bytes(content)
    with pytest.raises(DataError, match="does not say what the parts beside it were made of.*remove the folder") as raised:
        PartFolder(tmp_path / "out", SETTINGS, 3)
    assert str(raised.value).startswith(str(note)) and note.read_bytes() == content
