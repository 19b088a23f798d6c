"""The file of votes: what is confirmed is on the disk, what is torn is moved aside, and nothing counts twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mmalign.arena.votes import VoteConflict, VotesFile
from mmalign.errors import DataError


def row(name: str, user: str = "ann", choice: str = "left", **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": "p", "chosen": "media/a.png", "rejected": "media/b.png", "p_chosen": 1.0, "user": user,
            "weight": 1.0, "group": "g", "meta": {"choice": choice, "pair": f"g.{name}", "shown": "g.0.1"}, **more}  # fmt: skip


def test_a_vote_is_flushed_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_write, real_sync = os.write, os.fsync
    with VotesFile(tmp_path) as votes:

        def write(descriptor: int, data: bytes) -> int:
            order.append("write")
            return real_write(descriptor, data)

        def sync(descriptor: int) -> None:
            order.append("sync")
            assert len(votes) == 0, "not counted before it is on the disk"
            real_sync(descriptor)

        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "fsync", sync)
        assert votes.add(row("1"))
        assert order == ["write", "sync"] and len(votes) == 1


def test_a_full_disk_leaves_no_half_line_and_no_vote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VotesFile(tmp_path) as votes:
        votes.add(row("1"))
        real = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:20]))
            with pytest.raises(DataError, match="20 of"):
                votes.add(row("2"))
        assert votes.add(row("2")), "it can be sent again"
    assert [json.loads(line)["id"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()] == ["1", "2"]


def test_the_same_vote_counts_once_and_another_content_is_a_conflict(tmp_path: Path) -> None:
    with VotesFile(tmp_path) as votes:
        assert votes.add(row("1")) and not votes.add(row("1"))
        with pytest.raises(VoteConflict):
            votes.add(row("1", p_chosen=0.5))
        with pytest.raises(VoteConflict):
            votes.add(row("1", user="bob"))
    with VotesFile(tmp_path) as again:
        assert len(again) == 1 and not again.add(row("1"))


def test_a_torn_last_line_is_moved_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    with VotesFile(tmp_path) as votes:
        votes.add(row("1"))
    with (tmp_path / "pairs.jsonl").open("ab") as handle:
        handle.write(b'{"id": "2", "prom')
    with VotesFile(tmp_path) as votes:
        assert votes.recovered == 17 and len(votes) == 1
        votes.add(row("3"))
    assert (tmp_path / "torn.jsonl").read_bytes() == b'{"id": "2", "prom\n'
    assert [json.loads(line)["id"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()] == ["1", "3"]


def test_a_damaged_line_in_the_middle_is_refused_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('not json\n{"id": "2"}\n')
    with pytest.raises(DataError, match="line 1: not a vote"):
        VotesFile(tmp_path)


def test_undo_takes_back_the_latest_only_and_keeps_a_copy(tmp_path: Path) -> None:
    with VotesFile(tmp_path) as votes:
        for name, user in (("1", "ann"), ("2", "bob"), ("3", "ann"), ("4", "bob")):
            votes.add(row(name, user))
        with pytest.raises(VoteConflict):
            votes.undo("ann", "1")
        assert votes.undo("bob", "3") is None, "somebody else's"
        undone = votes.undo("ann", "3")
        assert undone is not None and undone["id"] == "3" and votes.undo("ann", "3") is None
        votes.add(row("5", "ann"))
        assert [item["id"] for item in votes.of("ann")] == ["1", "5"]
    assert [json.loads(line)["id"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()] == ["1", "2", "4", "5"]
    assert json.loads((tmp_path / "undone.jsonl").read_text())["id"] == "3"
    with VotesFile(tmp_path) as again:
        assert len(again) == 4


def test_one_arena_writes_a_folder(tmp_path: Path) -> None:
    with VotesFile(tmp_path), pytest.raises(DataError, match="another arena"):
        VotesFile(tmp_path)


def test_tallies_tell_choices_ties_and_skips_apart(tmp_path: Path) -> None:
    with VotesFile(tmp_path) as votes:
        for number, choice in enumerate(("left", "right", "tie", "skip", "left")):
            votes.add(row(str(number), choice=choice))
        assert votes.tally("ann").as_dict() == {"choices": 3, "ties": 1, "skips": 1}
        assert votes.tally("bob").as_dict() == {"choices": 0, "ties": 0, "skips": 0}
